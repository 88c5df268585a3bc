"""Output to the terminal: results go to stdout; messages, progress and errors go to stderr. Only the commands use this
module. Rich is imported where it is needed, so that `mm --help` starts fast."""

import io
import json
import os
import re
import shlex
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mmdata.errors import MMError, cut_to, shown, wrapped

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from mmdata.io.files import Progress
    from mmdata.stats.report.page import Block, Section, Translation

PIPE_WIDTH = 120  # characters in a line of a table where stdout is no terminal
BAR_WIDTH = 12  # characters of a bar of progress
FIGURE_WIDTH = 16  # characters in a figure at most, in a table too wide for the terminal
CELL_WIDTH = 100  # a terminal's cells for a text in a report's table; longer ones are cut
# Seconds before the first line of progress, and between the next ones, where stderr is no terminal.
SOON_S, EVERY_S = 1.5, 10.0
WORKING_S = 1.0  # seconds without any output after which a command says that it works
SWITCHES = ("--plan", "--dry-run", "--json", "--resume")  # options without a value that are taken from a command line
MOST_KEYS = 10  # ignored keys of rows in a line


@dataclass
class Output:
    """What the running command prints to stderr besides errors: nothing if `quiet`, more if `verbose`. is_checking: the
    command checks its options and does nothing else."""

    quiet: bool = False
    verbose: bool = False
    is_checking: bool = False


OUTPUT = Output()


@contextmanager
def output(*, quiet: bool, verbose: bool, is_silent: bool = False) -> Iterator[None]:
    """Context manager of a command with -q or -v. With `verbose` its time and peak memory are printed at the end,
    and `fail` prints tracebacks; this holds until the next command. Until its first output a line says that it works,
    but not if `is_silent`."""
    OUTPUT.quiet, OUTPUT.verbose = quiet, verbose
    begun = time.monotonic()
    try:
        with nullcontext() if is_silent or OUTPUT.is_checking else working():
            yield
    finally:
        OUTPUT.quiet = False
        if verbose:
            say(f"took {in_time(time.monotonic() - begun)}{_peak_memory()}")


@contextmanager
def checking() -> Iterator[None]:
    """Context manager in which commands check their options and do nothing else."""
    OUTPUT.is_checking = True
    try:
        yield
    finally:
        OUTPUT.is_checking = False


def _peak_memory() -> str:
    """Return the peak memory of the process as text to append; empty on systems that do not tell it."""
    with suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return f" and {size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)} of memory"
    return ""


def say(text: str = "", *, is_styled: bool = False) -> None:
    """Print one line to stderr, unless the command is quiet; on a terminal it is wrapped between words. is_styled: the
    text has escapes for colours of its own."""
    if not OUTPUT.quiet:
        print(_wrapped(text if is_styled else shown(text), sys.stderr), file=sys.stderr, flush=True)


def result(text: str = "") -> None:
    """Print one line to stdout; on a terminal it is wrapped between words."""
    print(_wrapped(shown(text), sys.stdout), flush=True)


def _wrapped(text: str, stream: TextIO) -> str:
    """Return a line in pieces that fit the terminal that `stream` is; unchanged if it is none, if the line has
    newlines, or if it names a command to copy."""
    if not stream.isatty() or "\n" in text or text.startswith(("next: ", "fix: ")):
        return text
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    return wrapped(text, shutil.get_terminal_size().columns, indent)


def next_command(command: str) -> None:
    """Print the command that usually follows, as "next: COMMAND" to stderr. Most commands end with it.

    Where the shell does not find `mm`, as after `make demo`, its words `mm` are replaced by the path of this program.
    """
    program = Path(sys.argv[0])
    if program.name == "mm" and program.is_file() and not shutil.which("mm"):
        command = re.sub(r"\bmm (?=[a-z])", f"{shlex.quote(os.path.relpath(program))} ", command)
    say(f"next: {command}")


def same_command(*without: str, add: str = "") -> str:
    """Return this process's command line without the options in `without` and their values, and with `add` at the
    end."""
    return " ".join(filter(None, ["mm", shlex.join(without_option(sys.argv[1:], *without)), add]))


def without_option(arguments: Sequence[str], *names: str) -> list[str]:
    """Return command-line arguments without any `NAME VALUE` (two arguments) and `NAME=VALUE` (one) of the options
    `names`; of those in SWITCHES only `NAME`."""
    kept = []
    words = iter(arguments)
    for word in words:
        if word in names:
            if word not in SWITCHES:
                next(words, None)
        elif word.partition("=")[0] not in names:
            kept.append(word)
    return kept


def print_json(value: Any) -> None:
    """Print `value` as indented JSON to stdout, as `json_text` writes it."""
    result(json_text(value, indent=2))


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return `value` as JSON. Dataclasses become objects; paths and other types become strings. Characters that are not
    ASCII are escaped if stdout has no Unicode encoding."""
    is_ascii = not (sys.stdout.encoding or "").lower().startswith("utf")
    return json.dumps(value, ensure_ascii=is_ascii, indent=indent, default=plain)


def plain(value: Any) -> Any:
    """Convert a value that json cannot write: a dataclass to a dictionary of its fields, others to `str(value)`."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return str(value)


def fail(error: MMError) -> int:
    """Print an error and, if it has one, its fix to stderr, with -v also its traceback. Return its exit code."""
    if OUTPUT.verbose:
        traceback.print_exception(error)
    for line in (f"error: {error.message}", *([f"fix: {error.fix}"] if error.fix else [])):
        print(_wrapped(shown(line), sys.stderr), file=sys.stderr, flush=True)
    return error.exit_code


# --- how figures are worded


def size(num_bytes: float) -> str:
    """Format a number of bytes with its unit, in powers of 1000: 12 B, 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def in_time(seconds: float) -> str:
    """Format a duration in seconds with a suitable unit: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def percent(part: float, whole: float) -> str:
    """Format `part` / `whole` in percent with one decimal: 12.5%. Returns 0.0% if `whole` is 0."""
    return f"{100 * part / whole if whole else 0:.1f}%"


def counted(counts: Iterable[tuple[str, int]]) -> str:
    """Format names with their counts in brackets: a (12), b (3)."""
    return ", ".join(f"{name} ({count:,})" for name, count in counts)


def ignored_keys(counts: Mapping[str, int]) -> Iterator[str]:
    """Yield a line that names the keys of rows that are ignored, and one that names metadata, if there are any."""
    from mmdata.encode.rows import split_keys

    for title, keys in zip(("keys ignored", "metadata ignored"), split_keys(counts), strict=True):
        if keys:
            more = f" and {len(keys) - MOST_KEYS:,} others" if len(keys) > MOST_KEYS else ""
            yield f"{title}: {counted(list(keys.items())[:MOST_KEYS])}{more}"


def left_out_parts(not_written: Mapping[str, int], unknown_share: float | None) -> Iterator[str]:
    """Yield a line for each reason why the chat template leaves out a part of rows that are used, and one on characters
    that the tokenizer does not know. unknown_share: of the bytes of the texts; None if it knows all."""
    for reason, rows in not_written.items():
        yield f"the chat template leaves out of {rows:,} rows: {reason.removesuffix(' lost')}"
    if unknown_share is not None:
        yield f"unknown characters, which are lost: {100 * unknown_share:.2g}% of the bytes of the texts"


# --- tables and text


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table to stdout, nothing without rows. Integers get thousands separators. columns: their names; without
    any there is no header. The first column and nameless ones from the third on (bars and notes) are aligned left."""
    names = list(columns)
    left = {index for index, name in enumerate(names) if index == 0 or (index > 1 and not name)}
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    if cells:
        _print_grids([_grid(title, names, cells, left)])


def print_sections(sections: "Iterable[Section]") -> None:
    """Print a report to stdout: for each section its title, then its tables, figures and notes. Blocks that a terminal
    cannot show, such as curves, are skipped, and sections of such blocks alone with their title."""
    from mmdata.stats.report.page import Translation

    translation = Translation("en")
    for section in sections:
        printed = [item for block in section.blocks for item in _printed(block, translation)]
        if printed and section.title:
            result(f"-- {translation(section.title)}")
        _print_grids(printed)


def _printed(block: "Block | list[Block]", translation: "Translation") -> "Iterator[str | RichTable]":
    """Yield the lines and tables that show a block of a report, or a list of blocks; nothing for a block that a
    terminal cannot show, such as a curve. translation: gives the texts' language."""
    from mmdata.stats.report import page

    if isinstance(block, page.Table) and block.rows:
        cells = [[_one_line(text) for text in block.texts(row, translation)] for row in block.rows]
        if block.marked:
            cells = [[f"{'* ' if i in block.marked else '  '}{row[0]}", *row[1:]] for i, row in enumerate(cells)]
        names = [translation(column.name) for column in block.columns]
        left = {index for index, column in enumerate(block.columns) if not column.is_number}
        title = translation(block.title) + (f" (* {block.mark})" if block.marked else "")
        yield _grid(title.strip(), names, cells, left)
    elif isinstance(block, page.Cards) and block.items:
        cells = [[translation(label), value, translation(hint)] for label, value, hint in block.items]
        yield _grid("", ["", "", ""], cells, {0, 2})
    elif isinstance(block, page.Callouts):
        yield from (f"! {translation(line)}" for line in block.lines)
    elif isinstance(block, page.Note) and block.in_terminal:
        yield f"({translation(block.text)})"
    elif isinstance(block, page.Heading):
        yield translation(block.text)
    elif isinstance(block, page.Plot) and block.in_terminal:
        yield from _printed(block.as_table(), translation)
    elif isinstance(block, list | page.Grid) or (isinstance(block, page.Fold) and block.in_terminal):
        inner = block if isinstance(block, list) else block.blocks
        printed = [item for each in inner for item in _printed(each, translation)]
        if isinstance(block, page.Fold) and printed:
            yield f"{translation(block.title)}:"
        yield from printed


def _grid(title: str, names: Sequence[str], cells: Iterable[Sequence[str]], left: Container[int]) -> "RichTable":
    """Return a table without ruled lines. names: headers, shown if any is not empty. cells: the rows. left: indices of
    the columns that are aligned left. If it is wider than stdout, its gaps and headers become narrower, bars are left
    out, and figures stay whole."""
    from rich.cells import cell_len
    from rich.table import Table

    columns = [[name, *map(shown, column)] for name, *column in zip(names, *cells, strict=True)]
    width = sum(max(map(cell_len, column)) + 2 for column in columns) - 2
    is_wide = width > (shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH)
    grid = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    grid.show_header = any(names)
    if is_wide:
        grid.padding = (0, 1, 0, 0)
    kept = []
    for index, (name, *column) in enumerate(columns):
        if is_wide and any(column) and set("".join(column)) <= {"█"}:
            continue
        kept.append(column)
        is_whole = is_wide and index not in left and max(map(len, column), default=0) <= FIGURE_WIDTH
        head = name.replace(" ", "\n") if is_whole else name
        grid.add_column(head, justify="left" if index in left else "right", overflow="fold", no_wrap=is_whole)
    for row in zip(*kept, strict=True):
        grid.add_row(*row)
    return grid


def _print_grids(items: "Iterable[str | RichTable]") -> None:
    """Print lines and tables to stdout. If stdout is no terminal, tables are at most PIPE_WIDTH characters wide."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    for item in items:
        result(item) if isinstance(item, str) else console.print(item)


def _one_line(text: str) -> str:
    """Return a text as one line that fits CELL_WIDTH: whitespace is collapsed, a longer text ends with "…"; a text of
    whitespace alone is shown with escapes (\\n)."""
    line = " ".join(text.split()) or repr(text)[1:-1]
    return line if cut_to(line, CELL_WIDTH) == line else f"{cut_to(line, CELL_WIDTH - 1)}…"


def print_styled(pieces: Iterable[tuple[str, str, str]]) -> None:
    """Print text in colours to stdout. Each piece is (text, rich style, replacement for a stdout without colour)."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False, soft_wrap=True)
    is_coloured = console.is_terminal and not console.no_color
    text = Text()
    for piece, style, uncoloured in pieces:
        text.append(shown(piece if is_coloured else uncoloured), style=style if is_coloured else "")
    console.print(text)


# --- progress


@contextmanager
def waiting(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Context manager that prints what its block waits for if it takes longer than WORKING_S, unless `quiet`."""
    timer = threading.Timer(WORKING_S, say, (f"waiting for {what}",))
    timer.daemon = True
    if not quiet:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def working() -> Iterator[None]:
    """Context manager that shows "working" on a terminal if its block, such as an import of torch, has printed nothing
    for WORKING_S; the first output replaces the line."""
    is_first_rank = os.environ.get("RANK", "0") == "0"
    # A command that another one runs writes to streams that are watched already.
    if not (sys.stdout and sys.stderr and sys.stderr.isatty() and is_first_rank) or "write" in vars(sys.stderr):
        yield
        return
    begun, has_printed, write_line = time.monotonic(), threading.Event(), sys.stderr.write

    def note(write: Callable[[str], int], text: str) -> int:
        if not has_printed.is_set():
            has_printed.set()
            write_line("\r\033[2K")
        return write(text)

    def watch() -> None:
        while not has_printed.wait(WORKING_S):
            write_line(f"\rworking, {in_time(time.monotonic() - begun)}")
            sys.stderr.flush()

    streams = sys.stdout, sys.stderr
    for stream in streams:
        setattr(stream, "write", partial(note, stream.write))  # noqa: B010
    thread = threading.Thread(target=watch, name="working", daemon=True)
    thread.start()
    try:
        yield
    finally:
        note(len, "")
        thread.join()
        for stream in streams:
            vars(stream).pop("write", None)


@contextmanager
def meter(*, quiet: bool) -> Iterator[Callable[..., None]]:
    """Show progress on stderr: bars on a terminal, elsewhere a line every EVERY_S seconds. A context manager that
    yields `draw(label, done, total, words, row=0)`, without effect if `quiet`: `done` of `total` units (0: unknown) of
    the work `label` are done; `words` follow the bar, as many of its parts between ", " as fit. Row 1 is a second bar,
    on terminals only."""
    if quiet or OUTPUT.quiet:
        yield lambda *_, **__: None
    elif sys.stderr.isatty():
        from rich.cells import cell_len
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=BAR_WIDTH),
            TextColumn("{task.fields[words]}", markup=False),
        )
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True) as bars:
            tasks: list[Any] = []

            def draw_bar(label: str, done: int, total: int, words: str, row: int = 0) -> None:
                while len(tasks) <= row:
                    tasks.append(bars.add_task("", words=""))
                words = fitting(words, console.width - cell_len(label) - BAR_WIDTH - 2)
                bars.update(tasks[row], description=shown(label), completed=done, total=total or None, words=words)

            yield draw_bar
    else:
        last = time.monotonic() - EVERY_S + SOON_S

        def draw_line(label: str, done: int, total: int, words: str, row: int = 0) -> None:
            nonlocal last
            if row == 0 and time.monotonic() - last >= EVERY_S:
                last = time.monotonic()
                say(f"{label}: {words}")

        yield draw_line


def fitting(words: str, width: int) -> str:
    """Return as many parts of `words`, which are separated by ", ", as fit in `width` cells, at least the first."""
    while cut_to(words, width) != words and ", " in words:
        words = words.rpartition(", ")[0]
    return words


class Rate:
    """The mean rate of a growing count, in units per second since the object was created. The first count passed is
    subtracted, so that what an earlier, interrupted run had done does not raise the rate."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._first: float | None = None

    def per_second(self, done: float) -> float:
        """Return the mean rate up to the count `done`, in units per second; 0 at the first call."""
        self._first = done if self._first is None else self._first
        return (done - self._first) / max(time.monotonic() - self._start, 1e-3)

    def time_left(self, done: float, total: float) -> str:
        """Return the estimated time left as text to append, such as ", 40 s left"; empty if unknown or done."""
        rate = self.per_second(done)
        return f", {in_time((total - done) / rate)} left" if rate > 0 and done < total else ""


@contextmanager
def progress(label: str, *, unit: str = "bytes", quiet: bool = False) -> Iterator["Progress"]:
    """Show the progress of one piece of work unless `quiet`, as a context manager. Yields `update(done, total)`.
    unit: what is counted, such as "samples"; counts of bytes are shown with a suitable unit."""
    rate = Rate()
    with meter(quiet=quiet) as draw:
        draw(label, 0, 0, "")

        def update(done: int, total: int) -> None:
            amount = f"{size(done)} of {size(total)}" if unit == "bytes" else f"{done:,} of {total:,} {unit}"
            draw(label, done, total, f"{amount} ({percent(done, total)}){rate.time_left(done, total)}")

        yield update


def replace_unknown_characters() -> None:
    """Let stdout and stderr print a character that their encoding lacks as "?", instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def take_arguments_as_utf8() -> None:
    """Start this process again in Python's UTF-8 mode if its arguments are UTF-8 and Python has read them as something
    else, as in a C locale with that mode switched off."""
    words = sys.argv[1:]
    if sys.getfilesystemencoding() == "utf-8" or not any("\ud800" <= c <= "\udfff" for word in words for c in word):
        return
    with suppress(UnicodeDecodeError):
        for word in words:
            os.fsencode(word).decode()
        os.environ["PYTHONUTF8"] = "1"  # for processes that are started from here
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
