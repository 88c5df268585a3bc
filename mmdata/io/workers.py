"""Apply a function to many jobs in this process, in a pool of local processes, or on a ray cluster.

Results come in the order of the jobs and do not depend on the engine or the number of workers. Worker processes are spawned,
not forked. An error of a job ends the run and is raised as it is, that of the earliest job if several fail. Ctrl-C ends
the workers at once.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

from mmdata.errors import MMError, UsageError

Job = TypeVar("Job")
Result = TypeVar("Result")
Progress = Callable[..., None]  # (units done, units in all, *other counts so far)
Tick = Callable[..., None]  # (more units done, *more of the other counts)
COUNTS = 4  # units, and up to three other counts
POLL_S = 0.2
ENGINES = ("local", "ray")
RAY_RETRIES = 2  # of a job whose machine or process died; an error of the job itself is final


def run(
    make: Callable[[], Callable[[Job, Tick], Result]],
    jobs: Sequence[Job],
    *,
    total: int,
    workers: int = 1,
    engine: str = "local",
    ray_address: str | None = None,
    progress: Progress | None = None,
    with_counts: bool = False,
) -> list[Result]:
    """The results of `work(job, tick)` for every job, where `work = make()` is made once in each process.

    make: must pickle. `tick(units, *counts)` reports progress of a job; `progress` is called with the units done, `total`
    and, `with_counts`, the sums of the other counts. total: units of all jobs together. engine "local": processes here; with
    one job, one worker, or in a daemon process, which may not have children, everything runs in this process. "ray": on
    the cluster at `ray_address`, or on one started here.
    """
    if progress and not with_counts:
        report = progress
        progress = lambda done, total, *_: report(done, total)  # noqa: E731
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine} is unknown", f"use {' or '.join(ENGINES)}")
    if ray_address and engine != "ray":
        raise UsageError("--ray-address belongs to --engine ray", "add --engine ray, or leave it out")
    if engine == "ray":
        return _run_on_ray(make, jobs, total, workers, ray_address, progress)
    workers = min(workers, len(jobs))
    if workers <= 1 or multiprocessing.current_process().daemon:
        return _run_here(make(), jobs, total, progress)
    return _run_in_pool(make, jobs, total, workers, progress)


def _run_here(
    work: Callable[[Job, Tick], Result], jobs: Sequence[Job], total: int, progress: Progress | None
) -> list[Result]:
    done = [0] * COUNTS

    def tick(*counts: int) -> None:
        _add(done, 0, counts)
        if progress:
            progress(done[0], total, *done[1:])

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
    counts, stop = context.RawArray("q", COUNTS * len(jobs)), context.RawValue("b", 0)
    with ProcessPoolExecutor(workers, context, _start_worker, (make, counts, stop, workers)) as pool:
        try:
            with _children_without_ctrl_c():
                futures = [pool.submit(_work_on, number, job) for number, job in enumerate(jobs)]
            _wait(futures, counts, total, progress)
            return _results(futures)
        except BaseException:
            stop.value = 1  # the results of the other workers are of no use: they end at their next tick
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def _children_without_ctrl_c() -> Iterator[None]:
    """Block SIGINT while processes are started, so that they never receive Ctrl-C, not even before they ignore it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(futures: Sequence[Future[Any]], counts: Any, total: int, progress: Progress | None) -> None:
    """Wait until all are done or one has failed; report progress meanwhile."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=POLL_S, return_when=FIRST_EXCEPTION)
        if progress:
            done_units, *more = (sum(counts[n::COUNTS]) for n in range(COUNTS))
            progress(done_units, total, *more)
        if any(future.exception() for future in done):
            return


def _results(futures: Sequence[Future[Any]]) -> list[Any]:
    """All results, or the error of the earliest failed job; jobs before a failed one are waited for."""
    from concurrent.futures.process import BrokenProcessPool

    try:
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise MMError("a worker process died (killed, or out of memory)", "run again with fewer --workers") from None


_state: dict[str, Any] = {}  # of a worker process: its function, the counts of each job, the flag to stop


class _Stopped(Exception):
    """Raised by `tick` in a worker whose result is no longer needed."""


def _start_worker(make: Callable[[], Any], counts: Any, stop: Any, workers: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _share_cores(workers)
    _state.update(work=make(), counts=counts, stop=stop)


def _add(totals: Any, begin: int, counts: Sequence[int]) -> None:
    for at, count in enumerate(counts, begin):
        totals[at] += count


def _share_cores(workers: int) -> None:
    """Limit the threads of this process's native encoders, so that all workers together have one a core."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.putenv("RAYON_NUM_THREADS", str(threads))  # read by the native libraries alone, at their first use
    os.putenv("TOKENIZERS_PARALLELISM", "true" if threads > 1 else "false")


def _die_with_parent() -> None:
    """Wait for the end of the parent process and exit: a killed parent cannot stop its workers."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _work_on(number: int, job: Any) -> Any:
    def tick(*counts: int) -> None:
        if _state["stop"].value:
            raise _Stopped
        _add(_state["counts"], COUNTS * number, counts)

    return _state["work"](job, tick)


# --- ray


def _run_on_ray(
    make: Callable[[], Callable[[Job, Tick], Result]],
    jobs: Sequence[Job],
    total: int,
    workers: int,
    address: str | None,
    progress: Progress | None,
) -> list[Result]:
    """One task a job, each on one core. A task whose machine dies runs again elsewhere, so jobs must be repeatable.

    The jobs' files must have the same paths on every machine.
    """
    ray = _import_ray()
    is_ours = not ray.is_initialized()
    if is_ours:
        options: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, logging_level="error", **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise MMError(f"no ray at {address}: {error}", "`ray status` shows clusters; --ray-address auto") from None
    try:
        task = ray.remote(num_cpus=1, max_retries=RAY_RETRIES)(_work_on_ray)
        shared = ray.put(make)
        return _gather(ray, [task.remote(shared, job) for job in jobs], total, progress)
    finally:
        if is_ours:
            ray.shutdown()


def _gather(ray: Any, tasks: Sequence[Any], total: int, progress: Progress | None) -> list[Any]:
    """The results of all tasks; the first error is raised, and the other tasks are not waited for."""
    pending, done = list(tasks), [0] * COUNTS
    results: dict[Any, Any] = {}
    while pending:
        ready, pending = ray.wait(pending, timeout=POLL_S)
        for task in ready:
            try:
                results[task], counts = ray.get(task)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, MMError) else error) from None
            except ray.exceptions.RayError as error:
                raise MMError(f"a ray worker died: {error}", "look at `ray logs`; run again to go on") from None
            _add(done, 0, counts)
        if progress:
            progress(done[0], total, *done[1:])
    return [results[task] for task in tasks]


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UsageError("--engine ray needs ray", "pip install 'mm-toolkit[ray]'") from None
    return ray


def _work_on_ray(make: Callable[[], Any], job: Any) -> tuple[Any, list[int]]:
    """A job's result and its counts. A process keeps the function that `make` returned for later tasks."""
    key = pickle.dumps(make)
    if _state.get("key") != key:
        _share_cores(os.cpu_count() or 1)  # ray gives a task one core
        _state.update(key=key, work=make())
    done = [0] * COUNTS
    return _state["work"](job, lambda *counts: _add(done, 0, counts)), done
