"""Atomic writes, file hashes and locks between processes. No other module of the project does any of these.

An atomic write creates a hidden file in the target's directory, flushes it to the disk (fsync) and renames it to the
target. Readers therefore see either the old or the new content and never a part of it, also after a power loss.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import shlex
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from mmdata.errors import MMError, UsageError

CHUNK_BYTES = 2**16
MAX_WHOLE_BYTES = 2**29  # the largest file that is read into memory as a whole: records and tokenizers are far smaller
Progress = Callable[[int, int], None]  # called with (bytes or other units done so far, units in all)


def no_progress(*_: object) -> None:
    """The `Progress` of a caller that shows none."""


class FileInfo(NamedTuple):
    """The size of a file in bytes and the sha256 of its content in hex digits."""

    bytes: int
    sha256: str


# --- reading


def check_regular(path: Path | str, most: int | None = None) -> os.stat_result:
    """Return the `os.stat` of a path. Raises OSError unless it is a regular file, or a link to one, of at most `most`
    bytes: opening a pipe would wait for a writer, and a device may have no end."""
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if most is not None and found.st_size > most:
        raise OSError(errno.EFBIG, f"has {found.st_size:,} bytes, expected at most {most:,}", str(path))
    return found


def read_bytes(path: Path, most: int = MAX_WHOLE_BYTES) -> bytes:
    """Return the content of a regular file of at most `most` bytes. Raises OSError as `check_regular` does."""
    check_regular(path, most)
    return path.read_bytes()


# --- atomic writes


def refuse_pointer(path: Path, head: bytes, error: type[MMError]) -> None:
    """Raise an error of this class if a file that begins with `head` is a Git LFS pointer."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        command = f"git -C {shlex.quote(str(path.parent))} lfs pull --include {shlex.quote(path.name)}"
        problem = f"{path} is a Git LFS pointer, not the file itself"
        raise error(problem, f"{command}    (or download the file itself)")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a hidden path next to `path` to write to. When the block ends, that file is synced and renamed to `path`,
    replacing a file there. If the block raises, the hidden file is removed and `path` is unchanged. Missing parent
    directories are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_partials(path.parent)
    partial = partial_path(path)
    try:
        yield partial
        move_into_place(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes | memoryview | Any) -> FileInfo:
    """Write bytes, or any object with the buffer protocol, to a file atomically and return its size and sha256."""
    with atomic_path(path) as partial:
        partial.write_bytes(content)
    return info_of_bytes(content)


def append_bytes(path: Path, content: bytes) -> None:
    """Append bytes to a file, which is created if it is missing, and sync it. A kill may leave a part of them."""
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync(path.parent)


def write_stream(path: Path, source: Any, tick: Callable[[int], None]) -> None:
    """Write what is left of a binary stream to a file that only this process needs, at a `partial_path`: neither
    atomically nor synced. tick: called with the bytes written since its last call."""
    _remove_partials(path.parent)
    with path.open("wb") as file:
        while chunk := source.read(2**22):
            file.write(chunk)
            tick(len(chunk))


def write_text(path: Path, text: str) -> FileInfo:
    """Write a UTF-8 file atomically, without converting newlines, and return its size and sha256."""
    return write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> FileInfo:
    """Write a JSON file with a final newline, atomically; return its size and sha256. indent: as in json.dumps."""
    return write_text(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def write_unsynced(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically but without fsync: it may be empty after a power loss. Meant for files that are
    rewritten often and whose loss only costs repeated work.
    """
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def partial_path(path: Path) -> Path:
    """Return the hidden path `.NAME.HOST-PID.partial` next to `path`, which this process writes to before renaming."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


@lru_cache(32)
def _remove_partials(directory: Path) -> None:
    """Remove the hidden files and directories that killed processes of this machine have left in a directory; seldom
    more than once, so that writing many files stays cheap."""
    if os.name == "nt":
        return  # there is no signal 0 to ask with whether a process is alive
    for path in directory.glob(f".*.{glob.escape(socket.gethostname())}-*.partial"):
        pid = path.name.removesuffix(".partial").rpartition("-")[2]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        except (ValueError, OverflowError, PermissionError):
            continue  # named by something else, or a process of another user


def move_into_place(source: Path, target: Path) -> None:
    """Sync the file `source`, rename it to `target` (replacing a file there) and sync the directory of `target`."""
    sync(source)
    source.replace(target)
    sync(target.parent)


def replace_directory(source: Path, target: Path, aside: Path) -> None:
    """Sync the directory entries of the tree `source` and rename it to `target`. The content of its files must be
    synced already (`write_bytes` does this).

    A directory at `target` is first renamed to `aside`, and removed at the end. If the second rename fails, it is
    renamed back and the error is raised. After a kill in between it exists only at `aside`; see `restore_directory`.
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


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield a new, empty directory that takes the place of `target` when the block ends. If the block raises an error,
    the directory is removed and an old one at `target` stays as it is. Raises FileNotFoundError if the directory was
    removed meanwhile: `atomic_path` would have made another one, for the files that followed."""
    _remove_partials(target.parent)
    partial = partial_path(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    itself = None if os.name == "nt" else os.open(partial, os.O_RDONLY)  # Windows removes no directory that is in use
    removed = FileNotFoundError(errno.ENOENT, "was removed while it was written", str(partial))
    try:
        try:
            yield partial
        except Exception as error:
            if itself is not None and not os.fstat(itself).st_nlink:
                raise removed from error  # whatever the block could not read
            raise
        if itself is not None and not os.fstat(itself).st_nlink:
            raise removed
        replace_directory(partial, target, target.with_name(f".{target.name}.replaced"))
    finally:
        if itself is not None:
            os.close(itself)
        shutil.rmtree(partial, ignore_errors=True)


def restore_directory(target: Path, aside: Path) -> None:
    """After a killed `replace_directory`: if `aside` exists, rename it to `target`, or remove it if `target` exists."""
    if aside.exists():
        shutil.rmtree(aside) if target.exists() else aside.rename(target)


def sync(path: Path) -> None:
    """Flush the content of a file, or the entries of a directory, to the disk (fsync)."""
    if os.name == "nt" and path.is_dir():
        return  # Windows flushes the entries of a directory by itself
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes only what it may write
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Return the free space of the disk that a path is on, which need not exist."""
    return shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free


# --- hashes


class Digest:
    """Running sha256, git blob id and line count of content that is passed to `update` piece by piece, in order.

    num_bytes: size of the whole content in bytes; git hashes it in front of the content. with_git: also compute the git
    blob id. Fields: `position`, the bytes passed so far, and `num_lines`, the newlines among them.
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
        """The sha256, in hex digits, of the bytes passed so far."""
        return self._sha256.hexdigest()

    @property
    def git_oid(self) -> str:
        """Git's blob id (SHA-1 in hex digits), valid once `num_bytes` bytes were passed; empty without `with_git`."""
        return self._git.hexdigest() if self._git is not None else ""

    @property
    def ends_with_newline(self) -> bool:
        """Whether the bytes passed so far end with a newline; True if there are none."""
        return self._last == b"\n"


def digest_file(path: Path, *, with_git: bool = False, progress: Progress = no_progress) -> Digest:
    """Return the `Digest` of a whole file (about 0.6 GB/s). with_git: also compute git's blob id."""
    with open(path, "rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        digest = Digest(num_bytes, with_git=with_git)
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
            progress(digest.position, num_bytes)
    return digest


def sha256_of(path: Path | Any) -> str:
    """Return the sha256 of a file in hex digits (1 GB/s a thread). path: a Path or any object with `open("rb")`."""
    with path.open("rb") as file:
        return sha256_of_stream(file)


def sha256_of_stream(stream: Any) -> str:
    """Return the sha256, in hex digits, of the remaining bytes of a binary stream."""
    return hashlib.file_digest(stream, "sha256").hexdigest()


def info_of(path: Path) -> FileInfo:
    """Return the size and sha256 of a file."""
    return FileInfo(path.stat().st_size, sha256_of(path))


def info_of_bytes(content: bytes | memoryview | Any) -> FileInfo:
    """Return the size and sha256 of a file with this content (bytes or any object with the buffer protocol)."""
    return FileInfo(memoryview(content).nbytes, hashlib.sha256(content).hexdigest())


# --- locks


class AlreadyLockedError(Exception):
    """Raised by `locked(path, wait=False)` if another process or thread holds the lock."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` while the block runs. The file is created if it is missing.

    The lock excludes other processes and threads; the system releases it when the process dies. If it is held: with
    `wait`, `on_wait` is called once and this waits until the lock is free; without, AlreadyLockedError is raised. The
    lock file is not removed afterwards, but the holder may remove it. Raises OSError if it cannot be created.
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


@contextlib.contextmanager
def alone(directory: Path, command: str) -> Iterator[None]:
    """Hold the lock of a directory, which is made, while the block runs. Raises UsageError if another process holds it.
    command: what that process is called, such as "mm run"."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with locked(directory / ".lock", wait=False):
            yield
    except AlreadyLockedError:
        raise UsageError(f"another {command} works in {directory}", "wait for it, or choose another --out") from None
