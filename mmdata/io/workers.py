"""Apply a function to many jobs in this process, in a pool of local processes, or on a ray cluster.

Results do not depend on the engine or the number of workers. Worker processes are spawned, not forked. The exception of
a job ends the run and is raised again here: with local processes that of the earliest failed job, on ray that of the
first one noticed. After an error or Ctrl-C, a local worker process stops the next time its job calls `tick`.
"""

import contextlib
import itertools
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np

from mmdata.errors import MMError, UsageError, needs
from mmdata.io.files import no_progress

Job = TypeVar("Job")
Result = TypeVar("Result")
CountedProgress = Callable[..., None]  # called with (units done, units in all, *other counts so far)
Tick = Callable[..., None]  # called with what was added since the last call: (units, *other counts)
COUNTS = 4  # units, and up to three other counts
POLL_S = 0.2
LARGE_BYTES = 2**30  # that one process reads in about a second: less is not worth to start others for
MAX_THREADS = 4  # hashing releases the GIL; more readers than this hardly help a disk
ENGINES = ("local", "ray")
RAY_TASKS = 200  # that are begun and not done at most, or 4 for each core of the cluster if that is more
REPORT_S = 1.0  # of a ray task, between two reports of its counts
CONNECT_S = 10.0  # until a host that does not answer is given up
RAY_RETRIES = 2  # of a job whose machine or process died; an exception of the job itself is not retried


def run_jobs(
    make: Callable[[], Callable[[Job, Tick], Result]],
    jobs: Sequence[Job],
    *,
    total: int,
    workers: int = 1,
    engine: str = "local",
    ray_address: str | None = None,
    progress: CountedProgress = no_progress,
    with_counts: bool = False,
) -> list[Result]:
    """Call `work(job, tick)` for every job, where `work = make()` is created once in each process, and return the
    results in the order of the jobs.

    make: must be picklable. work: reports what it did since its last call as `tick(units, *counts)`: work units, such
    as bytes, and up to three other counts. total: units of all jobs. progress: called with the units done so far and
    `total`; with `with_counts` also with the sums of the other counts. engine: "local" runs at most `workers`
    processes, or everything in this process if there is one job or worker, or if this is a daemon process, which may
    not start any. "ray" runs on the cluster at `ray_address`, or if that is None on one started here with `workers`
    CPUs. Raises UsageError for an unknown engine or a `ray_address` without "ray", MMError if a worker process dies or
    ray cannot be reached, and what `work` raises.
    """
    report: CountedProgress = progress if with_counts else lambda done, total, *_: progress(done, total)
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine} is unknown", f"use {' or '.join(ENGINES)}")
    if ray_address and engine != "ray":
        raise UsageError("--ray-address belongs to --engine ray", "add --engine ray, or leave it out")
    if engine == "ray":
        return _run_on_ray(make, jobs, total, workers, ray_address, report)
    workers = min(workers, len(jobs))
    if workers <= 1 or multiprocessing.current_process().daemon:
        return _run_here(make(), jobs, total, report)
    return _run_in_pool(make, jobs, total, workers, report)


def _run_here(
    work: Callable[[Job, Tick], Result], jobs: Sequence[Job], total: int, progress: CountedProgress
) -> list[Result]:
    done = [0] * COUNTS

    def tick(*counts: int) -> None:
        _add(done, 0, counts)
        progress(done[0], total, *done[1:])

    return [work(job, tick) for job in jobs]


def _run_in_pool(
    make: Callable[[], Callable[[Job, Tick], Result]],
    jobs: Sequence[Job],
    total: int,
    workers: int,
    progress: CountedProgress,
) -> list[Result]:
    """Run the jobs in spawned processes. On an exception, cancel the jobs not yet started, wait until the running ones
    stop at their next `tick`, and raise it."""
    context = multiprocessing.get_context("spawn")
    # Raw shared memory without locks: a process that dies while it holds a lock would leave the others waiting
    # forever. None are needed, since each job's counts are written by one process only.
    counts, stop = context.RawArray("q", COUNTS * len(jobs)), context.RawValue("b", 0)
    with ProcessPoolExecutor(workers, context, _start_worker, (make, counts, stop, workers)) as pool:
        try:
            with _children_without_ctrl_c():
                futures = [pool.submit(_work_on, number, job) for number, job in enumerate(jobs)]
            _wait(futures, counts, total, progress)
            return _results(futures)
        except BaseException:
            stop.value = 1  # the other results are not needed: workers stop at their next tick
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def _children_without_ctrl_c() -> Iterator[None]:
    """Block SIGINT while worker processes start: they inherit this and never get Ctrl-C. Does nothing on Windows."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(futures: Sequence[Future[Any]], counts: Any, total: int, progress: CountedProgress) -> None:
    """Wait until all are done or one has failed, calling `progress` every POLL_S seconds. counts: COUNTS for each job."""
    done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    for future in futures:
        future.add_done_callback(done.put)
    left, shown = len(futures), time.monotonic()
    sums = np.frombuffer(counts, np.int64).reshape(-1, COUNTS)
    while left:
        with contextlib.suppress(queue.Empty):
            left -= 1 if not done.get(timeout=POLL_S).exception() else left
        if not left or time.monotonic() - shown > POLL_S:
            shown = time.monotonic()
            done_units, *more = sums.sum(0).tolist()
            progress(done_units, total, *more)


def _results(futures: Sequence[Future[Any]]) -> list[Any]:
    """Return the results in order, or raise the first failed job's exception. MMError if a worker process died."""
    from concurrent.futures.process import BrokenProcessPool

    try:
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise MMError("a worker process died (killed, or out of memory)", "run again with fewer --workers") from None


_state: dict[
    str, Any
] = {}  # of a worker process: its work function, the shared counts of all jobs, the shared stop flag


class _Stopped(Exception):
    """Raised by `tick` in a worker process whose result is no longer needed."""


def _start_worker(make: Callable[[], Any], counts: Any, stop: Any, workers: int) -> None:
    """Prepare a worker process: ignore Ctrl-C, exit with the parent, limit native threads, create the work function."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is sent to all processes of the group; the parent handles it
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _share_cores(workers)
    _state.update(work=make(), counts=counts, stop=stop)


def _add(totals: Any, begin: int, counts: Sequence[int]) -> None:
    """Add `counts` in place to the entries of `totals` that start at index `begin`."""
    for at, count in enumerate(counts, begin):
        totals[at] += count


def _share_cores(workers: int) -> None:
    """Limit the threads of native libraries to this process's share of the cores: cores // workers, at least 1."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.putenv("RAYON_NUM_THREADS", str(threads))  # only the native libraries read these, when they are first used
    os.putenv("TOKENIZERS_PARALLELISM", "true" if threads > 1 else "false")


def _die_with_parent() -> None:
    """Wait until the parent process ends, then exit. A parent that was killed cannot stop its workers itself."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _work_on(number: int, job: Any) -> Any:
    """Run job `number` in a worker process. Raises _Stopped at the first `tick` after the stop flag was set."""

    def tick(*counts: int) -> None:
        if _state["stop"].value:
            raise _Stopped
        _add(_state["counts"], COUNTS * number, counts)

    return _state["work"](job, tick)


def in_threads(
    work: Callable[[Job], Result], jobs: Iterable[Job], threads: int = MAX_THREADS
) -> Iterator[tuple[Job, Result]]:
    """Yield (job, work(job)) for each job, in order, with so many threads; a thousand jobs are taken at a time."""
    left = iter(jobs)
    with ThreadPoolExecutor(threads) as pool:
        while some := list(itertools.islice(left, 1000)):
            yield from zip(some, pool.map(work, some), strict=True)


# --- ray


def _run_on_ray(
    make: Callable[[], Callable[[Job, Tick], Result]],
    jobs: Sequence[Job],
    total: int,
    workers: int,
    address: str | None,
    progress: CountedProgress,
) -> list[Result]:
    """Run each job as a ray task on one core and return the results in the order of the jobs. One whose machine or
    process dies is run again elsewhere, at most RAY_RETRIES times, so jobs must be repeatable, and their files must
    have the same paths on all machines; relative ones are of this process's directory. address: of the cluster, None starts one here with `workers` CPUs, unless ray
    is already initialized. Raises MMError if it cannot connect."""
    with needs("--engine ray needs ray", "ray"):
        import ray
        import ray.exceptions
    is_ours = not ray.is_initialized()
    if is_ours:
        options: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
        try:
            _check_listening(address or "")
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            place = f"at {address}" if address else "on this machine"
            fix = "if this names no other cause: `ray status` shows clusters, --ray-address auto takes the one here"
            raise MMError(f"cannot connect to ray {place}: {str(error).strip() or type(error).__name__}", fix) from None
    try:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        counts = ray.remote(num_cpus=0, scheduling_strategy=here)(_Counts).remote()
        task = ray.remote(num_cpus=1, max_retries=RAY_RETRIES)(_work_on_ray)
        shared = ray.put((make, os.getcwd(), counts))
        return _gather(ray, partial(task.remote, shared), counts, jobs, total, progress)
    finally:
        if is_ours:
            ray.shutdown()


def _check_listening(address: str) -> None:
    """Raise OSError if nothing listens at an address HOST:PORT or ray://HOST:PORT, for which ray would wait a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()


def _gather(
    ray: Any, begin: Callable[[int, Any], Any], counts: Any, jobs: Sequence[Any], total: int, progress: CountedProgress
) -> list[Any]:
    """Return the results of all jobs in order. begin: starts the task of a job, given its number. counts: `_Counts` as
    an actor. The first error noticed is raised without waiting for others: an MMError of the job as it is, others as
    ray's RayTaskError, and MMError if a ray worker died."""
    most = max(RAY_TASKS, 4 * int(ray.cluster_resources().get("CPU", 1)))
    todo, running, done = iter(enumerate(jobs)), {}, [0] * COUNTS
    results: list[Any] = [None] * len(jobs)
    while True:
        running |= {begin(number, job): number for number, job in itertools.islice(todo, most - len(running))}
        if not running:
            return results
        ready, _ = ray.wait(list(running), num_returns=len(running), timeout=POLL_S)
        for task in ready:
            try:
                results[running.pop(task)], of_task = ray.get(task)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, MMError) else error) from None
            except ray.exceptions.RayError as error:
                raise MMError(f"a ray worker died: {error}", "look at `ray logs`; run again to go on") from None
            _add(done, 0, of_task)
        so_far = list(done)
        for of_task in ray.get(counts.of.remote(list(running.values()))):
            _add(so_far, 0, of_task)
        progress(so_far[0], total, *so_far[1:])


class _Counts:
    """The counts of the tasks that are running, by number: an actor of ray, to which they report now and then."""

    def __init__(self) -> None:
        self._of: dict[int, list[int]] = {}

    def report(self, number: int, counts: list[int]) -> None:
        self._of[number] = counts

    def of(self, numbers: list[int]) -> list[list[int]]:
        """Return what tasks of these numbers reported last, and forget the others."""
        self._of = {number: self._of[number] for number in numbers if number in self._of}
        return list(self._of.values())


def _work_on_ray(shared: tuple[Callable[[], Any], str, Any], number: int, job: Any) -> tuple[Any, list[int]]:
    """Run one job in a ray worker process; return its result and its COUNTS summed counts. shared: `make`, the
    directory that relative paths are of, and the actor to which the counts are reported every REPORT_S seconds. The
    work function is created once in a process for all tasks with an equal `make`. An MMError names the node."""
    make, directory, actor = shared
    with contextlib.suppress(OSError):  # a node may lack it: absolute paths are found all the same
        os.chdir(directory)
    done, reported = [0] * COUNTS, time.monotonic()

    def tick(*counts: int) -> None:
        nonlocal reported
        _add(done, 0, counts)
        if time.monotonic() - reported > REPORT_S:
            reported = time.monotonic()
            actor.report.remote(number, done)

    try:
        key = pickle.dumps(make)
        if _state.get("key") != key:
            _share_cores(os.cpu_count() or 1)  # ray reserves one core for a task
            _state.update(key=key, work=make())
        return _state["work"](job, tick), done
    except MMError as error:
        raise type(error)(f"{error.message} (on node {socket.gethostname()})", error.fix) from None
