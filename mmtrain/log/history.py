"""Figures of runs, finished or still training, read from their files: for the HTML report, `mm report --json` and the terminal.

Reads run.json, metrics.jsonl, samples.jsonl and events.jsonl. Does not import torch, so `mm report` starts fast. The
curves of a long run are averaged to POINTS points.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mmdata.errors import CheckpointError
from mmdata.io import files
from mmdata.io.records import Record, convert_record, plain
from mmtrain.records import RUN, RunRecord, read_run

METRICS, SAMPLES, EVENTS = "metrics.jsonl", "samples.jsonl", "events.jsonl"
POINTS = 400
PAIR_FIGURES = ("accuracy", "reward_margin", "chosen_drift", "rejected_drift", "chosen_logps", "rejected_logps")
STEP_FIGURES = ("loss", "lr", "grad_norm", *PAIR_FIGURES)

Metrics = dict[str, int | float | None]  # a line of metrics.jsonl: figures of a step or, named val_…, of a validation
RunFigures = dict[str, Any]  # one run in `mm report --json`; see `run_figures`


class Event(msgspec.Struct):
    """A line of events.jsonl: something that happened besides a step, such as a save."""

    step: int
    event: str
    note: str = ""


class Sample(msgspec.Struct):
    """A line of samples.jsonl: what the model wrote for a prompt after a step."""

    step: int
    prompt: str
    text: str


class _Step(msgspec.Struct):
    step: int


# --- jsonl files of a run


def read_records(path: Path, kind: type[Record]) -> list[Record]:
    """The records of a jsonl file; none when it is missing. Lines that do not fit, such as one cut short, are skipped."""
    return _records(path.read_bytes().splitlines(), kind) if path.exists() else []


def _records(lines: Iterable[bytes], kind: type[Record]) -> list[Record]:
    records = []
    for line in lines:
        try:
            value = json.loads(line)
            convert_record(value, _Step)
            records.append(convert_record(value, kind))
        except (ValueError, msgspec.ValidationError):
            continue
    return records


def append(path: Path, records: Iterable[Event | Sample]) -> None:
    """Append records to a jsonl file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(plain(record), ensure_ascii=False) + "\n" for record in records)


def cut_after(path: Path, step: int) -> None:
    """Remove the records after `step` from a jsonl file, which a resumed run writes again, and lines that are no record."""
    if path.exists():
        lines = path.read_bytes().splitlines()  # of bytes: a text may hold U+2028
        kept = [line + b"\n" for line in lines if any(one.step <= step for one in _records([line], _Step))]
        files.write_bytes(path, b"".join(kept))


@dataclass(slots=True)
class MetricsReader:
    """The lines of metrics.jsonl read so far, those of steps and of validations. `update` reads what was added."""

    path: Path
    steps: list[Metrics] = field(default_factory=list)
    vals: list[Metrics] = field(default_factory=list)
    _offset: int = 0
    _last: bytes = b""  # line read

    def update(self) -> None:
        """Read the complete lines added since; the whole file again when a resumed run has cut it in between."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset - len(self._last))
            if file.read(len(self._last)) != self._last:
                self.steps, self.vals, self._offset, self._last = [], [], 0, b""
                file.seek(0)
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        lines = complete.splitlines(keepends=True)
        self._last = lines[-1] if lines else self._last
        for record in _records(lines, Metrics):
            if "loss" in record:
                self.steps.append(record)
            elif any(name.startswith("val_") for name in record):
                self.vals.append(record)


# --- one run


def run_figures(run_dir: Path, *, metrics: MetricsReader | None = None, until: int | None = None) -> RunFigures:
    """Figures of one run, counted from its own beginning; with `until` only those up to that step.

    `curves` has a list of points for each name, among them the axes step, tokens and hours; `vals`, `events` and `samples`
    are records with their place on the axes. CheckpointError without a readable run.json.
    """
    run = read_run(run_dir)
    metrics = metrics or MetricsReader(run_dir / METRICS)
    metrics.update()
    limit = math.inf if until is None else until
    steps = [record for record in metrics.steps if _step(record) <= limit]
    vals = [record for record in metrics.vals if _step(record) <= limit]
    tokens, trained, seconds = _column(steps, "tokens"), _column(steps, "trained_tokens"), _seconds(steps)
    numbers = [_step(record) for record in steps]
    before = {"tokens": _running_sums(tokens), "hours": _running_sums(seconds / 3600)}

    def place(step: int) -> dict[str, float]:
        done = bisect_right(numbers, step)  # steps logged by then: an event may be recorded before its own step
        return {"step": step, "tokens": before["tokens"][done], "hours": before["hours"][done]}

    return {
        "name": run_dir.resolve().name,
        "dir": str(run_dir),
        "stage": run.stage,
        "status": run.status,
        "started": run.started,
        "ended": run.ended or None,
        "device": run.device_name or run.device or "?",
        "precision": run.precision or "?",
        "world_size": run.world_size or 1,
        "params": run.num_params,
        "num_steps": run.num_steps,
        "step": numbers[-1] if steps else 0,
        "tokens": int(np.nansum(tokens)),
        "trained_tokens": int(np.nansum(trained)),
        "hours": float(np.nansum(seconds) / 3600),
        "skipped": int(steps[-1].get("skipped") or 0) if steps else 0,
        "last": _last(steps, vals),
        "settings": plain(run.settings),
        "model": plain(run.model) or {},
        "data": plain(run.data),
        "init": plain(run.init),
        "versions": run.versions or {},
        "curves": _curves(steps, run) if steps else {},
        "vals": [{**place(_step(val)), **{k: v for k, v in val.items() if k != "step"}} for val in _thinned(vals)],
        "events": [plain(event) | place(event.step) for event in _events(run_dir, run, steps, limit)],
        "samples": [plain(one) for one in read_records(run_dir / SAMPLES, Sample) if one.step <= limit],
    }


def _step(record: Metrics) -> int:
    return int(record["step"] or 0)


def _thinned(vals: list[Metrics]) -> list[Metrics]:
    """At most POINTS validations, evenly spaced, the last one included."""
    if len(vals) <= POINTS:
        return vals
    return [vals[i] for i in np.linspace(0, len(vals) - 1, POINTS).astype(int)]


def _column(steps: Sequence[Metrics], name: str) -> np.ndarray:
    """float64 [steps]; NaN where a figure is missing or was not finite."""
    return np.array([math.nan if (v := step.get(name)) is None else v for step in steps], np.float64)


def _seconds(steps: Sequence[Metrics]) -> np.ndarray:
    """Duration of each step: its tokens divided by its tokens per second."""
    rate = _column(steps, "tokens_per_s")
    return np.where(rate > 0, _column(steps, "tokens") / np.where(rate > 0, rate, 1), 0.0)


def _running_sums(values: np.ndarray) -> list[float]:
    """Sum of the first n values, for n from 0 to all of them."""
    return [0.0, *np.cumsum(np.nan_to_num(values)).tolist()]


def _curves(steps: Sequence[Metrics], run: RunRecord) -> dict[str, list[float | None]]:
    """Curves of at most POINTS points: means over equal numbers of steps; step, tokens and hours at the end of each."""
    tokens, trained, seconds = _column(steps, "tokens"), _column(steps, "trained_tokens"), _seconds(steps)
    columns = {name: _column(steps, name) for name in STEP_FIGURES if any(name in step for step in steps)}
    columns["tokens_per_s"] = _column(steps, "tokens_per_s")
    nonzero = np.where(seconds > 0, seconds, math.nan)
    columns["trained_per_s"] = trained / nonzero
    if run.fill:
        columns["padded_per_s"] = columns["tokens_per_s"] / run.fill
    flops = _flops(run, tokens, trained)
    columns["gflops"] = flops / nonzero / 1e9
    if run.matmul_flops:
        columns["mfu"] = flops / nonzero / (run.matmul_flops * (run.world_size or 1))
    if any("memory_bytes" in step for step in steps):
        columns["memory_gb"] = _column(steps, "memory_bytes") / 1e9
    edges = np.unique(np.linspace(0, len(steps), min(len(steps), POINTS) + 1).astype(int))
    curves = {name: _rounded(_means(values, edges)) for name, values in columns.items()}
    axes = {
        "step": _column(steps, "step"),
        "tokens": np.cumsum(np.nan_to_num(tokens)),
        "hours": np.cumsum(np.nan_to_num(seconds)) / 3600,
    }
    curves |= {name: _rounded(values[edges[1:] - 1]) for name, values in axes.items()}
    if len(edges) - 1 < len(steps):
        loss, begins = columns["loss"], edges[:-1]
        low = np.minimum.reduceat(np.nan_to_num(loss, nan=math.inf), begins)
        high = np.maximum.reduceat(np.nan_to_num(loss, nan=-math.inf), begins)
        curves |= {"loss_low": _rounded(low), "loss_high": _rounded(high)}
    return curves


def _flops(run: RunRecord, tokens: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Floating-point operations of each step: 6 per weight and token (2 forward, 4 backward), the output matrix on
    trained tokens only, as this trainer does. Without attention's own products: under a tenth at these lengths."""
    head = run.model.vocab_size * run.model.hidden_size if run.model else 0
    return 6.0 * (max(run.num_params - head, 0) * tokens + head * trained)


def _means(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean between each two edges, of the values that are not NaN."""
    is_number = ~np.isnan(values)
    sums = np.add.reduceat(np.where(is_number, values, 0), edges[:-1])
    counts = np.add.reduceat(is_number.astype(float), edges[:-1])
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


def _rounded(values: np.ndarray) -> list[float | None]:
    """Six significant digits; None for what is not finite."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values.tolist()]


def _last(steps: Sequence[Metrics], vals: Sequence[Metrics]) -> dict[str, float | None]:
    """The newest figures: mean loss of the last tenth of the steps, preference figures, last and best validation."""
    last: dict[str, float | None] = {}
    if steps:
        losses = _column(steps[-max(1, len(steps) // 10) :], "loss")
        finite = losses[np.isfinite(losses)]
        last["loss"] = float(finite.mean()) if len(finite) else None
        last |= {name: steps[-1][name] for name in PAIR_FIGURES if name in steps[-1]}
    if vals:
        last |= {name: value for name, value in vals[-1].items() if name.startswith("val_")}
        losses = [(loss, _step(val)) for val in vals if (loss := val.get("val_loss")) is not None]
        if losses:
            last["best_val_loss"], last["best_val_step"] = min(losses, key=lambda pair: pair[0])
    return last


def _events(run_dir: Path, run: RunRecord, steps: Sequence[Metrics], limit: float) -> list[Event]:
    """Recorded events, resumptions and skipped steps in the order of their steps, each once."""
    events = read_records(run_dir / EVENTS, Event)
    events += [Event(one.step, "resume", f"{one.device}, world size {one.world_size}") for one in run.resumed or ()]
    before: float = 0
    for step in steps:
        count = step.get("skipped") or 0
        if count > before:
            events.append(Event(_step(step), "skip"))
        before = count
    unique = {(event.step, event.event): event for event in events if event.step <= limit}
    return [unique[key] for key in sorted(unique)]


# --- chains of runs


class RunReader:
    """Figures of runs, computed anew only when a file of the run has changed, by its time and size."""

    def __init__(self) -> None:
        self._metrics: dict[Path, MetricsReader] = {}
        self._figures: dict[tuple[Path, int | None], tuple[Any, RunFigures]] = {}

    def run(self, run_dir: Path, until: int | None = None) -> RunFigures:
        """A copy of `run_figures`, which the caller may add to."""
        key = run_dir.resolve(), until
        state = [_state(run_dir / name) for name in (RUN, METRICS, SAMPLES, EVENTS)]
        if key not in self._figures or self._figures[key][0] != state:
            metrics = self._metrics.setdefault(key[0], MetricsReader(run_dir / METRICS))
            self._figures[key] = state, run_figures(run_dir, metrics=metrics, until=until)
        return self._figures[key][1].copy()


def _state(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_size


def chain(run_dir: Path, reader: RunReader | None = None) -> list[RunFigures]:
    """A run and the runs it was started from, oldest first. `offset` of each: steps, tokens and hours of those before it.

    The chain ends at a run that no longer exists; `missing` of the run started from it names it.
    """
    reader = reader or RunReader()
    run = reader.run(run_dir)
    runs, visited = [run], {run_dir.resolve()}
    while True:
        parent, step = _parent(Path(run["dir"]), run["init"])
        if parent is None or parent.resolve() in visited:
            break
        visited.add(parent.resolve())
        try:
            run = reader.run(parent, until=step)
        except CheckpointError:
            run["missing"] = str(parent)
            break
        runs.insert(0, run)
    offset = {"step": 0, "tokens": 0, "hours": 0.0}
    for run in runs:
        run["offset"] = offset
        offset = {name: value + run[name] for name, value in offset.items()}
    return runs


def _parent(run_dir: Path, init: Mapping[str, Any] | None) -> tuple[Path | None, int | None]:
    """The run that an init checkpoint belongs to, at its recorded place or beside this run, and the checkpoint's step."""
    if not init or not init.get("dir"):
        return None, None
    path = Path(init["dir"])
    number = path.name.removeprefix("step-")
    step = int(number) if number.isdigit() else None
    parent = path.parent.parent if path.parent.name == "checkpoints" else path
    beside = run_dir.resolve().parent / parent.name
    return (parent if (parent / RUN).exists() or not (beside / RUN).exists() else beside), step


def figures(run_dirs: Sequence[Path], reader: RunReader | None = None) -> dict[str, list[list[RunFigures]]]:
    """{"chains": [[run, …], …]}: the chain of each run, except runs that belong to the chain of another one."""
    reader = reader or RunReader()
    chains: dict[Path, list[RunFigures]] = {}
    for run_dir in run_dirs:
        chains.setdefault(run_dir.resolve(), chain(run_dir, reader))
    ancestors = {Path(run["dir"]).resolve() for runs in chains.values() for run in runs[:-1]}
    return {"chains": [runs for run_dir, runs in chains.items() if run_dir not in ancestors]}
