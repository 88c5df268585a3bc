"""Whether files of a dataset hold the bytes that their records say, each hashed once for each state of the file.

`check` keeps what it verified in the dataset, as `.verified.json`: inode, time, size and sha256 of each file. Files that
were copied or touched are hashed again (about 1 GB/s a thread); where the dataset cannot be written to, every time. This
finds damage; it does not protect from somebody who forges files.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from mmdata.errors import DatasetError
from mmdata.io.files import locked, sha256_of, write_json
from mmdata.io.records import FileEntry, plain, read_record

VERIFIED_NAME = ".verified.json"
LOCK_NAME = ".verified.lock"
MAX_THREADS = 4  # hashing releases Python's lock; more readers than this hardly help a disk
Progress = Callable[[int, int], None]


class VerifiedFile(msgspec.Struct, array_like=True, frozen=True):
    """The state of a file when it was last hashed, and the sha256 it had."""

    inode: int
    mtime_ns: int
    size: int
    sha256: str


def check(directory: Path, files: Sequence[FileEntry], progress: Progress | None = None) -> Iterator[tuple[str, str]]:
    """(path, actual sha256) of every file whose content is not what its record says.

    Only files whose present state has not been verified are read. Processes that ask at the same time wait for the first.
    """
    wrong: list[tuple[str, str]] = []
    with _exclusive(directory):
        verified = _read(directory)
        todo = [file for file in files if verified.get(file.path) != _state(directory, file)]
        total, done = sum(file.bytes for file in todo), 0
        states = [_state(directory, file) for file in todo]  # before reading: a write during it then shows
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            digests = pool.map(lambda file: sha256_of(directory / file.path), todo)
            for file, state, digest in zip(todo, states, digests, strict=True):
                if digest == file.sha256:
                    verified[file.path] = state
                else:
                    wrong.append((file.path, digest))
                done += file.bytes
                if progress:
                    progress(done, total)
        if todo:
            _write(directory, verified)
    yield from wrong


def mark_verified(directory: Path, files: Sequence[FileEntry]) -> None:
    """Record that all of these files were just found to be as their records say."""
    _write(directory, {file.path: _state(directory, file) for file in files})


def difference(directory: Path, file: FileEntry) -> str:
    """How a file differs from its record, in words; empty when it does not. Reads it if its size is right."""
    path = directory / file.path
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != file.bytes:
        return f"has {size:,} bytes, expected {file.bytes:,}"
    digest = sha256_of(path)
    return "" if digest == file.sha256 else f"sha256 is {digest}, expected {file.sha256}"


def _state(directory: Path, file: FileEntry) -> VerifiedFile:
    stat = (directory / file.path).stat()
    return VerifiedFile(stat.st_ino, stat.st_mtime_ns, stat.st_size, file.sha256)


def _read(directory: Path) -> dict[str, VerifiedFile]:
    """What was verified, by path; nothing where it cannot be read."""
    with contextlib.suppress(DatasetError):
        return read_record(directory / VERIFIED_NAME, dict[str, VerifiedFile], DatasetError, "")
    return {}


def _write(directory: Path, verified: Mapping[str, VerifiedFile]) -> None:
    with contextlib.suppress(OSError):  # a read-only dataset is hashed each time instead
        write_json(directory / VERIFIED_NAME, plain(verified), indent=0)


@contextlib.contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """One process at a time; no lock on a read-only dataset, where nothing is written."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(locked(directory / LOCK_NAME))
        yield
