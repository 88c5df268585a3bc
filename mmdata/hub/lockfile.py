"""mm.lock: the record of what `mm fetch` downloaded, by which a later run, or another machine, gets the same bytes."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from mmdata.errors import DiskError, FetchError
from mmdata.io.files import locked
from mmdata.io.records import Count, read_record, write_record

FORMAT_VERSION = 1
LOCK_NAME = "mm.lock"
MTIME_SLACK_NS = 2_000_000  # tools that set times as floats, and some filesystems, round them


class LockEntry(msgspec.Struct, frozen=True):
    """The record of a downloaded file in mm.lock: its content, where it came from, and its times (ns). `revision` is
    the branch, tag or commit requested, `commit` what it meant at the source."""

    num_bytes: Count
    sha256: str
    num_lines: Count
    ends_with_newline: bool
    mtime_ns: int
    ctime_ns: int
    source: str  # hf, modelscope, dir or url
    endpoint: str
    repo: str
    repo_kind: str  # dataset or model
    revision: str
    commit: str
    path: str  # in the repository or folder
    is_verified: bool  # whether a checksum was known before the download and was compared

    @property
    def num_rows(self) -> int:
        """The number of lines, a last one without a newline included."""
        return self.num_lines + (not self.ends_with_newline)


class Lock(msgspec.Struct, frozen=True):
    """The content of mm.lock. `files` maps the path of a file relative to the directory of mm.lock to its entry."""

    format_version: int = FORMAT_VERSION
    files: dict[str, LockEntry] = {}


def read_lock(out_dir: Path, warnings: list[str] | None = None) -> Lock:
    """Return the content of mm.lock in `out_dir`; an empty `Lock` if there is none or it cannot be used. warnings: gets
    a message if the file is damaged or has another format."""
    path = out_dir / LOCK_NAME
    try:
        lock = read_record(path, Lock, FetchError, "")
        if lock.format_version == FORMAT_VERSION:
            return lock
        problem = f"{path} has format {lock.format_version}, expected {FORMAT_VERSION}: it is not used"
    except FetchError:
        if not path.exists() and not path.is_symlink():
            return Lock()
        problem = f"{path} is damaged: files are checked by their content instead"
    if warnings is not None:
        warnings.append(problem)
    return Lock()


def write_entry(out_dir: Path, name: str, entry: LockEntry) -> None:
    """Set the entry of file `name` in mm.lock, with the file's present times. A lock that is damaged or has another
    format is renamed to mm.lock.broken first. Raises DiskError if no lock file can be created, and OSError if the file
    does not exist or mm.lock cannot be written."""
    stat = (out_dir / name).stat()
    entry = msgspec.structs.replace(entry, mtime_ns=stat.st_mtime_ns, ctime_ns=stat.st_ctime_ns)
    path = out_dir / LOCK_NAME
    with only_one(path):
        warnings: list[str] = []
        files = read_lock(out_dir, warnings).files | {name: entry}
        if warnings:
            path.replace(path.with_name(f"{LOCK_NAME}.broken"))
        write_record(path, Lock(files=dict(sorted(files.items()))))


def same_stat(path: Path, entry: LockEntry) -> bool:
    """Return whether size, mtime and ctime are as recorded, so that the content need not be read. False if missing."""
    with contextlib.suppress(OSError):
        stat = path.stat()
        return stat.st_size == entry.num_bytes and same_mtime(path, entry) and stat.st_ctime_ns == entry.ctime_ns
    return False


def same_mtime(path: Path, entry: LockEntry) -> bool:
    """Return whether the mtime is the recorded one, give or take MTIME_SLACK_NS: other bytes then mean damage, not
    editing. Raises OSError if there is no file."""
    return abs(path.stat().st_mtime_ns - entry.mtime_ns) <= MTIME_SLACK_NS


@contextlib.contextmanager
def only_one(path: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Context manager that locks `path` against other processes, by a lock file in its directory. on_wait: called once
    if another process holds the lock, then waited for. Raises DiskError without a lock file."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(guard_path(path), on_wait=on_wait))
        except OSError as error:
            problem = f"cannot write beside {path}: {error.strerror}"
            raise DiskError(problem, f"check the permissions: ls -ld {path.parent}") from error
        yield


def guard_path(path: Path) -> Path:
    """Return the path of the lock file of `only_one`: `.NAME.lock` in the same directory."""
    return path.with_name(f".{path.name}.lock")
