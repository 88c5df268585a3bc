"""One function over many jobs, in this process or in several: jobs in, results in the order of the jobs out.

Results do not depend on the number of workers. Workers are spawned, not forked; a job's error ends the run and comes
through as it is, the earliest job's when several fail; Ctrl-C ends the workers at once.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

from mmdata.errors import MMError

Job = TypeVar("Job")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]
Tick = Callable[[int], None]  # n more units are done
POLL_S = 0.2


def run(
    make: Callable[[], Callable[[Job, Tick], Result]],
    jobs: Sequence[Job],
    *,
    total: int,
    workers: int = 1,
    progress: Progress | None = None,
) -> list[Result]:
    """The results of `make()` applied to every job; `make` is called once in each process and must pickle.

    What `make` gives is called with a job and `tick`; `tick(n)` says that n more units of the job are done. total: the units that all jobs together tick, for `progress`. One job, one worker, or a process that may not have
    children (a daemon): everything runs right here.
    """
    workers = min(workers, len(jobs))
    if workers <= 1 or multiprocessing.current_process().daemon:
        return _run_here(make(), jobs, total, progress)
    return _run_in_pool(make, jobs, total, workers, progress)


def _run_here(
    work: Callable[[Job, Tick], Result], jobs: Sequence[Job], total: int, progress: Progress | None
) -> list[Result]:
    done = 0

    def tick(units: int) -> None:
        nonlocal done
        done += units
        if progress:
            progress(done, total)

    return [work(job, tick) for job in jobs]


def _run_in_pool(
    make: Callable[[], Callable[[Job, Tick], Result]],
    jobs: Sequence[Job],
    total: int,
    workers: int,
    progress: Progress | None,
) -> list[Result]:
    context = multiprocessing.get_context("spawn")
    # No locks: a process that dies holding one would leave the others waiting. A job's count has one writer.
    counts, stop = context.RawArray("q", len(jobs)), context.RawValue("b", 0)
    with ProcessPoolExecutor(workers, context, _start_worker, (make, counts, stop)) as pool:
        try:
            with _children_without_ctrl_c():
                futures = [pool.submit(_work_on, number, job) for number, job in enumerate(jobs)]
            _wait(futures, counts, total, progress)
            return _results(futures)
        except BaseException:
            stop.value = (
                1  # an error or Ctrl-C: what the other workers are at is of no use, they end at their next tick
            )
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def _children_without_ctrl_c() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C, not even before they can ignore it: the parent alone decides."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(futures: Sequence[Future[Any]], counts: Any, total: int, progress: Progress | None) -> None:
    """Until all are done or one failed, telling progress on the way."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=POLL_S, return_when=FIRST_EXCEPTION)
        if progress:
            progress(sum(counts), total)
        if any(future.exception() for future in done):
            return


def _results(futures: Sequence[Future[Any]]) -> list[Any]:
    """All results; else the error of the earliest job, for which the jobs before a failed one are waited for."""
    from concurrent.futures.process import BrokenProcessPool

    try:
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise MMError("a worker process died (killed, or out of memory)", "run again with fewer --workers") from None


_state: dict[str, Any] = {}  # of a worker process: its function, what each job has ticked, the sign to stop


class _Stopped(Exception):
    """Ends a worker's job whose result nobody waits for."""


def _start_worker(make: Callable[[], Any], counts: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # one core a worker; read by the native library alone
    _state.update(work=make(), counts=counts, stop=stop)


def _die_with_parent() -> None:
    """A killed parent cannot stop its workers: each waits for its end and follows."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _work_on(number: int, job: Any) -> Any:
    def tick(units: int) -> None:
        if _state["stop"].value:
            raise _Stopped
        _state["counts"][number] += units

    return _state["work"](job, tick)
