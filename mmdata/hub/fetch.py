"""Carrying out a plan of `mm fetch`: downloads files one after another, verifies them and records them in mm.lock in
the output directory. If every file is there already, no request is made and huggingface_hub is not imported."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mmdata.errors import DiskError, FetchError, IntegrityError, InterruptedFetch, MMError
from mmdata.hub import catalog
from mmdata.hub.lockfile import LockEntry, guard_path, only_one, read_lock, same_stat, write_entry
from mmdata.hub.options import FetchOptions
from mmdata.hub.partial import RESUME, Content, kept_bytes
from mmdata.hub.plan import TOKENIZER_DIR, FetchItem, FetchPlan, WantedFile
from mmdata.hub.sources import Repo, Source, open_source, opener
from mmdata.hub.transfer import RetryPolicy, disk_error, download
from mmdata.io.files import AlreadyLockedError, Digest, locked

SPACE_MARGIN_BYTES = 64 << 20
FIRST_LINE_BYTES = 1 << 20

# (file name, bytes of it that are there, its size, bytes of all files that are there, their size); they never decrease
Watch = Callable[[str, int, int, int, int], None]


@dataclass(frozen=True, slots=True)
class FetchOutcome:
    """What happened to one file. `status`: kept (it was there and recorded in mm.lock), adopted (it was there and is
    now recorded), fetched or failed (see `error`). `num_lines` counts newline characters, `received_bytes` what this
    run received, repeated bytes included, and `failures` failed attempts."""

    name: str
    status: str
    num_bytes: int = 0
    num_lines: int = 0
    sha256: str = ""
    revision: str = ""
    commit: str = ""
    received_bytes: int = 0
    failures: int = 0
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    error: MMError | None = None


def fetch(
    plan: FetchPlan, *, watch: Watch | None = None, on_wait: Callable[[str], None] | None = None
) -> list[FetchOutcome]:
    """Download and verify the files of a plan and record them in mm.lock. Return one outcome per file, in order; a file
    that fails does not stop the others, except those of a tokenizer that follow: mm.lock has its last ones only if it
    has all. Bytes that have arrived stay on disk, and the next run resumes from them.

    watch: called with the progress of the file and of the whole plan. on_wait: called with a file's name before waiting
    for another process that downloads it. Raises DiskError if the disk is too small, full or not writable,
    InterruptedFetch on Ctrl-C, and UsageError for a source that does not exist.
    """
    options, needed = plan.options, plan.get_bytes + SPACE_MARGIN_BYTES
    if plan.get_bytes and needed > plan.free_bytes:
        raise DiskError(
            f"{options.out} needs {needed:,} bytes more, {plan.free_bytes:,} are free",
            "free some space, or choose a disk with more: --out",
        )
    source = open_source(options.source, options.endpoint, options.retry or RetryPolicy())
    report = _Report(plan, watch)
    outcomes: list[FetchOutcome] = []
    broken: dict[Repo, str] = {}  # tokenizers, and their first file that failed
    for item in plan.items:
        name, repo = item.want.name, item.want.repo
        try:
            if repo in broken and not item.error:
                raise FetchError(f"{name} is not fetched without {broken[repo]}", RESUME)
            outcomes.append(_fetch_one(options, source, item, report, partial(on_wait, name) if on_wait else None))
        except DiskError:
            raise
        except MMError as error:
            outcomes.append(FetchOutcome(name, "failed", error=error))
            if repo.kind == "model":
                broken.setdefault(repo, name)
        except KeyboardInterrupt as error:
            kept = kept_bytes(options.out / name)
            raise InterruptedFetch(f"interrupted: {kept:,} bytes of {name} are kept", RESUME) from error
        report.close(item)
    return outcomes


class _Report:
    """Called with the bytes of the current file, adds up those of the whole plan; neither decreases, even if a damaged
    file is downloaded again. `close` ends the current file."""

    def __init__(self, plan: FetchPlan, watch: Watch | None) -> None:
        self.watch = watch
        self.total = sum(map(self._size, plan.items))
        self.before = self.most = self.most_all = 0

    @staticmethod
    def _size(item: FetchItem) -> int:
        return item.content.num_bytes if item.content and item.action == "get" else 0

    def __call__(self, name: str, done: int, total: int) -> None:
        self.most = max(self.most, done)
        self.most_all = max(self.most_all, self.before + done)
        if self.watch:
            self.watch(name, self.most, total, self.most_all, self.total)

    def close(self, item: FetchItem) -> None:
        self.before += self._size(item)
        self.most = 0


def _fetch_one(
    options: FetchOptions, source: Source, item: FetchItem, report: _Report, on_wait: Callable[[], None] | None
) -> FetchOutcome:
    """Keep, adopt or download one file, locked against other `mm` processes, and record it. Raises the item's error."""
    want, path, content = item.want, options.out / item.want.name, item.content
    if item.error:
        raise item.error
    if item.action == "keep" or content is None:
        return _outcome(options, want.name, "kept")
    start = time.monotonic()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from error
    with only_one(path, on_wait=on_wait):
        entry = read_lock(options.out).files.get(want.name)
        is_new = entry is not None and entry.sha256 == content.sha256 and same_stat(path, entry)
        if is_new and item.action == "get" and not options.verify:
            return _outcome(options, want.name, "kept")  # another process fetched it meanwhile
        if item.digest is not None:  # adopt the file; if mm.lock has the same bytes, only the times are recorded anew
            is_recorded = entry is not None and entry.sha256 == item.digest.sha256
            write_entry(options.out, want.name, entry if entry and is_recorded else _entry(source, item, item.digest))
            return _outcome(options, want.name, "kept" if entry else "adopted")
        report(want.name, item.have_bytes, content.num_bytes)
        result = download(
            path,
            content,
            opener(source, want.repo, item.commit or item.revision, item.path),
            connections=options.connections,
            retry=options.retry,
            progress=lambda done, total: report(want.name, done, total),
            check=lambda part, digest: _check_rows(part, digest, want, content),
        )
        write_entry(options.out, want.name, _entry(source, item, result.digest))
    outcome = _outcome(options, want.name, "fetched")
    seconds, warnings = time.monotonic() - start, tuple(result.warnings)
    return replace(
        outcome, received_bytes=result.received_bytes, failures=result.failures, seconds=seconds, warnings=warnings
    )


def _entry(source: Source, item: FetchItem, digest: Digest) -> LockEntry:
    """Return the mm.lock entry of a file. Its times are 0, because `write_entry` fills them in."""
    assert item.content is not None
    return LockEntry(
        digest.position,
        digest.sha256,
        digest.num_lines,
        digest.ends_with_newline,
        mtime_ns=0,
        ctime_ns=0,
        source=source.kind,
        endpoint=source.endpoint,
        repo=item.want.repo.id,
        repo_kind=item.want.repo.kind,
        revision=item.revision,
        commit=item.commit,
        path=item.path,
        is_verified=item.content.is_published,
    )


def _outcome(options: FetchOptions, name: str, status: str) -> FetchOutcome:
    """Return an outcome with the figures of mm.lock, or, for a file that is not in it, only its size."""
    entry = read_lock(options.out).files.get(name)
    if entry is None:
        return FetchOutcome(name, status, (options.out / name).stat().st_size)
    return FetchOutcome(name, status, entry.num_bytes, entry.num_lines, entry.sha256, entry.revision, entry.commit)


def _check_rows(part: Path, digest: Digest, want: WantedFile, content: Content) -> list[str]:
    """Return warnings about the rows of the complete file `part`. Raises IntegrityError if its first row is wrong and
    no checksum was published."""
    warnings = []
    num_rows = digest.num_lines + (not digest.ends_with_newline)
    if want.known and want.known.num_rows not in (None, num_rows):
        warnings.append(f"{want.name} has {num_rows:,} lines; the catalog knows {want.known.num_rows:,}")
    if want.name.endswith(".jsonl") and not digest.ends_with_newline:
        warnings.append(f"the last line of {want.name} does not end: it may be cut upstream")
    if want.known and (problem := _first_row_problem(part, want.known.fields)):
        if not content.is_published:
            raise IntegrityError(f"{want.name}: {problem}, and no checksum was published for it", "check --source")
        warnings.append(f"{want.name}: {problem}, though its checksum is the published one")
    return warnings


def _first_row_problem(path: Path, expected: tuple[str, ...]) -> str:
    """Return what is wrong with the first line, which should be a JSON object with the `expected` keys; else empty."""
    with open(path, "rb") as file:
        line = file.readline(FIRST_LINE_BYTES)
    if not line or len(line) == FIRST_LINE_BYTES:
        return ""  # an empty file, or a line too long to read
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except ValueError:
        return "line 1 is not json"
    absent = [name for name in expected if not isinstance(row, dict) or name not in row]
    return f"line 1 has no {' and no '.join(repr(name) for name in absent)}" if absent else ""


# --- --list and --clean


@dataclass(frozen=True, slots=True)
class FileState:
    """One line of `mm fetch --list`: a known or downloaded file, or a tokenizer. `state` is have (of the expected size,
    or no size is known), part (partly downloaded), stale (another size) or missing; contents are not read. Figures that
    nobody published are None. `num_bytes` may be rounded, `max_len` is in tokens, `stage` is empty for files outside
    the catalog."""

    name: str
    stage: str
    state: str
    num_bytes: int | None = None
    num_rows: int | None = None
    max_len: int | None = None
    note: str = ""


def overview(out: Path) -> list[FileState]:
    """Return the state in directory `out` of everything in the catalog and of the other datasets in mm.lock, without
    any request. A tokenizer whose files differ in state counts as stale."""
    lock = read_lock(out).files
    states = []
    for known in catalog.FILES:
        entry = lock.get(known.name)
        num_bytes, num_rows = (entry.num_bytes, entry.num_rows) if entry else (known.num_bytes, known.num_rows)
        state = _state(out / known.name, num_bytes)
        size = num_bytes or known.about_bytes
        states.append(FileState(known.key, known.stage, state, size, num_rows, known.max_len, known.note))
    for tokenizer in catalog.TOKENIZERS.values():
        entries = {name: entry for name, entry in lock.items() if entry.repo in tokenizer.repo.values()}
        each = {_state(out / name, entry.num_bytes) for name, entry in entries.items()} or {"missing"}
        state = each.pop() if len(each) == 1 else "stale"
        size = sum(entry.num_bytes for entry in entries.values()) or None
        states.append(FileState(tokenizer.name, TOKENIZER_DIR, state, size, note=tokenizer.note))
    names = {known.name for known in catalog.FILES}
    for name, entry in lock.items():
        if name not in names and entry.repo_kind == "dataset":
            state = _state(out / name, entry.num_bytes)
            states.append(FileState(name, "", state, entry.num_bytes, entry.num_lines))
    return states


def _state(path: Path, num_bytes: int | None) -> str:
    """Return the state of one file: have, stale, part or missing. num_bytes: its expected size; None accepts any."""
    if path.is_file():
        return "have" if num_bytes in (None, path.stat().st_size) else "stale"
    return "part" if kept_bytes(path) else "missing"


_LEFTOVER = re.compile(
    r"(?P<name>.+)\.part(?:\.json(?:\.new)?)?|\.(?P<hidden>.+)\.part\.json\..+\.partial|\.(?P<lock>.+)\.lock"
)


def clean(out: Path) -> tuple[int, int]:
    """Remove the partial files, journals and lock files that unfinished downloads left in directory `out`, except of
    files being downloaded. Returns the number and bytes of files removed, without lock files."""
    leftovers: dict[Path, list[Path]] = {}  # downloaded file -> what its download left
    for path in sorted(out.rglob("*")):
        if match := _LEFTOVER.fullmatch(path.name):
            name = match["name"] or match["hidden"] or match["lock"]
            leftovers.setdefault(path.with_name(name), []).append(path)
    num_files = num_bytes = 0
    for target, paths in leftovers.items():
        guard = guard_path(target)
        try:
            with locked(guard, wait=False):
                for path in paths:
                    if path != guard and path.is_file():
                        num_files, num_bytes = num_files + 1, num_bytes + path.stat().st_size
                        path.unlink()
                guard.unlink(missing_ok=True)
        except AlreadyLockedError:
            continue
    return num_files, num_bytes
