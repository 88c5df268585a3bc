"""The hidden directory in which a dataset is packed before it is renamed to its place, and the locks on it.

    .NAME.packing/begun.json   what is being packed: all that the bytes of the dataset depend on
    .NAME.packing/done/*.jsonl the results of finished parts, each appended after the part's files; a file a process
    .NAME.packing/dataset/     the files; renamed to NAME when all of them are written

If a pack ends early (a kill, Ctrl-C, a full disk), its finished parts stay here, and the same command continues. The
file `.NAME.lock` names the process and host that are packing; a lock whose process has died is taken over.
"""

import contextlib
import errno
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mmdata.errors import DatasetError
from mmdata.io.files import (
    AlreadyLockedError,
    append_bytes,
    locked,
    no_progress,
    replace_directory,
    restore_directory,
    write_bytes,
)
from mmdata.io.records import FileEntry, decode_record, plain, read_record, sealed, write_record
from mmdata.io.workers import LARGE_BYTES, Tick, in_threads
from mmdata.pack.part import Part, PartPacker, PartResult, PartSettings
from mmdata.shards import checksums
from mmdata.shards.manifest import DatasetHeader

Run = Callable[..., list[Any]]  # calls `workers.run_jobs`
PACKAGES = ("mm-toolkit", "tokenizers", "pyarrow", "jinja2")  # other versions may write other tokens or bytes


class PackKey(DatasetHeader, frozen=True, kw_only=True):
    """The content of begun.json; packs with equal keys write the same bytes. versions: of the packages that these may
    depend on. Arguments that only decide about publishing have a fixed value."""

    versions: dict[str, str]

    @classmethod
    def of(cls, header: DatasetHeader) -> "PackKey":
        """Return the key for a dataset with this header, packed with the installed versions of the packages."""
        more = ["rensa"] if header.arguments.dedup == "near" else []
        more += ["polars"] if header.arguments.where else []
        versions = {name: version(name) for name in (*PACKAGES, *more)}
        values = msgspec.structs.asdict(header)
        values["arguments"] = msgspec.structs.replace(
            header.arguments, max_bad=None, max_bad_by_reason={}, on_bad="quarantine"
        )
        return cls(**values, versions=versions)

    def differences(self, before: "PackKey") -> list[str]:
        """Return, in words, how this key differs from that of an unfinished pack; empty if that can be continued."""
        words = [
            f"{name.replace('_', '-')} was {getattr(before, name)}, now {getattr(self, name)}"
            for name in ("kind", "max_len")
            if getattr(before, name) != getattr(self, name)
        ]
        if before.tokenizer != self.tokenizer:
            words.append("the tokenizer is another one")
        words += _input_differences(before.inputs, self.inputs)
        for label, old, new in (
            ("--", plain(before.arguments), plain(self.arguments)),
            ("version of ", before.versions, self.versions),
        ):
            for key in dict.fromkeys([*new, *old]):
                if old.get(key) != new.get(key):
                    name = key.replace("part_bytes", "part_size").replace("_", "-") if label == "--" else key
                    words.append(f"{label}{name} was {old.get(key)}, now {new.get(key)}")
        if not words and before != self:
            words.append("it was begun by another version of mm")
        return words


def _input_differences(before: Sequence[FileEntry], now: Sequence[FileEntry]) -> list[str]:
    """Return, in words, how the input files differ: their paths, or, if those are equal, size or content."""
    names_before, names_now = [file.path for file in before], [file.path for file in now]
    if names_before != names_now:
        return [f"the inputs were {', '.join(names_before)}, now {', '.join(names_now)}"]
    return [
        f"{new.path} has changed ({old.bytes:,} bytes then, {new.bytes:,} now)"
        for old, new in zip(before, now, strict=True)
        if old != new
    ]


class RecordPlace(NamedTuple):
    """Where the record of a finished part stands: in a file of done/, at a byte offset."""

    name: str
    offset: int


@dataclass(frozen=True, slots=True)
class Staging:
    """The hidden directory of one pack. out: the path that the finished dataset will have."""

    out: Path

    @property
    def dir(self) -> Path:
        """The hidden directory `.NAME.packing`, in the same directory as `out`."""
        return _sibling(self.out, "packing")

    @property
    def dataset(self) -> Path:
        """The directory to which the files of the dataset are written."""
        return self.dir / "dataset"

    def begun(self) -> PackKey | None:
        """Return the key of an unfinished pack to `out`, or None if there is none or its begun.json cannot be read."""
        with contextlib.suppress(DatasetError):
            return read_record(self.dir / "begun.json", PackKey, DatasetError, "")
        return None

    def begin(self, key: PackKey) -> None:
        """Create the directory and write `key` to begun.json."""
        self.dataset.mkdir(parents=True, exist_ok=True)
        write_record(self.dir / "begun.json", key)

    def record(self, result: PartResult, writer: str) -> None:
        """Record that a part is finished. All files of the part must be on disk. writer: a name that only this process
        has. The newline in front keeps records apart from one that was cut off by a full disk."""
        append_bytes(self.dir / f"done/{writer}.jsonl", b"\n%b\n" % msgspec.json.encode(sealed(result)))

    def recorded(self) -> set[int]:
        """Return the numbers of the parts that were recorded as finished. Their files are not checked."""
        return {*self.places()}

    def shard_counts(self) -> set[int]:
        """Return in how many shards those that have finished parts have divided them: one number, or several."""
        return {int(count) for path in self._records() if (count := path.stem.rpartition("-of-")[2]).isdecimal()}

    def places(self, names: Collection[str] = ()) -> dict[int, RecordPlace]:
        """Return where the record of each finished part stands, the last of several, by number, ascending. names: of
        files of records, which the file system may not list yet if another machine has just made them."""
        paths = {*self._records(), *(path for name in names if (path := self.dir / "done" / name).exists())}
        found = {
            number: RecordPlace(path.name, offset) for path in sorted(paths) for number, offset, _ in _numbered(path)
        }
        return dict(sorted(found.items()))

    def result(self, place: RecordPlace) -> PartResult:
        """Read the result of a part. Raises DatasetError if its record is damaged."""
        with (self.dir / "done" / place.name).open("rb") as file:
            file.seek(place.offset)
            return decode_record(file.readline(), PartResult, f"{file.name}", DatasetError, "pack again")

    def finished(self, run: Run, parts: Sequence[Part]) -> dict[int, RecordPlace]:
        """Return the places of those of these parts that are recorded and whose files have the recorded hashes (1 GB/s
        a thread), by number. run: as in `damaged`. Records of others are removed."""
        total = {part.number: part.num_bytes for part in parts}
        places = {number: place for number, place in self.places().items() if number in total}
        if bad := {number for number, _ in self.damaged(places, run, sum(total[number] for number in places))}:
            self.forget(bad)
            places = {number: place for number, place in self.places().items() if number in total}
        return places

    def damaged(self, places: Mapping[int, RecordPlace], run: Run, num_bytes: int) -> list[tuple[int, str]]:
        """Return (its number, what is wrong in words) for each file of these parts that is not as recorded. run: calls
        `workers.run_jobs`; it is used if the parts are of LARGE_BYTES, which other processes or machines then read."""
        jobs = list(places.values())
        if num_bytes < LARGE_BYTES or not jobs:
            wrong = [what for _, (_, what) in in_threads(partial(_differences, self, True), jobs)]
        else:
            wrong = [what for _, what in run(partial(partial, _differences, self, True), jobs, total=num_bytes)]
        return [(number, what) for number, several in zip(places, wrong, strict=True) for what in several]

    def results(self, places: Mapping[int, RecordPlace]) -> Iterator[tuple[PartResult, list[str]]]:
        """Yield the result of each of these parts, and what is missing of its files or has another size."""
        for _, (result, what) in in_threads(partial(_differences, self, False), places.values()):
            if result is None:
                raise DatasetError(what[0], "pack again")
            yield result, what

    def _records(self) -> list[Path]:
        return sorted((self.dir / "done").glob("*.jsonl"))

    def forget(self, numbers: Iterable[int]) -> None:
        """Remove the records of these parts, so that they are packed again."""
        if gone := set(numbers):
            for path in self._records():
                lines = list(_numbered(path))
                kept = [line for number, _, line in lines if number not in gone]
                if len(kept) < len(lines):
                    write_bytes(path, b"".join(kept))

    def clear(self) -> None:
        """Remove the hidden directory, records first: a part whose files are partly removed must not pass for finished."""
        shutil.rmtree(self.dir / "done", ignore_errors=True)
        shutil.rmtree(self.dir, ignore_errors=True)

    def publish(self, files: Collection[str]) -> None:
        """Move the dataset to `out`, replacing a dataset there, and remove the hidden directory. files: paths, relative
        to the dataset, that belong to it; others are removed before. Raises FileNotFoundError if one was removed."""
        present = {str(path.relative_to(self.dataset)) for path in self.dataset.rglob("*") if path.is_file()}
        for path in sorted({*files} - present):
            raise FileNotFoundError(errno.ENOENT, "was removed while others were written", str(self.dataset / path))
        for path in present - {*files}:
            (self.dataset / path).unlink()  # left by a writer that was killed
        replace_directory(self.dataset, self.out, _sibling(self.out, "replaced"))
        shutil.rmtree(self.dir, ignore_errors=True)


class _Number(msgspec.Struct):
    number: int


def _numbered(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield the number of the part, the offset and the line of each record in a file, without those that were cut off."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(msgspec.DecodeError, UnicodeError):
                yield msgspec.json.decode(line, type=_Number).number, offset, line
            offset += len(line)


def _differences(
    staging: Staging, is_hashed: bool, place: RecordPlace, _tick: Tick = no_progress
) -> tuple[PartResult | None, list[str]]:
    """Return what is wrong with the files of a part, in words, and, unless they are hashed, its result."""
    try:
        result = staging.result(place)
    except DatasetError as error:
        return None, [error.message]
    checked = (
        (file.path, checksums.difference(staging.dataset, file, is_hashed=is_hashed)) for file in result.all_files
    )
    return None if is_hashed else result, [f"{path} {what}" for path, what in checked if what]


class RecordingPacker:
    """A PartPacker that records a part as finished when its files are on disk. out: path of the finished dataset.
    share: (i, n) of a shard."""

    def __init__(self, settings: PartSettings, out: Path, share: tuple[int, int] | None = None):
        self._pack = PartPacker(settings)
        self._staging, self._name = Staging(out), f"{uuid.uuid4().hex}{'-{}-of-{}'.format(*share) if share else ''}"

    def __call__(self, part: Part, tick: Tick) -> tuple[int, str, str]:
        """Pack a part; return its number, the host that wrote it, and the name of the file with its record."""
        result = self._pack(part, tick)
        self._staging.record(result, self._name)
        return part.number, result.host, f"{self._name}.jsonl"


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[Staging]:
    """Hold the lock for packing all of `out` while the block runs; first restore a dataset whose publishing was killed
    half way. Raises DatasetError, naming host and process, if another pack to `out` is running."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with _hold(_sibling(out, "lock"), out):
        for path in sorted(out.parent.glob(f".{out.name}.lock.*")):
            _check_free(path, out)
        restore_directory(out, _sibling(out, "replaced"))
        yield Staging(out)


@contextlib.contextmanager
def one_of_several(out: Path, shard: str) -> Iterator[Staging]:
    """Hold the lock for packing the share `shard` (such as "1-of-4") of `out` while the block runs. Raises DatasetError
    if another process packs the same share or all of `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with _hold(_sibling(out, f"lock.{shard}"), out, may_move=True):
        _check_free(_sibling(out, "lock"), out)
        yield Staging(out)


# --- locks


class LockOwner(msgspec.Struct, frozen=True):
    """The content of a lock file: host and id of the process that holds the lock."""

    host: str
    pid: int


@contextlib.contextmanager
def _hold(path: Path, out: Path, *, may_move: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, with this process's host and id, while the block runs. Raises DatasetError if another
    process holds it, or it names another host, as shared file systems do not always pass locks on. may_move: take it
    over in the latter case, where the other process could do no harm."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path, wait=False))
        except AlreadyLockedError:
            raise _busy(out, _owner(path)) from None
        this, owner = LockOwner(socket.gethostname(), os.getpid()), _owner(path)
        if owner and owner.host != this.host and not may_move:
            raise _busy(out, owner)
        if owner or not path.stat().st_size:  # otherwise filelock's own marker, on a file system without locks
            path.write_bytes(msgspec.json.encode(this))  # in place: the lock is on this inode
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _check_free(path: Path, out: Path) -> None:
    """Raise DatasetError if another process holds the lock file `path`, which need not exist."""
    if path.exists():
        try:
            with locked(path, wait=False):
                pass
        except AlreadyLockedError:
            raise _busy(out, _owner(path)) from None


def _owner(path: Path) -> LockOwner | None:
    with contextlib.suppress(DatasetError):
        return read_record(path, LockOwner, DatasetError, "")
    return None


def _busy(out: Path, owner: LockOwner | None) -> DatasetError:
    host, pid = (owner.host, owner.pid) if owner else ("?", 0)
    return DatasetError(
        f"another mm pack is writing {out} (process {pid} on {host})",
        f"wait until it ends, or choose another --out; if {host} is gone for good: rm {_sibling(out, 'lock')}",
    )


def _sibling(out: Path, role: str) -> Path:
    return out.parent / f".{out.name}.{role}"
