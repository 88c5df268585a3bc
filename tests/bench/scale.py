"""What packing and training on many machines cost: measured on one, and computed for many (docs/scale.md).

    PYTHONPATH=. python tests/bench/scale.py parts 100 1000 10000 [--dir /dev/shm]
    PYTHONPATH=. python tests/bench/scale.py constants FILE.jsonl --tokenizer DIR [--dir /dev/shm]
    PYTHONPATH=. python tests/bench/scale.py model

parts: CPU milliseconds a part, at 10^2, 10^3, … tiny parts, of packing, --finish (check and publish), verifying, opening and
the first batch (children included), and the most memory the process took. constants: the rates and sizes that the model
takes, measured with one thread on rows that are like yours. model: the tables of docs/scale.md.
"""

import argparse
import json
import math
import resource
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack
from mmdata.shards.checksums import VERIFIED_NAME
from mmdata.shards.dataset import open_dataset
from mmdata.shards.pairs import make_loader
from mmdata.shards.verify import verify
from mmdata.tokenizer.tokenizer import CHATML, train_bpe
from mmtrain.shapes import MODEL_SHAPES

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MB, GB, TB, MIB = 1e6, 1e9, 1e12, 2**20


# --- the model: packing


@dataclass(frozen=True)
class Measured:
    """Constants that `constants` and `parts` measured on one core (tests/bench/RESULTS.md, "Many machines")."""

    cut: float = 0.79 * GB  # bytes a second that are hashed and cut into parts
    pack: float = 19 * MB  # bytes of conversations a second that are packed, proof included
    hash: float = 1.34 * GB  # bytes a second
    open: float = 0.74 * GB  # bytes a second that one thread checks when a dataset is opened for the first time
    verify: float = 0.36 * GB  # bytes a second that one thread of `mm verify` checks
    start_s: float = 2.0  # of a worker process: imports, tokenizer, encoder
    out: float = 0.645  # bytes of the dataset per byte of jsonl, 16-bit ids
    files: int = 6  # of a part
    record_s: float = 0.7e-3  # of the driver for a part, from its record to the manifest: `parts`, and "record"
    result: float = 1e3  # bytes of the driver's memory a part
    manifest: float = 1.89e3  # bytes of parts.jsonl a part
    worker: float = 200 * MB  # memory of a worker, and what each byte of its part adds
    worker_per_byte: float = 7.0


@dataclass(frozen=True)
class Cluster:
    """Machines and storage, all assumed. stream: bytes a second of one connection. request_s: until a request is
    answered; request: its bytes (mm's READ_BYTES). link: bytes a second of a node in each direction. task_s: of the
    driver for a Ray task."""

    cores: int = 1000
    cores_per_node: int = 64
    link: float = 25e9 / 8
    stream: float = 90 * MB
    request_s: float = 0.03
    request: float = 4 * MIB
    task_s: float = 1e-3

    def transfer_s(self, num_bytes: float) -> float:
        """Seconds in which every core moves its share of so many bytes, one request after the other."""
        share = num_bytes / self.cores
        rate = min(self.stream, self.link / self.cores_per_node)
        return share / rate + share / self.request * self.request_s


def packing(
    num_bytes: float, cluster: Cluster, *, part: float = 128 * MIB, inputs: int = 2000, measured: Measured = Measured()
) -> dict[str, float]:
    """Seconds of each step of `mm pack s3://… --engine ray --out s3://…`, and what else grows with the data."""
    m, c = measured, cluster
    parts, out = math.ceil(num_bytes / part), m.out * num_bytes
    rounds = (
        math.ceil(inputs / c.cores) * c.cores / inputs
    )  # an input is hashed by one core: the last may wait for others
    packed = c.transfer_s(num_bytes) + num_bytes / c.cores / m.pack + c.transfer_s(out)
    steps = {
        "look at each input: size, kind of rows": inputs * 8 * c.request_s / 32,
        "hash the inputs and cut them into parts": rounds * (c.transfer_s(num_bytes) + num_bytes / c.cores / m.cut),
        "start the workers": m.start_s,
        "read the parts": c.transfer_s(num_bytes),
        "pack them": num_bytes / c.cores / m.pack,
        "write their files to the shared file system": c.transfer_s(out),
        "wait for the driver, if it is slower than the parts": max(0.0, parts * c.task_s - packed),
        "the driver: sizes of all files, manifest, stats": parts * m.record_s,
        "read all files on another node and hash them": c.transfer_s(out) + out / c.cores / m.hash,
        "send the dataset: read, write, read back": 3 * c.transfer_s(out)
        + out / c.cores / m.hash
        + 4 * parts * m.files / c.cores * c.request_s,
    }
    return steps | {
        "all": sum(steps.values()),
        "parts": parts,
        "manifest": parts * m.manifest,
        "driver": parts * m.result,
        "worker": m.worker + m.worker_per_byte * part,
        "first opening": out / (4 * m.open),
        "verify": out / (4 * m.verify),
    }


# --- the model: training


@dataclass(frozen=True)
class Cards:
    """Cards that train, assumed. tokens: of a step on each. flops: that a card really makes a second. link: bytes a second
    that a card sends to the next one of a ring, in the slowest place."""

    name: str
    count: int
    tokens: int
    flops: float
    link: float


CARDS = (
    Cards("2 cards on PCIe 4, 80 TFLOP/s", 2, 32_768, 80e12, 25 * GB),
    Cards("8 H100 on NVLink, 400 TFLOP/s", 8, 8_192, 400e12, 450 * GB),
    Cards("4 nodes of 8 H100, 400 Gbit/s a card", 32, 8_192, 400e12, 50 * GB),
    Cards("16 nodes of 8 H100, 400 Gbit/s a card", 128, 8_192, 400e12, 50 * GB),
    Cards("16 nodes of 8 H100, 400 Gbit/s a card", 128, 32_768, 400e12, 50 * GB),
    Cards("16 nodes of 8 H100, 100 Gbit/s a node", 128, 32_768, 400e12, 100e9 / 8 / 8),
)


def training(cards: Cards, model: str = "minimind2") -> dict[str, float]:
    """Seconds of a step: forward and backward, the sum of the gradients, and how much of it is waited for if it begins
    at the end, and in chunks as mm sums them."""
    from mmtrain.distributed import CHUNK_BYTES  # with torch, which would count as memory of a worker in `constants`

    num_bytes = 4 * MODEL_SHAPES[model].num_params
    compute = 6 * MODEL_SHAPES[model].num_params * cards.tokens / cards.flops
    ring = 2 * (cards.count - 1) / cards.count / cards.link
    total, last = ring * num_bytes, ring * min(num_bytes, CHUNK_BYTES)
    chunked = max(last, total - compute * 2 / 3 * (1 - CHUNK_BYTES / num_bytes))
    return {"compute": compute, "sum": total, "one sum": total / (compute + total), "mm": chunked / (compute + chunked)}


# --- the tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def seconds(value: float) -> str:
    """A time, in seconds."""
    return f"{value:,.0f} s" if value >= 10 else f"{value:.1f} s"


def tables() -> dict[str, str]:
    """The tables of docs/scale.md by name."""
    narrow, wide = Cluster(), Cluster(link=100e9 / 8)
    columns = {
        "1 TB, 25 Gbit/s": packing(TB, narrow),
        "10 TB, 25 Gbit/s": packing(10 * TB, narrow),
        "10 TB, 100 Gbit/s": packing(10 * TB, wide),
        "100 TB on 10,000 cores, 100 Gbit/s": packing(
            100 * TB, replace(wide, cores=10_000), part=512 * MIB, inputs=20_000
        ),
    }
    steps = list(columns["1 TB, 25 Gbit/s"])
    steps = steps[: steps.index("all")]
    rows = [[step, *(seconds(column[step]) for column in columns.values())] for step in steps]
    rows.append(["**all**", *(f"**{column['all'] / 60:.1f} min**" for column in columns.values())])
    sizes = [
        (
            f"{part / MIB:.0f} MiB",
            f"{found['parts']:,.0f}",
            f"{found['manifest'] / MB:,.0f} MB",
            f"{found['driver'] / MB:,.0f} MB",
            f"{found['worker'] / GB:.1f} GB",
            f"{found['all'] / 60:.1f} min",
        )
        for part in (64 * MIB, 128 * MIB, 512 * MIB)
        if (found := packing(10 * TB, wide, part=part))
    ]
    ten = packing(10 * TB, wide)
    alone = [
        [
            "`mm train` or `mmdata.load`, the first time: every file is checked, four threads",
            f"{ten['first opening'] / 60:.0f} min",
        ],
        ["`mm verify`, four threads", f"{ten['verify'] / 60:.0f} min"],
    ]
    steps_of_cards = [
        (
            cards.name,
            f"{cards.tokens:,}",
            f"{1e3 * figures['compute']:.1f} ms",
            f"{1e3 * figures['sum']:.1f} ms",
            f"{100 * figures['one sum']:.1f} %",
            f"{100 * figures['mm']:.1f} %",
        )
        for cards in CARDS
        if (figures := training(cards))
    ]
    return {
        "packing": table(["step", *columns], rows),
        "parts": table(["part", "parts", "parts.jsonl", "driver's memory", "a worker's memory", "all"], sizes),
        "alone": table(["by one process, not in the sum", "10 TB"], alone),
        "training": table(
            ["cards", "tokens a card", "forward and backward", "sum", "waits, one sum", "waits, mm"], steps_of_cards
        ),
    }


# --- measuring


def cpu_s() -> float:
    """CPU seconds of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(root: Path, num_parts: int, workers: int) -> dict[str, float]:
    """Pack `num_parts` rows, each a part, and return the CPU milliseconds of each step a part."""
    rows, out, found = root / "rows.jsonl", root / "out", {}
    rows.write_text("".join(json.dumps({"text": f"row {i} of a few words"}) + "\n" for i in range(num_parts)))
    train_bpe(
        ["row of a few words"], vocab_size=270, control_tokens=CONTROL, chat_template=CHATML, out_dir=root / "tokenizer"
    )
    options: dict[str, Any] = {"tokenizer": root / "tokenizer", "max_len": 64, "part_bytes": 1, "workers": workers}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        begun, wall = cpu_s(), time.monotonic()
        result = run()
        found[name] = 1000 * (cpu_s() - begun) / num_parts
        found[f"{name} (wall)"] = 1000 * (time.monotonic() - wall) / num_parts
        return result

    timed("pack --shard 1/1", lambda: pack([rows], out, PackOptions(shard="1/1", **options)))
    timed("pack --finish", lambda: pack([rows], out, PackOptions(finish=True, **options)))
    timed("pack, up to date", lambda: pack([rows], out, PackOptions(**options)))
    assert timed("verify", lambda: verify(out)) == []
    dataset = timed("open again", lambda: open_dataset(out))
    loader = timed("loader", lambda: make_loader([dataset], batch_tokens=4096, seed=0))
    timed("first batch", lambda: loader.batch(0))
    return found


def constants(path: Path, tokenizer: Path, root: Path) -> dict[str, float]:
    """The constants of `Measured` that one process can measure, of one input file."""
    import msgspec

    from mmdata.errors import DatasetError
    from mmdata.io.files import sha256_of
    from mmdata.io.records import decode_record
    from mmdata.pack import inputs, pipeline
    from mmdata.pack.part import PartPacker, PartResult, PartSettings
    from mmdata.pack.summary import Summary, part_record

    def timed(run: Callable[[], Any]) -> tuple[float, Any]:
        begun = time.process_time()
        result = run()
        return time.process_time() - begun, result

    size, ignore = path.stat().st_size, lambda *_: None
    options = PackOptions(tokenizer=tokenizer, max_len=1024, part_bytes=4 * MIB)
    found = {"start_s": time.process_time()}
    with path.open("rb") as file:
        found["cut, GB/s"] = size / GB / timed(lambda: inputs.scan(file, 32 * MIB))[0]
    found["hash, GB/s"] = size / GB / timed(lambda: sha256_of(path))[0]
    for part_bytes in (4 * MIB, 16 * MIB):
        options = replace(options, part_bytes=part_bytes)
        arguments = pipeline.arguments_of(options)
        job = pipeline._plan_job([path], root / str(part_bytes), options, arguments, ignore, ignore, ignore)
        start_s, packer = timed(lambda job=job: PartPacker(PartSettings(job.out, tokenizer, job.header)))
        runs = [timed(lambda part=part, packer=packer: packer(part, ignore)) for part in job.parts]
        found |= {"start_s": found["start_s"] + start_s} if part_bytes == 4 * MIB else {}
        found["pack, MB/s"] = sum(part.num_bytes for part in job.parts[1:]) / MB / sum(spent for spent, _ in runs[1:])
        found[f"memory of a worker, parts of {part_bytes / MIB:.0f} MiB, MB"] = peak_mb()
    results: list[PartResult] = [result for _, result in runs]
    files = [file.bytes for result in results for file in result.all_files]
    found |= {"out": sum(files) / size, "files": len(files) / len(results)}
    dataset = pack([path], root / "whole", replace(options, part_bytes=32 * MIB)).out
    num_bytes = sum(file.stat().st_size for file in dataset.rglob("*.arrow"))
    found["verify, GB/s"] = num_bytes / GB / timed(lambda: verify(dataset))[0]
    (dataset / VERIFIED_NAME).unlink()
    found["open, GB/s"] = num_bytes / GB / timed(lambda: open_dataset(dataset))[0]
    content = msgspec.json.encode(results[0])
    spent, many = timed(lambda: [decode_record(content, PartResult, "", DatasetError, "") for _ in range(1000)])
    for number, result in enumerate(many):
        result.number = number
        result.shards = [msgspec.structs.replace(shard, part=number) for shard in result.shards]
    tracemalloc.start()
    summary = Summary(job.header)
    for result in many:
        summary.add(result)
    found["result, kB"] = tracemalloc.get_traced_memory()[0] / 1e6
    tracemalloc.stop()

    def summarize() -> int:
        again = Summary(job.header)
        for result in many:
            again.add(result)
        again.stats(), again.manifest([])
        return sum(len(msgspec.json.encode(part_record(result))) + 1 for result in many)

    spent_again, lines = timed(summarize)
    return found | {"record, ms": spent + spent_again, "parts.jsonl, kB": lines / 1e6}


def peak_mb() -> float:
    """The most memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("model")
    for name in ("parts", "constants"):
        command = commands.add_parser(name)
        command.add_argument("--dir", type=Path)
        if name == "parts":
            command.add_argument("parts", type=int, nargs="+")
            command.add_argument("--workers", type=int, default=1)
        else:
            command.add_argument("file", type=Path)
            command.add_argument("--tokenizer", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "model":
        print("\n\n".join(f"{name}\n\n{text}" for name, text in tables().items()))
    elif args.command == "constants":
        with tempfile.TemporaryDirectory(dir=args.dir) as directory:
            for name, value in constants(args.file, args.tokenizer, Path(directory)).items():
                print(f"{name:<45} {value:,.3f}")
    else:
        print_parts(args.parts, args.dir, args.workers)


def print_parts(counts: Sequence[int], directory: Path | None, workers: int) -> None:
    """Print a table with a column for each number of parts."""
    columns = {}
    for num_parts in counts:
        root = Path(tempfile.mkdtemp(dir=directory))
        try:
            columns[num_parts] = measure(root, num_parts, workers)
        finally:
            shutil.rmtree(root)
        columns[num_parts]["memory at its highest, MB"] = peak_mb()
    print(f"{'CPU ms a part':<28}", *(f"{number:>10,}" for number in columns))
    for name in next(iter(columns.values())):
        print(f"{name:<28}", *(f"{column[name]:>10.3f}" for column in columns.values()))


if __name__ == "__main__":
    main()
