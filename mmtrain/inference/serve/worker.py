"""The one thread that owns a generation engine; any number of asyncio tasks hand it prompts and read what is said.

Answers run in one batch, joining and leaving between steps. A step that fails ends the answers in it with the error,
and the thread goes on. Nothing is kept of an answer once its reader has let it go.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from mmdata.errors import MMError
from mmtrain.inference.engine import Delta, Engine, Row
from mmtrain.inference.sampling import Sampling


class BusyError(Exception):
    """As many answers wait already as may."""


class StoppedError(Exception):
    """The server is stopping, or a step failed; `str` says what."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer wanted: a prompt's ids and how it is drawn."""

    prompt_ids: Sequence[int]
    sampling: Sampling


@dataclass(eq=False, slots=True)
class _Job:
    """The answers of one request, and the way back to the task that waits for them."""

    asks: Sequence[Ask]
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[tuple[int, Delta] | Exception]
    rows: list[Row]
    is_taken: bool = False  # by the thread
    is_cancelled: bool = False  # by its reader

    def tell(self, event: tuple[int, Delta] | Exception) -> None:
        if not self.is_cancelled and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Worker:
    """Runs an engine in a thread of its own. `max_waiting`: answers that may wait for a place among the running ones."""

    def __init__(self, engine: Engine, *, max_waiting: int = 64):
        self.engine = engine
        self._max_waiting = max_waiting
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs: dict[Row, tuple[_Job, int]] = {}
        self._num_unseen = 0  # answers handed in that the thread has not taken yet; changed under the lock
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="mm-engine", daemon=True)
        self._is_stopping = False

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; answers in progress end with StoppedError."""
        self._is_stopping = True
        self._inbox.put(None)
        self._thread.join()

    @property
    def num_running(self) -> int:
        """Answers that are being written."""
        return self.engine.num_running

    @property
    def num_waiting(self) -> int:
        """Answers that wait for a place."""
        return self.engine.num_waiting + self._num_unseen

    async def answer(self, asks: Sequence[Ask], *, timeout_s: float) -> AsyncGenerator[tuple[int, Delta], None]:
        """(index of the ask, what it said more) until all have ended; letting go of the generator ends them.

        BusyError when too many wait, UsageError when a prompt does not fit, StoppedError when the engine cannot go on,
        TimeoutError when not all have ended after `timeout_s`.
        """
        job = _Job(asks, asyncio.get_running_loop(), asyncio.Queue(), [])
        with self._lock:
            if self._is_stopping:
                raise StoppedError("the server is stopping")
            if self.num_waiting + len(asks) > self._max_waiting:
                raise BusyError
            self._num_unseen += len(asks)
        self._inbox.put(job)
        num_open = len(asks)
        deadline = job.loop.time() + timeout_s
        try:
            while num_open:
                async with asyncio.timeout_at(deadline):  # not around the yield: who reads on may be another task
                    event = await job.events.get()
                if isinstance(event, Exception):
                    raise event
                num_open -= event[1].finish_reason is not None
                yield event
        finally:
            job.is_cancelled = True
            if num_open:
                self._inbox.put(job)  # the second time: its rows leave

    # --- the thread

    def _run(self) -> None:
        while not self._is_stopping:
            self._take(wait=self.engine.is_idle)
            try:
                for delta in self.engine.step():
                    self._tell(delta)
            except Exception as error:
                self._fail(StoppedError(f"generation failed: {type(error).__name__}: {error}"))
        self._fail(StoppedError("the server is stopping"))
        while not self._inbox.empty():
            if (job := self._inbox.get()) is not None:
                job.tell(StoppedError("the server is stopping"))

    def _take(self, *, wait: bool) -> None:
        """Take in what has come; with `wait` until something comes."""
        while wait or not self._inbox.empty():
            job = self._inbox.get()
            wait = False
            if job is None:
                return
            if not job.is_taken:
                self._submit(job)
            else:
                self._drop(job)

    def _submit(self, job: _Job) -> None:
        job.is_taken = True
        with self._lock:
            self._num_unseen -= len(job.asks)
        if job.is_cancelled:
            return
        try:
            for index, ask in enumerate(job.asks):
                row = self.engine.submit(ask.prompt_ids, ask.sampling)
                job.rows.append(row)
                self._jobs[row] = (job, index)
        except MMError as error:
            self._drop(job)
            job.tell(error)

    def _drop(self, job: _Job) -> None:
        """Let a job's rows go; those that ended are gone already."""
        for row in job.rows:
            self.engine.cancel(row)
            self._jobs.pop(row, None)

    def _tell(self, delta: Delta) -> None:
        job, index = self._jobs[delta.row]
        if delta.finish_reason is not None:
            del self._jobs[delta.row]
        job.tell((index, delta))

    def _fail(self, error: Exception) -> None:
        """End all that runs."""
        for job in {job for job, _ in self._jobs.values()}:
            job.tell(error)
            self._drop(job)
