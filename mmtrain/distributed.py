"""The ranks (processes) of a distributed run: join a run, sum tensors over all ranks, and start the ranks of one
machine with `launch`. Everything here also works in a single process without distributed training.

Gradients and counts are summed by all-reduce of parts of one flat tensor, so a rank with fewer micro-batches than
others, or none, takes part in the same way. If a rank fails or freezes, the others end within a minute, after an error
is printed.
"""

import _thread
import contextlib
import hashlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from mmdata.errors import MMError, TrainError, UsageError

GRACE_S = 20  # seconds that other ranks have to end by themselves after one has failed; then they are killed
BEAT_S, MISSED_BEATS = 3.0, 12  # how often a rank shows that it runs; beats after which a silent one is given up
BLOCKED_S = 15  # seconds after a signal until a process is ended whose main thread does not come back to Python
CHUNK_BYTES = 25 * 2**20  # of a gradient that are summed over ranks at a time, at least; what torch's DDP takes
MOST_NAMED, SHORT = 6, 40  # settings of a rank that are named in an error; characters of two values that are shown
CLEAN_UP_S = 10  # seconds that the last words of a process may take that is ended while its main thread is blocked


@dataclass(frozen=True)
class World:
    """This process's place among the ranks of a run. rank: counts from 0. size: number of ranks. device: its own."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Return whether this is rank 0, the only rank that prints and writes files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place, and return it. Every rank must call this, with equal shape and type.
        Raises TrainError if another rank has stopped."""
        if self.size > 1:
            with self._lost_rank():
                dist.all_reduce(tensor)
        return tensor

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Start what `sum` does and return a function that waits for it; on CUDA only the device waits. Several sums
        may be under way: every rank must start them in the same order. Both raise as `sum` does."""
        with self._lost_rank():
            work = dist.all_reduce(tensor, async_op=True)
        assert work is not None

        def wait() -> None:
            with self._lost_rank():
                work.wait()

        return wait

    @contextlib.contextmanager
    def _lost_rank(self) -> Iterator[None]:
        """Turn torch's error for a lost connection to another rank into a TrainError with the last words. First sleeps for
        2 seconds, so that the error of the other rank is printed before this one."""
        try:
            yield
        except RuntimeError as error:  # gloo notices a closed connection at once
            time.sleep(2)
            problem = f"rank {self.rank}: another rank stopped ({str(error).splitlines()[0][:120]})"
            raise TrainError(
                "; ".join([problem, *(say() for say in _last_words[-1:])]),
                "see that rank's error above, if it was not killed; then start all ranks again, with --resume",
            ) from error

    def gather(self, *numbers: int) -> list[tuple[int, ...]]:
        """Return the numbers of every rank, by rank. Every rank must call this, with equally many."""
        table = torch.zeros(self.size, len(numbers), dtype=torch.int64, device=self.device)
        table[self.rank] = torch.tensor(numbers)
        return [tuple(row) for row in self.sum(table).tolist()]

    def wait(self) -> None:
        """Wait until every rank has called this (a barrier)."""
        self.sum(torch.zeros(1, device=self.device))

    def agree(self, error: MMError | None) -> None:
        """Raise on every rank if any rank passes an error; return if all pass None. Every rank must call this. The
        lowest rank with an error raises it, and so does one rank on each other node; all others raise SystemExit with
        its exit code, so that a node prints it once."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        codes = [code for (code,) in self.gather(error.exit_code if error is not None else 0)]
        if not any(codes):
            return
        first = next(rank for rank, code in enumerate(codes) if code)
        if error is not None and self.rank == first:
            box: list[Any] = [(_node(), error.message, error.fix)]
        else:
            box = [None]
        with self._lost_rank():
            dist.broadcast_object_list(box, src=first, device=self.device)
        if error is not None and self.rank == first:
            raise error
        node, message, fix = box[0]
        if node == _node() or int(os.environ.get("LOCAL_RANK", "0")):
            raise SystemExit(codes[first])
        raised = MMError(message if all(codes) else f"rank {first}: {message}", fix)
        raised.exit_code = codes[first]
        raise raised

    def agree_same(self, facts: Mapping[str, object]) -> None:
        """Raise TrainError, as `agree` does, unless all ranks pass equal facts, compared by their text. It names the
        ranks with other facts than most, and how those differ. Every rank must call this, with equal keys."""
        if self.size == 1:
            return
        digests = [hashlib.sha256(str(value).encode()).digest()[:7] for value in facts.values()]
        rows = self.gather(*(int.from_bytes(digest, "big") for digest in digests))
        usual = Counter(rows).most_common(1)[0][0]
        if rows == [usual] * self.size:
            return
        known: list[Any] = [None] * self.size
        with self._lost_rank():
            dist.all_gather_object(known, {name: _texts(value) for name, value in facts.items()})
        whole = rows.index(usual)
        others = [
            f"rank {number} has other {', '.join(differences(known[number], known[whole]))}"
            for number, row in enumerate(rows)
            if row != usual
        ]
        problem = f"the ranks do not start from the same: {'; '.join(others)} than rank {whole}"
        fix = "bring the same data, checkpoint, options and version of mm to every node"
        self.agree(TrainError(problem, fix))

    def agree_on(self, check: Callable[[], object]) -> None:
        """Call `check` on every rank, and raise its MMError, if any, as `agree` does. Every rank must call this."""
        error = None
        try:
            check()
        except MMError as raised:
            error = raised
        self.agree(error)


def _node() -> str:
    """Return the number of this process's node, which torchrun gives; "0" without."""
    return os.environ.get("GROUP_RANK", "0")


def _texts(fact: object) -> str | dict[str, str]:
    return {name: str(value) for name, value in fact.items()} if isinstance(fact, dict) else str(fact)


def differences(these: Mapping[str, Any], those: Mapping[str, Any]) -> Iterator[str]:
    """Yield in words what differs between two mappings with equal names. Of a short text both values are given, of a
    longer one, such as a hash, only the name; of a mapping, the first MOST_NAMED differences, with both values."""
    for name in (name for name in those if these[name] != those[name]):
        this, that = these[name], those[name]
        if isinstance(this, dict):
            unlike = [key for key in that | this if this.get(key) != that.get(key)]
            more = f" and {len(unlike) - MOST_NAMED} more" if len(unlike) > MOST_NAMED else ""
            shown = ", ".join(f"{key} {this.get(key)} instead of {that.get(key)}" for key in unlike[:MOST_NAMED])
            yield f"{name} ({shown}{more})"
        else:
            yield f"{name} ({this} instead of {that})" if len(this + that) <= SHORT else name


class GradientSum:
    """Sums the flat gradient of a model over all ranks in chunks, each as soon as the backward pass of a rank's last
    micro-batch has completed it, while the pass goes on.

    A backward pass completes gradients from the last parameter to the first, more or less. So chunks are cut from the
    end of the vector, at least CHUNK_BYTES of whole parameters each, and every rank starts each of them once a step, in
    this order, whatever micro-batches it has. In a single process nothing is summed.
    """

    def __init__(self, world: World, gradient: Tensor, parameters: Sequence[nn.Parameter]):
        """gradient: the flat gradient of the trainable `parameters`, in their order (see `optim.flat_gradient`)."""
        self._world = world
        self._chunks: list[Tensor] = []
        self._num_parameters: list[int] = []  # of each chunk
        self._incomplete: list[int] = []  # parameters of each chunk without final gradient; empty: none is final
        self._waits: list[Callable[[], None]] = []  # of the chunks that have been started, the first ones
        self._summed: list[Tensor] = []  # their sums, if the passes have to run again
        begin = end = gradient.numel()
        count = 0
        for parameter in reversed(parameters) if world.size > 1 else ():
            parameter.register_post_accumulate_grad_hook(partial(self._complete, len(self._chunks)))
            begin, count = begin - parameter.numel(), count + 1
            if begin == 0 or (end - begin) * gradient.itemsize >= CHUNK_BYTES:
                self._chunks.append(gradient[begin:end])
                self._num_parameters.append(count)
                end, count = begin, 0

    def start(self) -> None:
        """Sum from here on what the backward pass completes. Called before the pass of this rank's last micro-batch."""
        if not self._summed:
            self._incomplete = self._num_parameters.copy()

    def _complete(self, chunk: int, _parameter: Tensor) -> None:
        if self._incomplete:
            self._incomplete[chunk] -= 1
            while len(self._waits) < len(self._chunks) and self._incomplete[len(self._waits)] == 0:
                self._start_next()

    def _start_next(self) -> None:
        self._waits.append(self._world.start_sum(self._chunks[len(self._waits)]))

    def run_again(self) -> None:
        """Keep the sums that have been started, as the passes of this step will run again from a gradient of zeros.
        They are kept in host memory, because the device's has run out."""
        self._incomplete = []
        if not self._summed:
            for wait, chunk in zip(self._waits, self._chunks, strict=False):
                wait()
                self._summed.append(chunk.to("cpu", copy=True))

    def finish(self) -> None:
        """Start the chunks that have not been started, and wait for all: the gradient is then the sum over ranks. Every
        rank must call this once a step, after its last micro-batch, if any. Raises TrainError if another rank has
        stopped."""
        while len(self._waits) < len(self._chunks):
            self._start_next()
        for wait in self._waits:
            wait()
        for chunk, value in zip(self._chunks, self._summed, strict=False):
            chunk.copy_(value)
        self._incomplete, self._waits, self._summed = [], [], []


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the torch device for `name`: "cpu", "cuda" (number `local_rank`), "mps" (an Apple GPU), or "auto": the
    first that torch sees of CUDA, MPS and CPU. Raises UsageError if the name is unknown, or torch sees no such
    device."""
    seen = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name not in ("auto", *seen):
        raise UsageError(f"--device {name} is unknown", f"use auto, {', '.join(seen)}")
    if not seen.get(name, True):
        raise UsageError(f"--device {name}: torch sees no {name.upper()} device here", "use --device cpu")
    kind = next(kind for kind, is_there in seen.items() if is_there) if name == "auto" else name
    return torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)


def join(device_name: str) -> World:
    """Join the distributed run that the environment variables of torchrun or `launch` describe (nccl on CUDA, gloo on
    the CPU), and return this process's World; without them it is the only rank. device_name: see `choose_device`.
    Raises UsageError for several ranks on MPS."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    if size > 1 and device.type == "mps":
        raise UsageError(f"{size} ranks on MPS: torch sums no gradients there", "--device cpu, or one process")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        # This module uses the default process group as a default argument. If it is first imported after the group
        # exists (AdamW imports it in its first step), it keeps the group alive until the interpreter exits, and the
        # group's threads sometimes abort the process then (torch 2.13). Imported here, before the group, it does not.
        importlib.import_module("torch.distributed.nn.functional")
        backend = "nccl" if device.type == "cuda" else "gloo"
        store: Any
        store, number, _ = next(rendezvous("env://"))
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=timedelta(minutes=30))
        _beats.append(Beats(number, size, store.clone()))
    return World(rank(), size, device)


def leave(*, is_failed: bool = False) -> None:
    """Destroy the process group, if there is one. Ranks that still wait for this one get an error and end too.
    is_failed: an nccl group is then not destroyed, as that would wait for ranks that may have ended."""
    while _beats:
        _beats.pop().stop()
    if dist.is_initialized() and not (is_failed and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


class Beats:
    """Notices ranks that are silent: frozen, cut off, or ended without closing their connections.

    Every BEAT_S seconds each rank counts up a number of its own in the run's store. Rank 0 looks at those of all ranks,
    the others at that of rank 0 and at the rank that it gives up. A rank is given up if its number has not changed
    MISSED_BEATS times, and the store if it has not answered for as long; the process then ends with `end_now`. Time in
    which this process itself was frozen does not count.
    """

    def __init__(self, rank: int, size: int, store: Any) -> None:
        self._rank, self._store = rank, store
        self._watched = range(1, size) if rank == 0 else range(1)
        self._counts: dict[int, int] = {}
        self._given_up = self._rounds = 0
        self._is_over = threading.Event()
        for target in (self._beat, self._watch):
            threading.Thread(target=target, name="beats", daemon=True).start()

    def stop(self) -> None:
        """End the threads."""
        self._is_over.set()

    def _beat(self) -> None:
        """In a thread of its own, as the store does not answer if the process that holds it is frozen."""
        with contextlib.suppress(RuntimeError):  # the connection is closed: `_watch` sees that no round follows
            while not self._is_over.is_set():
                self._store.add(f"mm beat {self._rank}", 1)
                self._counts = {number: self._store.add(f"mm beat {number}", 0) for number in self._watched}
                self._given_up = self._store.add("mm given up", 0)  # number of the rank + 1
                self._rounds += 1
                self._is_over.wait(BEAT_S)

    def _watch(self) -> None:
        seen: dict[int, int] = {}
        missed: Counter[int] = Counter()
        rounds = silent = 0
        while not self._is_over.wait(BEAT_S):
            rounds, silent = self._rounds, 0 if self._rounds != rounds else silent + 1
            for number, count in () if silent else self._counts.items():
                missed[number] = 0 if seen.get(number) != count else missed[number] + 1
                seen[number] = count
            lost = self._given_up - 1 if self._given_up else next((n for n in missed if missed[n] >= MISSED_BEATS), -1)
            if self._rank == 0 and lost > 0:
                self._store.add("mm given up", lost + 1)
                time.sleep(2 * BEAT_S)  # until the others have read it, as the store may end with this process
            if lost >= 0 or silent >= MISSED_BEATS:
                words = "the node of rank 0" if lost < 0 else f"rank {lost}"
                seconds = MISSED_BEATS * BEAT_S
                end_now(f"rank {self._rank}: {words} has not answered for {seconds:.0f} s: frozen or cut off", 1)


_beats: list[Beats] = []  # of this process: one, or none
_last_words: list[Callable[[], str]] = []


@contextlib.contextmanager
def last_words(say: Callable[[], str]) -> Iterator[None]:
    """While the block runs, `end_now` calls `say`, in another thread than the main one, and prints what it returns: what
    there is to go on from."""
    _last_words.append(say)
    try:
        yield
    finally:
        _last_words.pop()


def end_now(problem: str, code: int) -> NoReturn:
    """Print an error with the last words and end this process, whatever its main thread is doing."""
    words: list[str] = []
    thread = threading.Thread(target=lambda: words.extend(say() for say in _last_words[-1:]), daemon=True)
    thread.start()
    thread.join(CLEAN_UP_S)
    sys.stderr.write(f"error: {'; '.join([problem, *words])}\nfix: start all ranks again, with --resume\n")
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def signals_end_it() -> Iterator[None]:
    """While the block runs, SIGINT and SIGTERM end this process after BLOCKED_S seconds if its main thread is blocked, as
    in a sum with a rank that has frozen: handlers of Python only run when that comes back. Does nothing outside the main
    thread and on Windows."""
    if not hasattr(signal, "SIGURG") or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    is_answering = threading.Event()

    def watch() -> None:
        while numbers := reader.recv(16):
            if not {signal.SIGINT, signal.SIGTERM} & set(numbers):
                continue
            is_answering.clear()
            _thread.interrupt_main(signal.SIGURG)  # runs its handler once the handlers of the others have run
            if not is_answering.wait(BLOCKED_S):
                end_now(f"rank {rank()}: ended by a signal while waiting for other ranks or a device", 128 + numbers[0])

    urgent = signal.signal(signal.SIGURG, lambda *_: is_answering.set())
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGURG, urgent)
        writer.close()
        thread.join()
        reader.close()


def rank() -> int:
    """Return this process's rank from the environment variable RANK; 0 if it is not set."""
    return int(os.environ.get("RANK", "0"))


def ranks_here(world: World) -> int:
    """Return the number of ranks on this machine: LOCAL_WORLD_SIZE, which torchrun sets, else all ranks of the run,
    because `launch` starts ranks on one machine only."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world.size)))


class StopSignals:
    """Context manager that turns the first SIGINT or SIGTERM into `is_set` = True instead of ending the process, and
    calls `answer`. The next one of the same kind has its previous effect; leaving the context restores the handlers. It
    does nothing outside the main thread, because Python allows only that one to set handlers."""

    def __init__(self, answer: Callable[[], None] = lambda: None) -> None:
        self.is_set = False
        self._answer = answer
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        except ValueError:  # only the main thread can set handlers
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.is_set = True
        signal.signal(number, self._before[number])
        self._answer()


def launch(num_processes: int, argv: Sequence[str]) -> int:
    """Run the command line `argv` as `num_processes` ranks on this machine, and wait for them. Return 0, or the exit
    code of the first rank seen to fail; 128 + n if signal n ended it.

    The ranks share this process's stdout and stderr. SIGINT and SIGTERM are forwarded to them; they then save and end.
    Each has a session of its own, as otherwise Ctrl-C would reach it twice. Ranks that still run at the end are killed.
    """
    # The ranks' store is kept here, and they are told so as torchrun tells its own: a port that was only looked up could be
    # taken by another process before rank 0 listens at it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    common = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    common["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    processes = [
        subprocess.Popen(
            argv, env={**os.environ, **common, "RANK": str(number), "LOCAL_RANK": str(number)}, start_new_session=True
        )
        for number in range(num_processes)
    ]

    def pass_on(number: int, _frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _watch(processes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()


def _watch(processes: Sequence[subprocess.Popen]) -> int:
    """Wait until all ranks have ended, killing those that still run GRACE_S seconds after one failed. Return 0, or the
    exit code of the first that failed (128 + n if signal n ended it)."""
    deadline, failure = float("inf"), 0
    while any(process.poll() is None for process in processes):
        codes = [process.poll() for process in processes]
        if not failure and any(codes):
            failure = next(code for code in codes if code)
            deadline = time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    failure = failure or next((process.returncode for process in processes if process.returncode), 0)
    return failure if failure >= 0 else 128 - failure  # ended by a signal: 128 + its number, the shell's convention
