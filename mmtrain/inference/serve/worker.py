"""A thread that owns the generation engine and serves any number of asyncio tasks.

Answers of all tasks run in one batch, joining and leaving between steps. When a step fails, the running answers end with
the error and the thread continues. Nothing of an answer is kept once the task that reads it has ended.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from mmdata.errors import MMError
from mmtrain.inference.engine import Delta, Engine, Row
from mmtrain.inference.settings import Sampling


class BusyError(Exception):
    """The maximum number of answers is already waiting."""


class StoppedError(Exception):
    """The server is stopping, or a step failed; the message says which."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer to generate: prompt ids and sampling settings."""

    prompt_ids: Sequence[int]
    sampling: Sampling


@dataclass(eq=False, slots=True)
class _Job:
    """The answers of one request, and the queue of the task that waits for them."""

    asks: Sequence[Ask]
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[tuple[int, Delta] | Exception]
    rows: list[Row]
    is_cancelled: bool = False  # by the task

    def put(self, event: tuple[int, Delta] | Exception) -> None:
        if not self.is_cancelled and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Worker:
    """Runs an engine in its own thread. `max_waiting`: answers that may wait for a place in the batch."""

    def __init__(self, engine: Engine, *, max_waiting: int = 64):
        self.engine = engine
        self._max_waiting = max_waiting
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # called by the thread between steps
        self._jobs: dict[Row, tuple[_Job, int]] = {}
        self._num_unseen = 0  # answers in the inbox; changed under the lock
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="mm-engine", daemon=True)
        self._is_stopping = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; running answers end with StoppedError."""
        self._is_stopping = True
        self._inbox.put(lambda: None)  # wakes the thread
        self._thread.join()

    @property
    def num_running(self) -> int:
        """Answers in the batch."""
        return self.engine.num_running

    @property
    def num_waiting(self) -> int:
        """Answers waiting for a place in the batch."""
        return self.engine.num_waiting + self._num_unseen

    async def answer(self, asks: Sequence[Ask], *, timeout_s: float) -> AsyncGenerator[tuple[int, Delta], None]:
        """Yield (index of the ask, delta) until all answers have ended; closing the generator cancels them.

        BusyError when too many are waiting, UsageError when a prompt does not fit, StoppedError when generation fails,
        TimeoutError when not all have ended after `timeout_s`.
        """
        job = _Job(asks, asyncio.get_running_loop(), asyncio.Queue(), [])
        with self._lock:
            if self._is_stopping:
                raise StoppedError("the server is stopping")
            if self.num_waiting + len(asks) > self._max_waiting:
                raise BusyError
            self._num_unseen += len(asks)
        self._inbox.put(partial(self._submit, job))
        num_open = len(asks)
        deadline = job.loop.time() + timeout_s
        try:
            while num_open:
                async with asyncio.timeout_at(
                    deadline
                ):  # not around the yield: the next read may come from another task
                    event = await job.events.get()
                if isinstance(event, Exception):
                    raise event
                num_open -= event[1].finish_reason is not None
                yield event
        finally:
            job.is_cancelled = True
            if num_open:
                self._inbox.put(partial(self._drop, job))

    # --- the thread

    def _run(self) -> None:
        while not self._is_stopping:
            self._take(wait=self.engine.is_idle)
            try:
                for delta in self.engine.step():
                    self._send(delta)
            except Exception as error:
                self._fail(StoppedError(f"generation failed: {type(error).__name__}: {error}"))
        self._take(wait=False)  # jobs that arrived meanwhile end like the running ones
        self._fail(StoppedError("the server is stopping"))

    def _take(self, *, wait: bool) -> None:
        """Process the inbox; with `wait` block until something arrives."""
        while wait or not self._inbox.empty():
            self._inbox.get()()
            wait = False

    def _submit(self, job: _Job) -> None:
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
            job.put(error)

    def _drop(self, job: _Job) -> None:
        """Cancel a job's rows; finished ones are unaffected."""
        for row in job.rows:
            self.engine.cancel(row)
            self._jobs.pop(row, None)

    def _send(self, delta: Delta) -> None:
        job, index = self._jobs[delta.row]
        if delta.finish_reason is not None:
            del self._jobs[delta.row]
        job.put((index, delta))

    def _fail(self, error: Exception) -> None:
        """End all jobs with an error."""
        for job in {job for job, _ in self._jobs.values()}:
            job.put(error)
            self._drop(job)
