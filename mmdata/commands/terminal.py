"""The terminal: lines, tables and bars, and how figures are worded. Results go to stdout, talk to stderr.

Only `cli` uses this. At its top it imports the standard library alone, so that `mm --help` stays instant.
"""

import json
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdata.encode.sequences import Sequences
    from mmdata.encode.validate import Validation
    from mmdata.errors import MMError
    from mmdata.hub.fetch import FetchOutcome, FileState
    from mmdata.hub.plan import FetchPlan
    from mmdata.pack.estimate import Estimate
    from mmdata.pack.pipeline import PackResult
    from mmdata.stats.report.page import Block, Section, Translation
    from mmdata.stats.stats import Measured

DATA_DIR, SHARDS_DIR, RUNS_DIR = Path("data"), Path("shards"), Path("runs")  # where commands look unless told


# --- lines, tables, bars


def say(text: str = "") -> None:
    """Talk: one line to stderr."""
    print(text, file=sys.stderr, flush=True)


def result(text: str = "") -> None:
    """A result: one line to stdout."""
    print(text, flush=True)


def print_json(value: Any) -> None:
    """A result for programs: one JSON document to stdout; dataclasses become objects, paths strings."""
    print(json.dumps(value, ensure_ascii=False, indent=2, default=plain), flush=True)


def plain(value: Any) -> Any:
    """A value json does not know, as one it does: dataclasses become objects, the rest strings."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return str(value)


def fail(error: "MMError") -> int:
    """Print an error and the line that helps; give its exit code."""
    say(f"error: {error.message}")
    if error.fix:
        say(f"fix: {error.fix}")
    return error.exit_code


def size(num_bytes: float) -> str:
    """Bytes as people write them: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def in_time(seconds: float) -> str:
    """A duration as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def percent(part: float, whole: float) -> str:
    """A share in percent with one decimal; of nothing it is 0.0%."""
    return f"{100 * part / whole if whole else 0:.1f}%"


def table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], *, left: Container[int] | None = None
) -> None:
    """Print a table to stdout. left: columns that are aligned left, by default the first one and, from the third on, those
    without a name (bars)."""
    from rich.console import Console
    from rich.table import Table

    names, rows = list(columns), list(rows)
    if not rows:
        return
    grid = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    grid.show_header = any(names)
    for index, name in enumerate(names):
        is_left = index in left if left is not None else index == 0 or (not name and index > 1)
        grid.add_column(name, justify="left" if is_left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    Console(highlight=False, markup=False).print(grid)


@contextmanager
def progress(label: str, *, unit: str = "bytes", quiet: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, a plain line every 10 s elsewhere; yields `update(done, total)`."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            amount,
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        with bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        last = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= 10:
                last = time.monotonic()
                amount = f"{size(done)} of {size(total)}" if unit == "bytes" else f"{done:,} of {total:,} {unit}"
                say(f"{label}: {amount} ({percent(done, total)})")

        yield update


class PackWatch:
    """Adds rows, rows set aside and rates to the progress of a pack: on a terminal in the bar, else in the plain lines."""

    def __init__(self, label: str, *, quiet: bool = False):
        self._label = label
        self._quiet = quiet
        self._start = time.monotonic()
        self._told = self._start
        self._rows = self._tokens = self._left_out = 0
        self._first_tokens: int | None = None
        self._first_bytes: int | None = None

    def _begin(self, done: int) -> None:
        if self._first_bytes is None:  # what an earlier pack had done is no speed of this one
            self._first_bytes = done

    def watch(self, rows: int, tokens: int, left_out: int) -> None:
        """What came of the inputs so far."""
        self._rows, self._tokens, self._left_out = rows, tokens, left_out
        if self._first_tokens is None:
            self._first_tokens = tokens

    def words(self, done: int, total: int) -> str:
        """Rows, rates since the beginning of this run, the time left and what was set aside."""
        seconds = max(time.monotonic() - self._start, 1e-3)
        rate = (done - (self._first_bytes or 0)) / seconds
        tokens = (self._tokens - (self._first_tokens or 0)) / seconds
        left = f", {in_time((total - done) / rate)} left" if rate > 0 and done < total else ""
        aside = f", {self._left_out:,} set aside" if self._left_out else ""
        return f"{self._rows:,} rows{aside}, {rate / 1e6:.1f} MB/s, {tokens:,.0f} tokens/s{left}"

    @contextmanager
    def progress(self) -> Iterator[Callable[[int, int], None] | None]:
        """As `progress`, with these words."""
        if self._quiet:
            yield None
        elif sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(binary_units=False))
            bar = Progress(*columns, TextColumn("{task.fields[words]}"), console=Console(stderr=True), transient=True)
            with bar:
                task = bar.add_task(self._label, total=None, words="")

                def update(done: int, total: int) -> None:
                    self._begin(done)
                    bar.update(task, completed=done, total=total, words=self.words(done, total))

                yield update
        else:
            yield self._line

    def _line(self, done: int, total: int) -> None:
        self._begin(done)
        if time.monotonic() - self._told >= 10:
            self._told = time.monotonic()
            say(f"{self._label}: {percent(done, total)} of {size(total)}, {self.words(done, total)}")


def next_command(command: str) -> None:
    """The last line of a command: what people usually do next."""
    say(f"next: {command}")


# --- fetch


def fetch_plan_values(to_do: "FetchPlan") -> dict[str, Any]:
    """A plan for programs."""
    from mmdata.hub import catalog

    files = [
        {
            "name": item.want.name,
            "stage": item.want.stage,
            "state": item.state,
            "action": item.action,
            "num_bytes": item.content.num_bytes if item.content else None,
            "get_bytes": item.get_bytes,
            "num_rows": item.want.known.num_rows if item.want.known else None,
            "max_len": item.want.known.max_len if item.want.known else None,
            "revision": item.revision,
            "commit": item.commit,
            "error": item.error and item.error.message,
        }
        for item in to_do.items
    ]
    return {
        "out": str(to_do.options.out),
        "source": to_do.options.source,
        "files": files,
        "get_bytes": to_do.get_bytes,
        "free_bytes": to_do.free_bytes,
        "licence": catalog.LICENCE,
        "warnings": list(to_do.warnings),
    }


def print_fetch_plan(to_do: "FetchPlan") -> None:
    """Say what will be fetched, how large it is, what is free, under which licence."""
    from mmdata.hub import catalog

    for item in to_do.items:
        amount = size(item.content.num_bytes) if item.content else "-"
        rest = f", {size(item.get_bytes)} to fetch" if item.action == "get" else ""
        at = f" at {item.commit[:12]}" if item.commit else ""
        say(f"{item.state:8} {item.want.name} ({amount}{rest}){at}")
    for warning in to_do.warnings:
        say(f"note: {warning}")
    if to_do.get_bytes:
        say(f"licence: {catalog.LICENCE}")
        say(
            f"to fetch: {size(to_do.get_bytes)} into {to_do.options.out}, {size(to_do.free_bytes)} free; `mm pack` needs about as much again"
        )
    if to_do.get_bytes > 256_000_000 and to_do.options.connections == 1:
        say("tip: `--connections 4` is faster where each connection is slow")


def print_fetched(outcomes: list["FetchOutcome"], out: Path, seconds: float) -> None:
    """Print what became of each file, the sum, and the next command."""
    for outcome in outcomes:
        if not outcome.error:
            again = f", {outcome.failures} interruptions" if outcome.failures else ""
            rows = f"{outcome.num_lines:,} lines, " if outcome.name.endswith(".jsonl") else ""
            result(f"{outcome.status} {out / outcome.name}: {rows}{size(outcome.num_bytes)}{again}")
        for warning in outcome.warnings:
            say(f"note: {warning}")
    received = sum(outcome.received_bytes for outcome in outcomes)
    say(
        f"{sum(not o.error for o in outcomes)} of {len(outcomes)} files are here; received {size(received)} in {seconds:.1f} s"
    )
    data = [str(out / o.name) for o in outcomes if not o.error and o.name.endswith(".jsonl")]
    if data:
        next_command("mm pack" + ("" if out == DATA_DIR else f" {' '.join(data)} --tokenizer {out / 'tokenizer'}"))


def print_overview(rows: list["FileState"], as_json: bool) -> None:
    """Print the known files and their state, then what there is to know about them."""
    if as_json:
        return print_json(rows)
    columns = ("name", "stage", "state", "size", "rows", "max-len")
    shown = [
        (
            row.name,
            row.stage,
            row.state,
            size(row.num_bytes) if row.num_bytes else "?",
            row.num_rows or "?",
            row.max_len or "",
        )
        for row in rows
    ]
    table("", columns, shown)
    for row in rows:
        if row.note:
            result(f"{row.name}: {row.note}")
    return None


def print_cleaned(num_files: int, num_bytes: int, as_json: bool) -> None:
    """Print what `--clean` removed."""
    if as_json:
        return print_json({"num_files": num_files, "num_bytes": num_bytes})
    return result(f"removed {num_files} files of unfinished downloads, {size(num_bytes)}")


@contextmanager
def fetch_progress(*, quiet: bool) -> Iterator[Callable[[str, int, int, int, int], None] | None]:
    """Two bars on a terminal, the file's and the sum's, with speed and time left; a plain line every 10 s elsewhere."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            one, everything, shown = bar.add_task(""), bar.add_task("all files"), ""

            def draw(name: str, done: int, total: int, all_done: int, all_total: int) -> None:
                nonlocal shown
                if name != shown:
                    shown = name
                    bar.reset(one, description=name)
                bar.update(one, completed=done, total=total)
                bar.update(everything, completed=all_done, total=all_total)

            yield draw
    else:
        start = last = time.monotonic()
        first = -1

        def write(name: str, done: int, total: int, all_done: int, all_total: int) -> None:
            nonlocal last, first
            first = all_done if first < 0 else first
            if time.monotonic() - last >= 10:
                last = time.monotonic()
                rate = max(all_done - first, 1) / (last - start)
                left = f"{size(rate)}/s, {(all_total - all_done) / rate:.0f} s left in all"
                say(f"{name}: {size(done)} of {size(total)} ({percent(done, total)}), {left}")

        yield write


# --- rows and datasets


def print_validation(found: "Validation") -> None:
    """A file's kind and counts, then a table of reasons with the first places, and what helps."""
    from mmdata.encode.rows import REASONS

    bad = found.num_rows - found.num_good
    result(f"{found.path}: {found.num_rows:,} rows, kind {found.kind}; {found.num_good:,} good, {bad:,} cannot be used")
    if found.reasons:
        table(
            "",
            ("reason", "rows", "share", "first lines"),
            (
                (
                    reason,
                    count,
                    percent(count, found.num_rows),
                    ", ".join(str(place.line) for place in found.places[reason]),
                )
                for reason, count in found.reasons.most_common()
            ),
        )
        for reason, _ in found.reasons.most_common():
            place = found.places[reason][0]
            result(f"{reason}: {REASONS[reason]}" + (f" (line {place.line}: {place.detail})" if place.detail else ""))
    if found.extra_keys:
        result("keys ignored: " + ", ".join(f"{key} ({count:,})" for key, count in found.extra_keys.most_common(10)))
    if found.control_strings:
        strings = ", ".join(f"{text} ({count:,})" for text, count in found.control_strings.most_common(10))
        result(f"control strings in content of {found.num_rows_with_control:,} rows, packed as plain text: {strings}")


def print_packed(packed: "PackResult", tell: Callable[[str], None] = result) -> None:
    """What `mm pack` made of its rows, in two or three lines."""
    from mmdata.encode.rows import HELP

    if packed.up_to_date:
        tell(f"{packed.out} is up to date: {packed.kept:,} rows, {packed.tokens:,} tokens")
        return
    left_out = ", ".join(
        f"{count:,} {reason}" for reason, count in sorted(packed.left_out.items(), key=lambda x: -x[1])
    )
    tell(
        f"kept {packed.kept:,} of {packed.rows:,} rows"
        + (f"; left out {packed.rows - packed.kept:,} ({left_out}), see {packed.out / 'rejected'}" if left_out else "")
    )
    for reason, tokens in packed.cut.items():
        tell(f"cut {tokens:,} of {packed.tokens_in:,} tokens: {reason}")
    if packed.control_strings:
        often = sorted(packed.control_strings.items(), key=lambda item: (-item[1], item[0]))[:10]
        more = f" and {len(packed.control_strings) - 10:,} others" if len(packed.control_strings) > 10 else ""
        strings = ", ".join(f"{text} ({count:,})" for text, count in often)
        tell(f"control strings in content, packed as plain text: {strings}{more}")
    if packed.parts_left is not None:
        tell(
            f"packed this shard of {packed.out} in {packed.seconds:.1f} s; {packed.parts_left:,} parts of others are left"
        )
        return
    samples = ", ".join(f"{count:,} of {bucket}" for bucket, count in sorted(packed.samples.items()) if count)
    noun, fill = ("pairs", "") if packed.kind == "pair" else ("packs", f"fill {100 * packed.fill:.1f}%, ")
    tell(
        f"wrote {packed.out}: {packed.tokens:,} tokens, {percent(packed.loss_tokens, packed.tokens)} trained, "
        f"{noun} {samples}, {fill}{packed.val_rows:,} rows for val, in {packed.seconds:.1f} s"
    )
    for reason in packed.left_out:
        say(f"{reason}: {HELP[reason]}")


def print_estimate(found: "Estimate") -> None:
    """What `mm pack --plan` foresees, a line a length limit."""
    names = ", ".join(found.inputs)
    result(
        f"{names}: about {found.rows:,} rows of kind {found.kind} in {size(found.bytes)}"
        f" (read {size(found.read_bytes)}); {found.rows_left_out:,} cannot be used"
    )
    head = ["max-len", "tokens", "trained", "padding", "cut rows", "too long", "disk", "time", "steps an epoch"]
    lines = [
        [
            f"{o.max_len:,}",
            f"{o.tokens / 1e6:,.1f}M",
            percent(o.loss_tokens, o.tokens),
            f"{100 * o.padding:.2f}%",
            f"{o.rows_cut:,}",
            f"{o.rows_too_long:,}",
            size(o.disk_bytes),
            in_time(o.seconds),
            f"{o.steps_per_epoch:,}" if o.steps_per_epoch else "-",
        ]
        for o in found.outlooks
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    for line in (head, *lines):
        result("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    say(
        f"{found.workers} workers, {found.encoder}; a step takes {found.batch_tokens or 0:,} tokens; nothing was written"
    )


# --- samples


def show_dataset(directory: Path, index: int | None, split: str, ids: bool, as_json: bool) -> None:
    """Print one sample of a packed dataset, or with `as_json` and no index every source row."""
    from mmdata.errors import UsageError
    from mmdata.shards.dataset import open_dataset, sample_rows, source_rows
    from mmdata.tokenizer.tokenizer import Tokenizer

    dataset = open_dataset(directory)
    if as_json and index is None:
        for record in source_rows(dataset, split):
            sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
        sys.stdout.flush()
        return
    name = "train" if split == "all" else split
    number = index or 0
    try:
        records = sample_rows(dataset, name, number)
    except IndexError:
        samples = dataset.split(name).num_samples()
        raise UsageError(f"{directory}: --index {number}, but {name} has {samples:,} samples", "count from 0") from None
    if as_json:
        print_json(records)
        return
    loaded = Tokenizer.load(dataset.tokenizer_dir)
    for record in records:
        result(f"{record['file']} line {record['line']}")
        for ids_key, mask_key, title in SHOWN_PARTS:
            if ids_key in record:
                mask = record.get(mask_key) or [0] * len(record[ids_key])
                print_tokens(loaded.decode, record[ids_key], mask, title, ids)
    say(f"sample {number} of {dataset.split(name).num_samples():,} in {name}; trained tokens are {TRAINED_LOOK}")
    next_command(f"mm show {directory} --split {name} --index {number + 1}")


def show_file(path: Path, index: int, tokenizer: Path, max_len: int, ids: bool, as_json: bool) -> None:
    """Print one row of a jsonl file as it would be packed, or why it would be left out."""
    from mmdata.encode.encoder import RowEncoder, preview
    from mmdata.encode.rows import REASONS, find_kind, iter_lines
    from mmdata.errors import UsageError
    from mmdata.tokenizer.tokenizer import Tokenizer

    line = next(islice(iter_lines(path), index, None), None)
    if line is None:
        raise UsageError(f"{path}: --index {index}, but it has fewer rows", "count from 0")
    kind = find_kind(path)
    shown = preview(line.raw, RowEncoder(Tokenizer.load(tokenizer), max_len=max_len), kind=kind)
    place: dict[str, Any] = {"file": str(path), "line": line.number}
    if shown.bad:
        record = {**place, "reason": shown.bad.reason, "detail": shown.bad.detail}
        if as_json:
            print_json(record)
            return
        result(f"{path} line {line.number} would be left out: {shown.bad}")
        say(f"fix: {REASONS[shown.bad.reason]}")
    else:
        if as_json:
            print_json([{**place, **record} for record in encoded_records(shown.encoded.sequences)])
            return
        cut = "".join(f", {count:,} cut: {reason}" for reason, count in shown.encoded.cut.items())
        result(f"{path} line {line.number}: {shown.encoded.num_tokens:,} tokens{cut}")
        if ids:
            for record in encoded_records(shown.encoded.sequences):
                for name, values in record.items():
                    result(f"{name}: {' '.join(map(str, values))}")
    for number, segments in enumerate(shown.segments):
        title = ("chosen", "rejected")[number] if kind == "pair" else ""
        print_runs([(segment.text, segment.is_trained) for segment in segments], title)
    say(f"trained tokens are {TRAINED_LOOK}")


def encoded_records(sequences: "Sequences") -> list[dict[str, list[int]]]:
    """Ids and loss masks of a row's sequences, or of a pair, under the names `mm show --json` uses."""
    from mmdata.encode.sequences import PairSequence
    from mmdata.shards.dataset import loss_mask

    records = []
    for one in sequences:
        if not isinstance(one, PairSequence):
            records.append({"input_ids": one.ids.tolist(), "loss_mask": one.loss_mask.tolist()})
            continue
        record = {"prompt_ids": one.prompt.tolist()}
        for name, ids, spans in (
            ("chosen", one.chosen, one.chosen_spans),
            ("rejected", one.rejected, one.rejected_spans),
        ):
            record |= {f"{name}_ids": ids.tolist(), f"{name}_mask": loss_mask(spans.reshape(-1), len(ids)).tolist()}
        records.append(record)
    return records


SHOWN_PARTS = (
    ("input_ids", "loss_mask", ""),
    ("prompt_ids", "", "prompt"),
    ("chosen_ids", "chosen_mask", "chosen"),
    ("rejected_ids", "rejected_mask", "rejected"),
)


TRAINED_LOOK = "green, or between ⟦ and ⟧ where there is no colour"


def print_tokens(
    decode: Callable[[list[int]], str], ids: list[int], mask: list[int], title: str, with_ids: bool
) -> None:
    """Print decoded tokens, trained runs marked; with ids on a line of their own."""
    runs = [
        (decode([token for token, _ in run]), bool(trained))
        for trained, run in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    ]
    print_runs(runs, title)
    if with_ids:
        result(f"ids: {' '.join(map(str, ids))}")


def print_runs(runs: Iterable[tuple[str, bool]], title: str) -> None:
    """Print stretches of text, the trained ones green, or marked where there is no colour."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False, soft_wrap=True)
    text = Text()
    if title:
        text.append(f"{title}: ", style="bold")
    for is_trained, pieces in groupby(runs, key=lambda run: run[1]):
        piece = "".join(text for text, _ in pieces)
        if console.is_terminal and not console.no_color:
            text.append(piece, style="green" if is_trained else "")
        else:
            text.append(f"⟦{piece}⟧" if is_trained else piece)
    console.print(text)


def print_measured(measured: "Sequence[Measured]", together: list[dict[str, Any]], *, is_comparison: bool) -> None:
    """The report on each path as tables, then warnings on all together and, where two are compared, their differences."""
    from mmdata.stats.report.compare import side_by_side
    from mmdata.stats.report.data import sections_of, warned
    from mmdata.stats.report.page import Section

    for one in measured:
        result(f"{one.path}: {one.figures['kind']} rows")
        print_sections(sections_of(one))
    blocks = [warned(together), *([side_by_side(measured[0], measured[1])] if is_comparison else [])]
    print_sections([Section("", "", blocks)])
    if not any("tokens" in one.figures for one in measured):
        say("name a --tokenizer to see tokens")


def print_sections(sections: "Iterable[Section]") -> None:
    """Print the tables of a report, each section below its title."""
    from mmdata.stats.report import page

    translation = page.Translation("en")
    for section in sections:
        printed = [draw for block in section.blocks for draw in _drawings(block, translation)]
        if printed and section.title:
            result(f"-- {translation(section.title)}")
        for draw in printed:
            draw()


def _drawings(block: "Block | list[Block]", translation: "Translation") -> "Iterator[Callable[[], None]]":
    """What prints a block of a report: nothing for what a terminal cannot show, such as curves."""
    from mmdata.stats.report import page

    if isinstance(block, page.Table):
        rows = [[_cell(cell) for cell in block.texts(row, translation)] for row in block.rows]
        rows = (
            [[("* " if i in block.marked else "  ") + row[0], *row[1:]] for i, row in enumerate(rows)]
            if block.marked
            else rows
        )
        names = [translation(column.name) for column in block.columns]
        left = [i for i, column in enumerate(block.columns) if not column.is_number]
        title = translation(block.title) + (" (* differs)" if block.marked else "")
        yield lambda: table(title.strip(), names, rows, left=left)
    elif isinstance(block, page.Cards):
        cards = [(translation(label), value, translation(hint)) for label, value, hint in block.items]
        yield lambda: table("", ("", "", ""), cards)
    elif isinstance(block, page.Callouts):
        for line in block.lines:
            yield lambda line=line: result(f"! {translation(line)}")
    elif isinstance(block, page.Note) and block.in_terminal:
        yield lambda: result(f"({translation(block.text)})")
    elif isinstance(block, page.Plot) and block.in_terminal:
        yield from _drawings(block.as_table(), translation)
    elif isinstance(block, page.Heading):
        yield lambda: result(translation(block.text))
    elif isinstance(block, list | page.Grid) or (isinstance(block, page.Fold) and block.in_terminal):
        inner = block if isinstance(block, list) else block.blocks
        drawings = [draw for each in inner for draw in _drawings(each, translation)]
        if isinstance(block, page.Fold) and drawings:
            yield lambda: result(f"{translation(block.title)}:")
        yield from drawings


def _cell(text: str) -> str:
    """A cell as one line of at most 100 characters."""
    line = " ".join(text.split()) or repr(text)[1:-1]
    return line if len(line) <= 100 else f"{line[:99]}…"


# --- the demo


def print_scores(found: dict[str, Any]) -> None:
    """What `mm eval` measured."""
    for dataset, buckets in found.get("datasets", {}).items():
        is_pairs = "accuracy" in buckets["all"]
        columns = ["bucket", "sequences", "tokens", "loss", "bits/byte", "perplexity"]
        columns += ["ranked right", "margin"] if is_pairs else []
        rows = []
        for name, figures in buckets.items():
            row = [f"{name}", int(figures["sequences"]), int(figures["tokens"]), f"{figures['loss']:.4f}"]
            row += [f"{figures['bits_per_byte']:.4f}", f"{figures['perplexity']:.2f}"]
            rows.append(row + ([percent(figures["accuracy"], 1), f"{figures['margin']:.2f}"] if is_pairs else []))
        table(f"{dataset} ({' and '.join(found['splits'])} split)", columns, rows)
    if rows := found.get("noisiest"):
        shown = [(f"{row['file']} line {row['line']}", row["tokens"], f"{row['loss']:.3f}") for row in rows]
        table("least likely rows", ["row", "tokens", "nats a token"], shown)
    if written := found.get("per_sequence"):
        result(f"wrote {written['file']}: {written['lines']:,} lines, one a sequence")
    for name, what in (("questions", "answered word for word"), ("choices", "chosen right")):
        if name in found:
            _print_asked(found[name], what)
    for task, figures in found.get("lm_eval", {}).items():
        result(f"{task}: {', '.join(f'{metric} {value:.4f}' for metric, value in figures.items())}")
    say(f"measured {found['model']} in {found['seconds']:.1f} s")


def _print_asked(asked: dict[str, Any], what: str) -> None:
    """How a file of questions went, with the first ones that went wrong."""
    per_byte = asked.get("accuracy_per_byte")
    more = f"; by log-probability a byte {percent(per_byte, 1)}" if per_byte is not None else ""
    result(f"{asked['file']}: {percent(asked['accuracy'], 1)} of {asked['asked']:,} questions {what}{more}")
    for outcome in [outcome for outcome in asked["outcomes"] if not outcome.is_right][:3]:
        said = " ".join(outcome.said.split()) or "nothing"
        say(f"  line {outcome.line}: {outcome.question[:60]!r} -> {said[:60]!r}, expected {outcome.expected[:60]!r}")


def print_demo(figures: dict[str, Any], out: Path) -> None:
    """The demo's figures stage by stage, five answers of its last model, and where everything is."""
    columns = ("stage", "val bits/byte", "exact answers", "whole sentences", "pairs ranked right", "minutes")
    rows = [
        (
            stage["stage"],
            f"{stage['bits_per_byte']:.3f}" if "bits_per_byte" in stage else "-",
            percent(stage["exact"], 1),
            percent(stage["sentences"], 1),
            percent(stage["preference_accuracy"], 1),
            f"{stage['minutes']:.1f}",
        )
        for stage in figures["stages"]
    ]
    result()
    table(f"{figures['questions']} held-out questions, none of them trained on", columns, rows)
    result()
    for shown in figures["stages"][-1]["transcript"]:
        for message in shown["messages"]:
            result(f"{'you' if message['role'] == 'user' else ' mm'}: {message['content']}")
        result(f" mm: {shown['answer']}" + ("" if shown["is_exact"] else f"    (expected: {shown['expected']})"))
        result()
    result(f"made in {figures['minutes']:.1f} minutes, all under {out}:")
    result(
        "  data/ the corpus, its tokenizer and what is held out; shards/ packed; runs/ trained; demo.json these figures"
    )
