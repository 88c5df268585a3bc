"""Check that the files of a dataset have the content that the manifest records, hashing an unchanged file only once.

What has been verified is stored in the dataset's directory, in `.verified.json`. Files copied or touched since are
hashed again (about 1 GB/s a thread), and all files every time if the directory is read-only. This finds damage; it does
not detect deliberate forgery.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from mmdata.io.files import check_regular, locked, read_bytes, sha256_of, write_bytes
from mmdata.io.records import FileEntry
from mmdata.io.workers import in_threads

VERIFIED_NAME = ".verified.json"
LOCK_NAME = ".verified.lock"


class VerifiedFile(msgspec.Struct, array_like=True, frozen=True):
    """A file when it was last read: inode, modification time in ns, size in bytes, the sha256 it had, and the
    `Manifest.content_digest` with which its content was compared."""

    inode: int
    mtime_ns: int
    size: int
    sha256: str
    against: str = ""


def check(
    directory: Path, files: Iterable[FileEntry], against: str, problem_of: Callable[[FileEntry], str]
) -> list[tuple[str, str]]:
    """Return (path, what is wrong) of each file that is not as its record says. A file is read only if its inode,
    modification time or size, its record or `against` has changed since it was last found right. Another process that
    checks the same dataset waits. files: with paths relative to `directory`. problem_of: returns what is wrong with a
    file of the recorded hash, "" if nothing is."""

    def wrong(file: FileEntry) -> str:
        digest = sha256_of(directory / file.path)
        if digest != file.sha256:
            return f"its bytes have changed since it was packed (sha256 {digest})"
        return problem_of(file)

    todo: list[tuple[FileEntry, VerifiedFile]] = []  # with states before reading, so that a write meanwhile is noticed
    found: list[tuple[str, str]] = []
    verified = _read(directory)
    for file in files:
        try:
            state = _state(directory, file, against)
        except OSError as error:
            what = "is missing" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
            found.append((file.path, what))
        else:
            todo += [(file, state)] if verified.get(file.path) != state else []
    if found or not todo:
        return found
    with _exclusive(directory):
        verified = _read(directory)
        states = {file.path: state for file, state in todo if verified.get(file.path) != state}
        new = (file for file, _ in todo if file.path in states)
        for file, what in in_threads(wrong, new):
            if what:
                found.append((file.path, what))
            else:
                verified[file.path] = states[file.path]
        if states:
            _write(directory, verified)
    return found


def mark_verified(directory: Path, files: Iterable[FileEntry], against: str) -> None:
    """Record that all of these files were found right, see `check`. The records of other files are removed."""
    _write(directory, {file.path: _state(directory, file, against) for file in files})


def difference(directory: Path, file: FileEntry, *, is_hashed: bool = True) -> str:
    """Return in words how a file differs from its record, "" if it does not. It is read only if its size is right."""
    path = directory / file.path
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != file.bytes:
        return f"has {size:,} bytes, expected {file.bytes:,}"
    digest = sha256_of(path) if is_hashed else file.sha256
    return "" if digest == file.sha256 else f"sha256 is {digest}, expected {file.sha256}"


def _state(directory: Path, file: FileEntry, against: str) -> VerifiedFile:
    """Return the state of a file. Raises OSError unless it is a regular file of the recorded size: reading past the end
    of a mapped file that is too short crashes the process."""
    found = check_regular(os.path.join(directory, file.path))
    if found.st_size != file.bytes:
        raise OSError(errno.EINVAL, f"has {found.st_size:,} bytes, expected {file.bytes:,}")
    return VerifiedFile(found.st_ino, found.st_mtime_ns, found.st_size, file.sha256, against)


def _read(directory: Path) -> dict[str, VerifiedFile]:
    """Return the verified files by path; none if `.verified.json` is missing or unreadable."""
    with contextlib.suppress(OSError, msgspec.DecodeError, UnicodeError):
        return _decoder.decode(read_bytes(directory / VERIFIED_NAME))
    return {}


def _write(directory: Path, verified: Mapping[str, VerifiedFile]) -> None:
    with contextlib.suppress(OSError):  # a read-only dataset is hashed each time instead
        write_bytes(directory / VERIFIED_NAME, msgspec.json.encode(verified))


_decoder = msgspec.json.Decoder(dict[str, VerifiedFile])


@contextlib.contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """Let one process at a time run the block. Without effect on a read-only dataset, where no lock can be created."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(locked(directory / LOCK_NAME))
        yield
