"""`mm stats`: measure packed datasets and jsonl files, and print the figures or write them as an HTML report."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdata.commands.options import REPORT, Html, Json, Lang, TokenizerDir, Workers, is_dataset, optional_tokenizer
from mmdata.commands.terminal import (
    fail,
    next_command,
    print_json,
    print_sections,
    progress,
    result,
    same_command,
    say,
    size,
)
from mmdata.errors import MMError, UsageError
from mmdata.io.options import READING, ReadOptions
from mmdata.options import Option
from mmtrain.shapes import MODEL_SHAPES, shape_of

if TYPE_CHECKING:
    from mmdata.stats.stats import Measured
    from mmdata.stats.tally import Figures


def stats(
    paths: Annotated[list[Path], typer.Argument(metavar="DIR|FILE...", help="Packed datasets or files of rows.")],
    tokenizer: TokenizerDir = None,
    html: Html = None,
    *,
    read: ReadOptions,
    compare: Annotated[
        Path | None, Option("Another dataset or file, to compare with the one named.", REPORT, metavar="DIR|FILE")
    ] = None,
    exact: Annotated[bool, Option("Tokenize every row of a file instead of a sample of a large one.", REPORT)] = False,
    losses: Annotated[
        Path | None,
        Option("File written by `mm eval --per-sequence`; also show the rows of highest loss.", REPORT, metavar="FILE"),
    ] = None,
    where: Annotated[
        str | None,
        Option("Describe only the rows for which this condition holds (docs/frames.md).", READING, metavar="CONDITION"),
    ] = None,
    lang: Lang = "en",
    max_bad: Annotated[
        str | None,
        Option(
            "End with an error if a larger share of a file's rows cannot be used; also by reason: '1%,not json=0'.",
            READING,
            metavar="SHARE",
            default_text="50%",
        ),
    ] = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Describe data: counts, lengths, languages, repeats, vocabulary and samples. --html writes them as a page, too.

    Example: mm stats shards/sft_512 --html stats.html    mm stats old.jsonl --compare new.jsonl
    """
    from mmdata.pack.options import parse_budget
    from mmdata.stats.figures import read_losses
    from mmdata.stats.stats import contained

    every = [*paths, *([compare] if compare else [])]
    check_paths(every, is_comparison=compare is not None, exact=exact)
    budget = parse_budget(max_bad)
    options = {
        "workers": workers or os.cpu_count() or 1,
        "losses": read_losses(losses) if losses else None,
        "where": where,
    }
    of_files = {"tokenizer_dir": optional_tokenizer(tokenizer), "is_exact": exact, "read": read}
    measured = [measure(path, options, of_files, quiet=as_json) for path in every]
    overlaps = contained(measured)
    if html:
        write_page(html, measured, overlaps, lang, is_comparison=compare is not None)
    show = print_values if as_json else print_measured
    show(measured, overlaps, is_comparison=compare is not None)
    if html:
        say(f"wrote {html} ({size(html.stat().st_size)})")
    elif not as_json:
        next_command(same_command(add="--html stats.html"))
    end_if_unusable(measured, budget, read.kind)


def check_paths(paths: Sequence[Path], *, is_comparison: bool, exact: bool) -> None:
    """Raise UsageError if an option does not fit the datasets and files to describe."""
    if is_comparison and len(paths) != 2:
        problem = f"--compare puts two datasets side by side, {len(paths) - 1} are named"
        raise UsageError(problem, "mm stats ONE --compare OTHER")
    if exact and not any(path.is_file() for path in paths):
        raise UsageError("--exact is for files of rows; a packed dataset's figures are exact", "leave --exact out")


def measure(path: Path, options: "Figures", of_files: "Figures", *, quiet: bool) -> "Measured":
    """Measure a packed dataset or a file of rows, and show progress. `of_files`: the further options for a file."""
    from mmdata.stats.stats import measure_dataset, measure_file

    with progress(f"read {path}", quiet=quiet) as update:
        if is_dataset(path):
            measured = measure_dataset(path, **options, progress=update)
        else:
            measured = measure_file(path, **options, **of_files, progress=update)
    add_models(measured.figures)
    return measured


def end_if_unusable(
    measured: "Sequence[Measured]", budget: tuple[float | None, dict[str, float]], kind: str | None
) -> None:
    """End the command with an error if more of a file's rows than the budget allows (see parse_budget) cannot be used;
    name each such file's error. kind: the kind of rows that the user named."""
    from mmdata.encode.rows import MOST_FAILED, check_budget

    limit, limits = budget
    failures = []
    for one in measured:
        try:
            if one.path.is_file():
                shares = MOST_FAILED if limit is None else limit, limits
                check_budget(one.figures["left_out"], one.figures["rows"], *shares, kind=kind)
        except MMError as error:
            failures.append(fail(error))
    if failures:
        raise typer.Exit(failures[0])


def add_models(figures: "Figures") -> None:
    """Add to the figures of documents, as "models", what known models are with this vocabulary and these tokens."""
    if figures["kind"] != "document" or "vocabulary" not in figures:
        return
    shapes = {
        name: shape_of(name, figures["vocabulary"]["size"]) for name, known in MODEL_SHAPES.items() if known.vocab_size
    }
    figures["models"] = {
        name: {"parameters": shape.num_params, "tokens_per_parameter": figures["tokens"] / shape.num_params}
        for name, shape in shapes.items()
    }


def write_page(
    html: Path, measured: "Sequence[Measured]", overlaps: "list[Figures]", lang: str, *, is_comparison: bool
) -> None:
    """Write the report on all datasets and files as a page; see print_measured for the arguments."""
    from mmdata.io.files import write_text
    from mmdata.stats.report.compare import compare_page
    from mmdata.stats.report.data import dataset_page

    about = {"lang": lang, "others": overlaps, "command": same_command()}
    write_text(html, compare_page(*measured, **about) if is_comparison else dataset_page(measured, **about))


def print_values(measured: "Sequence[Measured]", overlaps: "list[Figures]", *, is_comparison: bool) -> None:
    """Print the figures as JSON, for `--json`: by path; of a comparison also "differences", and any "warnings"."""
    from mmdata.stats.report.compare import differences

    values: Figures = {str(one.path): one.figures for one in measured}
    if is_comparison:
        values["differences"] = differences(measured[0].figures, measured[1].figures)
    print_json(values | ({"warnings": overlaps} if overlaps else {}))


def print_measured(measured: "Sequence[Measured]", overlaps: "list[Figures]", *, is_comparison: bool) -> None:
    """Print a report on each dataset or file, then the warnings about rows that several of them share. is_comparison:
    `measured` has two entries, whose differences follow."""
    from mmdata.stats.report.compare import side_by_side
    from mmdata.stats.report.data import sections_of, warned
    from mmdata.stats.report.page import Section

    for one in measured:
        result(f"{one.path}: {one.figures['kind']} rows")
        print_sections(sections_of(one))
    blocks = [warned(overlaps), *([side_by_side(measured[0], measured[1])] if is_comparison else [])]
    print_sections([Section("", "", blocks)])
    if not any("tokens" in one.figures for one in measured):
        say("name a --tokenizer to see tokens")
