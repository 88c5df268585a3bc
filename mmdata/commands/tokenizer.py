"""`mm tokenizer`: train, measure, compare, check, show and extend tokenizers."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdata.commands.options import DATA_DIR, Html, Json, Lang, data_files
from mmdata.commands.terminal import (
    counted,
    meter,
    next_command,
    percent,
    print_json,
    print_sections,
    print_styled,
    progress,
    result,
    say,
    size,
    table,
)
from mmdata.errors import UsageError
from mmdata.io.options import ReadOptions
from mmdata.options import INT64, Option
from mmdata.tokenizer.toolkit.options import TEXTS, TOKENIZER, TokenizerOptions
from mmtrain.shapes import MODEL_SHAPES

if TYPE_CHECKING:
    from mmdata.tokenizer.toolkit.check import Finding
    from mmdata.tokenizer.toolkit.compare import Comparison
    from mmdata.tokenizer.toolkit.evaluate import Evaluation
    from mmdata.tokenizer.toolkit.train import Trained
    from mmdata.tokenizer.vocabulary import TokenView

TOKEN_STYLES = ("black on cyan", "black on green", "black on yellow", "white on blue", "white on magenta")

TextFiles = Annotated[
    list[Path] | None,
    Option(
        "File of rows whose text is measured; may be repeated.",
        flag="--data",
        metavar="FILE",
        default_text="data/*.jsonl",
    ),
]
LimitBytes = Annotated[int, Option("Largest amount of text in bytes, drawn evenly over files and languages.", least=1)]
Seed = Annotated[int, Option("Seed of the random choice of texts, where not all are taken.", **INT64)]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Tokenizer directory.")]


def train(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help="Files of rows of any kind. [default: data/*.jsonl]"),
    ] = None,
    *,
    options: Annotated[dict[str, Any], TokenizerOptions],
    out: Annotated[
        Path | None,
        Option("Directory of the new tokenizer.", TOKENIZER, metavar="DIR", default_text="data/tokenizer-VOCAB_SIZE"),
    ] = None,
    weight: Annotated[
        list[str] | None,
        Option(
            "Count the texts of a FILE, field (user, assistant …) or language (Chinese, English …) W times; may be repeated.",
            TEXTS,
            metavar="NAME=W",
        ),
    ] = None,
    quiet: Annotated[bool, Option("Print no progress.")] = False,
    as_json: Json = False,
) -> None:
    """Train a tokenizer on the text of jsonl files; the same files and seed give the same tokenizer.

    Example: mm tokenizer train data/pretrain_hq.jsonl data/sft_512.jsonl --vocab-size 6400
    """
    from mmdata.tokenizer.toolkit.train import train_to

    directory = out or DATA_DIR / f"tokenizer-{options['vocab_size']}"
    chosen = TokenizerOptions(**options, weights=weights_of(weight))
    with phase_progress(quiet=quiet or as_json) as phase:
        trained = train_to(data_files(files, is_read_once=False), directory, chosen, phase=phase)
    if as_json:
        print_json(trained)
    else:
        print_trained(trained)
    paths, reading = list(map(str, files or ())), shlex.join(chosen.flags)
    data = " ".join(f"--data {path}" for path in paths)
    evaluate, pack = ["mm tokenizer eval", str(directory), data, reading], ["mm pack", *paths, reading]
    next_command(f"{' '.join(filter(None, evaluate))}    or    {' '.join(filter(None, pack))} --tokenizer {directory}")


def eval_(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Tokenizer directories.")],
    data: TextFiles = None,
    *,
    read: ReadOptions,
    limit_bytes: LimitBytes = 10_000_000,
    batch_tokens: Annotated[
        int, Option("Tokens of one training step, to compute the steps of an epoch.", least=1)
    ] = 65_536,
    html: Html = None,
    lang: Lang = "en",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare tokenizers on the same text: compression, tokens used, exact decoding, speed, and model size and steps.

    Example: mm tokenizer eval data/tokenizer data/tokenizer-6400 --data data/sft_512.jsonl
    """
    from mmdata.io.files import write_text
    from mmdata.stats.report.tokenizer import eval_page
    from mmdata.tokenizer.tokenizer import Tokenizer
    from mmdata.tokenizer.toolkit.evaluate import Shape, evaluate
    from mmdata.tokenizer.toolkit.sample import draw

    tokenizers = [Tokenizer.load(directory) for directory in directories]
    shapes = {
        name: Shape(shape.hidden_size, shape.num_params - shape.vocab_size * shape.hidden_size)
        for name, shape in MODEL_SHAPES.items()
        if shape.vocab_size
    }
    with progress("read", quiet=as_json) as update:
        paths = data_files(data, is_read_once=False)
        sample = draw(paths, limit_bytes=limit_bytes, seed=seed, read=read, progress=update)
    with progress("encode", quiet=as_json) as update:
        figures = evaluate(tokenizers, sample, shapes=shapes, step_tokens=batch_tokens, progress=update)
    if html:
        write_text(html, eval_page(figures, lang=lang))
        say(f"report: {html}")
    if as_json:
        print_json(figures)
        return
    print_evaluated(figures)
    next_command(f"mm tokenizer check {directories[0]}")


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Tokenizer that a model was trained with.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Tokenizer that data was packed with.")],
    data: TextFiles = None,
    *,
    read: ReadOptions,
    limit_bytes: LimitBytes = 2_000_000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Show how two tokenizers split the same text, and whether a model trained with A can read shards packed with B.

    Example: mm tokenizer compare data/tokenizer data/tokenizer-6400 --data data/sft_512.jsonl
    """
    from mmdata.tokenizer.tokenizer import Tokenizer
    from mmdata.tokenizer.toolkit.compare import compare as compare_tokenizers
    from mmdata.tokenizer.toolkit.sample import draw

    tokenizers = Tokenizer.load(a), Tokenizer.load(b)
    with progress("read", quiet=as_json) as update:
        paths = data_files(data, is_read_once=False)
        sample = draw(paths, limit_bytes=limit_bytes, seed=seed, read=read, progress=update)
    comparison = compare_tokenizers(*tokenizers, sample)
    if as_json:
        print_json(comparison)
    else:
        print_compared(comparison)


def check(
    directory: Directory,
    model: Annotated[
        str | None, Option("Published model whose vocabulary the tokenizer must fit.", choices=tuple(MODEL_SHAPES))
    ] = None,
    as_json: Json = False,
) -> None:
    """Check what training needs of a tokenizer: ids, special tokens, template, exact decoding. Exit code 1 on an error.

    Example: mm tokenizer check data/tokenizer --model minimind3
    """
    from mmdata.tokenizer.toolkit.check import check as check_tokenizer

    findings = check_tokenizer(directory, vocab_size=(MODEL_SHAPES[model].vocab_size or None) if model else None)
    if as_json:
        print_json(findings)
    else:
        print_findings(directory, findings)
    errors = [finding for finding in findings if finding.level == "error"]
    for finding in errors:
        say(f"error: {directory}: {finding.check}: {finding.found}")
        say(f"fix: {finding.fix}")
    if errors:
        raise typer.Exit(1)


def show(
    directory: Directory,
    text: Annotated[
        str | None,
        typer.Argument(metavar="[TEXT]", help="Text to split; - reads standard input. [default: show the vocabulary]"),
    ] = None,
    control: Annotated[bool, Option("Encode control strings in TEXT as control tokens.")] = False,
    begin: Annotated[int, Option("Without TEXT: first id to show.", flag="--from", least=0)] = 0,
    count: Annotated[int, Option("Without TEXT: number of ids to show.", least=0)] = 100,
    find: Annotated[str | None, Option("Without TEXT: show only tokens that contain this.", metavar="TEXT")] = None,
    as_json: Json = False,
) -> None:
    """Show the tokens of a text, in colours and with their ids; without a text, show the vocabulary.

    Example: mm tokenizer show data/tokenizer '你好, world'    mm tokenizer show data/tokenizer --from 6000
    """
    from mmdata.tokenizer.tokenizer import Tokenizer
    from mmdata.tokenizer.vocabulary import list_tokens, split_text

    tokenizer = Tokenizer.load(directory)
    if text is None and control:
        raise UsageError("--control needs TEXT", f"mm tokenizer show {directory} TEXT --control")
    if text is not None and (find is not None or begin):
        raise UsageError("--from and --find show the vocabulary, TEXT a text", "leave one of them out")
    if text is None:
        entries = list_tokens(tokenizer, begin, count, find)
    else:
        entries = split_text(tokenizer, sys.stdin.read() if text == "-" else text, control=control)
    if as_json:
        print_json(entries)
    elif text is None:
        print_vocabulary(entries, tokenizer.vocab_size)
    else:
        print_split(entries)


def extend(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The tokenizer to extend; it is not changed.")],
    add: Annotated[list[str], Option("A token to add; may be repeated.", metavar="TOKEN")],
    out: Annotated[Path, Option("Directory of the extended tokenizer.", metavar="DIR")],
    control: Annotated[
        bool, Option("Make them control tokens, which only chat templates produce, never text.")
    ] = False,
    reserved: Annotated[
        bool, Option("Replace reserved tokens (<|buffer1|> …), so that a model's embedding keeps its size.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Add a few tokens after the last id, or with --reserved in place of reserved tokens; other ids are unchanged.

    Example: mm tokenizer extend data/tokenizer --add '<think>' --add '</think>' --out data/tokenizer-more
    """
    from mmdata.tokenizer.toolkit.extend import extend as extend_tokenizer

    ids = extend_tokenizer(directory, add, out, is_control=control, reserved=reserved)
    if as_json:
        print_json({"out": out, "ids": ids})
    else:
        result(f"wrote {out}: " + ", ".join(f"{token} is {id:,}" for token, id in ids.items()))
    next_command(f"mm pack --tokenizer {out}    then    mm train sft --resize-embeddings mean")


def weights_of(items: list[str] | None) -> dict[str, float]:
    """Parse `--weight` options such as assistant=2 into weights by name; empty for None. Raise UsageError for an item
    that is not NAME=NUMBER, or whose number is negative, infinite or NaN."""
    weights = {}
    for item in items or ():
        name, equals, amount = item.rpartition("=")
        try:
            weights[name] = float(amount)
        except ValueError:
            equals = ""
        if not equals or not 0 <= weights[name] < float("inf"):
            raise UsageError(
                f"--weight {item!r} is not NAME=NUMBER", "--weight assistant=2 --weight data/dpo.jsonl=0.5"
            )
    return weights


@contextmanager
def phase_progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show the progress of work in several phases, as a context manager. Yields `phase(name, done, total)`, which takes
    the bytes done in the phase and its bytes in all (0 if not known)."""
    start = time.monotonic()
    with meter(quiet=quiet) as draw:

        def phase(name: str, done: int, total: int) -> None:
            amount = f"{size(done)} of {size(total)} ({percent(done, total)}) " if total else ""
            draw(name, done, total, f"{amount}after {time.monotonic() - start:.0f} s")

        yield phase


def print_trained(trained: "Trained") -> None:
    """Print the text found and drawn by file and language, the rows left out, and the tokenizer; or "up to date"."""
    if trained.up_to_date:
        result(f"{trained.out} is up to date: {trained.vocab_size:,} tokens, sha256 {trained.sha256[:12]}")
        return
    rows = (
        (f"{one.file} {one.language}", size(one.found_bytes), size(one.drawn_bytes), one.drawn_texts)
        for one in trained.strata
    )
    table("", ("text of", "found", "drawn", "texts"), rows)
    for name, counts in trained.left_out.items():
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        say(f"{name}: left out {sum(counts.values()):,} rows ({reasons}); `mm validate {name}` shows them")
    if trained.vocab_size < trained.asked_size:
        enough = f"the text has pairs for {trained.vocab_size:,} tokens only, {trained.asked_size:,} were asked for"
        say(f"warning: {enough}: give more text")
    text = f"{trained.vocab_size:,} tokens from {size(sum(one.drawn_bytes for one in trained.strata))} of text"
    result(f"wrote {trained.out}: {text}, sha256 {trained.sha256[:12]}, in {trained.seconds:.1f} s")


def print_findings(directory: Path, findings: "Sequence[Finding]") -> None:
    """Print a line for each check (ok, note or error), a fix below each note, then the numbers of errors and notes. The
    fixes of errors are printed by the caller."""
    for finding in findings:
        result(f"{finding.level:<5}  {finding.check}: {finding.found}")
        if finding.fix and finding.level == "note":
            result(f"       fix: {finding.fix}")
    levels = [finding.level for finding in findings]
    result(f"{directory}: {len(findings)} checks, {levels.count('error')} errors, {levels.count('note')} notes")


def print_evaluated(figures: "Evaluation") -> None:
    """Print tables with a column for each tokenizer, then each tokenizer's longest tokens and its problems."""
    from mmdata.stats.report.page import Section
    from mmdata.stats.report.tokenizer import short_names, tables

    text = figures.text
    result(f"{size(text.bytes)} of text, {text.texts:,} texts drawn from {text.rows:,} rows")
    for name, counts in text.left_out.items():
        say(f"{name}: left out {sum(counts.values()):,} rows; `mm validate {name}` shows them")
    print_sections([Section("", "", tables(figures))])
    names = short_names([one.name for one in figures.tokenizers])
    for name, one in zip(names, figures.tokenizers, strict=True):
        result(f"{name}: longest tokens: {counted((token.text, token.id) for token in one.longest_tokens)}")
        if one.glitch_prone:
            examples = counted((token.text, token.id) for token in one.glitch_prone_tokens)
            result(f"{name}: never in this text: {one.glitch_prone:,} tokens, such as {examples}")
        for example in one.round_trip.examples:
            result(f"{name}: does not decode to the same text: {example!r}")


def print_compared(comparison: "Comparison") -> None:
    """Print whether a model trained with tokenizer A can read shards packed with B, then the figures behind it."""
    from mmdata.stats.report.tokenizer import short_names

    a, b = short_names([comparison.a, comparison.b])
    result(comparison.answer)
    result()
    rows = (
        ("vocabulary", *comparison.vocab_size),
        ("tokens of this text", *comparison.tokens),
        ("bytes per token", *(f"{value:.3f}" for value in comparison.bytes_per_token)),
    )
    table("", ("", a, b), rows)
    same = "the same" if comparison.same_template else "different"
    result(
        f"{comparison.shared_tokens:,} tokens are in both, {comparison.same_ids:,} under the same id; chat templates: "
        f"{same}; {percent(comparison.texts_split_alike, comparison.texts)} of {comparison.texts:,} texts and "
        f"{100 * (1 - comparison.words_split_differently):.1f}% of words are split alike"
    )
    for pair in comparison.first_differing_ids:
        result(f"id {pair.id:,}: {a} {pair.a}, {b} {pair.b}")
    for name, key in ((a, "only_a"), (b, "only_b")):
        if comparison.control_tokens[key]:
            result(f"control tokens only in {name}: {' '.join(comparison.control_tokens[key])}")
    words = ((word.text, word.count, "|".join(word.a), "|".join(word.b), "") for word in comparison.examples)
    table("split differently", ("text", "times", a, b, ""), words)


def print_split(pieces: "Sequence[TokenView]") -> None:
    """Print a text with each token on a coloured background, or followed by "|" without colour; then a table of the
    tokens."""
    styled = []
    for number, piece in enumerate(pieces):
        end = "\n" if "⏎" in piece.text else ""
        styled += [(piece.text, TOKEN_STYLES[number % len(TOKEN_STYLES)], f"{piece.text}|"), (end, "", end)]
    print_styled(styled)
    result()
    rows = ((piece.id, piece.text, piece.bytes, piece.note) for piece in pieces)
    table("", ("id", "token", "bytes", ""), rows)
    num_bytes = sum(len(bytes.fromhex(piece.bytes)) for piece in pieces)
    say(f"{len(pieces):,} tokens, {num_bytes:,} bytes: {num_bytes / max(len(pieces), 1):.2f} bytes per token")


def print_vocabulary(entries: "Sequence[TokenView]", total: int) -> None:
    """Print a table of tokens, and how many of the `total` tokens of the vocabulary they are."""
    table("", ("id", "token", "bytes", ""), ((one.id, one.text, one.bytes, one.note) for one in entries))
    say(
        f"{len(entries):,} of {total:,} tokens; ‹e4 bd› are bytes that form no character yet, ␣ is a space, ⏎ a newline"
    )
