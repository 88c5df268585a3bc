"""What `mm tokenizer` prints: tables of figures, findings, and text coloured by token. For cli alone."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mmdata.commands.terminal import percent, print_sections, result, say, size, table

if TYPE_CHECKING:
    from mmdata.tokenizer.toolkit.check import Finding
    from mmdata.tokenizer.toolkit.compare import Comparison
    from mmdata.tokenizer.toolkit.evaluate import Evaluation
    from mmdata.tokenizer.toolkit.train import Trained
    from mmdata.tokenizer.vocabulary import TokenView

_EVERY_S = 10
_COLOURS = ("black on cyan", "black on green", "black on yellow", "white on blue", "white on magenta")


@contextmanager
def phases(*, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Progress of work in phases: a bar with the time on a terminal, a line every 10 s elsewhere. Total 0: not known."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task, shown = bar.add_task("", total=None, amount=""), ""

            def draw(name: str, done: int, total: int) -> None:
                nonlocal shown
                amount = f"{size(done)} of {size(total)}" if total else ""
                if name != shown:
                    shown = name
                    bar.reset(task, total=total or None, description=name, amount=amount)
                bar.update(task, completed=done, total=total or None, amount=amount)

            yield draw
    else:
        begun = last = time.monotonic()

        def write(name: str, done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _EVERY_S:
                last = time.monotonic()
                amount = f" {size(done)} of {size(total)} ({percent(done, total)})" if total else ""
                say(f"{name}:{amount} after {last - begun:.0f} s")

        yield write


def print_trained(trained: "Trained") -> None:
    """What text was drawn from where, and what came of it."""
    if trained.up_to_date:
        result(f"{trained.out} is up to date: {trained.vocab_size:,} tokens, sha256 {trained.sha256[:12]}")
        return
    rows = [
        (f"{one.file} {one.language}", size(one.found_bytes), size(one.drawn_bytes), one.drawn_texts)
        for one in trained.strata
    ]
    table("", ("text of", "found", "drawn", "texts"), rows)
    for name, counts in trained.left_out.items():
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        say(f"{name}: left out {sum(counts.values()):,} rows ({reasons}); `mm validate {name}` shows them")
    if trained.vocab_size < trained.asked_size:
        say(
            f"warning: the text has pairs for {trained.vocab_size:,} tokens only, {trained.asked_size:,} were asked for: "
            "give more text"
        )
    drawn = sum(one.drawn_bytes for one in trained.strata)
    result(
        f"wrote {trained.out}: {trained.vocab_size:,} tokens from {size(drawn)} of text, sha256 {trained.sha256[:12]}, "
        f"in {trained.seconds:.1f} s"
    )


def print_findings(directory: object, findings: "Sequence[Finding]") -> None:
    """Findings one a line: ok, note or error; what helps below those that are not ok."""
    for finding in findings:
        result(f"{finding.level:<5}  {finding.check}: {finding.found}")
        if finding.fix and finding.level == "note":
            result(f"       fix: {finding.fix}")
    errors = [finding for finding in findings if finding.level == "error"]
    notes = sum(finding.level == "note" for finding in findings)
    result(f"{directory}: {len(findings)} checks, {len(errors)} errors, {notes} notes")


def print_evaluated(figures: "Evaluation") -> None:
    """Tokenizers side by side, a column each."""
    from mmdata.stats.report.page import Section
    from mmdata.stats.report.tokenizer import short_names, tables

    each, text = figures.tokenizers, figures.text
    names = short_names([one.name for one in each])
    result(f"{size(text.bytes)} of text, {text.texts:,} texts drawn from {text.rows:,} rows")
    for name, counts in text.left_out.items():
        say(f"{name}: left out {sum(counts.values()):,} rows; `mm validate {name}` shows them")
    print_sections([Section("", "", tables(figures))])
    for name, one in zip(names, each, strict=True):
        longest = ", ".join(f"{token.text} ({token.id:,})" for token in one.longest_tokens)
        result(f"{name}: longest tokens: {longest}")
        if one.glitch_prone:
            some = ", ".join(f"{token.text} ({token.id:,})" for token in one.glitch_prone_tokens)
            result(f"{name}: never in this text: {one.glitch_prone:,} tokens, such as {some}")
        if any(not found.fits for found in one.embedding.values()):
            result(f"{name}: ! has more ids than the preset's vocabulary; the model would have to be made larger")
        for example in one.round_trip.examples:
            result(f"{name}: does not come back: {example!r}")


def print_compared(found: "Comparison") -> None:
    """The answer first, then what it rests on."""
    from mmdata.stats.report.tokenizer import short_names

    a, b = short_names([found.a, found.b])
    result(found.answer)
    result()
    columns = ("", a, b)
    table(
        "",
        columns,
        (
            ("vocabulary", *found.vocab_size),
            ("tokens of this text", *found.tokens),
            ("bytes per token", *(f"{value:.3f}" for value in found.bytes_per_token)),
        ),
    )
    same = "the same" if found.same_template else "different"
    result(
        f"{found.shared_tokens:,} tokens are in both, {found.same_ids:,} under the same id; chat templates: {same}; "
        f"{percent(found.texts_split_alike, found.texts)} of {found.texts:,} texts and "
        f"{100 * (1 - found.words_split_differently):.1f}% of words are split alike"
    )
    for side in found.first_differing_ids:
        result(f"id {side.id:,}: {a} {side.a}, {b} {side.b}")
    for name, key in ((a, "only_a"), (b, "only_b")):
        if found.control_tokens[key]:
            result(f"control tokens only in {name}: {' '.join(found.control_tokens[key])}")
    if found.examples:
        table(
            "split differently",
            ("text", "times", a, b, ""),
            ((one.text, one.count, "|".join(one.a), "|".join(one.b), "") for one in found.examples),
        )


def print_split(pieces: "Sequence[TokenView]") -> None:
    """A text's tokens, each in the colour after the one before, with its id; between bars where there is no colour."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False, soft_wrap=True)
    is_coloured = console.is_terminal and not console.no_color
    text = Text()
    for number, piece in enumerate(pieces):
        style = _COLOURS[number % len(_COLOURS)] if is_coloured else ""
        shown = piece.text
        text.append(shown if is_coloured else f"{shown}|", style=style)
        if "⏎" in shown:
            text.append("\n")
    console.print(text)
    result()
    table(
        "",
        ("id", "token", "bytes", ""),
        ((piece.id, piece.text, piece.bytes, piece.note) for piece in pieces),
    )
    num_bytes = sum(len(bytes.fromhex(piece.bytes)) for piece in pieces)
    say(f"{len(pieces):,} tokens, {num_bytes:,} bytes: {num_bytes / max(len(pieces), 1):.2f} bytes per token")


def print_vocabulary(entries: "Sequence[TokenView]", total: int) -> None:
    """A stretch of the vocabulary."""
    table("", ("id", "token", "bytes", ""), ((one.id, one.text, one.bytes, one.note) for one in entries))
    say(
        f"{len(entries):,} of {total:,} tokens; ‹e4 bd› are bytes that form no character yet, ␣ is a space, ⏎ a newline"
    )
