"""Files at URLs (s3://, gs://, hf://, file://, …) through fsspec: reading inputs, and sending whole datasets.

Inputs are streamed by byte range and not stored locally. A dataset is packed locally and then sent, each file read back and
hashed. Training maps local files, so a dataset at a URL has to be copied here first (`bring_command`).
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mmdata.errors import DatasetError, InputError, UsageError
from mmdata.io.files import sha256_of_stream
from mmdata.io.records import FileEntry

READ_BYTES = 4 * 2**20
Progress = Callable[[int, int], None]
_BRING = {"s3": "aws s3 sync", "gs": "gcloud storage rsync -r", "hf": "hf download"}


class Stat(NamedTuple):
    """The state of a remote file: its size, and a number made of its time or etag, which changes when it is written."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at a URL, with those of pathlib.Path's methods that inputs are read by."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> str:
        return self.url.rstrip("/").rpartition("/")[0]

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The file's bytes, seekable; InputError when it cannot be opened."""
        assert mode == "rb", mode
        system, path = _system(self.url)
        try:
            return io.BufferedReader(system.open(path, "rb"), READ_BYTES)
        except OSError as error:
            raise _unreadable(self.url, error) from error

    def is_file(self) -> bool:
        """Whether there is such a file."""
        system, path = _system(self.url)
        try:
            return bool(system.isfile(path))
        except OSError as error:
            raise _unreadable(self.url, error) from error

    def stat(self) -> Stat:
        """The state of the file, with the names of os.stat_result."""
        system, path = _system(self.url)
        facts = system.info(path)
        state = next((facts[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if facts.get(key)), 0)
        return Stat(int(facts["size"]), int.from_bytes(hashlib.sha256(str(state).encode()).digest()[:8], "big"))


def is_url(text: object) -> bool:
    """Whether this is a URL with a scheme, such as s3://bucket/file."""
    return "://" in str(text)


def file_at(text: object) -> Any:
    """A Path, or a RemoteFile for a URL."""
    return text if isinstance(text, (Path, RemoteFile)) else RemoteFile(str(text)) if is_url(text) else Path(str(text))


def send(directory: Path, files: Sequence[FileEntry], url: str, progress: Progress | None = None) -> int:
    """Copy these files of a directory to a URL, in order; returns the bytes sent.

    Files that are at the URL with the same hash are left. Each file sent is read back and hashed. The file that makes the
    directory complete, such as a manifest, comes last.
    """
    system, root = _system(url)
    total, done, sent = sum(file.bytes for file in files), 0, 0
    for file in files:
        path = f"{root.rstrip('/')}/{file.path}"
        if not _is_there(system, path, file):
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            system.put_file(str(directory / file.path), path)
            sent += file.bytes
            if not _is_there(system, path, file):
                raise DatasetError(f"{url}: {file.path} arrived with other bytes", "run the same command again")
        done += file.bytes
        if progress:
            progress(done, total)
    return sent


def bring_command(url: str, directory: Path) -> str:
    """The command that copies a dataset from a URL to a local directory."""
    tool = _BRING.get(url.partition(":")[0], "copy")
    return f"{tool} {url} {directory} && mm verify {directory}"


def _is_there(system: Any, path: str, file: FileEntry) -> bool:
    """Whether the path holds the content of this file already."""
    if not system.exists(path) or system.info(path)["size"] != file.bytes:
        return False
    with system.open(path, "rb") as stream:
        return sha256_of_stream(stream) == file.sha256


def _system(url: str) -> tuple[Any, str]:
    """fsspec's filesystem for a URL, and the path in it."""
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except ImportError as error:
        raise UsageError(
            f"{url} needs a package that is not here ({error})", "pip install 'mm-toolkit[remote]'"
        ) from None
    except ValueError as error:
        raise UsageError(f"{url}: {error}", "use s3://, gs://, hf://, https:// or a local path") from None


def _unreadable(url: str, error: OSError) -> InputError:
    return InputError(f"{url}: {error}", "check the URL and what you may read there")
