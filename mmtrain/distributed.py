"""Ranks of a distributed run: joining it, sums over ranks, and `launch` to start them. Also works with a single process.

Gradients and counts are summed by all-reduces of one flat tensor, so a rank with fewer micro-batches, or none, takes part
like any other. A rank that fails ends the others within a minute; its own error is printed first.
"""

import importlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmdata.errors import MMError, TrainError, UsageError

GRACE_S = 20  # between the first failure and the end of the ranks that still run


@dataclass(frozen=True)
class World:
    """The place of this process in a run: `rank` of `size`, on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place; returns it."""
        if self.size > 1:
            try:
                dist.all_reduce(tensor)
            except RuntimeError as error:  # gloo notices a closed connection at once
                raise _lost_rank(self.rank, error) from error
        return tensor

    def wait(self) -> None:
        """Return when every rank has called this."""
        self.sum(torch.zeros(1, device=self.device))

    def agree(self, error: MMError | None) -> None:
        """Raise if any rank has an error: its error on the lowest such rank, SystemExit with its exit code on the others."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        codes = torch.zeros(self.size, device=self.device)
        codes[self.rank] = error.exit_code if error is not None else 0
        failed = self.sum(codes).nonzero()[:, 0].tolist()
        if failed and failed[0] == self.rank:
            assert error is not None
            raise error
        if failed:
            raise SystemExit(int(codes[failed[0]].item()))

    def agree_on(self, check: Callable[[], object]) -> None:
        """Call `check` on all ranks; if it raises on any, one of them raises its error and all end."""
        error = None
        try:
            check()
        except MMError as raised:
            error = raised
        self.agree(error)


def _lost_rank(rank: int, error: RuntimeError) -> TrainError:
    """The error of a rank whose connection to another was lost; delayed, so that the other's own error is printed first."""
    time.sleep(2)
    return TrainError(
        f"rank {rank}: another rank stopped ({str(error).splitlines()[0][:120]})",
        "see the first error above; then go on with --resume",
    )


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`; on CUDA the card of the local rank. UsageError if there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {name} is unknown", "use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here", "use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def join(device_name: str) -> World:
    """Join the run described by the environment variables of torchrun or `launch`; without them the only rank."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        # This module has the default group as the default of arguments. AdamW imports it at its first step, which would keep
        # the group alive until the interpreter exits, and its threads sometimes abort the process then (torch 2.13).
        importlib.import_module("torch.distributed.nn.functional")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return World(rank(), size, device)


def leave(*, is_failed: bool = False) -> None:
    """Destroy the process group, if there is one; the other ranks notice and end too. After a failure nccl's group is left
    alone, as destroying it would wait for ranks that may be gone."""
    if dist.is_initialized() and not (is_failed and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


def rank() -> int:
    """The rank of this process from its environment; 0 for a single process."""
    return int(os.environ.get("RANK", "0"))


def ranks_here(world: World) -> int:
    """Number of the run's ranks on this machine: as torchrun sets it; under `launch` all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world.size)))


class StopSignals:
    """A context in which the first SIGINT or SIGTERM only sets `is_set`; a second one has its usual effect."""

    def __init__(self) -> None:
        self.is_set = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread, which alone can set handlers
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.is_set = True
        signal.signal(number, self._before[number])


def launch(num_processes: int, argv: Sequence[str]) -> int:
    """Run the command line `argv` as `num_processes` ranks on this machine; returns the exit code of the first that fails.

    All ranks share this process's stdout and stderr. SIGINT and SIGTERM are forwarded; the ranks then save and end. Each has
    its own session, or Ctrl-C would reach it twice.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    common = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
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
    """Wait for all ranks; after a failure the others are killed unless they end within GRACE_S. Returns an exit code."""
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
    return failure if failure >= 0 else 128 - failure  # killed by a signal: the shell's convention
