"""Files at URLs (s3://, gs://, hf://, file://, …) through fsspec: read like local ones, and whole datasets sent there.

Inputs are streamed by byte range, nothing is kept here. A dataset is packed locally and then sent, each file read back and
hashed, its manifest last. Training maps local files: a dataset at a URL is brought here first (`bring_command`).
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mmdata.errors import DatasetError, InputError, UsageError

READ_BYTES = 4 * 2**20
Progress = Callable[[int, int], None]
_BRING = {"s3": "aws s3 sync", "gs": "gcloud storage rsync -r", "hf": "hf download"}


class Stat(NamedTuple):
    """What tells one state of a remote file from another: size, and a number made of its time or etag."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at a URL, with as much of Path's face as inputs are read by."""

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
        """Size and state."""
        system, path = _system(self.url)
        facts = system.info(path)
        state = next((facts[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if facts.get(key)), 0)
        return Stat(int(facts["size"]), int.from_bytes(hashlib.sha256(str(state).encode()).digest()[:8], "big"))


def is_url(text: object) -> bool:
    """Whether this names something through a scheme, as s3://bucket/file does."""
    return "://" in str(text)


def file_at(text: object) -> Any:
    """A Path, or a RemoteFile for a URL."""
    return text if isinstance(text, (Path, RemoteFile)) else RemoteFile(str(text)) if is_url(text) else Path(str(text))


def send(directory: Path, manifest: dict[str, Any], url: str, progress: Progress | None = None) -> int:
    """Copies a packed dataset to a URL and returns the bytes sent; files that are there with the same hash are left.

    Each file is read back and hashed; the manifest goes last, so that a reader finds it complete or not at all.
    """
    system, root = _system(url)
    entries = [*manifest["files"], *manifest["shards"]]
    content = (directory / "manifest.json").read_bytes()
    last = {"path": "manifest.json", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    total, done, sent = sum(entry["bytes"] for entry in entries), 0, 0
    for entry in [*entries, last]:
        path = f"{root.rstrip('/')}/{entry['path']}"
        if not _is_there(system, path, entry):
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            system.put_file(str(directory / entry["path"]), path)
            sent += entry["bytes"]
            if not _is_there(system, path, entry):
                raise DatasetError(f"{url}: {entry['path']} arrived with other bytes", "run the same command again")
        done += entry["bytes"]
        if progress:
            progress(min(done, total), total)
    return sent


def bring_command(url: str, directory: Path) -> str:
    """The command that copies a dataset from a URL to a local directory."""
    tool = _BRING.get(url.partition(":")[0], "copy")
    return f"{tool} {url} {directory} && mm verify {directory}"


def _is_there(system: Any, path: str, entry: dict[str, Any]) -> bool:
    if not system.exists(path) or system.info(path)["size"] != entry["bytes"]:
        return False
    digest = hashlib.sha256()
    with system.open(path, "rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == entry["sha256"]


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
