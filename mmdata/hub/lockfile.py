"""mm.lock: file names in; the bytes that belong there, and whether they still do, out. Looking costs one stat a file.

The lock lies beside the data and is meant for git: on another machine the same names bring the same bytes. A file whose
size and times are as recorded is taken as whole; anything else is hashed (about 0.6 GB/s) before it is judged.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from mmdata.errors import DiskError
from mmdata.io.files import locked, write_json

FORMAT_VERSION = 1
LOCK_NAME = "mm.lock"
MTIME_SLACK_NS = 2_000_000  # tools that set times through floats, and some filesystems, round them


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of one fetched file: its content, where it came from, and its stat when it was last checked."""

    num_bytes: int
    sha256: str
    num_lines: int
    ends_with_newline: bool
    mtime_ns: int
    ctime_ns: int
    source: str  # hf, modelscope, dir or url
    endpoint: str
    repo: str
    repo_kind: str  # dataset or model
    revision: str
    commit: str
    path: str
    is_verified: bool  # whether somebody published a checksum and it agreed


@dataclass(frozen=True, slots=True)
class Lock:
    """The lock file's content; `warning` says when it could not be read."""

    files: dict[str, Entry] = field(default_factory=dict)
    warning: str = ""


def same_stat(path: Path, entry: Entry) -> bool:
    """Whether size, mtime and ctime are as recorded, so that the content need not be read."""
    with contextlib.suppress(OSError):
        stat = path.stat()
        return stat.st_size == entry.num_bytes and same_mtime(path, entry) and stat.st_ctime_ns == entry.ctime_ns
    return False


def same_mtime(path: Path, entry: Entry) -> bool:
    """Whether the file was last written when the lock says: other bytes then mean damage, not an edit."""
    return abs(path.stat().st_mtime_ns - entry.mtime_ns) <= MTIME_SLACK_NS


def read_lock(out_dir: Path) -> Lock:
    """The lock of a folder; empty when there is none, and with a warning when it is no lock."""
    path = out_dir / LOCK_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format_version"] != FORMAT_VERSION:
            return Lock(
                warning=f"{path} has format {data['format_version']}, expected {FORMAT_VERSION}: it is not used"
            )
        return Lock({name: _entry(entry) for name, entry in data["files"].items()})
    except (FileNotFoundError, NotADirectoryError):
        return Lock()
    except (ValueError, KeyError, TypeError, AttributeError):
        return Lock(warning=f"{path} is damaged: files are checked by their content instead")


def _entry(values: dict) -> Entry:
    names = [part.name for part in fields(Entry)]
    return Entry(**{name: values[name] for name in names})


def record(out_dir: Path, name: str, entry: Entry) -> Entry:
    """Write one file's entry with its present stat; other processes' entries are kept. A damaged lock is set aside."""
    stat = (out_dir / name).stat()
    entry = replace(entry, mtime_ns=stat.st_mtime_ns, ctime_ns=stat.st_ctime_ns)
    path = out_dir / LOCK_NAME
    with only_one(path):
        lock = read_lock(out_dir)
        if lock.warning:
            path.replace(path.with_name(LOCK_NAME + ".broken"))
        known = dict(sorted({**lock.files, name: entry}.items()))
        data = {"format_version": FORMAT_VERSION, "files": {key: asdict(value) for key, value in known.items()}}
        write_json(path, data)
    return entry


@contextlib.contextmanager
def only_one(path: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold `path` against other processes; `on_wait` is called once when another one has it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(lock_path(path), on_wait=on_wait))
        except OSError as error:
            raise DiskError(
                f"cannot write beside {path}: {error.strerror}", f"check the permissions: ls -ld {path.parent}"
            ) from error
        yield


def lock_path(path: Path) -> Path:
    """Where the lock between processes for `path` lies."""
    return path.with_name(f".{path.name}.lock")
