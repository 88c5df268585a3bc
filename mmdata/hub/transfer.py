"""Downloading one file over an unreliable connection: resumed after failures, verified, then renamed.

Bytes are written to <name>.part. The journal <name>.part.json records which byte ranges (spans) of which content have
been written, so that a later run, another process or a download from another source can continue. Content is hashed as
it arrives. Memory use is a few chunks of CHUNK_BYTES. Nothing here depends on HTTP.
"""

import contextlib
import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from mmdata.errors import DiskError, FetchError, IntegrityError, MMError, NetworkError
from mmdata.io.files import CHUNK_BYTES, Digest, Progress, move_into_place, write_unsynced
from mmdata.io.records import read_record

T = TypeVar("T")
JOURNAL_BYTES = 512 * 1024  # with several connections, at most this much is downloaded again after a kill
MIN_PIECE_BYTES, MAX_PIECE_BYTES = 1 << 20, 64 << 20
RESUME = "run the same command again: it goes on where it stopped (`--endpoint`, `--source modelscope` try another way)"
NOT_DATA = (
    "a proxy or a login page answers in place of the source: open the address in a browser, or try another --endpoint"
)


# --- retrying


class TryAgain(Exception):
    """An attempt failed in a way that may pass. wait_s: what the server asked to wait; None if it did not ask.
    is_timeout: the server sent nothing, or too slowly."""

    def __init__(self, message: str, *, wait_s: float | None = None, is_timeout: bool = False) -> None:
        super().__init__(message)
        self.wait_s = wait_s
        self.is_timeout = is_timeout


class WrongSize(TryAgain):
    """The server reports a size or a byte range that contradicts the published size of the file."""


class RangeIgnored(Exception):
    """The server ignores byte ranges and sends whole files only, which makes several connections useless."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Timeouts and limits of repeated attempts. Only attempts in a row without any progress count towards `tries`."""

    tries: int = 6
    contradictions: int = 3  # answers of another size than the published one before the download fails
    progress_bytes: int = 64 * 1024  # an attempt that received at least this much made progress
    first_wait_s: float = 1.0
    max_wait_s: float = 30.0
    max_asked_wait_s: float = 300.0  # upper limit of a server's Retry-After
    read_timeout_s: float = 15.0
    slow_bytes_per_s: int = 1024  # a response slower than this for `slow_window_s` is abandoned
    slow_window_s: float = 20.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def wait(self, failures: int, asked_s: float | None = None) -> None:
        """Sleep before the next attempt: `first_wait_s`, doubled with each failure up to `max_wait_s`, with 25% jitter.
        failures: attempts that failed in a row, from 1. asked_s: used instead if given, up to `max_asked_wait_s`."""
        if asked_s is not None:
            seconds = min(max(asked_s, 0.0), self.max_asked_wait_s)
        else:
            seconds = min(self.first_wait_s * 2.0 ** (failures - 1), self.max_wait_s) * random.uniform(0.75, 1.25)
        self.sleep(seconds)


def with_retries(call: Callable[[], T], retry: RetryPolicy, *, fix: str) -> T:
    """Call `call` until it returns, with waits between attempts, and return its result. Only TryAgain leads to another
    call; a timeout counts as two. Raises NetworkError with `fix` after `retry.tries` failed attempts."""
    failures = 0
    while True:
        try:
            return call()
        except TryAgain as problem:
            failures += 2 if problem.is_timeout else 1
            if failures >= retry.tries:
                raise NetworkError(str(problem), fix) from problem
            retry.wait(failures, problem.wait_s)


# --- what is downloaded


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes that a file should have: `sha256` and `git_oid` (git's blob hash) in hex, None if not published."""

    num_bytes: int
    sha256: str | None = None
    git_oid: str | None = None
    etag: str | None = None
    first: bytes = b""  # one of these the file must begin with, known from its name; empty if anything is possible

    @property
    def identity(self) -> str | None:
        """What a partial download is recognized by: sha256, git_oid or etag; None means it cannot be resumed."""
        return self.sha256 or self.git_oid or self.etag

    @property
    def is_published(self) -> bool:
        """Whether a checksum is known before the download."""
        return bool(self.sha256 or self.git_oid)

    def mismatch(self, digest: Digest) -> str:
        """Return how `digest` differs in size or in a checksum, if one is known; empty if it does not."""
        if digest.position != self.num_bytes:
            return f"{digest.position:,} bytes, expected {self.num_bytes:,}"
        if self.sha256 and digest.sha256 != self.sha256:
            return f"sha256 {digest.sha256[:12]}…, expected {self.sha256[:12]}…"
        if self.git_oid and not self.sha256 and digest.git_oid != self.git_oid:
            return f"git hash {digest.git_oid[:12]}…, expected {self.git_oid[:12]}…"
        return ""


@dataclass(slots=True)
class Body:
    """An open response. `chunks` yields the bytes of the file from `start` on, which may be less than the offset asked
    for, if the server ignores ranges. `total`: size of the file or None."""

    start: int
    total: int | None
    chunks: Iterator[bytes]


OpenBody = Callable[[int, int | None], AbstractContextManager[Body]]  # (first byte, end; None for the rest)


@dataclass(slots=True)
class Download:
    """Result of `download`: the digest of the file, the bytes received by this run, and how many attempts failed."""

    digest: Digest
    received_bytes: int = 0
    failures: int = 0
    warnings: list[str] = field(default_factory=list)


# --- the partial file and its journal

Span = tuple[int, int]  # byte offsets of a range: first, end (exclusive)


class Journal(msgspec.Struct, frozen=True):
    """The content of <name>.part.json: the size and identity of the file to download, and the spans written so far."""

    num_bytes: int
    identity: str | None
    spans: list[Span]


def part_paths(target: Path) -> tuple[Path, Path]:
    """Return the paths of the partial download of `target` and of its journal: <name>.part and <name>.part.json."""
    return target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")


def kept_bytes(target: Path, content: Content | None = None) -> int:
    """Return how many bytes of `target` an earlier run left that need not be downloaded again. content: what is to be
    downloaded; a partial download of other content counts as 0 bytes. None accepts any."""
    return sum(end - begin for begin, end in _kept_spans(target, content))


def _kept_spans(target: Path, content: Content | None) -> list[Span]:
    """Return the spans that an earlier run left, sorted and disjoint. Empty if the partial file or its journal is
    missing, unreadable or too long, has other content than `content` (None: any), or content without an identity."""
    part, path = part_paths(target)
    try:
        journal = read_record(path, Journal, FetchError, RESUME)
        length = part.stat().st_size
    except (OSError, FetchError):
        return []
    is_same = content is None or (journal.num_bytes, journal.identity) == (content.num_bytes, content.identity)
    if not is_same or (content and content.identity is None):
        return []
    if not journal.spans or length > journal.num_bytes:
        return []
    *spans, (begin, end) = sorted(journal.spans)
    spans.append((begin, max(end, length)))  # the last span was written in order, up to the end of the partial file
    return merge([(begin, min(end, length)) for begin, end in spans])


def merge(spans: list[Span]) -> list[Span]:
    """Return sorted, non-empty, disjoint spans that cover the same bytes; touching spans are joined."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif begin < end:
            merged.append((begin, end))
    return merged


def missing(spans: list[Span], num_bytes: int) -> list[Span]:
    """Return the spans of [0, num_bytes) that `spans`, which must be merged, do not cover."""
    ends = [0, *(end for _, end in spans)]
    begins = [*(begin for begin, _ in spans), num_bytes]
    return [(end, begin) for end, begin in zip(ends, begins, strict=True) if end < begin]


def cut(gaps: list[Span], connections: int) -> list[Span]:
    """Cut spans into about four pieces per connection, so that all finish at about the same time; for one, nothing.
    Pieces have MIN_PIECE_BYTES to MAX_PIECE_BYTES; the last one of a span may be shorter."""
    if connections == 1:
        return gaps
    total = sum(end - begin for begin, end in gaps)
    size = min(max(total // (4 * connections), MIN_PIECE_BYTES), MAX_PIECE_BYTES)
    return [(at, min(at + size, end)) for begin, end in gaps for at in range(begin, end, size)]


class PartialFile:
    """The file <name>.part with its journal, open for writing. `done`: the completely written spans. `digest` has
    hashed an unbroken run of bytes from the beginning."""

    def __init__(self, target: Path, content: Content) -> None:
        """Open the partial download of `target`, continuing an earlier one of the same content. Raises OSError."""
        self.path, self.journal = part_paths(target)
        self.content = content
        self.done = _kept_spans(target, content)
        self._guard = threading.Lock()
        self._active: list[list[int]] = []  # [begin, position] of the spans being written
        self._unsaved = 0
        if not self.done:
            self.path.unlink(missing_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        self.digest = self._new_digest()
        self._save()

    def _new_digest(self) -> Digest:
        """Return an empty digest. Git's blob hash is computed only if it is the only checksum that is published."""
        return Digest(self.content.num_bytes, with_git=bool(self.content.git_oid and not self.content.sha256))

    def _spans(self) -> list[Span]:
        """Return all spans that have been written, those still being written included; neither sorted nor merged."""
        return [*self.done, *((begin, position) for begin, position in self._active)]

    def _save(self) -> None:
        self._unsaved = 0
        spans = sorted(self._spans() or [(0, 0)])
        journal = Journal(self.content.num_bytes, self.content.identity, spans)
        write_unsynced(self.journal, msgspec.json.encode(journal).decode())

    @contextlib.contextmanager
    def writing(self, offset: int) -> Iterator[list[int]]:
        """Context manager that yields a span [begin, position], both `offset` at first, for one thread to write to. It
        is in the journal before its first byte is written, and is added to `done` at the end."""
        span = [offset, offset]
        with self._guard:
            self._active.append(span)
            self._save()
        try:
            yield span
        finally:
            with self._guard:
                self._active.remove(span)
                self.done = merge([*self.done, (span[0], span[1])])
                self._save()

    def write(self, span: list[int], data: bytes, *, is_only: bool) -> None:
        """Write data at the position of a span and advance the position. Raises OSError. is_only: no other thread
        writes; the bytes are then hashed at once if they continue the digest."""
        view, offset = memoryview(data), span[1]
        while view:
            view = view[os.pwrite(self._file, view, offset + len(data) - len(view)) :]
        if is_only and self.digest.position == offset:
            self.digest.update(data)
        span[1] += len(data)
        # Without later bytes in the file, its length shows how far a single writer has come: no journal is needed.
        if not is_only or (self.done and self.done[-1][1] > offset):
            with self._guard:
                self._unsaved += len(data)
                if self._unsaved >= JOURNAL_BYTES:
                    self._save()

    def catch_up(self, *, stop: int | None = None) -> None:
        """Hash the unbroken bytes on disk that follow the digest's position, at most up to offset `stop`."""
        with self._guard:
            spans = merge(self._spans())
        whole = spans[0][1] if spans and spans[0][0] == 0 else 0
        whole = whole if stop is None else min(whole, stop)
        while self.digest.position < whole:
            data = os.pread(self._file, min(CHUNK_BYTES, whole - self.digest.position), self.digest.position)
            assert data, f"{self.path} ends at {self.digest.position} of {whole}"
            self.digest.update(data)

    def restart(self) -> None:
        """Delete all bytes and begin with an empty digest."""
        os.ftruncate(self._file, 0)
        self.done, self.digest = [], self._new_digest()
        self._save()

    def close(self) -> None:
        """Save the journal and close the file, for a later run to continue. Without any bytes, both are removed."""
        if self._file < 0:
            return
        os.close(self._file)
        self._file = -1
        with self._guard, contextlib.suppress(OSError):  # a full disk has been reported already
            self._save()
        if not merge(self._spans()):
            self.discard()

    def discard(self) -> None:
        """Close and delete the partial file and its journal, because its bytes are wrong."""
        self.close()
        self.path.unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)

    def become(self, target: Path) -> None:
        """Flush the complete file to the disk, rename it to `target` (replacing that) and delete the journal."""
        move_into_place(self.path, target)
        os.close(self._file)
        self._file = -1
        self.journal.unlink(missing_ok=True)


# --- the download


def download(
    target: Path,
    content: Content,
    open_body: OpenBody,
    *,
    connections: int = 1,
    retry: RetryPolicy | None = None,
    progress: Progress | None = None,
    check: Callable[[Path, Digest], list[str]] | None = None,
) -> Download:
    """Download one file to `target`, which stays as it is until the new file is complete, and verify it. A file whose
    checksum or size is wrong is downloaded once more.

    open_body: see `sources.opener`. progress: called with the bytes that are there and the size of the file. check:
    called with the path and digest of the complete partial file; returns warnings, or raises IntegrityError to refuse
    it. Raises NetworkError, IntegrityError, DiskError and what `open_body` raises. Partial bytes stay, unless they are
    wrong.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = PartialFile(target, content)
    except OSError as error:
        raise disk_error(target, error) from error
    try:
        result = Download(part.digest)
        for is_last in (False, True):
            _Connections(part, open_body, retry or RetryPolicy(), result, progress).run(connections)
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
            result.warnings.append(f"{target.name} arrived damaged ({problem}) and was fetched again")
        result.digest = part.digest
        try:
            result.warnings += check(part.path, part.digest) if check else []
        except IntegrityError:
            part.discard()
            raise
        part.become(target)
        return result
    except OSError as error:
        raise disk_error(target, error) from error
    finally:
        part.close()


class _Connections:
    """The connections of one download, as threads. `done_bytes` are on disk; `stop` tells all threads to end."""

    def __init__(
        self, part: PartialFile, open_body: OpenBody, retry: RetryPolicy, result: Download, progress: Progress | None
    ) -> None:
        self.part, self.open_body, self.retry = part, open_body, retry
        self.result, self.progress = result, progress
        self.num_bytes = part.content.num_bytes
        self.done_bytes = 0
        self.pieces: list[Span] = []
        self.is_shared = False  # several connections write at once
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._guard = threading.Lock()

    def run(self, connections: int) -> None:
        """Download and hash what is missing, over one connection if the server ignores ranges."""
        self.part.catch_up()
        try:
            self._run(connections)
        except RangeIgnored:
            self.result.warnings.append("the server sends whole files only: one connection")
            self.stop.clear()
            self.error = None
            self._run(1)
        self.part.catch_up()

    def _run(self, connections: int) -> None:
        """Download all missing spans over at most this many connections; raises the first error of any of them."""
        self.done_bytes = sum(end - begin for begin, end in self.part.done)
        self.pieces = cut(missing(self.part.done, self.num_bytes), connections)
        self.is_shared = connections > 1 and len(self.pieces) > 1
        if self.is_shared:
            count = min(connections, len(self.pieces))
            threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
            for thread in threads:
                thread.start()
            try:
                while alive := [thread for thread in threads if thread.is_alive()]:
                    self.part.catch_up()
                    alive[0].join(0.02)
            except BaseException:
                self.stop.set()
                for thread in threads:  # each ends when it receives its next bytes; silent ones are not waited for
                    thread.join(0.5)
                raise
        else:
            self._work()
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        """Download pieces until none is left or `stop` is set. An exception is stored in `error` and ends all."""
        try:
            while not self.stop.is_set():
                with self._guard:
                    if not self.pieces:
                        return
                    begin, end = self.pieces.pop(0)
                self._download_piece(begin, end)
        except BaseException as error:  # raised again by the thread that waits for this one
            with self._guard:
                self.error = self.error or error
            self.stop.set()

    def _download_piece(self, begin: int, end: int) -> None:
        """Download the bytes [begin, end), in as many attempts as it takes. Raises NetworkError after `retry.tries`
        attempts in a row without progress, and IntegrityError after `retry.contradictions` answers of another size than
        published."""
        if not self.is_shared:
            self.part.catch_up(stop=begin)
        failures = contradictions = 0
        with self.part.writing(begin) as span:
            while span[1] < end and not self.stop.is_set():
                before = span[1]
                try:
                    self._attempt(span, end)
                except TryAgain as problem:
                    self.result.failures += 1
                    contradictions += isinstance(problem, WrongSize)
                    failures = 0 if span[1] - before >= self.retry.progress_bytes else failures + 1
                    if contradictions >= self.retry.contradictions:
                        fix = "another source may have the whole file: --source modelscope"
                        raise IntegrityError(str(problem), fix) from problem
                    if failures >= self.retry.tries:
                        raise NetworkError(f"no progress in {failures} attempts: {problem}", RESUME) from problem
                    self.retry.wait(failures, problem.wait_s)

    def _attempt(self, span: list[int], end: int) -> None:
        """Read one response from the position of the span to `end`. Raises WrongSize, RangeIgnored or TryAgain."""
        position = span[1]
        with self.open_body(position, end if self.is_shared else None) as body:
            if body.total is not None and body.total != self.num_bytes:
                raise WrongSize(f"the server's file has {body.total:,} bytes, the published one {self.num_bytes:,}")
            if body.start > position:
                raise WrongSize(f"the server began at byte {body.start:,}, asked for {position:,}")
            if self.is_shared and body.start < position:
                raise RangeIgnored
            self._read(body, span, end)
        if span[1] < end and not self.stop.is_set():
            raise TryAgain(f"the connection closed after {span[1]:,} of {self.num_bytes:,} bytes")

    def _read(self, body: Body, span: list[int], end: int) -> None:
        """Write the bytes of a response to the span, up to `end`; bytes before the span's position are skipped. Raises
        TryAgain if it is slower than `slow_bytes_per_s` over `slow_window_s`, IntegrityError for a wrong start."""
        skip = span[1] - body.start  # bytes before the span's position, which a server that ignores ranges sends again
        window_start, window_bytes = self.retry.clock(), 0
        for chunk in body.chunks:
            if self.stop.is_set():  # another connection failed
                return
            with self._guard:
                self.result.received_bytes += len(chunk)
            window_bytes += len(chunk)
            elapsed = self.retry.clock() - window_start
            if elapsed >= self.retry.slow_window_s:
                if window_bytes < self.retry.slow_bytes_per_s * elapsed:
                    raise TryAgain(f"{window_bytes:,} bytes in {elapsed:.0f} s: too slow", is_timeout=True)
                window_start, window_bytes = window_start + elapsed, 0
            data = chunk[skip : skip + end - span[1]]
            skip = max(0, skip - len(chunk))
            if not data:
                continue
            if span[1] == 0:
                _check_first(data, self.part.content.first)
            self.part.write(span, data, is_only=not self.is_shared)
            with self._guard:
                self.done_bytes += len(data)
                if self.progress:
                    self.progress(self.done_bytes, self.num_bytes)
            if span[1] == end:
                return


def _check_first(data: bytes, expected: bytes) -> None:
    """Raise IntegrityError if a file's first byte, BOM and white space aside, is not in `expected` (empty: any)."""
    start = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    if expected and start[:1] not in expected:
        what = "a web page" if start.startswith(b"<") else f"something that begins with {start[:12]!r}"
        raise IntegrityError(f"{what} came instead of the data", NOT_DATA)


def disk_error(path: Path, error: OSError) -> MMError:
    """Return the exception for an OSError while writing `path`: DiskError for an exhausted disk, quota or size limit,
    or a path that cannot be opened for writing, else FetchError."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskError(
            f"the disk is full: {path.name} is kept as far as it came", "free some space (`df -h .`), then run it again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
        return DiskError(f"cannot write {path}: {error.strerror}", f"check the folder: ls -ld {path.parent}")
    return FetchError(f"{path}: {error.strerror or error}", RESUME)
