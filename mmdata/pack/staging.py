"""The hidden directory a dataset is packed in before it appears, complete, at its place; and who may write there.

    .NAME.packing/begun.json       what is being packed: all that its bytes depend on
    .NAME.packing/done/00007.json  the result of a finished part, written after the part's files
    .NAME.packing/dataset/         the files; renamed to NAME when all of them are there

A pack that ends early (a kill, Ctrl-C, a full disk) leaves its finished parts here, and the same pack goes on from them.
`.NAME.lock` says which process of which host is packing; a lock whose process has died is taken over.
"""

import contextlib
import os
import shutil
import socket
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from mmdata.errors import DatasetError
from mmdata.io.files import AlreadyLockedError, locked, replace_directory, restore_directory
from mmdata.io.records import FileEntry, plain, read_record, write_record
from mmdata.io.workers import Tick
from mmdata.pack.part import Part, PartPacker, PartResult, PartSettings
from mmdata.shards import checksums
from mmdata.shards.manifest import DatasetHeader, TokenizerRecord

# These decide whether a dataset is published, not what its parts hold.
FREE_ARGUMENTS = ("max_bad", "max_bad_by_reason")
PACKAGES = ("mm-toolkit", "tokenizers", "pyarrow", "jinja2")  # other versions may write other tokens or bytes


class PackKey(msgspec.Struct, kw_only=True):
    """The content of begun.json: a dataset's header, without the arguments that no byte depends on, and versions."""

    format: str
    format_version: int
    kind: str
    max_len: int
    buckets: tuple[int, ...]
    tokenizer: TokenizerRecord
    inputs: list[FileEntry]
    arguments: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def of(cls, header: DatasetHeader) -> "PackKey":
        """The key of a dataset with this header, packed by the installed versions."""
        values = msgspec.structs.asdict(header)
        arguments = {k: v for k, v in plain(header.arguments).items() if k not in FREE_ARGUMENTS}
        near = ("rensa",) if header.arguments.dedup == "near" else ()
        versions = {name: version(name) for name in (*PACKAGES, *near)}
        return cls(**{**values, "arguments": arguments, "versions": versions})

    def differences(self, before: "PackKey") -> list[str]:
        """What differs from the key an earlier pack began with, in words; empty when this pack can go on with it."""
        words = [
            f"{name.replace('_', '-')} was {getattr(before, name)}, now {getattr(self, name)}"
            for name in ("kind", "max_len")
            if getattr(before, name) != getattr(self, name)
        ]
        if before.tokenizer != self.tokenizer:
            words.append("the tokenizer is another one")
        words += _input_differences(before.inputs, self.inputs)
        for label, old, new in (
            ("--", before.arguments, self.arguments),
            ("version of ", before.versions, self.versions),
        ):
            for key in dict.fromkeys([*new, *old]):
                if old.get(key) != new.get(key):
                    name = key.replace("_", "-") if label == "--" else key
                    words.append(f"{label}{name} was {old.get(key)}, now {new.get(key)}")
        if not words and before != self:
            words.append("it was begun by another version of mm")
        return words


def _input_differences(before: Sequence[FileEntry], now: Sequence[FileEntry]) -> list[str]:
    names_before, names_now = [file.path for file in before], [file.path for file in now]
    if names_before != names_now:
        return [f"the inputs were {', '.join(names_before)}, now {', '.join(names_now)}"]
    return [
        f"{new.path} has changed ({old.bytes:,} bytes then, {new.bytes:,} now)"
        for old, new in zip(before, now, strict=True)
        if old != new
    ]


@dataclass(frozen=True, slots=True)
class Staging:
    """The hidden directory of one pack; `out` is the place its dataset will have."""

    out: Path

    @property
    def dir(self) -> Path:
        return _sibling(self.out, "packing")

    @property
    def dataset(self) -> Path:
        """Where the files of the dataset are written."""
        return self.dir / "dataset"

    def begun(self) -> PackKey | None:
        """What an earlier pack to this place began with; None when none is unfinished."""
        with contextlib.suppress(DatasetError):
            return read_record(self.dir / "begun.json", PackKey, DatasetError, "")
        return None

    def begin(self, key: PackKey) -> None:
        """Record what is being packed."""
        self.dataset.mkdir(parents=True, exist_ok=True)
        write_record(self.dir / "begun.json", key)

    def record(self, result: PartResult) -> None:
        """Record that a part's files are all on disk."""
        write_record(self._record_path(result.number), result)

    def recorded(self) -> list[int]:
        """The numbers of the parts with a record."""
        return sorted(int(path.stem) for path in (self.dir / "done").glob("*.json") if path.stem.isdigit())

    def finished(self, numbers: Collection[int] | None = None) -> dict[int, PartResult]:
        """The results of the parts (all, or these) whose files are as recorded (hashed, about 1 GB/s a thread).

        Records that cannot be read or whose files are damaged are removed.
        """
        results = {}
        for number in self.recorded():
            if numbers is not None and number not in numbers:
                continue
            with contextlib.suppress(DatasetError):
                result = read_record(self._record_path(number), PartResult, DatasetError, "")
                if self._is_intact(result):
                    results[number] = result
                    continue
            self._record_path(number).unlink(missing_ok=True)
        return results

    def _is_intact(self, result: PartResult) -> bool:
        files = [*(shard.file for shard in result.shards), *result.files]
        with ThreadPoolExecutor(checksums.MAX_THREADS) as pool:
            return not any(pool.map(lambda file: checksums.difference(self.dataset, file), files))

    def _record_path(self, part: int) -> Path:
        return self.dir / "done" / f"{part:05d}.json"

    def clear(self) -> None:
        """Remove all that was packed so far; records first, so that a half-removed part is not taken for a whole one."""
        shutil.rmtree(self.dir / "done", ignore_errors=True)
        shutil.rmtree(self.dir, ignore_errors=True)

    def publish(self, files: Collection[str]) -> None:
        """Move the dataset, which consists of these files, to `out`; what stood there is removed."""
        for path in self.dataset.rglob("*"):
            if path.is_file() and str(path.relative_to(self.dataset)) not in files:
                path.unlink()  # what a killed writer left
        replace_directory(self.dataset, self.out, _sibling(self.out, "replaced"))
        shutil.rmtree(self.dir, ignore_errors=True)


class RecordingPacker:
    """A PartPacker that records each part when its files are on disk."""

    def __init__(self, settings: PartSettings, out: Path):
        self._pack = PartPacker(settings)
        self._staging = Staging(out)

    def __call__(self, part: Part, tick: Tick) -> PartResult:
        result = self._pack(part, tick)
        self._staging.record(result)
        return result


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[Staging]:
    """Keep every other pack to `out` away; DatasetError, with host and process, when there is one.

    Restores the dataset at `out` if a pack was killed between the two renames of publishing.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with _hold(_sibling(out, "lock"), out):
        for path in sorted(out.parent.glob(f".{out.name}.lock.*")):
            _check_free(path, out)
        restore_directory(out, _sibling(out, "replaced"))
        yield Staging(out)


@contextlib.contextmanager
def one_of_several(out: Path, shard: str) -> Iterator[Staging]:
    """Pack a share of `out` while others pack theirs. DatasetError when one packs the same share, or all of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with _hold(_sibling(out, f"lock.{shard}"), out, may_move=True):
        _check_free(_sibling(out, "lock"), out)
        yield Staging(out)


# --- locks


class LockOwner(msgspec.Struct, frozen=True):
    """The content of a lock file: the process that holds the lock."""

    host: str
    pid: int


@contextlib.contextmanager
def _hold(path: Path, out: Path, *, may_move: bool = False) -> Iterator[None]:
    """Hold a lock file that names this process.

    A lock that no process holds but that names another host is refused, since file systems shared between hosts may not
    pass locks on. may_move: take it over anyway, where the other process could do no harm.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path, wait=False))
        except AlreadyLockedError:
            raise _busy(out, _owner(path)) from None
        this, owner = LockOwner(socket.gethostname(), os.getpid()), _owner(path)
        if owner and owner.host != this.host and not may_move:
            raise _busy(out, owner)
        if owner or not path.stat().st_size:  # else filelock's own marker, where the file system has no locks
            path.write_bytes(msgspec.json.encode(this))  # in place: the lock is on this inode
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _check_free(path: Path, out: Path) -> None:
    """DatasetError when another process holds this lock."""
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
