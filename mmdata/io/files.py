"""Atomic writes, file hashes and locks between processes. No other module of the project does any of the three itself.

An atomic write goes to a hidden file beside the target, is flushed to the disk (fsync) and then renamed over the target,
so that readers, and a machine that loses power, see the old content or the new one and never a part of it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

CHUNK_BYTES = 2**16
Progress = Callable[[int, int], None]  # (bytes read so far, of all)


class FileInfo(NamedTuple):
    """Size of a file and the sha256 of its content in hex digits."""

    bytes: int
    sha256: str


# --- atomic writes


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path` to write a file to; when the block ends, that file is synced and replaces `path`.

    Missing parent directories are created. If the block raises, the hidden file is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        move_into_place(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes | memoryview | Any) -> FileInfo:
    """Write a file atomically; returns its size and sha256. `content`: bytes or any object with the buffer protocol."""
    with atomic_path(path) as partial:
        partial.write_bytes(content)
    return info_of_bytes(content)


def write_text(path: Path, text: str) -> FileInfo:
    """Write a UTF-8 file atomically, newlines as they are; returns its size and sha256."""
    return write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> FileInfo:
    """Write a value as JSON with a final newline, atomically; returns its size and sha256."""
    return write_text(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def write_unsynced(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically but without fsync: readers never see a part of it, but power loss may leave it empty.

    For journals that are written often and only save work.
    """
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def partial_path(path: Path) -> Path:
    """The hidden path beside `path` that this process writes to: `.NAME.HOST-PID.partial`."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def move_into_place(source: Path, target: Path) -> None:
    """Sync a file, rename it to `target` (replacing a file there) and sync the target's directory."""
    sync(source)
    source.replace(target)
    sync(target.parent)


def replace_directory(source: Path, target: Path, aside: Path) -> None:
    """Sync a directory tree and rename it to `target`; a directory that stands there is renamed to `aside`, then removed.

    Its files must be synced already (`write_bytes` does so). If the process is killed between the two renames, the old
    directory stands at `aside` only: `restore_directory` brings it back.
    """
    for directory, _, _ in os.walk(source, topdown=False):
        sync(Path(directory))
    if target.exists():
        target.rename(aside)
        try:
            source.rename(target)
        except BaseException:
            aside.rename(target)
            raise
    else:
        source.rename(target)
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def restore_directory(target: Path, aside: Path) -> None:
    """Undo a `replace_directory` that was killed: rename `aside` back to `target`, or remove it if `target` is complete."""
    if aside.exists():
        shutil.rmtree(aside) if target.exists() else aside.rename(target)


def sync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- hashes


class Digest:
    """Running sha256, git blob hash and line count of content that is passed to `update` in order.

    num_bytes: size of the whole content, which git's hash begins with. `position`: bytes so far.
    """

    def __init__(self, num_bytes: int, *, with_git: bool = False) -> None:
        self.position = 0
        self.num_lines = 0
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % num_bytes, usedforsecurity=False) if with_git else None
        self._last = b"\n"

    def update(self, data: bytes) -> None:
        """Add the next bytes of the content."""
        if not data:
            return
        self._sha256.update(data)
        if self._git is not None:
            self._git.update(data)
        self.num_lines += data.count(b"\n")
        self._last = data[-1:]
        self.position += len(data)

    @property
    def sha256(self) -> str:
        """sha256 of the bytes so far, in hex digits."""
        return self._sha256.hexdigest()

    @property
    def git_oid(self) -> str:
        """Git's object id of the bytes so far as a blob; empty without `with_git`."""
        return self._git.hexdigest() if self._git is not None else ""

    @property
    def ends_with_newline(self) -> bool:
        """Whether the last line is complete; true for empty content."""
        return self._last == b"\n"


def digest_file(path: Path, *, with_git: bool = False, progress: Progress | None = None) -> Digest:
    """The `Digest` of a whole file, about 0.6 GB/s. `progress` is called with bytes read and bytes in all."""
    with open(path, "rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        digest = Digest(num_bytes, with_git=with_git)
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
            if progress:
                progress(digest.position, num_bytes)
    return digest


def sha256_of(path: Path | Any) -> str:
    """sha256 of a file's content in hex digits, about 1 GB/s a thread. `path`: anything with `open("rb")`."""
    with path.open("rb") as file:
        return sha256_of_stream(file)


def sha256_of_stream(stream: Any) -> str:
    """sha256 of what is left to read of a binary stream, in hex digits."""
    return hashlib.file_digest(stream, "sha256").hexdigest()


def info_of(path: Path) -> FileInfo:
    """Size and sha256 of a file."""
    return FileInfo(path.stat().st_size, sha256_of(path))


def info_of_bytes(content: bytes | memoryview | Any) -> FileInfo:
    """Size and sha256 that a file with this content has."""
    return FileInfo(memoryview(content).nbytes, hashlib.sha256(content).hexdigest())


# --- locks


class AlreadyLockedError(Exception):
    """Another process holds the lock and the caller did not want to wait."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path` against other processes and threads; the system releases it when the process dies.

    wait: wait for another holder, after calling `on_wait` once; without it AlreadyLockedError is raised. The file stays;
    the holder may remove it. OSError where it cannot be created, such as on a read-only disk.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise AlreadyLockedError(str(path)) from None
        if on_wait:
            on_wait()
        lock.acquire(poll_interval=0.05)
    try:
        yield
    finally:
        lock.release()
