"""What training waits for the sum of gradients over two ranks: mm's chunks, one sum at the end, and torch's DDP.

    PYTHONPATH=. python tests/bench/gradients.py [--rates 1 10] [--block-ms 50] [--steps 8]

Two gloo processes on this machine. So that its other work and its few cores do not decide the figures, everything is a
hundredth of minimind2: 1.1M parameters in 16 blocks, chunks and DDP's buckets of 0.25 MiB, and the link's rate; and each
block's backward pass also sleeps for --block-ms. The link is throttled in the program: one thread of each rank carries one
sum after the other, and each lasts at least as long as its bytes take at the rate (GB/s in each direction; of two ranks a
ring sends each byte once). "Waited" is the time from the last gradient of the backward pass until all are summed, on the
slower rank: the least of the steps, as other work on the machine only makes it longer, and the median. All three must end
with the same weights.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from gpu import documents
from torch import Tensor, nn

from mmdata.shards.loader import MicroBatch
from mmtrain import distributed
from mmtrain.distributed import GradientSum, World
from mmtrain.model.batch import Batch, to_device, token_logps_of
from mmtrain.model.model import Model
from mmtrain.shapes import MODEL_SHAPES
from mmtrain.train.optim import flat_gradient, make, update

CPU = torch.device("cpu")
WAYS = ("one sum", "mm", "DDP")
PART = 100  # sizes and rates are so many times smaller
SHAPE = replace(MODEL_SHAPES["minimind2"], vocab_size=640, hidden_size=80, ffn_size=208)


class Link:
    """Carries one sum after the other, each for at least its bytes / `rate` seconds (GB/s; 0: no limit)."""

    def __init__(self, rate: float):
        self._rate = rate
        self._thread = ThreadPoolExecutor(1)

    def carry(self, tensor: Tensor) -> Future[Tensor]:
        """Sum `tensor` over the ranks, in place, in the background."""
        return self._thread.submit(self._carry, tensor)

    def _carry(self, tensor: Tensor) -> Tensor:
        begun = time.perf_counter()
        dist.all_reduce(tensor)
        if self._rate:
            time.sleep(max(0.0, begun + PART * tensor.nbytes / (1e9 * self._rate) - time.perf_counter()))
        return tensor


@dataclass(frozen=True)
class Linked(World):
    """A world whose ranks sum over a Link."""

    link: Link = field(default_factory=lambda: Link(0))

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Start a sum on the link."""
        future = self.link.carry(tensor)
        return lambda: [future.result()].clear()


class Loss(nn.Module):
    """The loss of a batch as the output of a module, which DDP wants."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Return the summed cross-entropy."""
        return -token_logps_of(self.model, batch).sum()


def over_link(link: Link, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: sum a bucket over the link."""
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    link.carry(bucket.buffer()).add_done_callback(lambda future: done.set_result(future.result()))
    return done


def measure(way: str, world: Linked, micro: MicroBatch, args: argparse.Namespace) -> tuple[list[float], float, Tensor]:
    """Make steps; return the seconds waited in each, the median seconds of a step, and the weights at the end."""
    torch.manual_seed(0)
    model = Model(SHAPE)
    for block in model.model.layers:
        block.register_full_backward_hook(lambda *_: time.sleep(args.block_ms / 1000))
    loss_of: nn.Module = Loss(model)
    parameters = list(model.parameters())
    at_end = [0.0]
    parameters[0].register_hook(
        lambda _: at_end.__setitem__(0, time.perf_counter())
    )  # the embedding's is the last gradient
    batch = to_device(micro, CPU)
    if way == "DDP":
        ddp = nn.parallel.DistributedDataParallel(loss_of, gradient_as_bucket_view=True, bucket_cap_mb=25 / PART)
        ddp.register_comm_hook(world.link, over_link)
        loss_of = ddp
        flat = torch.empty(0)
    else:
        flat = flat_gradient(model)
    summing = GradientSum(world, flat, [] if way == "DDP" else parameters)
    optimizer = make(model, "adamw", lr=1e-3, weight_decay=0.1)
    waited, steps = [], []
    for _ in range(args.steps):
        begun = time.perf_counter()
        optimizer.zero_grad() if way == "DDP" else flat.zero_()
        loss = loss_of(batch)
        if way == "mm":
            summing.start()
        loss.backward()
        if way == "one sum":
            world.start_sum(flat)()
        elif way == "mm":
            summing.finish()
        waited.append(time.perf_counter() - at_end[0])
        gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]) if way == "DDP" else flat
        update(optimizer, gradient, lr=1e-3, count=2 * batch.num_trained, clip=1.0)
        steps.append(time.perf_counter() - begun)
    weights = torch.cat([p.detach().flatten() for p in parameters])
    return waited[2:], statistics.median(steps[2:]), weights  # DDP arranges its buckets in the first step


def rank(number: int, store: str, args: argparse.Namespace) -> None:
    """One of the two ranks: measure all ways at all rates by turns; the first prints."""
    torch.set_num_threads(1)
    distributed.CHUNK_BYTES //= PART
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    micro = documents(16, 4, SHAPE.vocab_size)
    for rate in (*args.rates, 0):
        world = Linked(number, 2, CPU, Link(rate))
        first = None
        for way in WAYS:
            waited, seconds, weights = measure(way, world, micro, args)
            slower = torch.tensor(waited)
            dist.all_reduce(slower, dist.ReduceOp.MAX)
            first = weights if first is None else first
            torch.testing.assert_close(weights, first, rtol=1e-4, atol=1e-5)
            if number == 0:
                name = f"{rate:g} GB/s" if rate else "not throttled"
                print(
                    f"| {name} | {way} | {1e3 * slower.min():.0f} ms | {1e3 * slower.median():.0f} ms | {seconds:.2f} s |",
                    flush=True,
                )
    dist.destroy_process_group()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--block-ms", type=float, default=50.0)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 10.0])
    args = parser.parse_args()
    print(
        f"{4 * PART * SHAPE.num_params / 1e6:.0f} MB of gradients, a backward pass of {16 * args.block_ms:.0f} ms and more"
    )
    print("| link | way | waited, least | median | a step |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(rank, (f"{directory}/store", args), nprocs=2)


if __name__ == "__main__":
    main()
