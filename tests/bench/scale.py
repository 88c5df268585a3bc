"""What a part costs, at 10^2, 10^3, … tiny parts: packing, --finish (check and publish), verifying, opening, the first batch.

    PYTHONPATH=. python tests/bench/scale.py 100 1000 10000 [--dir /dev/shm]

Prints CPU milliseconds a part (children included), the files of the dataset, and the most memory the process took.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack
from mmdata.shards.dataset import open_dataset
from mmdata.shards.pairs import make_loader
from mmdata.shards.verify import verify
from mmdata.tokenizer.tokenizer import CHATML, train_bpe

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


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


def main() -> None:
    """Print a table with a column for each number of parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", type=int, nargs="+")
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    columns = {}
    for num_parts in args.parts:
        root = Path(tempfile.mkdtemp(dir=args.dir))
        try:
            columns[num_parts] = measure(root, num_parts, args.workers)
        finally:
            shutil.rmtree(root)
        columns[num_parts]["memory at its highest, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(f"{'CPU ms a part':<28}", *(f"{number:>10,}" for number in columns))
    for name in next(iter(columns.values())):
        print(f"{name:<28}", *(f"{column[name]:>10.3f}" for column in columns.values()))


if __name__ == "__main__":
    main()
