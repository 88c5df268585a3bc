"""Check that the files of a dataset have the content that the manifest records, hashing an unchanged file only once.

What has been verified is stored in the dataset's directory, in `.verified.json`. Files copied or touched since are
hashed again (about 1 GB/s a thread), and all files every time if the directory is read-only. This finds damage; it does
not detect deliberate forgery.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from mmdata.errors import DatasetError
from mmdata.io.files import locked, sha256_of, write_json
from mmdata.io.records import FileEntry, plain, read_record

VERIFIED_NAME = ".verified.json"
LOCK_NAME = ".verified.lock"
MAX_THREADS = 4  # hashing releases the GIL; more readers than this hardly help a disk


class VerifiedFile(msgspec.Struct, array_like=True, frozen=True):
    """A file when it was last hashed: inode, modification time in ns, size in bytes, and the sha256 it had."""

    inode: int
    mtime_ns: int
    size: int
    sha256: str


def check(directory: Path, files: Sequence[FileEntry]) -> list[tuple[str, str]]:
    """Return (path, actual sha256) of each file whose content differs from its record. A file is hashed only if its
    inode, modification time, size or recorded sha256 has changed since it was last verified. Another process that
    checks the same dataset waits. files: with paths relative to `directory`. Raises FileNotFoundError for a missing
    file."""
    wrong: list[tuple[str, str]] = []
    with _exclusive(directory):
        verified = _read(directory)
        todo = [file for file in files if verified.get(file.path) != _state(directory, file)]
        states = [_state(directory, file) for file in todo]  # before reading, so that a write meanwhile is noticed
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            digests = pool.map(lambda file: sha256_of(directory / file.path), todo)
            for file, state, digest in zip(todo, states, digests, strict=True):
                if digest == file.sha256:
                    verified[file.path] = state
                else:
                    wrong.append((file.path, digest))
        if todo:
            _write(directory, verified)
    return wrong


def mark_verified(directory: Path, files: Sequence[FileEntry]) -> None:
    """Record that all of these files were found to be as their records say. The records of other files are removed."""
    _write(directory, {file.path: _state(directory, file) for file in files})


def difference(directory: Path, file: FileEntry) -> str:
    """Return in words how a file differs from its record, "" if it does not. It is read only if its size is right."""
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
    """Return the verified files by path; none if `.verified.json` is missing or unreadable."""
    with contextlib.suppress(DatasetError):
        return read_record(directory / VERIFIED_NAME, dict[str, VerifiedFile], DatasetError, "")
    return {}


def _write(directory: Path, verified: Mapping[str, VerifiedFile]) -> None:
    with contextlib.suppress(OSError):  # a read-only dataset is hashed each time instead
        write_json(directory / VERIFIED_NAME, plain(verified), indent=0)


@contextlib.contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """Let one process at a time run the block. Without effect on a read-only dataset, where no lock can be created."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(locked(directory / LOCK_NAME))
        yield
