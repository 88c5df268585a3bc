"""Training a tokenizer on the text of jsonl files: `mm tokenizer train`.

The result is a directory that transformers loads without changes; the same files, options and seed give the same bytes
on any number of cores. Tokenizers are byte-level: every text decodes to itself. Peak memory is about 12 times
`limit_bytes`, most of it in the native trainer, which cannot be interrupted and so runs in a child process.
"""

import gc
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmdata.errors import MMError, TokenizerError, UsageError
from mmdata.io.files import info_of_bytes, new_directory, no_progress, sha256_of, write_bytes
from mmdata.io.records import read_record, sealed
from mmdata.options import check
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit import unigram
from mmdata.tokenizer.toolkit.layouts import BOS, EOS, LAYOUTS, PAD, Layout
from mmdata.tokenizer.toolkit.options import TokenizerOptions
from mmdata.tokenizer.toolkit.sample import Stratum, TextSample, draw
from mmdata.tokenizer.vocabulary import byte_of

# Regular expressions that cut text into words before training; no token extends over a cut. `gpt2` is what MiniMind's
# tokenizers use; it is built into the native byte-level pre-tokenizer, so none is given here. `digits` cuts the same
# way, except that every digit and every newline is a word of its own.
PATTERNS = {
    "digits": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}|\n| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+",
    "gpt2": "",
}
RECORD = "training.json"  # the TrainingRecord, in the directory of the trained tokenizer
_MIN_COUNT = 2  # BPE does not merge token pairs that occur less often
_MAX_WORDS = 2_000_000  # different words counted for unigram; if there are more, those seen once so far are dropped
_NEVER = -1e6  # a log-probability below that of any sequence of bytes
_FORMAT = 2  # version of training.json
_POLL_S = 0.2
Phase = Callable[[str, int, int], None]  # progress: (name of the phase, bytes done, bytes in all or 0 if unknown)


@dataclass(frozen=True, slots=True)
class Trained:
    """Result of `train_to`. `vocab_size` is less than `asked_size` if the text has too few different token pairs.
    `strata`, `num_rows` and `left_out`: see `TextSample`; empty if `up_to_date`, that is, an equal tokenizer was there
    already."""

    out: Path
    vocab_size: int
    asked_size: int
    sha256: str
    strata: Sequence[Stratum] = ()
    num_rows: int = 0
    left_out: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    seconds: float = 0.0
    up_to_date: bool = False


class InputFile(msgspec.Struct, frozen=True):
    """A file that a tokenizer was trained on: name, size and sha256."""

    name: str
    bytes: int
    sha256: str


class TrainingRecord(msgspec.Struct, frozen=True):
    """The content of training.json: what determines the tokenizer, the text drawn, and sha256 of the files written."""

    format_version: int
    made_by: str
    library: str
    options: TokenizerOptions
    inputs: list[InputFile]
    corpus: list[Stratum] = []
    files: dict[str, str] = {}


def train_to(files: Sequence[Path], out: Path, options: TokenizerOptions, *, phase: Phase = no_progress) -> Trained:
    """Train on the text of the files and write the tokenizer to `out`, which appears complete or not at all. An `out`
    that was trained from the same bytes with the same options stays as it is. phase: called with progress. Raises
    UsageError for any other `out` or a wrong option, InputError if the files have no text, MMError if the process
    dies."""
    begun = time.monotonic()
    check_options(options)
    inputs = [InputFile(path.name, path.stat().st_size, sha256_of(path)) for path in files]
    library = f"tokenizers {tokenizers.__version__}"
    record = TrainingRecord(_FORMAT, "mm tokenizer train", library, options, inputs)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _existing(out, record)
    written, sample = _in_child(files, options, phase)
    digests = {name: info_of_bytes(content).sha256 for name, content in written.items()}
    record = msgspec.structs.replace(record, corpus=sample.strata, files=digests)
    publish(out, written | {RECORD: (json.dumps(sealed(record), ensure_ascii=False, indent=1) + "\n").encode()})
    tokenizer = Tokenizer.load(out)
    return Trained(
        out,
        tokenizer.vocab_size,
        options.vocab_size,
        tokenizer.sha256,
        sample.strata,
        sample.num_rows,
        {name: dict(counts) for name, counts in sample.left_out.items()},
        time.monotonic() - begun,
    )


def check_options(options: TokenizerOptions) -> Layout:
    """Check the options and return the layout (template and added tokens). Raises UsageError if an option is wrong."""
    check(options)
    base = LAYOUTS[options.template]
    for token in options.special:
        if not token.strip() or options.special.count(token) > 1 or token in base.tokens:
            raise UsageError(f"--special {token!r}: empty, given twice, or one of the template's own", "leave it out")
    layout = replace(base, control=(*base.control, *options.special))
    least = len(layout.tokens) + 256 + 1
    if options.vocab_size < least:
        raise UsageError(
            f"--vocab-size {options.vocab_size:,}: {len(layout.tokens)} added tokens and the 256 bytes leave no room",
            f"--vocab-size 6400; at least {least}",
        )
    return layout


def train(
    files: Sequence[Path], options: TokenizerOptions, *, phase: Phase = no_progress
) -> tuple[dict[str, bytes], TextSample]:
    """Train in this process. Returns the tokenizer's files by name, and the sample, whose texts have been freed."""
    layout = check_options(options)
    sample = draw(
        files,
        limit_bytes=options.limit_bytes,
        weights=options.weights,
        seed=options.seed,
        evened=True,
        read=options.reading,
        progress=lambda done, total: phase("reading", done, total),
    )
    texts = _with_progress(sample, phase)
    native = _unigram(texts, layout, options, phase) if options.algorithm == "unigram" else _bpe(texts, layout, options)
    return tokenizer_files(native, layout), sample


def _with_progress(sample: TextSample, phase: Phase) -> Iterator[str]:
    """Yield all texts of the sample, freeing each, and call `phase` about every megabyte and at the end."""
    done, reported, total = 0, -1, sample.drawn_bytes
    for text in sample.release():
        yield text
        done += len(text)  # characters: close enough for a progress bar, and fast
        if done - reported > 1 << 20:
            reported = done
            phase("counting words", min(done, total), total)
    phase("merging", 0, 0)


def _bpe(texts: Iterable[str], layout: Layout, options: TokenizerOptions) -> tokenizers.Tokenizer:
    """Train byte-level BPE, natively; the order of the texts and the number of threads do not change the result."""
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


def _unigram(texts: Iterable[str], layout: Layout, options: TokenizerOptions, phase: Phase) -> tokenizers.Tokenizer:
    """Train a unigram model over bytes: the native pre-tokenizer cuts words and `unigram.train` learns the pieces. The
    layout's tokens are the first pieces, with a score so low that no text is encoded as them."""
    native = tokenizers.Tokenizer(models.Unigram())
    cut = pre_tokenizer(options.pattern)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in cut.pre_tokenize_str(text))
        if len(counts) > _MAX_WORDS:
            counts = Counter({word: count for word, count in counts.items() if count >= _MIN_COUNT})
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
    """Return the native pre-tokenizer for a key of PATTERNS."""
    if not PATTERNS[pattern]:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pattern]), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def tokenizer_files(native: tokenizers.Tokenizer, layout: Layout) -> dict[str, bytes]:
    """Return the tokenizer's files by name. native: its first ids must be the layout's tokens in their order."""
    assert [native.id_to_token(id) for id in range(len(layout.tokens))] == list(layout.tokens)
    parts = json.loads(native.to_str())
    parts["added_tokens"] = [
        added_token(id, token, is_control=token in layout.control) for id, token in enumerate(layout.tokens)
    ]
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


def added_token(id: int, token: str, *, is_control: bool) -> dict[str, int | str | bool]:
    """Return an entry of "added_tokens" in tokenizer.json: a token matched exactly, spaces around it untouched."""
    names = ("single_word", "lstrip", "rstrip", "normalized")
    return {"id": id, "content": token, **dict.fromkeys(names, False), "special": is_control}


def _existing(out: Path, record: TrainingRecord) -> Trained:
    """Return the tokenizer in `out` if training.json has the versions, options and input hashes of `record`, and the
    files have their recorded sha256. Raises UsageError otherwise."""
    try:
        old = read_record(out / RECORD, TrainingRecord, TokenizerError, "")
        is_same = msgspec.structs.replace(old, corpus=[], files={}) == record and all(
            sha256_of(out / name) == digest for name, digest in old.files.items()
        )
    except (OSError, TokenizerError):
        is_same = False
    if not is_same:
        raise UsageError(
            f"{out} exists and was not trained from these files with these options",
            "choose another --out, or remove it",
        )
    tokenizer = Tokenizer.load(out)
    return Trained(out, tokenizer.vocab_size, record.options.vocab_size, tokenizer.sha256, up_to_date=True)


def publish(out: Path, files: Mapping[str, bytes]) -> None:
    """Write files to the directory `out`, missing or empty before, which then has all of them or stays as it was."""
    with new_directory(out) as partial:
        for name, content in files.items():
            write_bytes(partial / name, content)


# --- the child process


def _in_child(files: Sequence[Path], options: TokenizerOptions, phase: Phase) -> tuple[dict[str, bytes], TextSample]:
    """Run `train` in a child process, killed if this call is interrupted. Raises its MMError, or one if it dies."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(sender, files, options), daemon=True)
    try:
        child.start()
        sender.close()
        progress: tuple[str, int, int] = ("starting", 0, 0)
        while True:
            if receiver.poll(_POLL_S):
                kind, value = receiver.recv()
                if kind == "done":
                    return value
                if kind == "error":
                    raise value
                progress = value
            phase(*progress)
    except EOFError:
        child.join()
        raise MMError(
            f"the training process died (exit code {child.exitcode}; killed, or out of memory)",
            f"a smaller --limit-bytes than {options.limit_bytes:,} needs less memory: about 12 times as many bytes",
        ) from None
    finally:
        child.kill()
        child.join()


def _work(connection: Connection, files: Sequence[Path], options: TokenizerOptions) -> None:
    """The child process: run `train` and send its progress, result or error through the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    gc.disable()  # the sample has many objects and no reference cycles
    try:
        done = train(files, options, phase=lambda *progress: connection.send(("phase", progress)))
        connection.send(("done", done))
    except MMError as error:
        connection.send(("error", error))
    except BrokenPipeError:  # the parent is gone
        os._exit(1)
