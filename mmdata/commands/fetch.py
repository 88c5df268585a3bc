"""`mm fetch`: download data files and tokenizers into a local directory, and verify them."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdata.commands.options import DATA_DIR, Json, pack_command
from mmdata.commands.terminal import (
    Rate,
    fail,
    meter,
    next_command,
    percent,
    plain,
    print_json,
    progress,
    result,
    same_command,
    say,
    size,
    table,
    waiting,
)
from mmdata.hub.options import FILES, LOCAL, SOURCE, FetchOptions
from mmdata.options import Option

if TYPE_CHECKING:
    from mmdata.hub.fetch import FetchOutcome, FileState
    from mmdata.hub.plan import FetchItem, FetchPlan

ASK_ABOVE_BYTES = 1_000_000_000  # of a download that the user has to agree to
ADVISE_CONNECTIONS_ABOVE_BYTES = 256_000_000
ENDPOINT_VARIABLES = {"hf": "HF_ENDPOINT", "modelscope": "MODELSCOPE_ENDPOINT"}
OUTPUT = "Output"
HEADINGS = (FILES, SOURCE, LOCAL, OUTPUT)  # the groups of options in --help, in this order


def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Known names, file names or globs, or OWNER/DATASET of the hub. [default: the files that a first run needs]",
        ),
    ] = None,
    *,
    options: FetchOptions,
    listing: Annotated[
        bool, Option("List the known files and whether they have been fetched; makes no request.", FILES, "--list")
    ] = False,
    clean: Annotated[bool, Option("Remove the files that unfinished downloads left; fetch nothing.", LOCAL)] = False,
    dry_run: Annotated[bool, Option("Show what would be fetched; fetch nothing.", OUTPUT)] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask before downloading more than 1 GB.", rich_help_panel=OUTPUT)
    ] = False,
    quiet: Annotated[bool, Option("Print errors only.", OUTPUT)] = False,
    as_json: Json = False,
) -> None:
    """Fetch data files and tokenizers, verify them, and resume downloads that an earlier run did not finish.

    Example: mm fetch    mm fetch pretrain_hq sft_512 dpo --connections 4    mm fetch --list
    """
    from mmdata.hub.fetch import clean as clean_up
    from mmdata.hub.fetch import overview
    from mmdata.hub.plan import plan
    from mmdata.hub.transfer import BRIEFLY, RetryPolicy

    if listing or clean:
        print_overview(overview(options.out), as_json) if listing else print_cleaned(*clean_up(options.out), as_json)
        return
    # Otherwise the client of the Hub sends data about its use.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    endpoint = options.endpoint or os.environ.get(ENDPOINT_VARIABLES.get(options.source, "")) or None
    mute = quiet or as_json
    retry = replace(BRIEFLY if dry_run else RetryPolicy(), waiting=partial(waiting, quiet=mute))
    options = replace(options, endpoint=endpoint, retry=retry)
    with progress("check", quiet=mute) as update:
        to_do = plan(tuple(names or ()), options, update)
    if not mute:
        print_plan(to_do)
    if dry_run:
        if as_json:
            print_json(plan_values(to_do))
        end_with(to_do.items)
        return
    if not mute and not yes and not agrees_to(to_do.get_bytes):
        say("nothing fetched")
        return
    start = time.monotonic()
    outcomes = fetch_planned(to_do, quiet=mute)
    seconds = time.monotonic() - start
    if as_json:
        values = [{**plain(outcome), "error": outcome.error and outcome.error.message} for outcome in outcomes]
        print_json({**plan_values(to_do), "files": values, "seconds": seconds})
    elif not quiet:
        print_fetched(outcomes, options.out, seconds)
    end_with(outcomes)


def fetch_planned(to_do: "FetchPlan", *, quiet: bool) -> list["FetchOutcome"]:
    """Fetch the files of a plan, and show progress; return what became of each."""
    from mmdata.hub.fetch import fetch as fetch_files

    with fetch_progress(quiet=quiet) as watch:
        return fetch_files(
            to_do, watch=watch, on_wait=None if quiet else lambda name: say(f"{name}: another process is fetching it")
        )


def end_with(files: "Sequence[FetchItem | FetchOutcome]") -> None:
    """Print the errors of files; if there are any, end the command with the exit code of the first."""
    if codes := [fail(file.error) for file in files if file.error]:
        raise typer.Exit(codes[0])


def agrees_to(num_bytes: int) -> bool:
    """Return whether to download `num_bytes`; asks the user above 1 GB if stdin and stderr are terminals."""
    if num_bytes <= ASK_ABOVE_BYTES or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    return typer.confirm(f"download {size(num_bytes)}?", default=True, err=True)


def plan_values(to_do: "FetchPlan") -> dict[str, Any]:
    """Return the plan as a dictionary for `--json`: its files, sizes in bytes, licence and warnings."""
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
        "licence": catalog.licence_of(_repos(to_do)),
        "warnings": list(to_do.warnings),
    }


def _repos(to_do: "FetchPlan") -> list[str]:
    """Return the dataset repositories of a plan's files."""
    return [item.want.repo.id for item in to_do.items if item.want.repo.kind == "dataset"]


def print_plan(to_do: "FetchPlan") -> None:
    """Print the plan to stderr: a line per file with its state, size and bytes to download, then the warnings; if
    anything has to be downloaded, also the licence, and the bytes to download and the free space, both in total."""
    from mmdata.hub import catalog

    for item in to_do.items:
        amount = size(item.content.num_bytes) if item.content else "-"
        rest = f", {size(item.get_bytes)} to fetch" if item.action == "get" else ""
        at = f" at {item.commit[:12]}" if item.commit else ""
        say(f"{item.state:8} {item.want.name} ({amount}{rest}){at}")
    for warning in to_do.warnings:
        say(f"note: {warning}")
    if to_do.get_bytes:
        say(f"licence: {catalog.licence_of(_repos(to_do))}")
        free = f"{size(to_do.free_bytes)} free; `mm pack` needs about as much again"
        say(f"to fetch: {size(to_do.get_bytes)} into {to_do.options.out}, {free}")
    if to_do.get_bytes > ADVISE_CONNECTIONS_ABOVE_BYTES and to_do.options.connections == 1:
        say("tip: `--connections 4` is faster where each connection is slow")


def print_fetched(outcomes: list["FetchOutcome"], out: Path, seconds: float) -> None:
    """Print the outcome of each file in `out`, the bytes received in this time, and the next command, if a jsonl file
    was fetched or was there already. Failed files are only counted; their errors are printed by the caller."""
    from mmdata.hub.catalog import holds_rows

    for outcome in outcomes:
        if not outcome.error:
            again = f", {outcome.failures} interruptions" if outcome.failures else ""
            rows = f"{outcome.num_lines:,} lines, " if outcome.name.endswith(".jsonl") else ""
            result(f"{outcome.status} {out / outcome.name}: {rows}{size(outcome.num_bytes)}{again}")
        for warning in outcome.warnings:
            say(f"note: {warning}")
    fetched = [outcome for outcome in outcomes if not outcome.error]
    received = size(sum(outcome.received_bytes for outcome in outcomes))
    say(f"{len(fetched)} of {len(outcomes)} files are here; received {received} in {seconds:.1f} s")
    data = [out / outcome.name for outcome in fetched if holds_rows(outcome.name) and "tokenizer/" not in outcome.name]
    if len(fetched) < len(outcomes):
        next_command(same_command())  # it fetches what is missing
    elif data and out == DATA_DIR and all(path.parent == out for path in data):
        next_command(pack_command())
    elif data:
        tokenizer = f" --tokenizer {out / 'tokenizer'}" if (out / "tokenizer").is_dir() else ""
        next_command(f"{'mm pack' if tokenizer else pack_command()} {' '.join(map(str, data))}{tokenizer}")


def print_overview(rows: list["FileState"], as_json: bool) -> None:
    """Print a table of the known files with their states, then the notes about them; with `as_json` a JSON list."""
    if as_json:
        print_json(rows)
        return
    cells = (
        (
            row.name,
            row.stage,
            row.state,
            size(row.num_bytes) if row.num_bytes else "?",
            row.num_rows or "?",
            row.max_len or "",
        )
        for row in rows
    )
    table("", ("name", "stage", "state", "size", "rows", "max-len"), cells)
    for row in rows:
        if row.note:
            result(f"{row.name}: {row.note}")


def print_cleaned(num_files: int, num_bytes: int, as_json: bool) -> None:
    """Print the number and total size of the files that `--clean` removed; with `as_json` as a JSON object."""
    if as_json:
        print_json({"num_files": num_files, "num_bytes": num_bytes})
    else:
        result(f"removed {num_files} files of unfinished downloads, {size(num_bytes)}")


@contextmanager
def fetch_progress(*, quiet: bool) -> Iterator[Callable[[str, int, int, int, int], None]]:
    """Show the progress of the current file and of all files together, as a context manager. Yields `watch(name, done,
    total, all_done, all_total)`: bytes done and in all of the file `name`, then of all files."""
    rate = Rate()
    with meter(quiet=quiet) as draw:

        def watch(name: str, done: int, total: int, all_done: int, all_total: int) -> None:
            per_second = rate.per_second(all_done)
            speed = f", {size(per_second)}/s" if per_second else ""
            left = rate.time_left(all_done, all_total)
            draw(name, done, total, f"{size(done)} of {size(total)} ({percent(done, total)}){speed}{left}")
            draw("all files", all_done, all_total, f"{size(all_done)} of {size(all_total)}", row=1)

        yield watch
