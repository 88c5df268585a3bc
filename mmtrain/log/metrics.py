"""Metrics of a training run: writes a line per step and validation to RUN/metrics.jsonl, on the first rank only, and
prints some of them. Functions that format numbers and durations are also here."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from mmtrain.log import history

Figures = Mapping[str, float | None]


def print_line(text: str) -> None:
    """Print one line to stderr."""
    print(text, file=sys.stderr, flush=True)


class MetricsLog:
    """Writes the figures of every step and validation to RUN/metrics.jsonl, and prints every `log_every`-th step and
    every validation. Records of steps after `first_step` are removed from the file at the beginning.

    run_dir: None writes no file. say: prints a line; None prints nothing, as on all ranks but the first. num_steps:
    length of the run. first_step: steps done before this session, 0 for a new run. also: called with every record that
    is written.
    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        num_steps: int,
        first_step: int,
        log_every: int,
        say: Callable[[str], None] | None,
        also: Callable[[Figures], None] | None = None,
    ):
        self.say_line, self._log_every, self._num_steps = say, log_every, num_steps
        self._first_step = first_step
        self._also = also
        self._file = None
        if run_dir is not None:
            history.cut_after(run_dir / history.METRICS, first_step)
            self._file = (run_dir / history.METRICS).open("a", encoding="utf-8")
        self._started = time.monotonic()

    def start_clock(self) -> None:
        """Set the beginning of the first step to now; the remaining time is estimated from it."""
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line, unless `say` is None."""
        if self.say_line is not None:
            self.say_line(text)

    def warn(self, text: str) -> None:
        """Print a line on any rank, even if `say` is None."""
        (self.say_line or print_line)(text)

    def step(self, record: Mapping[str, float]) -> None:
        """Write a step's figures and the peak memory. Print them if the step is a multiple of `log_every`, the first
        step of this session, or the last one of the run."""
        self._write({**record, "memory_bytes": memory_bytes()})
        step = record["step"]
        if step % self._log_every == 0 or step in (self._first_step + 1, self._num_steps):
            self.say(self._line(record))

    def val(self, record: Figures) -> None:
        """Write and print the figures of a validation; their names begin with val_, except for "step"."""
        self._write(record)
        self.say(f"step {record['step']}/{self._num_steps} val | {val_line(record)}")

    def close(self) -> None:
        """Close metrics.jsonl."""
        if self._file is not None:
            self._file.close()

    def _write(self, record: Figures) -> None:
        """Write a record to the file, if there is one, and pass it to `also`. Figures that are not finite become None."""
        if self._file is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._also is not None:
            self._also(finite)

    def _line(self, record: Mapping[str, float]) -> str:
        done = record["step"]
        per_step = (time.monotonic() - self._started) / (done - self._first_step)
        parts = [
            f"step {done}/{self._num_steps} {100 * done / self._num_steps:.1f}%",
            f"loss {record['loss']:.3f}",
            f"{short(record['tokens_per_s'])} tok/s",
            f"gn {record['grad_norm']:.2f} lr {record['lr']:.1e}",
            f"{memory_bytes() / 1e9:.1f} GB",
            f"eta {duration(per_step * (self._num_steps - done))}",
        ]
        if "accuracy" in record:
            parts.insert(2, _pair_part(record))
        if record["skipped"]:
            parts.append(f"skipped {record['skipped']}")
        return " | ".join(parts)


def val_losses(run_dir: Path) -> list[float]:
    """Return the validation losses in a run's metrics.jsonl, if it exists, in order; NaN for one that was not finite."""
    records = history.read_records(run_dir / history.METRICS, history.Metrics)
    losses = [record["val_loss"] for record in records if "val_loss" in record]
    return [math.nan if loss is None else loss for loss in losses]


def num_since_best(losses: Sequence[float]) -> int:
    """Return how many losses come after the smallest (the first of equal ones). NaN is never the smallest; if all are
    NaN, all count."""
    best, best_at = math.inf, -1
    for at, loss in enumerate(losses):
        if loss < best:
            best, best_at = loss, at
    return len(losses) - 1 - best_at


def val_line(record: Figures) -> str:
    """Return the figures of a validation as one line: for pairs a selection, for several datasets with the loss of
    each."""
    figures = {k.removeprefix("val_"): v for k, v in record.items() if k != "step" and v is not None}
    losses = [f"{k.removeprefix('loss/')} {v:.4g}" for k, v in figures.items() if k.startswith("loss/")]
    line = _overall({k: v for k, v in figures.items() if "/" not in k})
    return f"{line} | loss of each: {', '.join(losses)}" if losses else line


def _overall(figures: Mapping[str, float]) -> str:
    """Return the part of a validation's line that is about all datasets together."""
    if "accuracy" not in figures or "loss" not in figures:
        return " ".join(f"{name} {value:.4g}" for name, value in figures.items())
    names = ("chosen_drift", "rejected_drift", "flipped_right", "flipped_wrong")
    pairs = _pair_part(dict.fromkeys(names, math.nan) | dict(figures))
    guard = f" | guard {figures['guard_loss']:.3f} nats a token" if "guard_loss" in figures else ""
    return f"loss {figures['loss']:.4g} {pairs} | chosen {figures['chosen_nll']:.3f} nats a token{guard}"


def _pair_part(record: Mapping[str, float]) -> str:
    """Return the part of a line about pairs: accuracy and reward margin; with a reference also the drift of the logps
    from it, the percentage of pairs that the reference ranks wrong and the model right, and that of the reverse."""
    text = f"acc {record['accuracy']:.2f} margin {record['reward_margin']:+.3f}"
    if not math.isfinite(record["chosen_drift"]):
        return text
    drift = f"drift chosen {record['chosen_drift']:+.2f} rejected {record['rejected_drift']:+.2f}"
    right, wrong = (100 * record[f"flipped_{way}"] for way in ("right", "wrong"))
    return f"{text} {drift} | flipped right {right:.0f}% wrong {wrong:.0f}%"


def memory_bytes() -> int:
    """Return the peak memory so far: that allocated by torch on the CUDA device, else the resident memory of this
    process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def short(number: float) -> str:
    """Return a number rounded and with a unit of thousands, such as 512, 5.1k or 2.3M."""
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.0f}" if unit == "" else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f}G"


def duration(seconds: float) -> str:
    """Return a duration as text, such as 9s, 1m07s or 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
