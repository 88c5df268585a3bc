"""`mm pack`: convert jsonl files to a packed dataset.

The same inputs, tokenizer and options give the same bytes for any number of workers and any engine, and however often
packing was interrupted. Each worker needs memory for one part. The dataset appears at its path only after all of it is
written, checked and synced.
"""

import contextlib
import errno
import math
import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import UNSET

from mmdata.encode import rows
from mmdata.encode.encoder import DEFAULT_ON_LOST
from mmdata.errors import DatasetError, DiskError, InputError, TokenizerError, UsageError
from mmdata.io import remote, workers
from mmdata.io.files import (
    Progress,
    atomic_path,
    free_bytes,
    info_of,
    no_progress,
    read_bytes,
    sha256_of,
    write_bytes,
    write_json,
)
from mmdata.io.records import FileEntry, plain, write_record
from mmdata.options import check
from mmdata.pack.filter import dedup
from mmdata.pack.inputs import check_inputs, common_kind, plan, states_of
from mmdata.pack.options import PackOptions, packing_tokenizer, parse_budget
from mmdata.pack.part import Part, PartResult, PartSettings, first_rejected
from mmdata.pack.staging import PackKey, RecordingPacker, RecordPlace, Run, Staging, one_of_several, only_writer
from mmdata.pack.summary import PackResult, ShardSums, Summary, add_shards, header_of, part_record, result_of
from mmdata.shards.dataset import id_dtype, open_dataset
from mmdata.shards.manifest import MANIFEST, PARTS, DatasetHeader, ExcludedFile, Manifest, PackArguments, Parts
from mmdata.tokenizer.encoders import REFERENCE, choose
from mmdata.tokenizer.tokenizer import Tokenizer

DISK_SHARE = 0.6  # bytes of shards and sources per byte of jsonl with 16-bit ids (measured: 0.3 to 0.6)
LARGE_CHARACTERS = 20_000_000  # packed characters from which installing a faster encoder is recommended
UNKNOWN_WARNED, UNKNOWN_REFUSED = 0.001, 0.01  # share of bytes that the tokenizer does not know
COMPRESSION = 5  # bytes of jsonl per compressed byte, for the same estimate
Watch = Callable[[int, int, int], None]  # called with rows, tokens and rows left out so far
Note = Callable[[str], None]
Found = TypeVar("Found")
MOST_PARTS = 200_000  # with 6 files each .verified.json (0.2 kB a file) stays below what is read of a JSON file


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be packed, when nothing is written yet. progress, watch, note: as in `pack`."""

    inputs: list[Path]
    out: Path  # symbolic links are resolved
    options: PackOptions
    tokenizer: Tokenizer
    states: list[tuple[int, int]]  # size and modification time (ns) of each input
    parts: list[Part]
    header: DatasetHeader
    progress: Progress
    watch: Watch
    note: Note

    @property
    def run(self) -> Run:
        return run_with(self.options)


def pack(
    inputs: Sequence[Path],
    out: Path,
    options: PackOptions,
    *,
    progress: Progress = no_progress,
    watch: Watch = no_progress,
    note: Note = no_progress,
) -> PackResult:
    """Pack jsonl files of one row kind into the dataset directory `out`; do nothing if an equal dataset is there
    already.

    progress: called with the bytes of input packed so far and the bytes in all. watch: called before it with the rows,
    tokens and rows left out so far. note: called with sentences for the user. If `options.shard` is "i/n", only every
    n-th part is packed and nothing is published; `options.finish` publishes what all shards have packed.

    Raises UsageError for invalid options or more than MOST_PARTS parts; InputError for a missing input, inputs of
    different kinds, no usable row, or more bad rows than `options.max_bad` allows; TokenizerError; DatasetError if
    `out` is neither empty nor a dataset, or another process is packing to it; DiskError if the disk is full. After any
    error `out` is unchanged. After a kill, Ctrl-C or a full disk the same call continues with the parts that are not
    finished.
    """
    start = time.monotonic()
    check(options)
    share = options.share
    out = Path(out)
    arguments = arguments_of(options)
    check_inputs(inputs := [remote.file_at(path) for path in inputs])
    is_rerun = _is_dataset(out)
    job = _plan_job(inputs, out, options, arguments, progress, watch, note)
    if is_rerun and (manifest := _same_dataset(out, job.header)):
        return result_of(out, *manifest, start, up_to_date=True)
    if share:
        return _pack_shard(job, share, start)
    with _disk_errors(out), only_writer(job.out) as staging, _keep_parts(staging, job):
        if options.finish:
            _check_begun(staging, job)
        done = _resume(staging, job)
        if options.finish:
            _check_all_done(staging, job, done)
        _check_disk(job, [part for part in job.parts if part.number not in done])
        with atomic_path(staging.dataset / PARTS) as records, records.open("wb") as file:

            def write(result: PartResult) -> None:
                file.write(msgspec.json.encode(part_record(result)) + b"\n")

            summary = _pack_parts(staging, job, job.parts, done, write)
        _check_left_out(staging, job, summary)
        _check_unknown(job, summary)
        for entry in summary.unused or ():
            job.note(f"warning: --map {entry}: no row has a value in this column")
        _check_unchanged(staging, job, job.parts)
        _note_encoders(summary, job)
        manifest = _publish(staging, job, summary)
    return result_of(out, manifest, summary.shards, start)


def _pack_shard(job: _Job, share: tuple[int, int], start: float) -> PackResult:
    """Pack the parts i - 1, i - 1 + n, … of the share (i, n), while other processes may pack the others; publish
    nothing. Raises DatasetError if the shards so far have other arguments."""
    number, count = share
    own = job.parts[number - 1 :: count]
    if not own:
        job.note(f"shard {number}/{count} has nothing to pack: {len(job.parts):,} parts of --part-size in all")
    with _disk_errors(job.out), one_of_several(job.out, f"{number}-of-{count}") as staging:
        if not _check_begun(staging, job):
            staging.begin(PackKey.of(job.header))
        done = staging.finished(job.run, own)
        _check_disk(job, [part for part in own if part.number not in done])
        summary = _pack_parts(staging, job, own, done)
        _check_unchanged(staging, job, own)
        left = len(job.parts) - len(staging.recorded())
    manifest = msgspec.structs.replace(summary.manifest([]), encoders=[], dataset_digest="")
    return result_of(job.out, manifest, summary.shards, start, parts_left=left)


def _check_begun(staging: Staging, job: _Job) -> bool:
    """Return whether shards of this pack are there. Raises DatasetError if they are of a pack with other arguments."""
    begun = staging.begun()
    if begun is not None and (differences := PackKey.of(job.header).differences(begun)):
        raise DatasetError(
            f"shards of another pack to {job.out} are there already: {'; '.join(differences)}",
            f"give all shards and --finish the same arguments, or begin anew: rm -r {staging.dir}",
        )
    return begun is not None


def _pack_parts(
    staging: Staging,
    job: _Job,
    parts: Sequence[Part],
    done: Mapping[int, RecordPlace],
    write: Callable[[PartResult], None] = no_progress,
) -> Summary:
    """Pack those of these parts that are not `done`, check the files of all, and return what they are together. write:
    called with the result of each part, in order. Raises DatasetError as `_check_files` does."""
    todo = [part for part in parts if part.number not in done]
    total = sum(part.num_bytes for part in parts)
    bytes_before = total - sum(part.num_bytes for part in todo)
    before = [0, 0, 0]
    for place in done.values() if todo else ():
        result = staging.result(place)
        counts = (result.rows, result.tokens, result.left_out.total())
        before = [old + new for old, new in zip(before, counts, strict=True)]

    def report(done_bytes: int, _: int, *counts: int) -> None:
        job.watch(*(new + old for new, old in zip(counts, before, strict=True)))
        job.progress(bytes_before + done_bytes, total)

    packed: list[tuple[int, str, str]] = []
    if todo:
        settings = PartSettings(staging.dataset, job.tokenizer.dir, job.header, job.options.encoder)
        if job.header.arguments.screens:
            from mmdata.pack.filter.screen import screen  # with polars, which takes a moment to load

            screen(settings, job.parts, parts, job.run, job.progress)
        make = partial(RecordingPacker, settings, job.out, job.options.share)
        packed = job.run(make, todo, total=total - bytes_before, progress=report, with_counts=True)
    there = staging.places({name for _, _, name in packed})
    wrong = [
        (number, host, f"the record of part {number} is missing") for number, host, _ in packed if number not in there
    ]
    places = {part.number: there[part.number] for part in parts if part.number in there}
    summary, elsewhere, here = Summary(job.header), {}, socket.gethostname()
    for result, what in staging.results(places):
        write(result)
        summary.add(result)
        wrong += [(result.number, result.host, each) for each in what]
        if result.host != here and result.number not in done and not what:
            elsewhere[result.number] = result.host
    num_bytes = sum(job.parts[number].num_bytes for number in elsewhere)
    damaged = staging.damaged({number: places[number] for number in elsewhere}, job.run, num_bytes)
    _check_files(staging, job, [*wrong, *((number, elsewhere[number], what) for number, what in damaged)])
    return summary


def _check_files(staging: Staging, job: _Job, wrong: Sequence[tuple[int, str, str]]) -> None:
    """Raise DatasetError if files of the parts are not in the dataset that is to be published. These parts will be packed
    again. wrong: number of the part, host that wrote it, and what is wrong, in words."""
    if wrong:
        staging.forget(number for number, _, _ in wrong)
        named = [f"{what} (packed on {host})" for _, host, what in wrong[:4]]
        more = f" and {len(wrong) - 4:,} more" if len(wrong) > 4 else ""
        raise DatasetError(
            f"{staging.dataset} lacks files of {len({number for number, _, _ in wrong}):,} of {len(job.parts):,} "
            f"parts, so nothing is published: {'; '.join(named)}{more}",
            "give an --out on a file system that all nodes share, under the same path",
        )


def _publish(staging: Staging, job: _Job, summary: Summary) -> Manifest:
    """Write the tokenizer, stats.json and, last of all, the manifest; then move the dataset to its path."""
    files = [
        FileEntry(path, *write_bytes(staging.dataset / path, content))
        for path, content in ((f"tokenizer/{name}", content) for name, content in job.tokenizer.files.items())
    ]
    files.append(FileEntry("stats.json", *write_json(staging.dataset / "stats.json", plain(summary.stats()))))
    files.append(FileEntry(PARTS, *info_of(staging.dataset / PARTS)))
    manifest = summary.manifest(files)
    write_record(staging.dataset / MANIFEST, manifest)
    staging.publish({MANIFEST, *(file.path for file in Parts(staging.dataset, manifest).files)})
    return manifest


# --- what is to be packed


def arguments_of(options: PackOptions) -> PackArguments:
    """Return the options as the manifest records them, limits parsed. Raises as `dedup.check_options` does, and
    UsageError if `where` is no condition."""
    max_bad, by_reason = parse_budget(options.max_bad)
    dedup.check_options(options.dedup, options.exclude)
    if options.where is not None:
        from mmdata.pack.filter.frames import check_names
        from mmdata.pack.filter.where import Where

        check_names(Where(options.where).names, options.tokenizer)
    return PackArguments(
        val_fraction=options.val_fraction,
        on_bad=options.on_bad,
        max_bad=max_bad,
        max_bad_by_reason=dict(sorted(by_reason.items())),
        seed=options.seed,
        era=options.era,
        train_on=options.train_on,
        part_bytes=options.part_bytes,
        kind=options.kind or UNSET,
        map=rows.Columns.parse(options.mapping).mapping or UNSET,
        encoding=options.encoding or UNSET,
        text=options.text or UNSET,
        on_lost=UNSET if options.on_lost == DEFAULT_ON_LOST else options.on_lost,
        dedup=options.dedup,
        where=options.where or UNSET,
        exclude=[
            ExcludedFile(str(path), sha256_of(path), dedup.EXCLUDE_N, dedup.EXCLUDE_SHARE) for path in options.exclude
        ],
    )


def _plan_job(
    inputs: list[Path],
    out: Path,
    options: PackOptions,
    arguments: PackArguments,
    progress: Progress,
    watch: Watch,
    note: Note,
) -> _Job:
    """Read and hash the inputs once, check tokenizer and row kind, and cut the inputs into parts; write nothing."""
    kind = common_kind(inputs, options.reading)
    tokenizer, changes = packing_tokenizer(options, kind, note)
    arguments = msgspec.structs.replace(arguments, **changes)
    if options.encoder != "auto":
        choose(tokenizer, options.encoder)  # raises an error here instead of in every worker
    states = states_of(inputs)
    place = Path(os.path.realpath(out))
    is_one_of_several = options.share or options.finish
    found = Staging(place).dir / "inputs" if is_one_of_several else None
    records, parts = plan(
        inputs,
        options.part_bytes,
        options.reading,
        run=run_with(options),
        share=options.share,
        found=found,
        progress=progress,
    )
    if len(parts) > MOST_PARTS:
        enough = options.part_bytes * 2 ** math.ceil(math.log2(2 * len(parts) / MOST_PARTS))
        raise UsageError(
            f"{len(parts):,} parts: more than {MOST_PARTS:,}", f"larger parts, such as --part-size {enough}"
        )
    header = header_of(kind, options.max_len, tokenizer, records, arguments)
    return _Job(inputs, place, options, tokenizer, states, parts, header, progress, watch, note)


def run_with(options: PackOptions) -> Run:
    """Return `workers.run_jobs` with the engine and the workers of the options."""
    return partial(
        workers.run_jobs, workers=options.workers or 1, engine=options.engine, ray_address=options.ray_address
    )


# --- what is there already


def _is_dataset(out: Path) -> bool:
    """Return True for a dataset, False for a missing path or empty directory; raise DatasetError for anything else."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise DatasetError(f"{out} is a file, expected a directory for the dataset", "choose another --out")
    if not any(out.iterdir()):
        return False
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        if msgspec.json.decode(read_bytes(out / MANIFEST)).get("format") == "mm":
            return True
    raise DatasetError(
        f"{out} is not empty and not a packed dataset: it will not be replaced", "choose another --out, or empty it"
    )


def _same_dataset(out: Path, header: DatasetHeader) -> tuple[Manifest, ShardSums] | None:
    """Return the manifest of the dataset at `out` and the sums of its shards if packing would give it again; None if not,
    or if it is damaged."""
    try:
        manifest = (dataset := open_dataset(out)).manifest
    except DatasetError:
        return None
    names = ("format_version", "kind", "max_len", "buckets", "tokenizer", "arguments")
    is_same = all(getattr(manifest, name) == getattr(header, name) for name in names)
    if not is_same or _identity(manifest.inputs) != _identity(header.inputs):
        return None
    add_shards(sums := {}, dataset.parts.shards)
    return manifest, sums


def _identity(inputs: Sequence[FileEntry]) -> list[tuple[str, int, str]]:
    """Return name, size and sha256 of each input. Directories are left out, since the files may have been moved."""
    return [(remote.file_at(file.path).name, file.bytes, file.sha256) for file in inputs]


def _resume(staging: Staging, job: _Job) -> dict[int, RecordPlace]:
    """Return the places of the records of the parts finished by an earlier, unfinished pack with the same key, by
    number; remove what one with another key left. Either is noted."""
    key, begun = PackKey.of(job.header), staging.begun()
    if begun is not None and (differences := key.differences(begun)):
        job.note(f"an unfinished pack to {job.out} cannot be gone on with ({'; '.join(differences)}): it is begun anew")
        begun = None
    if begun is None:
        staging.clear()
        staging.begin(key)
        return {}
    done = staging.finished(job.run, job.parts)
    if done:
        job.note(f"{job.out}: going on with an unfinished pack, {len(done):,} of {len(job.parts):,} parts are done")
    return done


@contextlib.contextmanager
def _keep_parts(staging: Staging, job: _Job) -> Iterator[None]:
    """If the block raises, keep the finished parts and the rows left out for the next call, which begins anew only if
    the bytes would be others; without a finished part remove the hidden directory."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(InputError, OSError):  # an OSError does not show that one has changed
            _check_unchanged(staging, job, job.parts)
        if num_done := len(staging.recorded()):
            more = "" if job.options.finish else ": the same command goes on from there"
            job.note(f"{num_done:,} of {len(job.parts):,} parts are done and kept in {staging.dataset}{more}")
        else:
            staging.clear()
        raise


def _check_all_done(staging: Staging, job: _Job, done: Collection[int]) -> None:
    missing = [part.number for part in job.parts if part.number not in done]
    if missing:
        rest = "or leave --finish out to pack them here"
        names, fix = (
            f"parts {_some(missing)}",
            f"run the shards that pack them (part k is of shard k mod n + 1), {rest}",
        )
        if not done:
            names, fix = "no --shard has packed one here", f"run the shards first, {rest}"
        if len(counts := staging.shard_counts()) == 1:
            (count,) = counts
            shards = _some([f"{number}/{count}" for number in sorted({part % count + 1 for part in missing})])
            names, fix = f"those of --shard {shards}", f"run these shards, {rest}"
        problem = f"{len(missing):,} of {len(job.parts):,} parts of {job.out} are not packed yet: {names}"
        raise DatasetError(problem, f"{fix}; if another machine packed them, give all a directory that they share")


def _some(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:8])) + (", …" if len(names) > 8 else "")


# --- disk


def _check_disk(job: _Job, parts: Sequence[Part]) -> None:
    """Raise DiskError if the estimated size of the parts to be packed exceeds the free space of the disk of `out`."""
    id_bytes = id_dtype(job.header.tokenizer.vocab_size).itemsize
    needed = 2**20
    for part in parts:
        expansion = 1 if part.end is not None or part.read.encoding else COMPRESSION
        needed += int(part.num_bytes * expansion * DISK_SHARE * id_bytes / 2)
    if needed > (free := free_bytes(job.out)):
        raise DiskError(
            f"packing needs about {needed / 1e6:,.0f} MB, the disk of {job.out} has {free / 1e6:,.0f} MB free",
            "free some space, or choose another disk with --out",
        )


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Convert the errors of a full or read-only disk, a quota or missing permissions to DiskError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(
                f"the disk became full while packing {out}; what stood there is untouched",
                f"free some space at {out.parent} and run the same command again, or choose another disk with --out",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DiskError(f"cannot write {out}: {error.strerror}", "choose another --out") from error
        raise


# --- after the parts


def _check_left_out(staging: Staging, job: _Job, summary: Summary) -> None:
    """Raise InputError if no row was packed, or if more rows are left out than the limits for bad rows allow."""
    num_rows, left_out = summary.sums["rows"], summary.counts["left_out"]
    if not summary.sums["kept"]:
        reason = left_out.most_common(1)[0][0] if left_out else "no row"
        names = ", ".join(str(path) for path in job.inputs)
        fix = rows.HELP.get(reason, "give a file with one JSON object a line")
        first = first_rejected(staging.dataset / summary.rejected, job.options.reading) if summary.rejected else ""
        raise InputError(f"{names}: all {num_rows:,} rows are left out, most for: {reason}{first}", fix)
    arguments = job.header.arguments
    rows.check_budget(left_out, num_rows, arguments.max_bad, arguments.max_bad_by_reason, kind=job.options.kind)


def _check_unknown(job: _Job, summary: Summary) -> None:
    """Raise TokenizerError if the tokenizer does not know more than UNKNOWN_REFUSED of the bytes of the packed texts,
    unless that is allowed; warn from UNKNOWN_WARNED on."""
    unknown, total = summary.sums["unknown_bytes"], summary.sums["text_bytes"]
    share = unknown / max(1, total)
    problem = f"the tokenizer does not know {unknown:,} of {total:,} bytes of the texts ({share:.2%}): they are lost"
    if share > UNKNOWN_REFUSED and not job.options.allow_unknown:
        raise TokenizerError(problem, "take a tokenizer with a token for every byte, or --allow-unknown")
    if share > UNKNOWN_WARNED:
        job.note(f"warning: {problem}")


def _check_unchanged(staging: Staging, job: _Job, parts: Iterable[Part]) -> None:
    """Raise InputError if an input has changed since it was hashed; these parts will then be packed again."""
    for path, before, after in zip(job.inputs, job.states, states_of(job.inputs), strict=True):
        if before != after:
            staging.forget(part.number for part in parts)
            raise InputError(f"{path} changed while it was packed", "pack again when nothing writes to it any more")


def _note_encoders(summary: Summary, job: _Job) -> None:
    """Pass on each warning once; recommend the fast encoder if it is missing and would save much time."""
    for warning in summary.warnings:
        job.note(f"warning: {warning}")
    is_slow = not summary.warnings and all(name.startswith(REFERENCE) for name in summary.encoders)
    if summary.sums["characters"] > LARGE_CHARACTERS and is_slow and job.options.encoder == "auto":
        job.note(
            "the encoder took most of this time: pip install 'mm-toolkit[fast]' brings one that is ten times as fast"
        )
