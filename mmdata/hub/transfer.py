"""Downloading one file over an unreliable connection: resumed after failures (see partial.py), verified, then renamed.

Memory use is a few chunks of CHUNK_BYTES. Nothing here depends on HTTP.
"""

import errno
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mmdata.errors import DiskError, FetchError, IntegrityError, MMError, NetworkError
from mmdata.hub.partial import RESUME, Content, PartialFile, Span, cut, missing
from mmdata.io.files import Digest, Progress, no_progress

T = TypeVar("T")
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
    """Timeouts and limits of repeated attempts. Only attempts in a row without any progress count towards `tries`.
    waiting: makes a context manager, from what is waited for, that holds while a server is asked what it has."""

    tries: int = 6
    contradictions: int = 3  # answers of another size than the published one before the download fails
    progress_bytes: int = 64 * 1024  # an attempt that received at least this much made progress
    first_wait_s: float = 1.0
    max_wait_s: float = 30.0
    max_asked_wait_s: float = 300.0  # upper limit of a server's Retry-After
    read_timeout_s: float = 15.0
    slow_bytes_per_s: int = 1024  # a response slower than this for `slow_window_s` is abandoned
    slow_window_s: float = 20.0
    waiting: Callable[[str], AbstractContextManager] = nullcontext
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


def with_retries(call: Callable[[], T], retry: RetryPolicy, *, whom: str, fix: str) -> T:
    """Call `call` until it returns, with waits between attempts, and return its result. Only TryAgain leads to another
    call; a timeout counts as two. whom: the server asked. Raises NetworkError with `fix` after `retry.tries` failed
    attempts."""
    failures = 0
    with retry.waiting(whom):
        while True:
            try:
                return call()
            except TryAgain as problem:
                failures += 2 if problem.is_timeout else 1
                if failures >= retry.tries:
                    raise NetworkError(str(problem), fix) from problem
                retry.wait(failures, problem.wait_s)


# Of `mm fetch --dry-run`: it ends soon where there is no network.
BRIEFLY = RetryPolicy(tries=3, first_wait_s=0.5, max_asked_wait_s=5.0, read_timeout_s=5.0)


# --- what is downloaded


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


# --- the download


def download(
    target: Path,
    content: Content,
    open_body: OpenBody,
    *,
    connections: int = 1,
    retry: RetryPolicy | None = None,
    progress: Progress = no_progress,
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
        self, part: PartialFile, open_body: OpenBody, retry: RetryPolicy, result: Download, progress: Progress
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
