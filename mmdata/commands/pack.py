"""`mm pack`: validate jsonl files and pack them into tokenized shards; `--plan` estimates the result first."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdata.commands.options import FILES_HELP, SHARDS_DIR, STEM, Json, data_files, tokenizer_dir
from mmdata.commands.terminal import (
    Rate,
    counted,
    fail,
    ignored_keys,
    in_time,
    left_out_parts,
    meter,
    next_command,
    percent,
    print_json,
    progress,
    result,
    same_command,
    say,
    size,
    table,
    without_option,
)
from mmdata.errors import MMError, UsageError
from mmdata.options import Option, redeclared
from mmdata.pack.options import OUTPUT, PackOptions
from mmtrain.config import STAGE_KINDS, stage_of

if TYPE_CHECKING:
    from mmdata.io.files import Progress
    from mmdata.pack.estimate import Estimate
    from mmdata.pack.pipeline import PackResult

MOST_COMPARED = 10**8  # rows whose hashes are compared to find files in others: 2.4 GB of memory
MOST_NAMES = 10  # control strings to print at most


@dataclass(frozen=True, slots=True, kw_only=True)
class PackFlags(PackOptions):
    """The options as given; None for those that `settled` chooses from the data."""

    max_len: int | None = redeclared(PackOptions, "max_len", default=None)  # pyright: ignore[reportIncompatibleVariableOverride]
    val_fraction: float | None = redeclared(PackOptions, "val_fraction", default=None)  # pyright: ignore[reportIncompatibleVariableOverride]


def pack(
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help=FILES_HELP)] = None,
    *,
    options: PackFlags,
    out: Annotated[
        str | None,
        Option(
            "Pack all FILEs into this one dataset; for a URL, pack it under shards/ and then upload it.",
            OUTPUT,
            metavar="DIR|URL",
            default_text="shards/<file> for each file",
        ),
    ] = None,
    no_report: Annotated[bool, Option("Do not write report.html into the dataset.", OUTPUT)] = False,
    plan: Annotated[
        bool,
        Option("Read about 1 % of the data and estimate time, disk space, tokens and padding; write nothing.", OUTPUT),
    ] = False,
    as_json: Json = False,
) -> None:
    """Validate jsonl files and pack them into tokenized Arrow shards with length buckets.

    Example: mm pack data/sft_512.jsonl --max-len 512 --tokenizer data/tokenizer
    """
    from mmdata.io import remote

    directory = (SHARDS_DIR / remote.file_at(out).name if remote.is_url(out) else Path(out)) if out else None
    paths = data_files([remote.file_at(file) for file in files or ()])
    if out and remote.is_url(out) and not plan:
        remote.check_writable(out)
    options = replace(
        options, tokenizer=tokenizer_dir(options.tokenizer), workers=options.workers or os.cpu_count() or 1
    )
    if plan:
        print_plan(paths, bool(out), options, as_json)
        return
    if options.ray_address:
        say(f"connecting to ray at {options.ray_address}")
    paths = [kept_stdin(directory, options.text) if str(path) == "-" else path for path in paths]
    names = [] if directory else dataset_names(paths)
    jobs = [(paths, directory)] if directory else [([path], SHARDS_DIR / names[i]) for i, path in enumerate(paths)]
    results, failures = pack_all(jobs, options, with_report=not no_report, as_json=as_json)
    if out and remote.is_url(out) and results[0].parts_left is None:
        send(results[0].out, out, options, quiet=as_json)
    if as_json:
        print_json(results)
    if len(paths) > 1:
        warn_of_contained([packed for packed in results if packed.parts_left is None], files or ())
    if results and results[-1].parts_left is None:
        from mmdata.shards.manifest import MANIFEST

        stage, kind = next(each for each in STAGE_KINDS.items() if each[1] in {packed.kind for packed in results})
        places = [packed.out for packed in results if packed.kind == kind]
        newest = max(places, key=lambda place: (place / MANIFEST).stat().st_mtime_ns)  # which `mm train` takes too
        next_command(f"mm train {stage} --data {newest}")
    elif results:
        say("when the other shards are packed, publish the dataset:")
        next_command(same_command("--shard", add="--finish"))
    if failures:
        raise typer.Exit(failures[0])


def pack_all(
    jobs: list[tuple[list[Path], Path]], options: PackFlags, *, with_report: bool, as_json: bool
) -> tuple[list["PackResult"], list[int]]:
    """Pack the inputs of each job into its dataset and print what was packed. Return the results, and the exit codes of
    the jobs that failed; the error of a single job is raised."""
    from mmdata.pack import pipeline

    results, failures = [], []
    for inputs, place in jobs:
        try:
            with copies(inputs, place, options, quiet=as_json) as near:
                chosen = settled(near, place, options)
                with pack_progress(f"pack {place}", quiet=as_json) as (update, watch):
                    packed = pipeline.pack(near, place, chosen, progress=update, watch=watch, note=say)
        except MMError as error:
            if len(jobs) == 1:
                raise
            failures.append(fail(error))  # the other files are packed all the same
        else:
            results.append(packed)
            if not as_json:
                print_packed(packed)
                advise_max_len(inputs, chosen, packed)
            if with_report and packed.parts_left is None:
                write_report(packed.out, is_new=not packed.up_to_date)
    return results, failures


@contextmanager
def copies(inputs: list[Path], place: Path, options: PackOptions, *, quiet: bool) -> Iterator[list[Path]]:
    """Yield the inputs, of which those at URLs may have copies on this machine while the block runs."""
    from mmdata.io.remote import is_url
    from mmdata.pack.inputs import copied

    if not any(map(is_url, inputs)):
        yield inputs
        return
    with ExitStack() as stack:
        with progress(f"read for {place}", quiet=quiet) as update:
            near = stack.enter_context(copied(inputs, place, options, update))
        yield near


def settled(inputs: list[Path], place: Path, options: PackFlags) -> PackOptions:
    """Return the options with a --max-len and a --val-fraction that fit the inputs, printed, unless they are given."""
    from mmdata.pack import estimate

    if options.max_len is not None and options.val_fraction is not None:
        return options
    found = estimate.survey(inputs, options)
    max_len = options.max_len or estimate.max_len_for(found)
    fraction = options.val_fraction if options.val_fraction is not None else estimate.val_fraction_for(found.rows)
    if options.max_len is None:
        say(f"{place}: --max-len {max_len}: {percent(found.kept(max_len), 1)} of the tokens are in rows that fit")
    if options.val_fraction is None and fraction != estimate.VAL_FRACTION:
        held_out = f"about {number:,}" if (number := round(fraction * found.rows)) else "perhaps none"
        say(f"{place}: --val-fraction {fraction:g}: {held_out} of {found.rows:,} rows are held out as the val split")
    return replace(options, max_len=max_len, val_fraction=fraction)


def advise_max_len(inputs: list[Path], options: PackOptions, packed: "PackResult") -> None:
    """Print how many rows were left out as too long, if any, and the --max-len that would keep 99 % of the rows."""
    from mmdata.pack import estimate

    if (num := packed.left_out.get("too long", 0)) and not packed.up_to_date:
        enough = estimate.survey(inputs, options).quantile(0.99)
        larger = f"; --max-len {enough} would keep 99%" if enough > options.max_len else ""
        say(f"too long: {percent(num, packed.rows)} of the rows do not fit --max-len {options.max_len}{larger}")


def kept_stdin(out: Path | None, text: str | None) -> Path:
    """Copy standard input to `out`.jsonl (plain text, which `text` allows: .txt) and return its path, since a dataset
    names the input file and line of every row. Raise UsageError if `out`, the dataset, is None."""
    from mmdata.io.files import atomic_path

    if out is None:
        raise UsageError("packing standard input needs a name for the dataset", "mm pack - --out shards/NAME")
    path = out.with_name(f"{out.name}.{'txt' if text else 'jsonl'}")
    with atomic_path(path) as partial, partial.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    say(f"standard input is kept as {path}: the dataset's rows refer to it")
    return path


def dataset_names(paths: list[Path]) -> list[str]:
    """Return the name of the dataset made from each file: the file's name without the suffixes of format and
    compression. Equal ones get their parent directories in front (a-train, b-train) or, in one directory, the suffix
    behind (train-json), which is printed. Raise UsageError if two names are equal even so."""
    stems = [match[1] for path in paths if (match := STEM.fullmatch(path.name))]
    names = list(stems)
    for stem in dict.fromkeys(stem.casefold() for stem in stems):
        group = [i for i, other in enumerate(stems) if other.casefold() == stem]
        if len(group) == 1:
            continue
        places = [str(paths[i]) if "://" in str(paths[i]) else os.path.abspath(paths[i]) for i in group]
        folders = [tuple(re.split(r"[/\\:]+", place)[:-1]) for place in places]
        depth = 0
        while len({folder[len(folder) - depth :] for folder in folders}) < len(set(folders)):
            depth += 1
        for i, folder in zip(group, folders, strict=True):
            suffixes = paths[i].name[len(stems[i]) :].split(".")[1:] if folders.count(folder) > 1 else []
            names[i] = "-".join([*folder[len(folder) - depth :], stems[i], *suffixes])
        say(f"{len(group)} files are named {stems[group[0]]}: their datasets are {', '.join(names[i] for i in group)}")
    if twice := [name for name in names if sum(name.casefold() == other.casefold() for other in names) > 1]:
        raise UsageError(
            f"two files would both be packed to {SHARDS_DIR / twice[0]}", "--out DIR: all into one dataset"
        )
    return names


@contextmanager
def pack_progress(label: str, *, quiet: bool) -> Iterator[tuple["Progress", Callable[[int, int, int], None]]]:
    """Show the progress of packing, as a context manager. Yields `update(done, total)`, in bytes of the inputs, and
    `watch(rows, tokens, num_left_out)`, which takes the counts for the next `update` to show."""
    by_bytes, by_tokens = Rate(), Rate()
    counts = [0, 0, 0]

    def watch(*new: int) -> None:
        counts[:] = new
        by_tokens.per_second(counts[1])

    with meter(quiet=quiet) as draw:
        draw(label, 0, 0, "")

        def update(done: int, total: int) -> None:
            rows, tokens, num_left_out = counts
            aside = f", {num_left_out:,} set aside" if num_left_out else ""
            rates = by_bytes.per_second(done), by_tokens.per_second(tokens)
            speed = f", {size(rates[0])}/s, {rates[1]:,.0f} tokens/s" if all(rates) else ""
            left = by_bytes.time_left(done, total)
            draw(label, done, total, f"{percent(done, total)} of {size(total)}{left}, {rows:,} rows{aside}{speed}")

        yield update, watch


# --- after packing


def print_packed(packed: "PackResult", write: Callable[[str], None] = result) -> None:
    """Print the rows packed, left out and cut, and what was written; one line if the dataset was up to date. With
    `--shard` the last line says how many parts of other shards are left. write: prints one line."""
    from mmdata.encode.rows import HELP, LEFT_OUT

    if packed.up_to_date:
        write(f"{packed.out} is up to date: {packed.kept:,} rows, {packed.tokens:,} tokens")
        return
    by_count = sorted(packed.left_out.items(), key=lambda item: -item[1])
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in by_count)
    left_out = f"; left out {packed.rows - packed.kept:,} ({reasons}), see {packed.out / 'rejected'}" if reasons else ""
    write(f"kept {packed.kept:,} of {packed.rows:,} rows{left_out}")
    for reason, tokens in packed.cut.items():
        write(f"cut {tokens:,} of {packed.tokens_in:,} tokens: {reason}")
    for line in ignored_keys(packed.extra_keys):
        write(line)
    if packed.control_strings:
        strings = sorted(packed.control_strings.items(), key=lambda item: (-item[1], item[0]))
        more = f" and {len(strings) - MOST_NAMES:,} others" if len(strings) > MOST_NAMES else ""
        write(f"control strings in content, packed as plain text: {counted(strings[:MOST_NAMES])}{more}")
    for line in left_out_parts(packed.not_written, packed.unknown_share):
        write(line)
    if packed.parts_left is not None:
        rest = f"{packed.parts_left:,} parts of others are left"
        write(f"packed this shard of {packed.out} in {packed.seconds:.1f} s; {rest}")
        return
    samples = ", ".join(f"{count:,} of {bucket}" for bucket, count in sorted(packed.samples.items()) if count)
    noun, fill = ("pairs", "") if packed.kind == "pair" else ("packs", f"fill {100 * packed.fill:.1f}%, ")
    write(
        f"wrote {packed.out}: {packed.tokens:,} tokens, {percent(packed.loss_tokens, packed.tokens)} trained, "
        f"{noun} {samples}, {fill}{packed.val_rows:,} rows for val, in {packed.seconds:.1f} s"
    )
    for reason in packed.not_written:
        say(f"{reason}: {LEFT_OUT.get(reason) or HELP[reason]}")
    for reason in packed.left_out:
        if reason != "too long":  # see `advise_max_len`
            say(f"{reason}: {HELP[reason]}")


def warn_of_contained(results: "list[PackResult]", files: Sequence[str]) -> None:
    """Warn of each input file of which most rows are also in another one: a model would see them twice. More than
    MOST_COMPARED rows are not compared, as that would take more memory than packing. files: those of the command."""
    from mmdata.shards.checks import find_contained
    from mmdata.shards.dataset import open_dataset

    if (num_rows := sum(packed.kept for packed in results)) > MOST_COMPARED:
        say(f"note: {num_rows:,} rows are too many to compare files with each other; --dedup exact takes rows once")
        return
    command = [word for word in without_option(sys.argv[1:], "--dedup", "--json", "--out") if word not in files]
    for pair in find_contained([open_dataset(packed.out) for packed in results]):
        both = [str(pair.inner), str(pair.outer), "--out", str(SHARDS_DIR / "NAME"), "--dedup", "exact"]
        once = shlex.join(["mm", *command, *both])
        rows = f"{pair.rows:,} of {pair.of:,} rows of {pair.inner} stand in {pair.outer} too"
        say(f"warning: {rows}; to train on both, take them once: {once}")


def send(directory: Path, url: str, options: PackOptions, *, quiet: bool) -> None:
    """Copy a packed dataset to a URL with the workers of the options, read each file back to verify its hash, and print
    the command that downloads it. Raise DatasetError if a file arrives with other bytes."""
    from mmdata.io import remote
    from mmdata.pack.pipeline import run_with
    from mmdata.shards.manifest import every_file

    with progress(f"send {directory}", quiet=quiet) as update:
        num_bytes = remote.send(directory, every_file(directory), url, update, run_with(options))
    say(f"{url} holds {directory}: {size(num_bytes)} sent, every file read back and hashed")
    say(f"to train on it elsewhere: {remote.bring_command(url, directory)}")


def write_report(directory: Path, *, is_new: bool) -> None:
    """Write report.html and the card README.md into the dataset, from its recorded counts and a sample of its rows. A
    failure is printed as a note and raises nothing. is_new: the dataset was packed just now; only then a report that
    exists is replaced."""
    from mmdata.io.files import write_text
    from mmdata.shards.dataset import CARD
    from mmdata.stats import stats
    from mmdata.stats.report import card, data

    path = directory / data.FILE
    if path.exists() and not is_new:
        return
    try:
        measured = stats.measure_dataset(directory, is_quick=True)
        write_text(path, data.dataset_page([measured], command=same_command()))
        write_text(directory / CARD, card.dataset_card(directory, measured.figures))
    except (MMError, OSError) as error:
        say(f"note: no {path}: {error}")
    else:
        say(f"look: {path}")


# --- the plan


def print_plan(files: list[Path], is_one: bool, options: PackFlags, as_json: bool) -> None:
    """Print an estimate of what packing would give; nothing is written. is_one: all files go into one dataset, else
    each into its own."""
    from mmdata.pack.estimate import estimate
    from mmdata.pack.inputs import common_kind
    from mmtrain.sizing import settings_for

    if options.dedup or options.exclude:
        say("note: rows that --dedup and --exclude would leave out are counted here: only packing finds them")
    estimates = []
    for inputs in [files] if is_one else [[path] for path in files]:
        stage = stage_of(common_kind(inputs, options.reading))

        def step_tokens(epoch: int, max_len: int, stage: str = stage) -> int:
            return settings_for(stage, epoch, max_len=max_len).batch_tokens

        chosen = settled(inputs, inputs[0], options)
        estimates.append(estimate(inputs, chosen, batch_tokens=step_tokens))
        if not as_json:
            print_estimate(estimates[-1])
    if as_json:
        print_json(estimates)
    next_command(same_command("--plan", "--json"))


def print_estimate(estimate: "Estimate") -> None:
    """Print the estimate for a dataset: a table with one line for each length limit (`--max-len`)."""
    result(
        f"{', '.join(estimate.inputs)}: about {estimate.rows:,} rows of kind {estimate.kind} in {size(estimate.bytes)} "
        f"(read {size(estimate.read_bytes)}); {estimate.rows_left_out:,} cannot be used"
        + (f", {estimate.rows_not_selected:,} are not selected" if estimate.rows_not_selected else "")
    )
    head = ("max-len", "tokens", "trained", "padding", "cut rows", "too long", "disk", "time", "steps")
    rows = (
        (
            limit.max_len,
            f"{limit.tokens / 1e6:,.1f}M" if limit.tokens >= 1e6 else limit.tokens,
            percent(limit.loss_tokens, limit.tokens),
            f"{100 * limit.padding:.2f}%",
            limit.rows_cut,
            limit.rows_too_long,
            size(limit.disk_bytes),
            in_time(limit.seconds),
            limit.steps_per_epoch or "-",
        )
        for limit in estimate.outlooks
    )
    table("", head, rows)
    from mmdata.pack.pipeline import UNKNOWN_REFUSED

    if share := max(limit.unknown_share for limit in estimate.outlooks):
        refused = f", which `mm pack` refuses without --allow-unknown (allowed: {UNKNOWN_REFUSED:.0%})"
        result(
            f"unknown characters, which are lost: {share:.2%} of the bytes of the texts"
            + refused * (share > UNKNOWN_REFUSED)
        )
    batches = sorted({limit.batch_tokens or 0 for limit in estimate.outlooks})
    batch = " to ".join(f"{tokens:,}" for tokens in dict.fromkeys((batches[0], batches[-1])))
    step = f"steps: of one epoch, {batch} tokens each"
    say(f"{estimate.workers} workers, {estimate.encoder}; {step}; nothing was written")
