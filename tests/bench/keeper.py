"""What a run spends on telling of itself: `python tests/bench/keeper.py SHARDS [--model demo] [--steps 600] [--val-every 20]`.

Pretrains on a packed dataset in this process, into a directory that is deleted, and prints the seconds inside `Reporter` (events,
samples, reports while it trains) and after the last step (the last samples and report) beside those of the whole run.
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mmtrain.config import TrainOptions
from mmtrain.log.reporter import Reporter
from mmtrain.train import loop, run

spent: Counter[str] = Counter()
calls: Counter[str] = Counter()


class Timed(Reporter):
    """A Reporter whose time is added up, that of the last validation and page apart."""

    is_over = False

    def event(self, *given: Any, **named: Any) -> None:
        begun = time.perf_counter()
        super().event(*given, **named)
        spent["while it trains"] += time.perf_counter() - begun

    def validated(self, *given: Any, is_last: bool, **named: Any) -> None:
        begun = time.perf_counter()
        super().validated(*given, is_last=is_last, **named)
        self.is_over = is_last
        spent["at its end" if is_last else "while it trains"] += time.perf_counter() - begun

    def write(self) -> None:
        begun = time.perf_counter()
        super().write()
        calls["reports"] += 1
        if self.is_over:
            spent["at its end"] += time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--val-every", type=int, default=20)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    options = parser.parse_args()
    run.Reporter = Timed
    with tempfile.TemporaryDirectory() as scratch:
        config = TrainOptions(
            stage="pretrain",
            data=(options.shards,),
            out=Path(scratch) / "run",
            model=options.model,
            steps=options.steps,
            val_every=options.val_every,
            batch_tokens=options.batch_tokens,
        )
        begun = time.perf_counter()
        loop.train(config)
        whole = time.perf_counter() - begun
    print(
        f"{options.model}, {options.steps} steps in {whole:.1f} s, validated every {options.val_every}: "
        f"{calls['reports']} reports; " + ", ".join(f"{what} {s:.2f} s ({s / whole:.2%})" for what, s in spent.items())
    )


if __name__ == "__main__":
    main()
