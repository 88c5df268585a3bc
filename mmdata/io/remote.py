"""Access files at URLs (s3://, gs://, hf://, file://, …) through fsspec: read inputs, and send whole datasets.

Inputs are streamed by byte range, or copied to this machine while they are packed. Training memory-maps local files, so a dataset at a URL has to
be copied to this machine first; `bring_command` gives the command.
"""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mmdata.errors import DatasetError, InputError, MMError, UsageError
from mmdata.io.files import Progress, no_progress, sha256_of_stream, write_stream
from mmdata.io.records import FileEntry
from mmdata.io.workers import Tick, run_jobs

READ_BYTES = 4 * 2**20
FIRST_BYTES = 2**18  # of the first request after opening or seeking; each that follows doubles, up to READ_BYTES
SEND_BYTES = 2**28  # of files that one process sends after each other: some seconds
_BRING = {"s3": "aws s3 sync", "gs": "gcloud storage rsync -r", "hf": "hf download"}


class Stat(NamedTuple):
    """The state of a remote file, with the names of os.stat_result. st_size: bytes. st_mtime_ns: a number derived from
    the etag or modification time, by which another version is noticed."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at a URL, with the methods and properties of pathlib.Path that are needed for reading inputs. copy: a file
    on this machine with the same content, which is read instead."""

    url: str
    copy: Path | None = None

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last component of the URL's path: the file name."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> str:
        """The URL without its last component."""
        return self.url.rstrip("/").rpartition("/")[0]

    def open(self, mode: str = "rb", buffering: int = READ_BYTES) -> Any:
        """Open the file as a seekable binary stream. mode: must be "rb". buffering: bytes of one request, at least
        READ_BYTES. Raises InputError if it cannot be opened."""
        assert mode == "rb", mode
        if self.copy:
            return self.copy.open("rb", buffering)
        size = max(buffering, READ_BYTES)
        with _told(self.url, "read") as (system, path):  # "none": a cache would read far ahead at every seek
            return io.BufferedReader(_Told(self.url, system.open(path, "rb", block_size=size, cache_type="none")), size)

    def is_file(self) -> bool:
        """Return True if a file exists at this URL. Raises InputError if the storage cannot be asked."""
        with _told(self.url, "read") as (system, path):
            return _info(system, path).get("type") == "file"

    def stat(self) -> Stat:
        """Return the size and a number that changes when the file is written again, if the storage gives ETag, etag,
        mtime, LastModified or created: a hash of the first of these."""
        with _told(self.url, "read") as (system, path):
            facts = system.info(path)
        state = next((facts[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if facts.get(key)), 0)
        return Stat(int(facts["size"]), int.from_bytes(hashlib.sha256(str(state).encode()).digest()[:8], "big"))


def is_url(text: object) -> bool:
    """Return True if the text is a URL with a scheme, such as s3://bucket/file."""
    return "://" in str(text)


def file_at(text: object) -> Any:
    """Return a RemoteFile if the text is a URL, otherwise a Path. A Path or RemoteFile is returned unchanged."""
    return text if isinstance(text, (Path, RemoteFile)) else RemoteFile(str(text)) if is_url(text) else Path(str(text))


def bring(job: tuple[RemoteFile, Path], tick: Tick) -> RemoteFile:
    """Copy a file at a URL to a path on this machine, and return it with this copy."""
    file, copy = job
    with file.open() as source:
        write_stream(copy, source, tick)
    return replace(file, copy=copy)


def send(
    directory: Path,
    files: Sequence[FileEntry],
    url: str,
    progress: Progress = no_progress,
    run: Callable[..., list[Any]] = run_jobs,
) -> int:
    """Copy files of a local directory to a URL and return the bytes sent. files: paths relative to the directory; the
    last one makes it complete, such as a manifest, and is sent when all others are there. A file that is there already
    with the same size and sha256 is not sent. Each sent file is read back; DatasetError if its content differs.
    progress: called with the bytes done (sent or already there) and in all. run: calls `run_jobs`, of which each job is
    some files of SEND_BYTES together."""
    groups: list[list[FileEntry]] = [[]]
    for file in files[:-1]:
        if sum(each.bytes for each in groups[-1]) >= SEND_BYTES:
            groups.append([])
        groups[-1].append(file)
    make = partial(partial, _send, directory, url)
    total = sum(file.bytes for file in files)
    return sum(run(make, groups, total=total, progress=progress) + run_jobs(make, [files[-1:]], total=total))


def _send(directory: Path, url: str, files: Sequence[FileEntry], tick: Tick) -> int:
    """Send some files, see `send`, and return the bytes sent."""
    sent = 0
    with _told(url, "written") as (system, root):
        for file in files:
            path = f"{root.rstrip('/')}/{file.path}"
            if not _is_there(system, path, file):
                _make_parent(system, path)
                system.put_file(str(directory / file.path), path)
                sent += file.bytes
                if not _is_there(system, path, file):
                    raise DatasetError(f"{url}: {file.path} arrived with other bytes", "run the same command again")
            tick(file.bytes)
    return sent


def check_writable(url: str) -> None:
    """Raise InputError, with the storage's reason, unless files can be written at a URL: one is, and is removed. A bucket
    that is missing is not created."""
    with _told(url, "written") as (system, root):
        path = f"{root.rstrip('/')}/.mm-check"
        _make_parent(system, path)
        system.pipe_file(path, b"written by mm to see whether it may")
        system.rm_file(path)


def bring_command(url: str, directory: Path) -> str:
    """Return the shell command that copies a dataset from a URL to a local directory and verifies it there."""
    tool = _BRING.get(url.partition(":")[0], "copy")
    return f"{tool} {url} {directory} && mm verify {directory}"


def _is_there(system: Any, path: str, file: FileEntry) -> bool:
    """Return True if a file with the size and sha256 of `file` exists; the content is read only if the size matches."""
    if _info(system, path).get("size") != file.bytes:
        return False
    with system.open(path, "rb") as stream:
        return sha256_of_stream(stream) == file.sha256


def _system(url: str) -> tuple[Any, str]:
    """Return fsspec's filesystem for a URL and the path in it. Raises UsageError if the scheme is unknown or needs a
    missing package."""
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except ImportError as error:
        raise UsageError(
            f"{url} needs a package that is not here ({error})", "pip install 'mm-toolkit[remote]'"
        ) from None
    except ValueError as error:
        raise UsageError(f"{url}: {error}", "use s3://, gs://, hf://, https:// or a local path") from None


def _info(system: Any, path: str) -> dict[str, Any]:
    """Return what the storage knows of a file, nothing if there is none. Unlike fsspec's `exists`, errors are raised."""
    try:
        return system.info(path)
    except FileNotFoundError as error:
        reason = error.__cause__
        if isinstance(reason, OSError) and not isinstance(reason, FileNotFoundError):
            raise reason from None  # a host that cannot be reached is no missing file
        return {}


def _make_parent(system: Any, path: str) -> None:
    """Make the directory of a file, where the storage has directories: elsewhere this would create a missing bucket."""
    names = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
    if names & {"file", "local", "memory", "sftp", "ssh", "hdfs", "smb"}:
        system.makedirs(path.rpartition("/")[0], exist_ok=True)


@contextlib.contextmanager
def _told(url: str, what: str) -> Iterator[tuple[Any, str]]:
    """Yield fsspec's filesystem for a URL and the path in it. Errors of the storage, whose clients have classes of their
    own, become InputError with its reason. what: "read" or "written"."""
    system, path = _system(url)
    try:
        yield system, path
    except MMError:
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        fix = "check the network, the bucket, the credentials and what they may do; mm creates no bucket"
        raise InputError(f"{url} cannot be {what}: {reason}", fix) from error


class _Told(io.RawIOBase):
    """A file of fsspec as a raw stream, whose errors become InputError."""

    def __init__(self, url: str, file: Any):
        self._url, self._file, self._next = url, file, FIRST_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._next = FIRST_BYTES
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        with _told(self._url, "read"):
            data = self._file.read(min(len(buffer), self._next))
        self._next = min(2 * self._next, READ_BYTES)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
