"""`mm fetch`: a plan in, verified files in a folder out, and mm.lock beside them. One file after another, none in the other's way.

When everything is there, nothing is asked and huggingface_hub is not loaded.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmdata.errors import DiskError, IntegrityError, InterruptedFetch, MMError
from mmdata.hub import catalog
from mmdata.hub.lockfile import Entry, lock_path, only_one, read_lock, record, same_stat
from mmdata.hub.plan import TOKENIZER_DIR, Item, Options, Plan, Want
from mmdata.hub.sources import Source, open_source, opener
from mmdata.hub.transfer import RESUME, Brought, Content, bring, disk_error, kept_bytes, part_paths
from mmdata.io.files import AlreadyLockedError, Digest, locked

SPACE_MARGIN_BYTES = 64 << 20
FIRST_LINE_BYTES = 1 << 20

Watch = Callable[[str, int, int, int, int], None]  # (name, done, of; done in all, of): bytes, never less than before


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one file. `status`: kept, adopted (was there already), fetched, failed."""

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


# --- the work -------------------------------------------------------------------------------------------------------


def fetch(to_do: Plan, *, watch: Watch | None = None, on_wait: Callable[[str], None] | None = None) -> list[Outcome]:
    """Carry a plan out, file after file. One that fails is reported in its outcome and does not stop the rest.

    `on_wait(name)`: another process is fetching that file. Raises DiskError when the disk is too small or full,
    InterruptedFetch on Ctrl-C; what arrived is kept either way.
    """
    check_space(to_do)
    source = open_source(to_do.options.source, to_do.options.endpoint, to_do.options.patience)
    report = _Report(to_do, watch)
    outcomes: list[Outcome] = []
    for item in to_do.items:
        try:
            outcomes.append(_fetch_one(to_do.options, source, item, report, on_wait))
        except DiskError:
            raise
        except MMError as error:
            outcomes.append(Outcome(item.want.name, "failed", error=error))
        except KeyboardInterrupt as error:
            kept = kept_bytes(to_do.options.out / item.want.name)
            raise InterruptedFetch(f"interrupted: {kept:,} bytes of {item.want.name} are kept", RESUME) from error
        report.close(item)
    return outcomes


def check_space(to_do: Plan) -> None:
    """Raise DiskError when what is missing, with a margin, does not fit."""
    needed = to_do.get_bytes + SPACE_MARGIN_BYTES
    if to_do.get_bytes and needed > to_do.free_bytes:
        raise DiskError(
            f"{to_do.options.out} needs {needed:,} bytes more, {to_do.free_bytes:,} are free",
            "free some space, or choose a disk with more: --out",
        )


class _Report:
    """Adds the bytes of all files up, and never goes back."""

    def __init__(self, to_do: Plan, watch: Watch | None) -> None:
        self.watch = watch
        self.total = sum(item.content.num_bytes for item in to_do.items if item.content and item.action == "get")
        self.before = self.most = self.most_all = 0

    def __call__(self, name: str, done: int, total: int) -> None:
        self.most = max(self.most, done)
        self.most_all = max(self.most_all, self.before + done)
        if self.watch:
            self.watch(name, self.most, total, self.most_all, self.total)

    def close(self, item: Item) -> None:
        """The file is through, whole or not."""
        self.before += item.content.num_bytes if item.content and item.action == "get" else 0
        self.most = 0


def _fetch_one(
    options: Options, source: Source, item: Item, report: _Report, on_wait: Callable[[str], None] | None
) -> Outcome:
    want, path, content = item.want, options.out / item.want.name, item.content
    if item.error:
        raise item.error
    if item.action == "keep" or content is None:
        return _kept(options, want.name, "kept")
    start = time.monotonic()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from error
    with only_one(path, on_wait=(lambda: on_wait(want.name)) if on_wait else None):
        entry = read_lock(options.out).files.get(want.name)
        if (
            entry
            and entry.sha256 == content.sha256
            and same_stat(path, entry)
            and item.action == "get"
            and not options.verify
        ):
            return _kept(options, want.name, "kept")  # another process brought it meanwhile
        if item.found is not None:
            if entry and entry.sha256 == item.found.sha256:
                record(options.out, want.name, entry)  # only its times were other
            else:
                _record(options, source, item, item.found)
            return _kept(options, want.name, "kept" if entry else "adopted")
        report(want.name, item.have_bytes, content.num_bytes)
        brought = bring(
            path,
            content,
            opener(source, want.repo, item.commit or item.revision, item.path),
            connections=options.connections,
            patience=options.patience,
            progress=lambda done, total: report(want.name, done, total),
            check=lambda part, digest: _look_inside(part, digest, want, content),
        )
        _record(options, source, item, brought.digest)
    return _fetched(item, brought, time.monotonic() - start)


def _record(options: Options, source: Source, item: Item, digest: Digest) -> None:
    want, content = item.want, item.content
    assert content is not None
    entry = Entry(
        digest.position,
        digest.sha256,
        digest.num_lines,
        digest.ends_with_newline,
        mtime_ns=0,
        ctime_ns=0,
        source=source.kind,
        endpoint=source.endpoint,
        repo=want.repo.id,
        repo_kind=want.repo.kind,
        revision=item.revision,
        commit=item.commit,
        path=item.path,
        is_verified=content.is_published,
    )
    record(options.out, want.name, entry)


def _kept(options: Options, name: str, status: str) -> Outcome:
    entry = read_lock(options.out).files.get(name)
    if entry is None:
        return Outcome(name, status, (options.out / name).stat().st_size)
    return Outcome(name, status, entry.num_bytes, entry.num_lines, entry.sha256, entry.revision, entry.commit)


def _fetched(item: Item, brought: Brought, seconds: float) -> Outcome:
    digest = brought.digest
    return Outcome(
        item.want.name,
        "fetched",
        digest.position,
        digest.num_lines,
        digest.sha256,
        item.revision,
        item.commit,
        brought.received_bytes,
        brought.failures,
        seconds,
        tuple(brought.warnings),
    )


def _look_inside(part: Path, digest: Digest, want: Want, content: Content) -> list[str]:
    """Notes about a whole file: its rows, its last line, its first. What nobody vouches for must at least be of its kind."""
    notes = []
    num_rows = digest.num_lines + (not digest.ends_with_newline)
    if want.known and want.known.num_rows not in (None, num_rows):
        notes.append(f"{want.name} has {num_rows:,} lines; the catalog knows {want.known.num_rows:,}")
    if want.name.endswith(".jsonl") and not digest.ends_with_newline:
        notes.append(f"the last line of {want.name} does not end: it may be cut upstream")
    if want.known and (problem := _first_row_problem(part, want.known.fields)):
        if not content.is_published:
            raise IntegrityError(f"{want.name}: {problem}, and no checksum vouches for it", "check --source")
        notes.append(f"{want.name}: {problem}, though its checksum is the published one")
    return notes


def _first_row_problem(path: Path, expected: tuple[str, ...]) -> str:
    with open(path, "rb") as file:
        line = file.readline(FIRST_LINE_BYTES)
    if not line or len(line) == FIRST_LINE_BYTES:
        return ""  # nothing there, or a line too long to look at
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except ValueError:
        return "line 1 is not json"
    absent = [name for name in expected if not isinstance(row, dict) or name not in row]
    return f"line 1 has no {' and no '.join(repr(name) for name in absent)}" if absent else ""


# --- looking and tidying --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the overview; None where nobody knows. `state` is told by sizes and times alone."""

    name: str
    stage: str
    state: str
    num_bytes: int | None = None
    num_rows: int | None = None
    max_len: int | None = None
    note: str = ""


def overview(out: Path) -> list[Row]:
    """Every known file and everything fetched, with its state in `out`. Asks nobody."""
    lock = read_lock(out)
    rows = []
    for known in catalog.FILES:
        entry = lock.files.get(known.name)
        num_bytes = entry.num_bytes if entry else known.num_bytes
        state = _quick_state(out / known.name, num_bytes)
        num_rows = entry.num_lines + (not entry.ends_with_newline) if entry else known.num_rows
        rows.append(
            Row(known.key, known.stage, state, num_bytes or known.about_bytes, num_rows, known.max_len, known.note)
        )
    for tokenizer in catalog.TOKENIZERS:
        there = {name: entry for name, entry in lock.files.items() if entry.repo in tokenizer.repo.values()}
        states = {_quick_state(out / name, entry.num_bytes) for name, entry in there.items()} or {"missing"}
        state = states.pop() if len(states) == 1 else "stale"
        size = sum(entry.num_bytes for entry in there.values()) or None
        rows.append(Row(tokenizer.name, TOKENIZER_DIR, state, size, note=tokenizer.note))
    names = {known.name for known in catalog.FILES}
    for name, entry in lock.files.items():
        if name not in names and entry.repo_kind == "dataset":
            rows.append(Row(name, "", _quick_state(out / name, entry.num_bytes), entry.num_bytes, entry.num_lines))
    return rows


def _quick_state(path: Path, num_bytes: int | None) -> str:
    if path.is_file():
        return "have" if num_bytes in (None, path.stat().st_size) else "stale"
    return "part" if kept_bytes(path) else "missing"


def clean(out: Path) -> tuple[int, int]:
    """Remove what unfinished downloads left, except those another process is working on. Gives files and bytes removed."""
    num_files = num_bytes = 0
    targets = {path.with_name(path.name.removesuffix(".json").removesuffix(".part")) for path in out.rglob("*.part*")}
    for target in sorted(targets):
        try:
            with locked(lock_path(target), wait=False):
                for path in (*part_paths(target), target.with_name(target.name + ".part.json.new")):
                    if path.is_file():
                        num_files, num_bytes = num_files + 1, num_bytes + path.stat().st_size
                        path.unlink()
            lock_path(target).unlink(missing_ok=True)
        except AlreadyLockedError:
            continue
    for path in out.rglob(".*.lock"):
        try:
            with locked(path, wait=False):
                path.unlink(missing_ok=True)
        except AlreadyLockedError:
            continue
    return num_files, num_bytes
