"""Metrics of a training run: a line per step and validation in RUN/metrics.jsonl, on the first rank; some are
printed."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import torch

from mmtrain.log import history
from mmtrain.log.console import Console, bar, duration

Figures = Mapping[str, float | None]
LINE_S = 15.0  # seconds after which a step is printed although it is no multiple of --log-every


class MetricsLog:
    """Writes the figures of every step and validation to RUN/metrics.jsonl, and prints every `log_every`-th step, each
    step LINE_S seconds after the last line, and every validation. Records of steps after `first_step` are removed
    first. run_dir: None writes no file. console: prints the lines. num_steps: length of the run. first_step: steps done
    before this session. also: called with every record that is written."""

    def __init__(
        self,
        run_dir: Path | None,
        *,
        num_steps: int,
        first_step: int,
        log_every: int,
        console: Console,
        also: Callable[[Figures], None] | None = None,
    ):
        self.console, self._log_every, self._num_steps = console, log_every, num_steps
        self._first_step = first_step
        self._also = also
        self._file = None
        if run_dir is not None:
            history.cut_after(run_dir / history.METRICS, first_step)
            self._file = (run_dir / history.METRICS).open("a", encoding="utf-8")
        self._started = self._printed = time.monotonic()
        self._figures = ""  # of the last step, for the live line

    def start_clock(self) -> None:
        """Set the beginning of the first step to now; the remaining time is estimated from it."""
        self._started = time.monotonic()

    def step(self, record: Mapping[str, float]) -> None:
        """Write a step's figures and the peak memory. Print them if the step is a multiple of `log_every`, the first
        step of this session, or the last one of the run, or if nothing was printed for LINE_S seconds."""
        self._write({**record, "memory_bytes": memory_bytes()})
        step = record["step"]
        self._figures = f" | loss {record['loss']:.3f} | {short(record['tokens_per_s'])} tok/s"
        is_due = time.monotonic() - self._printed >= LINE_S
        if is_due or step % self._log_every == 0 or step in (self._first_step + 1, self._num_steps):
            self._printed = time.monotonic()
            self.console.say(f"step {step}/{self._num_steps} | {step_figures(record)} | eta {self._eta(step)}")

    def within(self, step: int, share: float) -> None:
        """Draw the live line, if any. step: the one being made, from 0. share: how much of it is done, 0 to 1."""

        def text() -> str:
            done = step + share
            place = f"{bar(done / self._num_steps)} step {step + 1}/{self._num_steps} ({100 * share:.0f}%)"
            return f"{place}{self._figures} | eta {self._eta(done)}"

        self.console.live(text)

    def val(self, record: Figures, num_rows: int = 0) -> None:
        """Write and print the figures of a validation, named val_… but for "step". num_rows: rows they rest on."""
        self._write(record)
        self._printed = time.monotonic()
        self.console.say(f"step {record['step']}/{self._num_steps} val | {val_line(record, num_rows)}")
        for line in dataset_lines(record):
            self.console.say(line)

    def close(self) -> None:
        """Close metrics.jsonl, and remove the live line."""
        self.console.close()
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

    def _eta(self, done: float) -> str:
        """Return the remaining time as text, from the mean time of a step in this session."""
        made = done - self._first_step
        return duration((time.monotonic() - self._started) / made * (self._num_steps - done)) if made > 0 else "?"


def step_figures(record: Mapping[str, float]) -> str:
    """Return the figures of a step that are printed, at most 50 characters. The others are in metrics.jsonl."""
    parts = [f"loss {record['loss']:.3f}"]
    if "accuracy" in record:
        margin = "" if record["skipped"] else f" margin {_margin(record['reward_margin'])}"
        parts.append(f"acc {record['accuracy']:.2f}{margin}")
    elif not record["skipped"]:
        parts.append(f"gn {record['grad_norm']:.2f} lr {record['lr']:.1e}")
    parts.append(f"{short(record['tokens_per_s'])} tok/s")
    return " | ".join([*parts, *([f"skipped {record['skipped']}"] if record["skipped"] else [])])


def val_losses(run_dir: Path) -> list[float]:
    """Return the validation losses in a run's metrics.jsonl, if it exists, in order; NaN for one that was not finite."""
    reader = history.MetricsReader(run_dir / history.METRICS)
    reader.update()
    losses = [val["val_loss"] for val in reader.vals if "val_loss" in val]
    return [math.nan if loss is None else loss for loss in losses]


def num_since_best(losses: Sequence[float]) -> int:
    """Return how many losses come after the smallest, the first of equal ones. NaN is never the smallest."""
    best, best_at = math.inf, -1
    for at, loss in enumerate(losses):
        if loss < best:
            best, best_at = loss, at
    return len(losses) - 1 - best_at


def _margin(value: float) -> str:
    """Return a reward margin with its sign, in at most 6 characters below 1,000."""
    return f"{value:+z.3f}" if abs(value) < 10 else f"{value:+.1f}"


def val_line(record: Figures, num_rows: int = 0) -> str:
    """Return the figures of a validation over all datasets that are printed; the others are in metrics.jsonl.
    num_rows: rows that they rest on; 0 is left out."""
    figures = {k.removeprefix("val_"): v for k, v in record.items() if v is not None}
    parts = [f"loss {figures['loss']:.4g}"] if "loss" in figures else []
    if "accuracy" in figures:
        parts.append(f"acc {figures['accuracy']:.2f} margin {_margin(figures['reward_margin'])}")
    elif "bits_per_byte" in figures:
        parts.append(f"bits/byte {figures['bits_per_byte']:.4g}")
    if "guard_loss" in figures:
        parts.append(f"guard {figures['guard_loss']:.3f}")
    unit = "pairs" if "accuracy" in figures else "rows"
    return " ".join(parts) + (f", {num_rows:,} {unit}" if num_rows else "")


def dataset_lines(record: Figures) -> list[str]:
    """Return a line with the val loss of each dataset, if there are several."""
    losses = {name.removeprefix("val_loss/"): loss for name, loss in record.items() if name.startswith("val_loss/")}
    return [f"  {name}: val loss {loss:.4g}" for name, loss in losses.items() if loss is not None]


def memory_bytes() -> int:
    """Return the peak memory so far: that allocated by torch on the CUDA device, else the resident memory of this
    process (where the system keeps no peak, the present one)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        info = psutil.Process().memory_info()
        return getattr(info, "peak_wset", info.rss)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def short(number: float) -> str:
    """Return a number rounded and with a unit of thousands, such as 512, 5.1k or 2.3M."""
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.0f}" if unit == "" else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f}G"
