"""`mm validate`: count the rows of jsonl files, and by reason those that cannot be used; writes nothing. `mm verify`:
check packed datasets against their manifests, and rebuild damaged files with --repair.
"""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdata.commands.options import FILES_HELP, Json, data_files, pack_command
from mmdata.commands.terminal import (
    counted,
    fail,
    ignored_keys,
    left_out_parts,
    next_command,
    percent,
    print_json,
    progress,
    result,
    say,
    table,
)
from mmdata.errors import InputError, MMError, UsageError
from mmdata.io.options import READING, ReadOptions
from mmdata.options import Option
from mmdata.pack.options import parse_budget

if TYPE_CHECKING:
    from mmdata.encode.encoder import RowEncoder
    from mmdata.encode.rows import BadRow
    from mmdata.encode.validate import Validation
    from mmdata.io.lines import Line

MAX_LEN = 2**24  # tokens; no row is longer
MOST_NAMES = 10  # keys, and control strings, to print at most


def validate(
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help=FILES_HELP)] = None,
    on_bad: Annotated[
        str,
        Option("quarantine: count bad rows and continue; fail: stop at the first.", choices=("quarantine", "fail")),
    ] = "quarantine",
    max_bad: Annotated[
        str | None,
        Option(
            "End with an error if a larger share of the rows is bad; also by reason: '1%,not json=0'.",
            metavar="SHARE",
            default_text="5%",
        ),
    ] = None,
    *,
    read: ReadOptions,
    tokenizer: Annotated[
        Path | None,
        Option("Also count what this tokenizer and its chat template leave out of the rows.", READING, metavar="DIR"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Report the kind of rows in each file, and how many rows cannot be used, by reason.

    Example: mm validate data/sft_512.jsonl
    """
    from mmdata.encode.rows import REASONS, asked_for, check_budget
    from mmdata.encode.validate import validate as validate_file
    from mmdata.io import remote
    from mmdata.io.lines import place_of, unit_of

    limit, limits = parse_budget(max_bad)
    encode = row_encoder(tokenizer).encode if tokenizer else None
    validations, failures = [], []
    paths = data_files([remote.file_at(file) for file in files or ()])
    for path in paths:

        def stop(line: "Line", bad: "BadRow", path: Path = path) -> None:
            if bad.reason not in asked_for(read.kind):
                fix = f"{REASONS[bad.reason]}; --on-bad quarantine goes on"
                raise InputError(f"{place_of(path, line.number, read)}: {bad}", fix)

        try:
            with progress(f"validate {path}", quiet=as_json) as update:
                on_row = stop if on_bad == "fail" else None
                validation = validate_file(path, read=read, encode=encode, on_bad=on_row, progress=update)
            validations.append(validation)
            if not as_json:
                print_validation(validation, unit_of(path, read))
            if not validation.num_good and limit != 1:
                raise InputError(f"{path}: no row can be used; {validation.first_bad}", "mm validate --help")
            check_budget(validation.reasons, validation.num_rows, limit, limits, kind=read.kind)
        except MMError as error:
            failures.append(fail(error))
    if as_json:
        print_json(validations)
    if failures:
        raise typer.Exit(failures[0])
    budget = f" --max-bad {shlex.quote(max_bad)}" if max_bad else ""
    next_command(pack_command(paths if files else (), read, tokenizer, budget))


def row_encoder(tokenizer: Path) -> "RowEncoder":
    """Return an encoder of rows of any length."""
    from mmdata.encode.encoder import RowEncoder
    from mmdata.tokenizer.tokenizer import Tokenizer

    return RowEncoder(Tokenizer.load(tokenizer), max_len=MAX_LEN)


def print_validation(validation: "Validation", unit: str) -> None:
    """Print the kind and counts of a file, a table of reasons with their first lines and what helps, and, if there are
    any, the keys that were ignored and the control strings in the rows' content."""
    from mmdata.encode.rows import REASONS

    num_rows, num_good = validation.num_rows, validation.num_good
    kind = f"{num_rows:,} rows, kind {validation.kind}"
    result(f"{validation.path}: {kind}; {num_good:,} good, {num_rows - num_good:,} cannot be used")
    reasons = validation.reasons.most_common()
    rows = (
        (reason, count, percent(count, num_rows), ", ".join(str(place.line) for place in validation.places[reason]))
        for reason, count in reasons
    )
    table("", ("reason", "rows", "share", f"first {unit}s"), rows)
    for reason, _ in reasons:
        place = validation.places[reason][0]
        result(f"{reason}: {REASONS[reason]}" + (f" ({unit} {place.line}: {place.detail})" if place.detail else ""))
    share = validation.unknown_bytes / validation.text_bytes if validation.unknown_bytes else None
    for line in (*ignored_keys(validation.extra_keys), *left_out_parts(validation.not_written, share)):
        result(line)
    for entry in validation.unused_columns:
        result(f"--map {entry}: no row has a value in this column")
    if validation.control_strings:
        strings = counted(validation.control_strings.most_common(MOST_NAMES))
        result(
            f"control strings in content of {validation.num_rows_with_control:,} rows, packed as plain text: {strings}"
        )


def verify(
    datasets: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Packed datasets.")],
    repair: Annotated[
        bool, Option("First rebuild damaged files from the dataset's input files, byte for byte.")
    ] = False,
    tokenizer: Annotated[
        Path | None,
        Option("With --repair: the original tokenizer directory, if the dataset's copy is damaged.", metavar="DIR"),
    ] = None,
    workers: Annotated[
        int | None, Option("With --repair: number of processes.", least=1, default_text="one per core")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hash every file of a dataset again, and check manifest, counts and token ranges. Exit code 1 if anything differs.

    Example: mm verify shards/sft_512
    """
    from mmdata.pack.repair import repair as repair_dataset
    from mmdata.shards.verify import verify as verify_dataset

    if (tokenizer or workers) and not repair:
        raise UsageError("--tokenizer and --workers belong to --repair", "mm verify DIR --repair")
    for path in datasets if repair else ():
        with progress(f"repair {path}", quiet=as_json) as update:
            rebuilt = repair_dataset(
                path, tokenizer_dir=tokenizer, workers=workers or os.cpu_count() or 1, progress=update
            )
        for name in rebuilt:
            say(f"rebuilt {path / name}")
    problems = {}
    for path in datasets:
        with progress(f"verify {path}", quiet=as_json) as update:
            problems[str(path)] = verify_dataset(path, progress=update)
    if as_json:
        print_json({path: {"ok": not damaged, "problems": damaged} for path, damaged in problems.items()})
    for path, damaged in problems.items():
        for problem in damaged:
            say(f"error: {Path(path) / problem.shard}: {problem.what}")
        if not as_json and not damaged:
            result(f"{path}: every shard is as packed")
    if bad := [path for path, damaged in problems.items() if damaged]:
        say(
            f"fix: mm verify {' '.join(bad)} --repair"
            if not repair
            else "fix: pack it again from its inputs (`mm pack`)"
        )
        raise typer.Exit(1)
