"""A directory that appears complete or not at all: written beside its place under a hidden name, then renamed into it.

One writer at a time. Whatever ends it (an error, Ctrl-C, a full disk), what stood there before stays; what a killed
writer left behind is cleared away by the next one.
"""

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from mmdata.errors import DatasetError


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yields an empty directory that takes `out`'s place when the block ends well, and is removed when it does not.

    DatasetError when another process is writing `out`. The caller has made sure that an existing `out` may be replaced.
    """
    out = Path(os.path.realpath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        _clear_leftovers(out)
        staging = _sibling(out, "packing")
        staging.mkdir()
        try:
            yield staging
            _sync_tree(staging)
            _swap(staging, out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _sibling(out: Path, role: str) -> Path:
    return out.parent / f".{out.name}.{role}-{socket.gethostname()}-{os.getpid()}"


def _siblings(out: Path, role: str) -> list[tuple[Path, str, str]]:
    """(path, host, pid) of every directory of this role beside `out`."""
    found = []
    for path in sorted(out.parent.iterdir()):
        prefix = f".{out.name}.{role}-"
        if path.name.startswith(prefix):
            host, _, pid = path.name.removeprefix(prefix).rpartition("-")
            found.append((path, host, pid))
    return found


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(out.parent / f".{out.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = ", ".join(f"process {pid} on {host}" for _, host, pid in _siblings(out, "packing"))
        raise DatasetError(
            f"another mm pack is writing {out} ({who or 'just started'})", "wait until it ends, or choose another --out"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(lock.lock_file)  # while it is held: a waiting process then opens a file of its own
        lock.release()


def _clear_leftovers(out: Path) -> None:
    """Removes what dead writers of this host left; we hold the lock, so none of them is alive."""
    for path, host, _ in _siblings(out, "replaced"):
        if host == socket.gethostname():
            if out.exists():
                shutil.rmtree(path)
            else:
                path.rename(out)  # killed between the two renames of _swap
    for path, host, _ in _siblings(out, "packing"):
        if host == socket.gethostname():
            shutil.rmtree(path)


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
    _sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_tree(directory: Path) -> None:
    """fsyncs every directory below and including this one; the files were synced as they were written."""
    for path, _, _ in os.walk(directory, topdown=False):
        _sync(Path(path))


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
