"""One file over a bad link: something that opens bodies in, the verified file in its place out. Knows no HTTP.

Bytes land in <name>.part; <name>.part.json says which, and of what content, so that a later run, another process or another
source goes on where this one stopped. Content is hashed as it arrives. Memory stays at a few chunks whatever the size.
"""

import contextlib
import errno
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mmdata.errors import DiskError, FetchError, IntegrityError, MMError, NetworkError
from mmdata.io.files import CHUNK_BYTES, Digest, Progress, move_into_place

T = TypeVar("T")
JOURNAL_BYTES = 512 * 1024  # with several connections, at most this much is fetched again after a kill
MIN_PIECE_BYTES, MAX_PIECE_BYTES = 1 << 20, 64 << 20


class TryAgain(Exception):
    """An attempt that failed in a way that may pass. `wait_s`: what the server asked for; `is_timeout`: it kept silent."""

    def __init__(self, message: str, *, wait_s: float | None = None, is_timeout: bool = False) -> None:
        super().__init__(message)
        self.wait_s = wait_s
        self.is_timeout = is_timeout


class WrongSize(TryAgain):
    """The server's figures contradict the published size."""


class RangeIgnored(Exception):
    """The server sends whole files only, so several connections would fetch everything several times."""


class _Stopped(Exception):
    """Another connection failed; this one ends without a word."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait and how often to try. Tries count attempts without progress, not attempts."""

    tries: int = 6
    strikes: int = 3  # contradictions about the size before giving up
    progress_bytes: int = 64 * 1024  # an attempt that brought this much was not in vain
    first_wait_s: float = 1.0
    max_wait_s: float = 30.0
    max_asked_wait_s: float = 300.0  # a server's Retry-After is honoured up to here
    read_timeout_s: float = 15.0
    slow_bytes_per_s: int = 1024
    slow_window_s: float = 20.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def wait(self, failures: int, asked_s: float | None = None) -> float:
        """Sleep before the next try: as long as the server asked, else longer each time, with jitter. Gives the seconds."""
        if asked_s is not None:
            seconds = min(max(asked_s, 0.0), self.max_asked_wait_s)
        else:
            seconds = min(self.first_wait_s * 2.0 ** (failures - 1), self.max_wait_s) * random.uniform(0.75, 1.25)
        self.sleep(seconds)
        return seconds


def persist(call: Callable[[], T], patience: Patience, *, fix: str) -> T:
    """Call until it answers: TryAgain is retried, and silence costs two of the tries. NetworkError when they are used up."""
    failures = 0
    while True:
        try:
            return call()
        except TryAgain as problem:
            failures += 2 if problem.is_timeout else 1
            if failures >= patience.tries:
                raise NetworkError(str(problem), fix) from problem
            patience.wait(failures, problem.wait_s)


@dataclass(frozen=True, slots=True)
class Content:
    """Which bytes a file should have. `sha256` and `git_oid` are hex digits, `etag` a server's word; None: not published."""

    num_bytes: int
    sha256: str | None = None
    git_oid: str | None = None
    etag: str | None = None
    first: bytes = b""  # what the file begins with, as far as its kind tells

    @property
    def identity(self) -> str | None:
        """What ties a part to its content, whatever the source; None: it cannot be resumed."""
        return self.sha256 or self.git_oid or self.etag

    @property
    def is_published(self) -> bool:
        """Whether a checksum is known beforehand."""
        return bool(self.sha256 or self.git_oid)

    def mismatch(self, found: Digest) -> str:
        """What differs between this content and what was found; empty when nothing does."""
        if found.position != self.num_bytes:
            return f"{found.position:,} bytes, expected {self.num_bytes:,}"
        if self.sha256 and found.sha256 != self.sha256:
            return f"sha256 {found.sha256[:12]}…, expected {self.sha256[:12]}…"
        if self.git_oid and not self.sha256 and found.git_oid != self.git_oid:
            return f"git hash {found.git_oid[:12]}…, expected {self.git_oid[:12]}…"
        return ""


@dataclass(slots=True)
class Body:
    """An opened answer: the file's bytes from `start` on; `total` is the whole file's size where the server says it."""

    start: int
    total: int | None
    chunks: Iterator[bytes]


Open = Callable[[int, int | None], AbstractContextManager[Body]]  # (begin, end or None for the rest)


@dataclass(slots=True)
class Brought:
    """What a transfer did: the content's digest, bytes received by this run, attempts that failed on the way."""

    digest: Digest
    received_bytes: int = 0
    failures: int = 0
    warnings: list[str] = field(default_factory=list)


def part_paths(target: Path) -> tuple[Path, Path]:
    """The part of a file and its journal."""
    return target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")


def kept_bytes(target: Path, content: Content | None = None) -> int:
    """Bytes of `target` that an earlier run left and a next one need not fetch; of any content when none is given."""
    return sum(end - begin for begin, end in _read_journal(target, content))


def _read_journal(target: Path, content: Content | None) -> list[tuple[int, int]]:
    """The spans an earlier run left; none when the part is absent, of other content, or too long."""
    part, journal = part_paths(target)
    try:
        data = json.loads(journal.read_text(encoding="utf-8"))
        length = part.stat().st_size
        spans = sorted((int(begin), int(end)) for begin, end in data["spans"])
        num_bytes, identity = int(data["num_bytes"]), data["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if content is not None and (
        content.identity is None or (num_bytes, identity) != (content.num_bytes, content.identity)
    ):
        return []
    if not spans or length > num_bytes:
        return []
    spans[-1] = (spans[-1][0], max(spans[-1][1], length))  # whoever wrote last wrote in order, up to the file's end
    return merge([(begin, min(end, length)) for begin, end in spans])


def merge(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted, non-empty, disjoint spans covering the same bytes."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif begin < end:
            merged.append((begin, end))
    return merged


def missing(spans: list[tuple[int, int]], num_bytes: int) -> list[tuple[int, int]]:
    """What merged spans leave open of [0, num_bytes)."""
    ends = [0, *(end for _, end in spans)]
    begins = [*(begin for begin, _ in spans), num_bytes]
    return [(end, begin) for end, begin in zip(ends, begins, strict=True) if end < begin]


def cut(gaps: list[tuple[int, int]], connections: int) -> list[tuple[int, int]]:
    """Gaps in pieces for several connections: about four each, so that none waits long for the last; one takes gaps whole."""
    if connections == 1:
        return gaps
    total = sum(end - begin for begin, end in gaps)
    size = min(max(total // (4 * connections), MIN_PIECE_BYTES), MAX_PIECE_BYTES)
    return [(at, min(at + size, end)) for begin, end in gaps for at in range(begin, end, size)]


class Part:
    """A file on its way: its bytes, which of them are there, and the digest of the unbroken beginning."""

    def __init__(self, target: Path, content: Content) -> None:
        self.path, self.journal = part_paths(target)
        self.content = content
        self._guard = threading.Lock()
        self.done = _read_journal(target, content)
        self._active: list[list[int]] = []  # [begin, position] of pieces being written
        self._unsaved = 0
        if not self.done:
            self.path.unlink(missing_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        self.digest = self._new_digest()
        self._save()

    def _new_digest(self) -> Digest:
        return Digest(self.content.num_bytes, with_git=bool(self.content.git_oid and not self.content.sha256))

    def begin(self, offset: int) -> list[int]:
        """Open a span for one writer; it is in the journal before its first byte."""
        span = [offset, offset]
        with self._guard:
            self._active.append(span)
            self._save()
        return span

    def write(self, span: list[int], data: bytes, *, is_only: bool) -> None:
        """Append to a span. What the only writer brings is hashed on the way, when it continues the digest."""
        view, offset = memoryview(data), span[1]
        while view:
            view = view[os.pwrite(self._file, view, offset + len(data) - len(view)) :]
        if is_only and self.digest.position == offset:
            self.digest.update(data)
        span[1] += len(data)
        if not is_only or (self.done and self.done[-1][1] > offset):  # else the file's length tells how far it came
            with self._guard:
                self._unsaved += len(data)
                if self._unsaved >= JOURNAL_BYTES:
                    self._save()

    def end(self, span: list[int]) -> None:
        """Close a span; its bytes count as done."""
        with self._guard:
            self._active.remove(span)
            self.done = merge([*self.done, (span[0], span[1])])
            self._save()

    def catch_up(self, *, stop: int | None = None) -> None:
        """Hash what lies unbroken after the digest's position, up to `stop`."""
        with self._guard:
            spans = merge([*self.done, *((begin, end) for begin, end in self._active)])
        whole = spans[0][1] if spans and spans[0][0] == 0 else 0
        whole = whole if stop is None else min(whole, stop)
        while self.digest.position < whole:
            wanted = min(CHUNK_BYTES, whole - self.digest.position)
            data = os.pread(self._file, wanted, self.digest.position)
            assert data, f"{self.path} ends at {self.digest.position} of {whole}"
            self.digest.update(data)

    def restart(self) -> None:
        """Forget everything."""
        os.ftruncate(self._file, 0)
        self.done, self.digest = [], self._new_digest()
        self._save()

    def _save(self) -> None:
        self._unsaved = 0
        spans = [*self.done, *((begin, end) for begin, end in self._active)] or [(0, 0)]
        data = {"num_bytes": self.content.num_bytes, "identity": self.content.identity, "spans": sorted(spans)}
        beside = self.journal.with_name(self.journal.name + ".new")
        beside.write_text(json.dumps(data), encoding="utf-8")
        os.replace(beside, self.journal)

    def close(self) -> None:
        """Keep what is there for the next run."""
        if self._file < 0:
            return
        file, self._file = self._file, -1
        os.close(file)
        with self._guard, contextlib.suppress(OSError):  # a full disk has been reported already
            self._save()
        if not merge([*self.done, *((begin, end) for begin, end in self._active)]):
            self._remove()

    def discard(self) -> None:
        """Remove the part: its bytes are of no use."""
        self.close()
        self._remove()

    def _remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)

    def examine(self, check: Callable[[Path, Digest], list[str]] | None) -> list[str]:
        """What `check` notes about the whole part; one it refuses is discarded."""
        try:
            return check(self.path, self.digest) if check else []
        except IntegrityError:
            self.discard()
            raise

    def become(self, target: Path) -> None:
        """Put the whole file in its place: on disk first, then one rename, so a reader sees old bytes or new ones."""
        move_into_place(self.path, target)
        file, self._file = self._file, -1
        os.close(file)
        self.journal.unlink(missing_ok=True)


class _Fill:
    """Everything one run of connections shares: where to ask, the pieces left, the first error."""

    def __init__(
        self, part: Part, open_body: Open, patience: Patience, brought: Brought, progress: Progress | None
    ) -> None:
        self.part, self.open_body, self.patience = part, open_body, patience
        self.brought, self.progress = brought, progress
        self.num_bytes = part.content.num_bytes
        self.have = sum(end - begin for begin, end in part.done)
        self.pieces: list[tuple[int, int]] = []
        self.is_shared = False
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._guard = threading.Lock()

    def run(self, connections: int) -> None:
        """Fetch all that is missing; an error of any connection is raised here."""
        self.pieces = cut(missing(self.part.done, self.num_bytes), connections)
        self.is_shared = connections > 1 and len(self.pieces) > 1
        if not self.is_shared:
            self._work()
        else:
            threads = [
                threading.Thread(target=self._work, daemon=True) for _ in range(min(connections, len(self.pieces)))
            ]
            for thread in threads:
                thread.start()
            try:
                while alive := [thread for thread in threads if thread.is_alive()]:
                    self.part.catch_up()
                    alive[0].join(0.02)
            except BaseException:
                self.stop.set()
                for (
                    thread
                ) in threads:  # they end with their next bytes; one that waits for a silent server is left behind
                    thread.join(0.5)
                raise
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        try:
            while not self.stop.is_set():
                with self._guard:
                    if not self.pieces:
                        return
                    begin, end = self.pieces.pop(0)
                self._fill_piece(begin, end)
        except _Stopped:
            return
        except BaseException as error:  # carried to the thread that waits, which raises it
            with self._guard:
                self.error = self.error or error
            self.stop.set()

    def _fill_piece(self, begin: int, end: int) -> None:
        """One piece, over as many attempts as it takes."""
        if not self.is_shared:
            self.part.catch_up(stop=begin)
        span = self.part.begin(begin)
        try:
            failures = strikes = 0
            while span[1] < end:
                mark = span[1]
                try:
                    self._attempt(span, end)
                except TryAgain as problem:
                    self.brought.failures += 1
                    strikes += isinstance(problem, WrongSize)
                    failures = 0 if span[1] - mark >= self.patience.progress_bytes else failures + 1
                    if strikes >= self.patience.strikes:
                        raise IntegrityError(
                            str(problem), "another source may have the whole file: --source modelscope"
                        ) from problem
                    if failures >= self.patience.tries:
                        raise NetworkError(f"no progress in {failures} attempts: {problem}", RESUME) from problem
                    self.patience.wait(failures, problem.wait_s)
        finally:
            self.part.end(span)

    def _attempt(self, span: list[int], end: int) -> None:
        """One answer, from where the span stands to the piece's end."""
        position = span[1]
        with self.open_body(position, end if self.is_shared else None) as body:
            if body.total is not None and body.total != self.num_bytes:
                raise WrongSize(f"the server's file has {body.total:,} bytes, the published one {self.num_bytes:,}")
            if body.start > position:
                raise WrongSize(f"the server began at byte {body.start:,}, asked for {position:,}")
            if self.is_shared and body.start < position:
                raise RangeIgnored
            self._read(body, span, end)
        if span[1] < end:
            raise TryAgain(f"the connection closed after {span[1]:,} of {self.num_bytes:,} bytes")

    def _read(self, body: Body, span: list[int], end: int) -> None:
        skip = span[1] - body.start  # what a server without ranges sends again
        window_start, window_bytes = self.patience.clock(), 0
        for data in body.chunks:
            if self.stop.is_set():
                raise _Stopped
            self._count(len(data))
            window_bytes += len(data)
            now = self.patience.clock()
            if now - window_start >= self.patience.slow_window_s:
                if window_bytes < self.patience.slow_bytes_per_s * (now - window_start):
                    raise TryAgain(f"{window_bytes:,} bytes in {now - window_start:.0f} s: too slow", is_timeout=True)
                window_start, window_bytes = now, 0
            if skip >= len(data):
                skip -= len(data)
                continue
            data = data[skip : skip + end - span[1]]
            skip = 0
            if span[1] == 0:
                _look_at_first(data, self.part.content.first)
            self.part.write(span, data, is_only=not self.is_shared)
            self._report(len(data))
            if span[1] == end:
                return

    def _count(self, num_bytes: int) -> None:
        with self._guard:
            self.brought.received_bytes += num_bytes

    def _report(self, num_bytes: int) -> None:
        with self._guard:
            self.have += num_bytes
            if self.progress:
                self.progress(self.have, self.num_bytes)


RESUME = "run the same command again: it goes on where it stopped (`--endpoint`, `--source modelscope` try another way)"
NOT_DATA = "something between you and the source answers in its place: open the address in a browser, or try another --endpoint"


def _look_at_first(data: bytes, expected: bytes) -> None:
    start = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    if expected and start and not start.startswith(expected):
        what = "a web page" if start.startswith(b"<") else f"something that begins with {start[:12]!r}"
        raise IntegrityError(f"{what} came instead of the data", NOT_DATA)


def bring(
    target: Path,
    content: Content,
    open_body: Open,
    *,
    connections: int = 1,
    patience: Patience | None = None,
    progress: Progress | None = None,
    check: Callable[[Path, Digest], list[str]] | None = None,
) -> Brought:
    """Fetch one file to `target` and verify it; what was there before stays until then. `progress` counts this file's bytes.

    `check` looks at the whole part before it takes its place: what it gives back is noted, what it raises refuses the file.

    Raises NetworkError, IntegrityError, DiskError and what `open_body` raises; the part is kept unless its bytes are wrong.
    """
    patience = patience or Patience()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Part(target, content)
    except OSError as error:
        raise disk_error(target, error) from error
    try:
        brought = Brought(part.digest)
        for is_last in (False, True):
            _fill(part, open_body, connections, patience, brought, progress)
            problem = content.mismatch(part.digest)
            if not problem:
                break
            part.restart()
            if is_last:
                part.discard()
                raise IntegrityError(
                    f"{target.name} arrived damaged twice: {problem}",
                    "try another source: --source modelscope, or --endpoint",
                )
            brought.warnings.append(f"{target.name} arrived damaged ({problem}) and was fetched again")
        brought.digest = part.digest
        brought.warnings += part.examine(check)
        part.become(target)
        return brought
    except OSError as error:
        raise disk_error(target, error) from error
    finally:
        part.close()


def _fill(
    part: Part, open_body: Open, connections: int, patience: Patience, brought: Brought, progress: Progress | None
) -> None:
    """Fetch what is missing and hash all of it; one connection where the server knows no ranges."""
    part.catch_up()
    try:
        _Fill(part, open_body, patience, brought, progress).run(connections)
    except RangeIgnored:
        brought.warnings.append("the server sends whole files only: one connection")
        _Fill(part, open_body, patience, brought, progress).run(1)
    part.catch_up()


def disk_error(path: Path, error: OSError) -> MMError:
    """What a failed write means to the user; an error that is not the disk's is given back as a FetchError."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskError(
            f"the disk is full: {path.name} is kept as far as it came", "free some space (`df -h .`), then run it again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
        return DiskError(f"cannot write {path}: {error.strerror}", f"check the folder: ls -ld {path.parent}")
    return FetchError(f"{path}: {error.strerror or error}", RESUME)
