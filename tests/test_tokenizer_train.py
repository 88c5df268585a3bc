"""Training tokenizers: the same bytes on any number of cores, exact on everything, and loaded by transformers as they are."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import text_data

from mmdata.errors import InputError, UsageError
from mmdata.tokenizer.hostile import hostile_strings
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit.options import TokenizerOptions
from mmdata.tokenizer.toolkit.train import RECORD, train, train_to
from mmdata.tokenizer.vocabulary import token_bytes

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = TokenizerOptions(420)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return list(text_data.make(tmp_path_factory.mktemp("train")).values())


@pytest.fixture(scope="module", params=[("bpe", "digits"), ("bpe", "gpt2"), ("unigram", "digits")], ids="-".join)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    algorithm, pattern = request.param
    return text_data.trained(tmp_path_factory.mktemp("trained"), pattern=pattern, algorithm=algorithm)


def test_hostile_strings_come_back_exactly(tokenizer: Tokenizer) -> None:
    strings = list(hostile_strings(1000, tokens=list(tokenizer.control_tokens)))
    flat, ends = tokenizer.encode_batch(strings)
    begins = [0, *ends[:-1].tolist()]
    assert [tokenizer.decode(flat[b:e]) for b, e in zip(begins, ends.tolist(), strict=True)] == strings
    assert not set(flat.tolist()) & set(tokenizer.control_tokens.values())


def test_transformers_loads_it_and_gives_the_same_ids(tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer.dir)
    strings = [*hostile_strings(300), "<think>x</think> <tool_call>"]
    for text in strings:
        assert (
            theirs(text, add_special_tokens=False).input_ids == tokenizer.encode_batch([text], control=True)[0].tolist()
        )
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0) and len(theirs) == 420
    marked = "<|im_start|>user\nhi<|im_end|>"
    assert (
        theirs(marked, add_special_tokens=False).input_ids == tokenizer.encode_batch([marked], control=True)[0].tolist()
    )


def test_ids_begin_with_the_layout_then_bytes_then_merges(tokenizer: Tokenizer) -> None:
    assert tokenizer.native.id_to_token(26) == "</think>" and tokenizer.vocab_size == 420
    assert set(tokenizer.control_tokens.values()) == set(range(21))
    assert set(tokenizer.added) == set(range(36))
    sizes = token_bytes(tokenizer)
    assert (sizes[36:] == 1).sum() == 256
    if json.loads(tokenizer.files["tokenizer.json"])["model"]["type"] == "BPE":
        assert (sizes[36 : 36 + 256] == 1).all()


def test_digits_and_newlines_stand_alone_with_digits_and_only_there(tmp_path: Path) -> None:
    rows = [{"text": "year 1984\n\n\nyear 1984"}] * 20
    path = text_data.write(tmp_path / "a.jsonl", rows)
    splits = {}
    for pattern in ("digits", "gpt2"):
        written, _ = train([path], replace(OPTIONS, pattern=pattern))
        found = Tokenizer(tmp_path, written)
        splits[pattern] = [found.decode([id]) for id in found.encode_batch(["year 1984\n\n\nyear"])[0]]
    assert splits["digits"] == ["year", " ", *"1984", "\n", "\n", "\n", "year"]
    assert splits["gpt2"] == ["year", " 1984", "\n\n", "\n", "year"]


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_any_number_of_threads_gives_the_same_file(files: list[Path], algorithm: str) -> None:
    """A process each, so that hash seeds differ too."""
    code = (
        "import sys, hashlib; from pathlib import Path; from mmdata.tokenizer.toolkit.options import TokenizerOptions; from mmdata.tokenizer.toolkit.train import train\n"
        "files, _ = train([Path(p) for p in sys.argv[2:]], TokenizerOptions(700, sys.argv[1], seed=3, limit_bytes=20_000))\n"
        "print(hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest())"
    )
    found = set()
    for threads in ("1", "2", "3"):
        environment = os.environ | {
            "RAYON_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "true",
            "PYTHONHASHSEED": threads,
        }
        command = [sys.executable, "-c", code, algorithm, *map(str, files)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1


def test_the_directory_appears_whole_with_a_record_and_is_not_made_twice(files: list[Path], tmp_path: Path) -> None:
    phases: list[str] = []
    out = tmp_path / "made"
    first = train_to(files, out, OPTIONS, phase=lambda name, done, total: phases.append(name))
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer.json", "tokenizer_config.json", RECORD]
    assert list(tmp_path.iterdir()) == [out]
    assert {"reading", "merging"} <= set(phases)
    assert first.vocab_size == 420 and first.num_rows == 360 and not first.up_to_date
    record = json.loads((out / RECORD).read_text())
    assert record["inputs"][0]["sha256"] == hashlib.sha256(files[0].read_bytes()).hexdigest()
    here, _ = train(files, OPTIONS)
    assert (out / "tokenizer.json").read_bytes() == here["tokenizer.json"]  # in a child or here, the same
    again = train_to(files, out, OPTIONS)
    assert again.up_to_date and again.sha256 == first.sha256
    for other in (replace(OPTIONS, seed=9), replace(OPTIONS, pattern="gpt2")):
        with pytest.raises(UsageError, match="was not trained from these files with these options"):
            train_to(files, out, other)
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="was not trained"):
        train_to(files, out, OPTIONS)


def test_what_ends_training_leaves_nothing_behind(files: list[Path], tmp_path: Path) -> None:
    def stop(name: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_to(files, tmp_path / "made", OPTIONS, phase=stop)
    assert not list(tmp_path.iterdir())


def test_a_childs_error_comes_through(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{broken\n")
    with pytest.raises(InputError, match="no text can be used") as caught:
        train_to([tmp_path / "bad.jsonl"], tmp_path / "made", OPTIONS)
    assert caught.value.fix


def test_little_text_gives_fewer_tokens_and_says_so(tmp_path: Path) -> None:
    path = text_data.write(tmp_path / "a.jsonl", [{"text": "aa bb"}])
    made = train_to([path], tmp_path / "made", OPTIONS)
    assert made.vocab_size < made.asked_size == 420


def test_further_control_tokens_follow_the_templates_own(files: list[Path], tmp_path: Path) -> None:
    written, _ = train(files, replace(OPTIONS, template="chatml", special=("<|fim|>", "<|sep|>")))
    found = Tokenizer(tmp_path, written)
    assert list(found.control_tokens) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim|>", "<|sep|>"]
    assert found.control_tokens["<|sep|>"] == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"algorithm": "wordpiece"}, "--algorithm wordpiece is unknown"),
        ({"template": "llama"}, "--template llama is unknown"),
        ({"pattern": "x"}, "--pattern x is unknown"),
        ({"vocab_size": 292}, "292: 36 added tokens and the 256 bytes leave no room"),
        ({"special": ("<|im_end|>",)}, "one of the template's own"),
        ({"special": ("a", "a")}, "given twice"),
        ({"special": (" ",)}, "empty"),
        ({"limit_bytes": 0}, "--limit-bytes 0"),
        ({"weights": {"nobody": 1.0}}, "--weight nobody"),
    ],
)
def test_options_that_cannot_be_are_refused(files: list[Path], tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        train_to(files, tmp_path / "made", replace(OPTIONS, **change))
    assert words in caught.value.message and caught.value.fix
    assert not list(tmp_path.iterdir())
