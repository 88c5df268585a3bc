"""Counters -> a console line per interval and a line per step in metrics.jsonl. Only the first rank writes."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def print_line(text: str) -> None:
    """One line to stderr."""
    print(text, file=sys.stderr, flush=True)


class Log:
    """The story of a run: every step to RUN/metrics.jsonl, a console line every `log_every` steps.

    run_dir None writes no file, say None prints nothing: so it is on all ranks but the first. `also` takes every line
    that is written.
    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        num_steps: int,
        first_step: int,
        log_every: int,
        say: Callable[[str], None] | None,
        also: Callable[[Mapping[str, Any]], None] | None = None,
    ):
        self.say_line, self._log_every, self._num_steps = say, log_every, num_steps
        self._first_step = first_step
        self._also = also
        self._file = None
        if run_dir is not None:
            cut_after(run_dir / "metrics.jsonl", first_step)
            self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._started = time.monotonic()

    def start_clock(self) -> None:
        """The first step begins now: what is still to do is estimated from here."""
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """A line to the console, unless the run is quiet."""
        if self.say_line is not None:
            self.say_line(text)

    def warn(self, text: str) -> None:
        """A line from whichever rank it concerns."""
        (self.say_line or print_line)(text)

    def step(self, record: Mapping[str, Any]) -> None:
        """Write a step's figures; print them at intervals, at the first and at the last step."""
        self._write({**record, "memory_bytes": memory_bytes()})
        done = record["step"]
        if done % self._log_every == 0 or done in (self._first_step + 1, self._num_steps):
            self.say(self._line(record))

    def val(self, record: Mapping[str, Any]) -> None:
        """Write and print held-out figures."""
        self._write(record)
        self.say(f"step {record['step']}/{self._num_steps} val | {val_line(record)}")

    def close(self) -> None:
        """Close metrics.jsonl."""
        if self._file is not None:
            self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._also is not None:
            self._also(finite)

    def _line(self, record: Mapping[str, Any]) -> str:
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
    """The val losses metrics.jsonl holds, in order; none where there is no file."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line).get("val_loss", "") for line in lines]
    return [math.nan if loss is None else loss for loss in found if loss != ""]


def num_since_best(losses: Sequence[float]) -> int:
    """How many of these came after the smallest; one that is not a number is never the smallest."""
    best, best_at = math.inf, -1
    for at, loss in enumerate(losses):
        if loss < best:
            best, best_at = loss, at
    return len(losses) - 1 - best_at


def val_line(record: Mapping[str, Any]) -> str:
    """Held-out figures on one line; of pairs those that show what is learned, and of each of several datasets its loss: the
    others stand in metrics.jsonl."""
    found = {k.removeprefix("val_"): v for k, v in record.items() if k != "step" and v is not None}
    each = [f"{name.removeprefix('loss/')} {value:.4g}" for name, value in found.items() if name.startswith("loss/")]
    of_all = _of_all({name: value for name, value in found.items() if "/" not in name})
    return f"{of_all} | loss of each: {', '.join(each)}" if each else of_all


def _of_all(found: Mapping[str, Any]) -> str:
    """The line without single datasets."""
    if "accuracy" not in found or "loss" not in found:
        return " ".join(f"{name} {value:.4g}" for name, value in found.items())
    names = ("chosen_drift", "rejected_drift", "flipped_right", "flipped_wrong")
    drift = {name: found.get(name, math.nan) for name in names}
    guard = f" | guard {found['guard_loss']:.3f} nats a token" if "guard_loss" in found else ""
    part = _pair_part({**found, **drift})
    return f"loss {found['loss']:.4g} {part} | chosen {found['chosen_nll']:.3f} nats a token{guard}"


def _pair_part(record: Mapping[str, Any]) -> str:
    """Accuracy and margin; where there is a reference, how far both sides have drifted from it and whose order flipped."""
    text = f"acc {record['accuracy']:.2f} margin {record['reward_margin']:+.3f}"
    if not math.isfinite(record["chosen_drift"]):
        return text
    drift = f"drift chosen {record['chosen_drift']:+.2f} rejected {record['rejected_drift']:+.2f}"
    right, wrong = (100 * record[f"flipped_{way}"] for way in ("right", "wrong"))
    return f"{text} {drift} | flipped right {right:.0f}% wrong {wrong:.0f}%"


def cut_after(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl that belong to steps after `step`, and a torn last line; nothing when there is none."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # torn by a kill in the middle of a write
            continue
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def memory_bytes() -> int:
    """The most memory used so far: on the CUDA device where there is one, else by this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def short(number: float) -> str:
    """A number as people say it: 512, 5.1k, 2.3M."""
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.0f}" if unit == "" else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f}G"


def duration(seconds: float) -> str:
    """Seconds as people say them: 9s, 1m07s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
