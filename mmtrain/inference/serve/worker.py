"""A thread that runs the generation engine for any number of asyncio tasks. Their answers are generated in one batch,
which they join and leave between steps. When a step fails, all submitted answers end with the error and the thread
continues. Nothing is stored of an answer after the task that reads it has ended."""

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
    """Raised when a request would exceed the number of answers that may wait."""


class StoppedError(Exception):
    """Raised when the server is stopping or a step of generation failed; the message says which."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer to generate: prompt ids and sampling settings."""

    prompt_ids: Sequence[int]
    sampling: Sampling


@dataclass(eq=False, slots=True)
class _Job:
    """The answers of one request, and the queue of deltas or an error for the asyncio task that waits for them."""

    asks: Sequence[Ask]
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[tuple[int, Delta] | Exception]
    rows: list[Row]  # the engine's rows, in the order of `asks`; empty before they are submitted
    is_cancelled: bool = False  # True once the task no longer reads

    def put(self, event: tuple[int, Delta] | Exception) -> None:
        """Send an event to the task, from the worker's thread. No effect if the task has ended."""
        if not self.is_cancelled and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Worker:
    """Runs an engine in a thread of its own. max_waiting: the most answers that may wait for a place in the batch."""

    def __init__(self, engine: Engine, *, max_waiting: int = 64):
        self.engine = engine
        self._max_waiting = max_waiting
        # Functions that the thread calls between steps.
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: dict[Row, tuple[_Job, int]] = {}  # unfinished rows: their job and index in its `asks`
        self._num_unseen = 0  # answers in the inbox, not submitted yet; changed with the lock held
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="mm-engine", daemon=True)
        self._is_stopping = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for its end. Answers that have not ended raise StoppedError in their tasks."""
        self._is_stopping = True
        self._inbox.put(lambda: None)  # wakes the thread
        self._thread.join()

    @property
    def num_running(self) -> int:
        """Number of answers in the batch."""
        return self.engine.num_running

    @property
    def num_waiting(self) -> int:
        """Number of answers that wait for a place in the batch."""
        return self.engine.num_waiting + self._num_unseen

    async def answer(self, asks: Sequence[Ask], *, timeout_s: float) -> AsyncGenerator[tuple[int, Delta], None]:
        """Yield (index in `asks`, delta) until all answers have ended; closing the generator cancels the rest. Raise
        BusyError when more than `max_waiting` answers would be waiting, UsageError when a prompt and its answer do not
        fit the window, StoppedError when generation fails or the server is stopping, and TimeoutError after `timeout_s`
        seconds."""
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
                # The timeout must not enclose the yield: the next item may be requested by another task.
                async with asyncio.timeout_at(deadline):
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
        self._take(wait=False)  # jobs that arrived meanwhile also get the error
        self._fail(StoppedError("the server is stopping"))

    def _take(self, *, wait: bool) -> None:
        """Call the functions in the inbox. wait: first block until there is one."""
        while wait or not self._inbox.empty():
            self._inbox.get()()
            wait = False

    def _submit(self, job: _Job) -> None:
        """Submit the answers of a job to the engine. If one is refused, drop the whole job and send it the error."""
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
        """Cancel the rows of a job; rows that have ended are unaffected."""
        for row in job.rows:
            self.engine.cancel(row)
            self._jobs.pop(row, None)

    def _send(self, delta: Delta) -> None:
        job, index = self._jobs[delta.row]
        if delta.finish_reason is not None:
            del self._jobs[delta.row]
        job.put((index, delta))

    def _fail(self, error: Exception) -> None:
        for job in {job for job, _ in self._jobs.values()}:
            job.put(error)
            self._drop(job)
