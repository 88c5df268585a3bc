"""A dataset that appears complete or not at all: packed beside its place in a hidden directory, then renamed into it.

    .NAME.packing/begun.json     what is being packed: all that its bytes depend on
    .NAME.packing/done/00007.json  the record of a finished part, written after the part's files
    .NAME.packing/dataset/       the files; renamed to NAME when all is there

What ends a pack (a kill, Ctrl-C, a full disk) leaves the finished parts, and the same pack goes on from them. `.NAME.lock`
says which process of which host is at it; the lock of a dead process is taken over.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdata.errors import DatasetError
from mmdata.io.files import sync, write_json


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

    def begun(self) -> dict[str, Any] | None:
        """What an earlier pack to this place was begun with; None when none is unfinished."""
        try:
            found = json.loads((self.dir / "begun.json").read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def begin(self, what: dict[str, Any]) -> None:
        """Notes what is being packed."""
        self.dataset.mkdir(parents=True, exist_ok=True)
        write_json(self.dir / "begun.json", what)

    def record(self, part: int, result: dict[str, Any]) -> None:
        """Notes that a part's files are all on disk."""
        write_json(self.dir / "done" / f"{part:05d}.json", result)

    def records(self) -> dict[int, dict[str, Any]]:
        """What was noted of each finished part."""
        found = {}
        for path in sorted((self.dir / "done").glob("*.json")):
            if path.stem.isdigit():
                found[int(path.stem)] = json.loads(path.read_bytes())
        return found

    def forget(self, part: int) -> None:
        """Takes a part's record back: its files are not what the record says."""
        (self.dir / "done" / f"{part:05d}.json").unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes all that was packed so far; records first, so that a half-removed part is not taken for a whole one."""
        shutil.rmtree(self.dir / "done", ignore_errors=True)
        shutil.rmtree(self.dir, ignore_errors=True)

    def publish(self, known: Sequence[str]) -> None:
        """Puts the dataset, which consists of the `known` files, where `out` is; what stood there is removed."""
        for path in self.dataset.rglob("*"):
            if path.is_file() and str(path.relative_to(self.dataset)) not in known:
                path.unlink()  # what a killed writer left
        _sync_tree(self.dataset)
        _swap(self.dataset, self.out)
        shutil.rmtree(self.dir, ignore_errors=True)


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[Staging]:
    """Nobody else packs to `out` meanwhile; DatasetError, with host and process, when somebody does.

    Puts right what a pack left that was killed between the two renames of publishing.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(_sibling(out, "lock"), out):
        for path in sorted(out.parent.glob(f".{out.name}.lock.*")):
            if holder := _holder(path):
                raise _busy(out, holder)
        replaced = _sibling(out, "replaced")
        if replaced.exists():
            shutil.rmtree(replaced) if out.exists() else replaced.rename(out)
        yield Staging(out)


@contextlib.contextmanager
def one_of_several(out: Path, shard: str) -> Iterator[Staging]:
    """This process packs its share of `out`, others theirs. DatasetError when one does the same share, or packs alone."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(_sibling(out, f"lock.{shard}"), out, may_move=True):
        if holder := _holder(_sibling(out, "lock")):
            raise _busy(out, holder)
        yield Staging(out)


# --- the lock


@contextlib.contextmanager
def _locked(path: Path, out: Path, *, may_move: bool = False) -> Iterator[None]:
    """Holds the lock file. The system lets go of it when a process dies; where a filesystem cannot lock, host and pid
    decide. may_move: whether a lock left behind by another host is taken over (its holder can do no harm)."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            holder = None if _try_lock(descriptor) else _read_owner(path)
            if holder is None and not may_move:
                left = _read_owner(path)
                holder = left if left and left["host"] != socket.gethostname() else None
            if holder is not None:
                raise _busy(out, holder)
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                break  # else its last holder removed it after we had opened it
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # while it is held: a waiting process then opens a file of its own
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this filesystem has no locks
        found = json.loads(os.pread(descriptor, 1000, 0) or b"null")
        return not (found and found["host"] == socket.gethostname() and _is_alive(found["pid"]))
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _read_owner(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _holder(path: Path) -> dict[str, Any] | None:
    """Who holds this lock now, if anybody does."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        return None if _try_lock(descriptor) else _read_owner(path) or {"host": "?", "pid": 0}
    finally:
        os.close(descriptor)


def _busy(out: Path, holder: dict[str, Any]) -> DatasetError:
    who = f"process {holder['pid']} on {holder['host']}"
    lock = _sibling(out, "lock")
    return DatasetError(
        f"another mm pack is writing {out} ({who})",
        f"wait until it ends, or choose another --out; if {holder['host']} is gone for good: rm {lock}",
    )


# --- the place


def _sibling(out: Path, role: str) -> Path:
    return out.parent / f".{out.name}.{role}"


def _swap(staging: Path, out: Path) -> None:
    """Puts `staging` where `out` is; an existing `out` is moved aside first, and back should the second rename fail."""
    replaced = _sibling(out, "replaced")
    if not out.exists():
        staging.rename(out)
    else:
        out.rename(replaced)
        try:
            staging.rename(out)
        except BaseException:
            replaced.rename(out)
            raise
    sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_tree(directory: Path) -> None:
    """fsyncs every directory below and including this one; the files were synced as they were written."""
    for path, _, _ in os.walk(directory, topdown=False):
        sync(Path(path))
