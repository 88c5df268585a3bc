"""jsonl files in; a tokenizer's directory out that transformers loads as it is. The same files, options and seed give the
same bytes on any number of cores.

Byte-level: every text has ids, and they give it back. Peak memory is about 12 times the text drawn (`limit_bytes`), most
of it the native trainer's. That one cannot be interrupted, so `train_to` works in a process of its own, which it can end.
"""

import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmdata.errors import MMError, UsageError
from mmdata.io.files import sha256_of, sync, write_bytes
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit import unigram
from mmdata.tokenizer.toolkit.layouts import BOS, EOS, LAYOUTS, PAD, Layout
from mmdata.tokenizer.toolkit.sample import Corpus, Stratum, draw
from mmdata.tokenizer.vocabulary import byte_of

ALGORITHMS = ("bpe", "unigram")
# Where text is cut before merges are learned: no token reaches over a cut. `gpt2` is what MiniMind's tokenizers use
# (built into the native byte-level step). `digits` cuts the same, but for digits and newlines, which stand alone.
PATTERNS = {
    "digits": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}|\n| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+",
    "gpt2": "",
}
RECORD = "training.json"  # what a tokenizer was trained on and how, beside its files
LIMIT_BYTES = 100_000_000
_MIN_COUNT = 2  # a pair seen once is no pattern
_MOST_WORDS = 2_000_000  # different words counted for unigram; past that those seen once so far are let go of
_NEVER = -1e6  # a log-probability no sum of bytes comes near
_FORMAT = 2
_POLL_S = 0.2
Phase = Callable[[str, int, int], None]  # what is going on, bytes done, bytes in all (0: not known)


@dataclass(frozen=True, slots=True)
class Options:
    """How to train. `special`: control tokens after the template's own; `weights` as `corpus.draw` takes them."""

    vocab_size: int
    algorithm: str = "bpe"
    template: str = "minimind3"
    special: tuple[str, ...] = ()
    pattern: str = "digits"
    limit_bytes: int = LIMIT_BYTES
    weights: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of it. `vocab_size` is smaller than asked for where the text had no more pairs."""

    out: Path
    vocab_size: int
    asked_size: int
    sha256: str
    strata: Sequence[Stratum] = ()
    num_rows: int = 0
    left_out: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    seconds: float = 0.0
    up_to_date: bool = False


def train_to(files: Sequence[Path], out: Path, options: Options, *, phase: Phase | None = None) -> Trained:
    """Train on the files' text and publish the tokenizer as `out`, which appears whole or not at all.

    A tokenizer that was trained from the same bytes with the same options is left as it is. UsageError when `out` holds
    anything else, or an option cannot be; InputError when no text is found.
    """
    begun = time.monotonic()
    check_options(options)
    record = _record(files, options)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _found(out, record, options)
    written, corpus = _in_child(files, options, phase)
    record |= {"corpus": [asdict(stratum) for stratum in corpus.strata]}
    record |= {"files": {name: hashlib.sha256(content).hexdigest() for name, content in written.items()}}
    publish(out, written | {RECORD: (json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode()})
    tokenizer = Tokenizer.load(out)
    left_out = {name: dict(counts) for name, counts in corpus.left_out.items()}
    seconds = time.monotonic() - begun
    return Trained(
        out, tokenizer.vocab_size, options.vocab_size, tokenizer.sha256, corpus.strata, corpus.num_rows, left_out, seconds
    )  # fmt: skip


def check_options(options: Options) -> Layout:
    """The layout of the tokenizer to be; UsageError for options it cannot have."""
    for option, value, known in (
        ("--algorithm", options.algorithm, ALGORITHMS),
        ("--template", options.template, LAYOUTS),
        ("--pattern", options.pattern, PATTERNS),
    ):
        if value not in known:
            raise UsageError(f"{option} {value}: no such choice", f"choose one of {', '.join(known)}")
    given = LAYOUTS[options.template]
    for token in options.special:
        if not token.strip() or options.special.count(token) > 1 or token in given.tokens:
            raise UsageError(f"--special {token!r}: empty, given twice, or one of the template's own", "leave it out")
    layout = Layout(given.template, (*given.control, *options.special), given.plain)
    least = len(layout.tokens) + 256 + 1
    if options.vocab_size < least:
        raise UsageError(
            f"--vocab-size {options.vocab_size:,}: {len(layout.tokens)} added tokens and the 256 bytes leave no room",
            f"--vocab-size 6400; at least {least}",
        )
    if options.limit_bytes < 1:
        raise UsageError(f"--limit-bytes {options.limit_bytes} must be greater than 0", "--limit-bytes 100000000")
    return layout


def train(files: Sequence[Path], options: Options, *, phase: Phase | None = None) -> tuple[dict[str, bytes], Corpus]:
    """Train in this process: the tokenizer's files by name, and the corpus it came from, emptied of its texts."""
    layout = check_options(options)
    corpus = draw(
        files,
        limit_bytes=options.limit_bytes,
        weights=options.weights,
        seed=options.seed,
        evened=True,
        progress=(lambda done, total: phase("reading", done, total)) if phase else None,
    )
    texts = _told(corpus, phase) if phase else corpus.release()
    native = _unigram(texts, layout, options, phase) if options.algorithm == "unigram" else _bpe(texts, layout, options)
    return tokenizer_files(native, layout), corpus


def _told(corpus: Corpus, phase: Phase) -> Iterable[str]:
    """The corpus's texts, telling how far their words are counted."""
    done, told, total = 0, -1, corpus.drawn_bytes
    for text in corpus.release():
        yield text
        done += len(text)  # characters: near enough for a bar, free for a loop that runs for every text
        if done - told > 1 << 20:
            told = done
            phase("counting words", min(done, total), total)
    phase("merging", 0, 0)


def _bpe(texts: Iterable[str], layout: Layout, options: Options) -> tokenizers.Tokenizer:
    """Byte-level BPE by the native trainer. Its result follows from word counts and breaks ties by id: no order, no
    number of threads changes it."""
    native = tokenizers.Tokenizer(models.BPE())
    native.pre_tokenizer = pre_tokenizer(options.pattern)
    native.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        min_frequency=_MIN_COUNT,
        special_tokens=list(layout.tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    native.train_from_iterator(texts, trainer)
    return native


def _unigram(texts: Iterable[str], layout: Layout, options: Options, phase: Phase | None) -> tokenizers.Tokenizer:
    """Unigram over bytes: words are counted by the native pre-tokenizer, pieces learned by `unigram`.

    The layout's tokens stand in the vocabulary for their ids; their score is so low that no text becomes them.
    """
    native = tokenizers.Tokenizer(models.Unigram())
    cut = pre_tokenizer(options.pattern)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in cut.pre_tokenize_str(text))
        if len(counts) > _MOST_WORDS:
            counts = Counter({word: count for word, count in counts.items() if count >= _MIN_COUNT})
    if phase:
        phase("learning pieces", 0, 0)
    table = byte_of()
    words = {bytes(table[char] for char in word): count for word, count in counts.items()}
    pieces = unigram.train(words, options.vocab_size - len(layout.tokens))
    char_of = {byte: char for char, byte in table.items()}
    scored = [("".join(char_of[byte] for byte in piece), score) for piece, score in pieces]
    native.model = models.Unigram([*((token, _NEVER) for token in layout.tokens), *scored])
    native.pre_tokenizer = cut
    native.decoder = decoders.ByteLevel()
    return native


def pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    """The native pre-tokenizer of a PATTERN."""
    if not PATTERNS[pattern]:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pattern]), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def tokenizer_files(native: tokenizers.Tokenizer, layout: Layout) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a trained tokenizer whose first ids are the layout's tokens."""
    assert [native.id_to_token(id) for id in range(len(layout.tokens))] == list(layout.tokens)
    parts = json.loads(native.to_str())
    parts["added_tokens"] = [_added(id, token, token in layout.control) for id, token in enumerate(layout.tokens)]
    whole = tokenizers.Tokenizer.from_str(json.dumps(parts))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": PAD,
        "additional_special_tokens": [token for token in layout.control if token != PAD],
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "model_max_length": 32768,
        "added_tokens_decoder": {str(token.pop("id")): token for token in parts["added_tokens"]},
        "chat_template": layout.template,
    }
    return {
        "tokenizer.json": whole.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode(),
    }


def _added(id: int, token: str, is_control: bool) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized")
    return {"id": id, "content": token, **dict.fromkeys(names, False), "special": is_control}


# --- the record beside a tokenizer


def _record(files: Sequence[Path], options: Options) -> dict[str, Any]:
    """What the result follows from, inputs by name, size and hash."""
    inputs = []
    for path in files:
        inputs.append({"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)})
    return {
        "format_version": _FORMAT,
        "made_by": "mm tokenizer train",
        "library": f"tokenizers {tokenizers.__version__}",
        "options": json.loads(json.dumps(asdict(options))),
        "inputs": inputs,
    }


def _found(out: Path, record: dict[str, Any], options: Options) -> Trained:
    """What stands in `out`, if it is what would be made; UsageError otherwise."""
    try:
        found = json.loads((out / RECORD).read_bytes())
        is_same = all(found[key] == value for key, value in record.items()) and all(
            sha256_of(out / name) == digest for name, digest in found["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_same = False
    if not is_same:
        raise UsageError(
            f"{out} exists and was not trained from these files with these options", "choose another --out, or remove it"
        )  # fmt: skip
    tokenizer = Tokenizer.load(out)
    return Trained(out, tokenizer.vocab_size, options.vocab_size, tokenizer.sha256, up_to_date=True)


def publish(out: Path, files: Mapping[str, bytes]) -> None:
    """Write files beside `out`, which is missing or an empty directory, and rename them into its place, all or none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.writing-", dir=out.parent))
    try:
        for name, content in files.items():
            write_bytes(beside / name, content)
        beside.chmod(0o755)  # mkdtemp's is for its owner alone
        sync(beside)
        beside.replace(out)
        sync(out.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


# --- a process of its own


def _in_child(files: Sequence[Path], options: Options, phase: Phase | None) -> tuple[dict[str, bytes], Corpus]:
    """`train` in a child process, which whatever ends this call ends too."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(there, files, options), daemon=True)
    try:
        child.start()
        there.close()
        now: tuple[str, int, int] = ("starting", 0, 0)
        while True:
            if here.poll(_POLL_S):
                kind, value = here.recv()
                if kind == "done":
                    return value
                if kind == "error":
                    raise value
                now = value
            if phase:
                phase(*now)
    except EOFError:
        child.join()
        raise MMError(
            f"the training process died (exit code {child.exitcode}; killed, or out of memory)",
            f"a smaller --limit-bytes than {options.limit_bytes:,} needs less memory: about 12 times as many bytes",
        ) from None
    finally:
        child.kill()
        child.join()


def _work(connection: Connection, files: Sequence[Path], options: Options) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    gc.disable()  # the corpus is many objects and no garbage
    try:
        done = train(files, options, phase=lambda *now: connection.send(("phase", now)))
        connection.send(("done", done))
    except MMError as error:
        connection.send(("error", error))
    except BrokenPipeError:  # the parent is gone
        os._exit(1)
