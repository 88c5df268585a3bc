"""`mm pack`: jsonl files in, a packed dataset out. Parts are packed alone and in any order; what is published is proved.

The same inputs, tokenizer and arguments give the same bytes for any number of workers, any engine, and however often a
pack was killed on the way. Memory: one part a worker. Nothing appears at the output's place before all of it is written,
summed and synced.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmdata.encode import rows
from mmdata.errors import DatasetError, DiskError, InputError, TokenizerError, UsageError
from mmdata.io import remote
from mmdata.io import workers as engine
from mmdata.io.files import sha256_of, write_bytes
from mmdata.options import check
from mmdata.pack import dedup as screen
from mmdata.pack import unfinished
from mmdata.pack.buckets import buckets_for
from mmdata.pack.options import PackOptions, parse_budget
from mmdata.pack.part import Part, PartResult, Settings
from mmdata.pack.staging import Staging, one_of_several, only_writer
from mmdata.pack.unfinished import RecordingPacker
from mmdata.shards import dataset
from mmdata.tokenizer.encoders import NUM_HOSTILE, REFERENCE, choose
from mmdata.tokenizer.tokenizer import Tokenizer

READ_BYTES = 4 * 2**20
DISK_SHARE = 0.6  # of the jsonl's bytes, as 16-bit shards with provenance (measured: 0.3 to 0.6); 32-bit ids: twice
LARGE_CHARACTERS = 20_000_000  # where a slow encoder is worth a word
COMPRESSION = 5  # bytes of jsonl in a compressed byte, for the same estimate
Progress = Callable[[int, int], None]
Watch = Callable[[int, int, int], None]  # rows, tokens and rows set aside so far
Note = Callable[[str], None]
_Told = tuple[Progress | None, Watch | None]


@dataclass(frozen=True, slots=True)
class PackResult:
    """What became of the inputs. rows = kept + left out; tokens_in = tokens + cut; all counts by reason where it says so.

    Of one of several shards: what became of its parts.
    """

    out: Path
    kind: str
    up_to_date: bool  # an equal dataset stood there already; nothing was done
    rows: int
    kept: int
    left_out: dict[str, int]
    val_rows: int
    tokens_in: int
    tokens: int
    loss_tokens: int
    cut: dict[str, int]
    control_strings: dict[str, int]  # special-token strings in content, packed as plain text
    samples: dict[int, int]  # bucket -> packs or pairs, of both splits
    fill: float  # share of positions that hold tokens
    encoders: dict[str, int]  # who encoded text -> parts
    digest: str  # "" while nothing is published
    parts_left: int | None  # of a shard: what others shards still have to pack; None: published
    seconds: float


@dataclass(frozen=True, slots=True)
class _Job:
    """What is asked for, read and checked; nothing is written yet."""

    inputs: list[Path]
    out: Path
    tokenizer: Tokenizer
    tokenizer_dir: Path
    stamps: list[tuple[int, int]]
    parts: list[Part]
    manifest: dict[str, Any]  # its beginning
    encoder: str


def pack(
    inputs: Sequence[Path],
    out: Path,
    options: PackOptions,
    *,
    progress: Progress | None = None,
    watch: Watch | None = None,
    note: Note | None = None,
) -> PackResult:
    """Pack jsonl files of one row kind into the dataset directory `out`.

    `progress` is called with bytes of the inputs done and in all, `watch` before it with rows, tokens and rows left out so
    far, `note` with sentences about what an unfinished pack left. With `options.shard` i/n only every n-th part is packed
    and nothing is published; `options.finish` publishes what all shards packed.

    InputError: a missing file, no usable row, or more bad rows than `options.max_bad`. TokenizerError. DatasetError: `out`
    is no dataset and not empty, or being written. DiskError: full. Whatever ends the pack early leaves `out` as it was;
    after a kill, Ctrl-C or a full disk the same pack goes on where it was.
    """
    start = time.monotonic()
    check(options)
    shard, budget = options.share, parse_budget(options.max_bad)
    inputs, out = [remote.file_at(path) for path in inputs], Path(out)
    arguments = _arguments(options, budget)
    _check_inputs(inputs)
    is_rerun = _is_dataset(out)
    job = _plan_job(inputs, out, options, arguments)
    if is_rerun and (found := _same_dataset(out, job.manifest)):
        return _result(out, found, time.monotonic() - start, up_to_date=True)
    run = partial(engine.run, workers=options.workers or 1, engine=options.engine, ray_address=options.ray_address)
    say = note or (lambda _: None)
    if shard:
        return _pack_shard(job, shard, run, (progress, watch), start)
    with _disk_errors(out), only_writer(job.out) as staging, _kept_parts(staging, job, say):
        done = _go_on(staging, job, say)
        if options.finish:
            _check_all_done(job, done, staging)
        _check_disk(job, [part for part in job.parts if part.number not in done])
        results = _pack_parts(staging, job, job.parts, done, run, (progress, watch))
        _check_kept(inputs, results, *budget)
        _check_unchanged(inputs, job.stamps)
        _say_who_encoded(results, options.encoder, say)
        manifest = _finish(staging, job, results)
    return _result(out, manifest, time.monotonic() - start, up_to_date=False)


def _arguments(options: PackOptions, budget: tuple[float | None, dict[str, float]]) -> dict[str, Any]:
    """What the manifest records of the options."""
    max_bad, by_reason = budget
    return {
        "val_fraction": options.val_fraction,
        "on_bad": options.on_bad,
        "max_bad": max_bad,
        "max_bad_by_reason": dict(sorted(by_reason.items())),
        "seed": options.seed,
        "era": options.era,
        "train_on": options.train_on,
        "part_bytes": options.part_bytes,
        "dedup": options.dedup,
        "exclude": _excluded(options.dedup, options.exclude),
    }


def _plan_job(inputs: list[Path], out: Path, options: PackOptions, arguments: dict[str, Any]) -> _Job:
    assert options.tokenizer, "PackOptions.tokenizer is required"
    tokenizer = Tokenizer.load(options.tokenizer)
    if options.encoder != "auto":
        choose(tokenizer, options.encoder)  # refuses here, not in every worker
    kind = common_kind(inputs)
    stamps = _stamps(inputs)
    entries, parts = plan(inputs, options.part_bytes)
    manifest = _begin_manifest(kind, options.max_len, tokenizer, entries, arguments)
    place = Path(os.path.realpath(out))
    return _Job(inputs, place, tokenizer, options.tokenizer, stamps, parts, manifest, options.encoder)


def _pack_parts(
    staging: Staging,
    job: _Job,
    parts: Sequence[Part],
    done: Mapping[int, PartResult],
    run: Callable[..., list[PartResult]],
    told: _Told,
) -> list[PartResult]:
    """The results of these parts, in their order; those that are not done are packed."""
    progress, watch = told
    if any(part.number not in done for part in parts):
        screen_rows(staging.dir / "screen", job.manifest, job.parts, parts, run, progress)
    total = sum(part.num_bytes for part in parts)
    before = sum(part.num_bytes for part in parts if part.number in done)
    todo = [part for part in parts if part.number not in done]
    begun = _rows_tokens_left_out([result for result in done.values() if result.number in {p.number for p in parts}])

    def tell(ticked: int, _: int, *counts: int) -> None:
        if watch:
            rows, tokens, left_out = (new + old for new, old in zip(counts, begun, strict=True))
            watch(rows, tokens, left_out)
        if progress:
            progress(before + ticked, total)

    work = partial(RecordingPacker, Settings(staging.dataset, job.tokenizer_dir, job.manifest, job.encoder), job.out)
    new = (
        {result.number: result for result in run(work, todo, total=total - before, progress=tell, with_counts=True)}
        if todo
        else {}
    )
    return [done.get(part.number) or new[part.number] for part in parts]


def screen_rows(
    directory: Path,
    manifest: Mapping[str, Any],
    parts: Sequence[Part],
    own: Sequence[Part],
    run: Callable[..., Any],
    progress: Progress | None,
) -> None:
    """Finds the rows to leave out for what other rows or files say; nothing unless that is asked for.

    All parts are looked at, `own` ones first: several shards that begin together so share the work.
    """
    arguments = manifest["arguments"]
    if not arguments.get("dedup") and not arguments.get("exclude"):
        return
    exclude = tuple(Path(entry["path"]) for entry in arguments["exclude"])
    for path, entry in zip(exclude, arguments["exclude"], strict=True):
        if not path.is_file() or sha256_of(path) != entry["sha256"]:
            raise InputError(
                f"{path}: gone, or not what it was when rows were compared with it", "bring the old file back"
            )
    screening = screen.Screening(directory, manifest["kind"], arguments["dedup"], exclude)
    numbers = {part.number for part in own}
    first = sorted(parts, key=lambda part: part.number not in numbers)
    screen.mark(screening, first, run, progress)
    screen.compare(screening, parts)


def _rows_tokens_left_out(results: Sequence[PartResult]) -> tuple[int, int, int]:
    return (
        sum(result.rows for result in results),
        sum(result.tokens for result in results),
        sum(result.left_out.total() for result in results),
    )


def _pack_shard(
    job: _Job, shard: tuple[int, int], run: Callable[..., list[PartResult]], told: _Told, start: float
) -> PackResult:
    """Packs every n-th part beside other processes that pack theirs."""
    number, count = shard
    own = job.parts[number - 1 :: count]
    with _disk_errors(job.out), one_of_several(job.out, f"{number}-of-{count}") as staging:
        key = unfinished.key_of(job.manifest)
        begun = staging.begun()
        if begun is not None and (found := unfinished.differences(begun, key)):
            raise DatasetError(
                f"shards of another pack to {job.out} are there already: {'; '.join(found)}",
                f"give all shards the same arguments, or begin anew: rm -r {staging.dir}",
            )
        if begun is None:
            staging.begin(key)
        done = unfinished.finished_parts(staging, [part.number for part in own])
        _check_disk(job, [part for part in own if part.number not in done])
        results = _pack_parts(staging, job, own, done, run, told)
        _check_unchanged(job.inputs, job.stamps)
        left = len(job.parts) - len(staging.records())
    entries = [entry for result in results for entry in result.shards]
    found = {**job.manifest, "shards": entries, "totals": _totals(results, entries), "dataset_digest": ""}
    return _result(job.out, found, time.monotonic() - start, up_to_date=False, parts_left=left)


def _check_all_done(job: _Job, done: Mapping[int, PartResult], staging: Staging) -> None:
    missing = [part.number for part in job.parts if part.number not in done]
    if missing:
        names = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        raise UnfinishedError(
            f"{len(missing):,} of {len(job.parts):,} parts of {job.out} are not packed yet: {names}",
            "run the shards that pack them (part k belongs to shard k mod n + 1), or leave --finish out to pack them here",
        )


# --- what an unfinished pack left


def _go_on(staging: Staging, job: _Job, say: Note) -> dict[int, PartResult]:
    """The parts that an earlier, unfinished pack of the same has done; what another one left is removed, and named."""
    key = unfinished.key_of(job.manifest)
    begun = staging.begun()
    if begun is not None and (found := unfinished.differences(begun, key)):
        say(f"an unfinished pack to {job.out} cannot be gone on with ({'; '.join(found)}): it is begun anew")
        begun = None
    if begun is None:
        staging.clear()
        staging.begin(key)
        return {}
    done = unfinished.finished_parts(staging)
    if done:
        say(f"{job.out}: going on with an unfinished pack, {len(done):,} of {len(job.parts):,} parts are done")
    return done


@contextlib.contextmanager
def _kept_parts(staging: Staging, job: _Job, say: Note) -> Iterator[None]:
    """Keeps what is packed when a pack ends early, unless its inputs are of no use as they are or nothing is done yet."""
    try:
        yield
    except BaseException as error:
        of_no_use = isinstance(error, (InputError, UsageError, TokenizerError, DatasetError))
        if of_no_use and not isinstance(error, UnfinishedError):
            staging.clear()
        elif num_done := len(staging.records()):
            say(f"{num_done:,} of {len(job.parts):,} parts are done and kept: the same command goes on from there")
        else:
            staging.clear()
        raise


class UnfinishedError(DatasetError):
    """Shards that have not all packed their parts."""


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """What the operating system says about the disk, in our words."""
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


def _result(
    out: Path, manifest: Mapping[str, Any], seconds: float, *, up_to_date: bool, parts_left: int | None = None
) -> PackResult:
    totals = manifest["totals"]
    samples = dict.fromkeys(manifest["buckets"], 0)
    for entry in manifest["shards"]:
        samples[entry["bucket"]] += entry["samples"]
    names = ("rows", "kept", "left_out", "val_rows", "tokens_in", "tokens", "loss_tokens", "cut", "control_strings")
    return PackResult(
        out=out,
        kind=manifest["kind"],
        up_to_date=up_to_date,
        **{name: totals[name] for name in names},
        samples=samples,
        fill=_fill(manifest["kind"], manifest["shards"]),
        encoders={entry["name"]: entry["parts"] for entry in manifest.get("encoders", [])},
        digest=manifest["dataset_digest"],
        parts_left=parts_left,
        seconds=seconds,
    )


# --- what is asked for


def _check_inputs(inputs: Sequence[Path]) -> None:
    if not inputs:
        raise UsageError("no input file", "mm pack FILE.jsonl")
    for path in inputs:
        if str(path) == "-" or not path.is_file():
            raise InputError(f"{path} is not a file", "name jsonl files; `mm fetch` downloads the known ones")
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty", "give a file with one JSON object a line")


def _excluded(dedup: str | None, exclude: Sequence[Path]) -> list[dict[str, Any]]:
    """What decides which rows overlap with excluded files."""
    screen.check_arguments(dedup, exclude)
    rule = {"n": screen.EXCLUDE_N, "share": screen.EXCLUDE_SHARE}
    return [{"path": str(path), "sha256": sha256_of(Path(path)), **rule} for path in exclude]


def _is_dataset(out: Path) -> bool:
    """Whether a dataset of ours stands at `out`; DatasetError when something else does that must not be replaced."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise DatasetError(f"{out} is a file, expected a directory for the dataset", "choose another --out")
    if not any(out.iterdir()):
        return False
    try:
        is_ours = json.loads((out / "manifest.json").read_bytes()).get("format") == "mm"
    except (OSError, ValueError, AttributeError):
        is_ours = False
    if not is_ours:
        raise DatasetError(
            f"{out} is not empty and not a packed dataset: it will not be replaced", "choose another --out, or empty it"
        )
    return True


def common_kind(inputs: Sequence[Path]) -> str:
    """The row kind that all inputs have; InputError where they differ."""
    kinds = {path: rows.find_kind(path) for path in inputs}
    first = kinds[inputs[0]]
    for path, other in kinds.items():
        if other != first:
            raise InputError(
                f"{path} holds {other} rows, {inputs[0]} {first} rows", "pack each kind into a dataset of its own"
            )
    return first


def _begin_manifest(
    kind: str,
    max_len: int,
    tokenizer: Tokenizer,
    inputs: list[dict[str, Any]],
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """What is known before packing: all that the bytes to come depend on."""
    names = ("sha256", "template_sha256", "vocab_size", "bos_id", "eos_id", "pad_id")
    return {
        "format": "mm",
        "format_version": dataset.FORMAT_VERSION,
        "kind": kind,
        "max_len": max_len,
        "buckets": list(buckets_for(max_len)),
        "tokenizer": {name: getattr(tokenizer, name) for name in names},
        "inputs": inputs,
        "arguments": arguments,
    }


def plan(inputs: Sequence[Path], part_bytes: int) -> tuple[list[dict[str, Any]], list[Part]]:
    """Every input's size and sha256, and the parts: byte ranges of `part_bytes`, moved on to the next line start.

    One pass over the files. A compressed file cannot be cut: it is one part.
    """
    entries: list[dict[str, Any]] = []
    parts: list[Part] = []
    for number, path in enumerate(inputs):
        is_seekable = rows.is_seekable(path)
        sha256, num_bytes, cuts = _scan(path, part_bytes)
        entries.append({"path": str(path), "bytes": num_bytes, "sha256": sha256})
        if not is_seekable:
            parts.append(Part(len(parts), number, path, 0, None, 1, num_bytes))
            continue
        ends = [begin for begin, _ in cuts[1:]] + [num_bytes]
        for (begin, line), end in zip(cuts, ends, strict=True):
            parts.append(Part(len(parts), number, path, begin, end, line, end - begin))
    return entries, parts


def _scan(path: Path, part_bytes: int) -> tuple[str, int, list[tuple[int, int]]]:
    """sha256, size, and for each part its first byte and the number of its first line."""
    digest = hashlib.sha256()
    cuts = [(0, 1)]
    position, newlines, target = 0, 0, part_bytes
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
            at = 0
            while (newline := chunk.find(b"\n", max(at, target - 1 - position))) >= 0:
                newlines += chunk.count(b"\n", at, newline + 1)
                at = newline + 1
                cuts.append((position + at, newlines + 1))
                target = ((position + at) // part_bytes + 1) * part_bytes
            newlines += chunk.count(b"\n", at)
            position += len(chunk)
    return digest.hexdigest(), position, [cut for cut in cuts if cut[0] < position]


# --- whether it is there already, and whether it will fit


def _same_dataset(out: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest that stands at `out` when packing again would give the same, and its files are in place."""
    try:
        found = dataset.open_dataset(out).manifest
    except DatasetError:
        return None
    keys = ("format_version", "kind", "max_len", "buckets", "tokenizer", "arguments")
    is_same = all(found[key] == manifest[key] for key in keys)
    same_inputs = _identity(found["inputs"]) == _identity(manifest["inputs"])
    return found if is_same and same_inputs else None


def _identity(entries: Sequence[dict[str, Any]]) -> list[tuple[str, int, str]]:
    return [(remote.file_at(entry["path"]).name, entry["bytes"], entry["sha256"]) for entry in entries]


def _check_disk(job: _Job, parts: Sequence[Part]) -> None:
    """DiskError when what is still to be packed will hardly fit."""
    id_bytes = dataset.id_dtype(job.manifest["tokenizer"]["vocab_size"]).itemsize
    needed = 2**20
    for part in parts:
        expansion = 1 if part.end is not None else COMPRESSION
        needed += int(part.num_bytes * expansion * DISK_SHARE * id_bytes / 2)
    place = next(parent for parent in job.out.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DiskError(
            f"packing needs about {needed / 1e6:,.0f} MB, {place} has {free / 1e6:,.0f} MB free",
            "free some space, or choose another disk with --out",
        )


# --- after the parts


def _check_kept(
    inputs: Sequence[Path], results: Sequence[PartResult], max_bad: float | None, by_reason: Mapping[str, float]
) -> None:
    """InputError when no row is left, or more rows are left out than a budget allows."""
    num_rows = sum(result.rows for result in results)
    left_out = _sum(result.left_out for result in results)
    if not any(result.kept for result in results):
        reason = left_out.most_common(1)[0][0] if left_out else "no row"
        names = ", ".join(str(path) for path in inputs)
        fix = rows.HELP.get(reason, "give a file with one JSON object a line")
        raise InputError(f"{names}: all {num_rows:,} rows are left out, most for: {reason}", fix)
    rows.check_budget(left_out, num_rows, max_bad, by_reason)


def _say_who_encoded(results: Sequence[PartResult], encoder: str, say: Note) -> None:
    """Warns where the fast way was given up, and says how to get it where it is missing and would be felt."""
    for warning in dict.fromkeys(result.warning for result in results if result.warning):
        say(f"warning: {warning}")
    is_large = sum(result.characters for result in results) > LARGE_CHARACTERS
    if is_large and encoder == "auto" and all(r.encoder.startswith(REFERENCE) and not r.warning for r in results):
        say("the encoder took most of this time: pip install 'mm-toolkit[fast]' brings one that is ten times as fast")


def _encoders(results: Sequence[PartResult]) -> list[dict[str, Any]]:
    """Who encoded text: name and version, in how many parts, and how many of their rows were held to the reference."""
    found: dict[str, list[PartResult]] = {}
    for result in results:
        found.setdefault(result.encoder, []).append(result)
    return [
        {
            "name": name,
            "parts": len(of),
            "rows_compared": sum(result.compared for result in of),
            "hostile_compared": 0 if name.startswith(REFERENCE) else NUM_HOSTILE,
            "given_up": sum(bool(result.warning) for result in of),
        }
        for name, of in sorted(found.items())
    ]


def _stamps(inputs: Sequence[Path]) -> list[tuple[int, int]]:
    """Size and time of last change of every input."""
    return [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in inputs)]


def _check_unchanged(inputs: Sequence[Path], stamps: Sequence[tuple[int, int]]) -> None:
    for path, before, after in zip(inputs, stamps, _stamps(inputs), strict=True):
        if before != after:
            raise InputError(f"{path} changed while it was packed", "pack again when nothing writes to it any more")


def _sum(counters: Any) -> Counter[Any]:
    total: Counter[Any] = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _finish(staging: Staging, job: _Job, results: Sequence[PartResult]) -> dict[str, Any]:
    """Writes the tokenizer, stats.json and, last of all, the manifest, which it returns; then publishes."""
    manifest = dict(job.manifest)
    entries = sorted((s for r in results for s in r.shards), key=lambda s: (s["split"], s["bucket"], s["part"]))
    manifest["encoders"] = _encoders(results)
    manifest["parts"] = [_part_entry(result) for result in results]
    manifest["shards"] = entries
    manifest["totals"] = _totals(results, entries)
    manifest["dataset_digest"] = dataset.dataset_digest(manifest["kind"], manifest["max_len"], entries)
    files = [file for result in results for file in result.files]
    for name, content in sorted(job.tokenizer.files.items()):
        files.append(
            {"path": f"tokenizer/{name}", **write_bytes(staging.dataset / "tokenizer" / name, content)._asdict()}
        )
    stats = stats_json(manifest, results)
    files.append({"path": "stats.json", **write_bytes(staging.dataset / "stats.json", stats)._asdict()})
    manifest["files"] = sorted(files, key=lambda file: file["path"])
    write_bytes(staging.dataset / "manifest.json", _to_json(manifest))
    staging.publish(["manifest.json", *(file["path"] for file in [*files, *entries])])
    return manifest


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def stats_json(manifest: dict[str, Any], results: Sequence[PartResult]) -> bytes:
    """The content of stats.json, from a manifest with totals and the results of all its parts."""
    return _to_json(_stats(manifest, results))


def _part_entry(result: PartResult) -> dict[str, Any]:
    return {
        "part": result.number,
        "rows": result.rows,
        "kept": result.kept,
        "left_out": dict(sorted(result.left_out.items())),
        "tokens_in": result.tokens_in,
        "tokens": result.tokens,
        "cut": dict(sorted(result.cut.items())),
        "sequences": result.sequences,
        "sequence_digest": f"{result.digest:032x}",
    }


def _totals(results: Sequence[PartResult], entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "rows": sum(result.rows for result in results),
        "kept": sum(result.kept for result in results),
        "left_out": dict(sorted(_sum(result.left_out for result in results).items())),
        "tokens_in": sum(result.tokens_in for result in results),
        "tokens": sum(result.tokens for result in results),
        "cut": dict(sorted(_sum(result.cut for result in results).items())),
        "loss_tokens": sum(entry["loss_tokens"] for entry in entries),
        "control_strings": dict(sorted(_sum(result.control_strings for result in results).items())),
        "sequences": sum(result.sequences for result in results),
        "samples": sum(entry["samples"] for entry in entries),
        "val_rows": sum(entry["rows"] for entry in entries if entry["split"] == "val"),
    }


def _stats(manifest: dict[str, Any], results: Sequence[PartResult]) -> dict[str, Any]:
    """The figures of a dataset, as `mm stats` shows them."""
    kind, totals, entries = manifest["kind"], manifest["totals"], manifest["shards"]
    characters = sum(result.characters for result in results)
    counts = np.zeros(manifest["max_len"] + 1, np.int64)
    for length, count in _sum(result.lengths for result in results).items():
        counts[length] += count
    return {
        "kind": kind,
        "max_len": manifest["max_len"],
        "dataset_digest": manifest["dataset_digest"],
        **totals,
        "trained_share": totals["loss_tokens"] / max(1, totals["tokens"]),
        "characters": characters,
        "characters_per_token": characters / max(1, totals["tokens_in"]),
        "fill": _fill(kind, entries),
        "waste": 1 - _fill(kind, entries),
        "splits": {name: _figures(kind, [e for e in entries if e["split"] == name]) for name in dataset.SPLITS},
        "buckets": {
            str(bucket): _figures(kind, [e for e in entries if e["bucket"] == bucket]) for bucket in manifest["buckets"]
        },
        "lengths": length_figures(counts),
    }


def _figures(kind: str, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = ("samples", "sequences", "rows", "tokens", "loss_tokens")
    return {**{name: sum(entry[name] for entry in entries) for name in names}, "fill": _fill(kind, entries)}


def _fill(kind: str, entries: Sequence[dict[str, Any]]) -> float:
    """The share of positions that hold tokens; a pair has a bucket's length for each of its sides."""
    positions = sum(entry["samples"] * entry["bucket"] for entry in entries) * (2 if kind == "pair" else 1)
    return sum(entry["model_tokens"] for entry in entries) / max(1, positions)


def length_figures(counts: np.ndarray) -> dict[str, Any]:
    """Figures of a length distribution. counts: int64 [longest + 1], how many sequences have each length."""
    total = int(counts.sum())
    lengths = np.arange(len(counts))
    reached = np.cumsum(counts)
    quantiles = {f"p{q}": int(np.searchsorted(reached, max(1, -(-total * q // 100)))) for q in (50, 90, 99)}
    present = np.flatnonzero(counts)
    edges = [0, *(2**k for k in range(5, 31) if 2**k < len(counts) - 1), len(counts) - 1]
    return {
        "sequences": total,
        "tokens": int((counts * lengths).sum()),
        "mean": float((counts * lengths).sum() / max(1, total)),
        "shortest": int(present[0]) if total else 0,
        **(quantiles if total else dict.fromkeys(quantiles, 0)),
        "longest": int(present[-1]) if total else 0,
        "histogram": [
            {
                "up_to": high,
                "sequences": int(counts[low + 1 : high + 1].sum()),
                "tokens": int((counts * lengths)[low + 1 : high + 1].sum()),
            }
            for low, high in itertools.pairwise(edges)
        ],
    }
