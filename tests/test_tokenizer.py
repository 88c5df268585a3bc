"""Tokenizers: loading, encoding by the batch, and training small ones."""

import json
import shutil
from pathlib import Path

import eras
import numpy as np
import pytest

from mmdata.errors import TokenizerError
from mmdata.tokenizer.tokenizer import Tokenizer, train_bpe
from mmdata.tokenizer.vocabulary import token_bytes

TEXTS = ["Hello, world!\n", "你好 <|im_end|>", "", "<think>a</think>", "é" * 3, " \n\n  x"]


def test_a_batch_is_flat_ids_and_their_ends() -> None:
    tokenizer = eras.tokenizer("era3")
    ids, ends = tokenizer.encode_batch(TEXTS)
    assert (ids.dtype, ends.dtype) == (np.uint32, np.int64)
    assert [tokenizer.decode(part) for part in np.split(ids, ends[:-1])] == TEXTS
    empty, no_ends = tokenizer.encode_batch([])
    assert (len(empty), len(no_ends)) == (0, 0)


def test_special_strings_stay_plain_text_unless_asked_for() -> None:
    tokenizer = eras.tokenizer("era3")
    end = tokenizer.control_tokens["<|im_end|>"]
    assert end not in tokenizer.encode_batch(["a<|im_end|>"])[0]
    assert tokenizer.encode_batch(["<|im_end|>"], control=True)[0].tolist() == [end]
    assert len(tokenizer.encode_batch(["<think>"])[0]) == 1  # an added token, but ordinary vocabulary
    assert "<think>" not in tokenizer.control_tokens


def test_ids_of_marks_come_from_the_configuration() -> None:
    seed, era3 = eras.tokenizer("seed"), eras.tokenizer("era3")
    assert [seed.decode([id]) for id in (seed.bos_id, seed.eos_id, seed.pad_id) if id is not None] == [
        "<s>",
        "</s>",
        "<unk>",
    ]
    assert (era3.bos_token, era3.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert era3.decode([era3.eos_id, *era3.encode_batch(["x"])[0]], skip_control=True) == "x"  # type: ignore[list-item]


def test_token_bytes_of_a_text_sum_to_its_bytes() -> None:
    tokenizer = eras.tokenizer("era3")
    sizes = token_bytes(tokenizer)
    assert (sizes.dtype, len(sizes)) == (np.int64, tokenizer.vocab_size)
    for text in TEXTS:
        assert sizes[tokenizer.encode_batch([text])[0]].sum() == len(text.encode())
    assert not sizes[list(tokenizer.control_tokens.values())].any()


def test_saving_writes_the_same_bytes(tmp_path: Path) -> None:
    tokenizer = eras.tokenizer("era3")
    tokenizer.save(tmp_path / "copy")
    copy = Tokenizer.load(tmp_path / "copy")
    assert copy.files == tokenizer.files
    assert (copy.sha256, copy.template_sha256) == (tokenizer.sha256, tokenizer.template_sha256)


def test_ids_equal_transformers_on_plain_text() -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(eras.directory("era3"))
    for text in (t for t in TEXTS if "<|" not in t):
        assert (
            eras.tokenizer("era3").encode_batch([text])[0].tolist() == theirs(text, add_special_tokens=False).input_ids
        )


def test_a_jinja_file_goes_before_the_configuration(tmp_path: Path) -> None:
    shutil.copytree(eras.directory("era3"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert Tokenizer.load(tmp_path).chat_template == "{{ messages }}"


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    shutil.copytree(eras.directory("era3"), tmp_path, dirs_exist_ok=True)
    templates = [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]
    config = {
        "eos_token": {"content": "</s>"},
        "extra_special_tokens": {"image": "<think>"},
        "chat_template": templates,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = Tokenizer.load(tmp_path)
    assert (found.chat_template, found.eos_token, found.bos_id) == ("b", "</s>", None)
    assert "<think>" in found.control_tokens  # named special by the configuration


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer.json", "\x00", "is not a tokenizer"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[]", "is not a JSON object"),
        ("tokenizer_config.json", "{}", "it names no eos token"),
        ("tokenizer_config.json", None, "it names no eos token"),
        ("tokenizer_config.json", '{"eos_token": "<none>"}', "'<none>' has no id"),
    ],
)
def test_a_directory_that_is_no_tokenizer_is_an_error_that_says_why(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    shutil.copytree(eras.directory("era3"), tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.fix


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="is not a directory"):
        Tokenizer.load(tmp_path / "none")


def test_training_twice_gives_the_same_files(tmp_path: Path) -> None:
    texts = [f"row {n}: the sum of {n} and {n * 7} is {n * 8}. 你好" for n in range(200)] + [
        chr(97 + n % 26) * 3 + chr(97 + n % 17) for n in range(442)
    ]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    first, second = (
        train_bpe(texts, vocab_size=400, control_tokens=control, chat_template="{{ 1 }}", out_dir=tmp_path / name)
        for name in "ab"
    )
    assert first.files == second.files == Tokenizer.load(tmp_path / "a").files
    assert (first.pad_id, first.bos_id, first.eos_id, first.vocab_size) == (0, 1, 2, 400)
    assert [first.decode([id]) for id in first.encode_batch(["1984"])[0]] == list("1984")  # digits stay apart
    whole = train_bpe(
        texts, vocab_size=400, control_tokens=control, chat_template="", out_dir=tmp_path / "c", split_digits=False
    )
    assert whole.chat_template is None
    assert len(whole.encode_batch(["112"])[0]) < 3
