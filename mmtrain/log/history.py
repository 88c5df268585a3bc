"""Reads the figures of runs (metrics, settings, events, samples), finished or still training, for the HTML report, `mm
report --json` and the terminal.

The files are run.json, metrics.jsonl, samples.jsonl and events.jsonl. Does not import torch, so that `mm report` starts
fast. The curves of a long run are averaged to POINTS points.
"""

import errno
import json
import math
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import numpy as np

from mmdata.errors import CheckpointError
from mmdata.io import files
from mmdata.io.records import Record, convert_record, plain
from mmtrain.log.flops import attention_flops, peak_flops, weight_flops
from mmtrain.records import RUN, RunRecord, read_run

METRICS, SAMPLES, EVENTS = "metrics.jsonl", "samples.jsonl", "events.jsonl"
POINTS = 400  # the most points of a curve
MAX_LINE_BYTES = 2**20  # of a jsonl file that may have any number of lines
MAX_FIGURE = 1e30  # a figure of metrics.jsonl beyond it, or NaN, counts as not finite
PAIR_FIGURES = ("accuracy", "reward_margin", "chosen_drift", "rejected_drift", "chosen_logps", "rejected_logps")
STEP_FIGURES = ("loss", "lr", "grad_norm", *PAIR_FIGURES)
COLUMNS = frozenset(("step", "tokens", "trained_tokens", "tokens_per_s", "skipped", "memory_bytes", *STEP_FIGURES))

Metrics = dict[str, int | float | None]  # a line of metrics.jsonl: figures of a step or of a validation (named val_…)
RunFigures = dict[str, Any]  # one run in `mm report --json`; see `run_figures`


class Event(msgspec.Struct):
    """A line of events.jsonl: something other than a training step, such as saving a checkpoint."""

    step: int
    event: str
    note: str = ""


class Sample(msgspec.Struct):
    """A line of samples.jsonl: the text that the model generated for a prompt after a step."""

    step: int
    prompt: str
    text: str


class _Step(msgspec.Struct):
    """The part that all records of a run's jsonl files have in common."""

    step: Annotated[int, msgspec.Meta(ge=0, le=2**53)]


# --- jsonl files of a run


def read_records(path: Path, kind: type[Record]) -> list[Record]:
    """Read the records of type `kind` from a jsonl file; none if the file does not exist. Lines that cannot be read as
    `kind`, such as a last line that is cut short, are skipped."""
    return list(_records(files.read_bytes(path).splitlines(), kind)) if path.exists() else []


def sample_prompts(path: Path) -> list[str]:
    """Return the different prompts of the sample answers of a run, given by its directory or a checkpoint's."""
    directory = next((each for each in (path, path.parent.parent) if (each / SAMPLES).exists()), path)
    return list(dict.fromkeys(sample.prompt for sample in read_records(directory / SAMPLES, Sample)))


def _records(lines: Iterable[bytes], kind: type[Record]) -> Iterator[Record]:
    """Yield the records of type `kind` in lines of JSON; lines that are none or have no step are skipped."""
    for line in lines:
        try:
            value = json.loads(line)
            convert_record(value, _Step)
            record = convert_record(value, kind)
        except (ValueError, RecursionError, msgspec.ValidationError):
            continue
        yield record


def append(path: Path, records: Iterable[Event | Sample]) -> None:
    """Append records to a jsonl file, which is created if it does not exist."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(plain(record), ensure_ascii=False) + "\n" for record in records)


def cut_after(path: Path, step: int) -> None:
    """Remove from a jsonl file, if it exists, the records of steps after `step`, which a resumed run will write again,
    and lines that cannot be read."""
    if path.exists():
        files.check_regular(path)
        with files.atomic_path(path) as partial, path.open("rb") as file, partial.open("wb") as kept:
            for line in _lines(file):
                if any(one.step <= step for one in _records([line], _Step)):
                    kept.write(line.removesuffix(b"\n") + b"\n")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file that may be of any size. Raises OSError for a line of more than MAX_LINE_BYTES."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise OSError(errno.EFBIG, f"has a line of more than {MAX_LINE_BYTES:,} bytes", str(file.name))
        yield line


@dataclass(slots=True)
class StepTable:
    """The figures COLUMNS of logged steps as columns of float64, 8 bytes each, in the order of the steps."""

    columns: dict[str, "array[float]"] = field(default_factory=dict)
    num_steps: int = 0

    def append(self, record: Metrics) -> None:
        for name in (COLUMNS & record.keys()) - self.columns.keys():
            self.columns[name] = array("d", [math.nan]) * self.num_steps
        for name, column in self.columns.items():
            value = record.get(name)
            column.append(math.nan if value is None else value)
        self.num_steps += 1

    def column(self, name: str) -> np.ndarray:
        """Return the values of one figure, float64 [num_steps]; NaN if it is missing or was not finite."""
        return np.array(self.columns.get(name, [math.nan] * self.num_steps), np.float64)

    def until(self, step: float) -> "StepTable":
        """Return the part up to a step."""
        number = bisect_right(self.columns.get("step", []), step)
        return StepTable({name: column[:number] for name, column in self.columns.items()}, number)


@dataclass(slots=True)
class MetricsReader:
    """Reads a metrics.jsonl that may still grow. steps, vals: the steps and validations read so far."""

    path: Path
    steps: StepTable = field(default_factory=StepTable)
    vals: list[Metrics] = field(default_factory=list)
    _offset: int = 0  # bytes read so far
    _last: bytes = b""  # the line read last

    def update(self) -> None:
        """Read the complete lines appended since the last call, if the file exists; read it from the beginning if the
        line read last is no longer at its place, because a resumed run has cut the file."""
        if not self.path.exists():
            return
        files.check_regular(self.path)
        with self.path.open("rb") as file:
            file.seek(self._offset - len(self._last))
            if file.read(len(self._last)) != self._last:
                self.steps, self.vals, self._offset, self._last = StepTable(), [], 0, b""
                file.seek(0)
            for record in _records(self._complete_lines(file), Metrics):
                figures = {
                    sys.intern(name): value if value is not None and abs(value) <= MAX_FIGURE else None
                    for name, value in record.items()
                }
                if "loss" in figures:
                    self.steps.append(figures)
                elif any(name.startswith("val_") for name in figures):
                    self.vals.append(figures)

    def _complete_lines(self, file: BinaryIO) -> Iterator[bytes]:
        for line in _lines(file):
            if not line.endswith(b"\n"):
                return
            self._offset += len(line)
            self._last = line
            yield line


# --- one run


def run_figures(run_dir: Path, *, metrics: MetricsReader | None = None, until: int | None = None) -> RunFigures:
    """Return the figures of one run, without the runs it was started from, as a dict for JSON. In `curves` each name
    has a list of values, among them the axes step, tokens and hours; the records in `vals` and `events` also have the
    tokens and hours up to their step. until: only figures up to this step. metrics: a reader of the run's metrics.jsonl
    that may have read a part of it. Raise CheckpointError if run.json is missing or unreadable."""
    run = read_run(run_dir)
    metrics = metrics or MetricsReader(run_dir / METRICS)
    metrics.update()
    limit = math.inf if until is None else until
    steps = metrics.steps.until(limit)
    vals = [record for record in metrics.vals if _step(record) <= limit]
    tokens, trained, seconds = steps.column("tokens"), steps.column("trained_tokens"), _seconds(steps)
    numbers, skipped = steps.column("step"), np.nan_to_num(steps.column("skipped"))
    before = {"tokens": _running_sums(tokens), "hours": _running_sums(seconds / 3600)}

    def place(step: int) -> dict[str, float]:
        # Number of steps logged up to `step`. An event may be recorded before the line of its own step.
        done = bisect_right(steps.columns.get("step", []), step)
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
        "step": int(numbers[-1]) if steps.num_steps else 0,
        "tokens": int(np.nansum(tokens)),
        "trained_tokens": int(np.nansum(trained)),
        "hours": float(np.nansum(seconds) / 3600),
        "skipped": int(skipped[-1]) if steps.num_steps else 0,
        "last": _last(steps, vals),
        "settings": plain(run.settings),
        "model": plain(run.model) or {},
        "data": plain(run.data),
        "init": plain(run.init),
        "versions": run.versions or {},
        "curves": _curves(steps, run) if steps.num_steps else {},
        "vals": [{**place(_step(val)), **{k: v for k, v in val.items() if k != "step"}} for val in _thinned(vals)],
        "events": [
            plain(event) | place(event.step)
            for event in _events(run_dir, run, numbers[np.diff(skipped, prepend=0) > 0], limit)
        ],
        "samples": [plain(one) for one in read_records(run_dir / SAMPLES, Sample) if one.step <= limit],
    }


def _step(record: Metrics) -> int:
    return int(record["step"] or 0)


def _thinned(vals: list[Metrics]) -> list[Metrics]:
    if len(vals) <= POINTS:
        return vals
    return [vals[i] for i in np.linspace(0, len(vals) - 1, POINTS).astype(int)]


def _seconds(steps: StepTable) -> np.ndarray:
    """Return the seconds that each step took, from its tokens and tokens per second; 0 if the rate is unknown."""
    rate = steps.column("tokens_per_s")
    is_known = rate > 1e-9
    return np.where(is_known, steps.column("tokens") / np.where(is_known, rate, 1), 0.0)


def _running_sums(values: np.ndarray) -> list[float]:
    """Return the sums of the first n values, for n from 0 to the number of values. NaN counts as 0."""
    return [0.0, *np.cumsum(np.nan_to_num(values)).tolist()]


def _curves(steps: StepTable, run: RunRecord) -> dict[str, list[float | None]]:
    """Return the curves of a run by name, each with at most POINTS points. More steps are divided into stretches of
    nearly equal length, of which a point is the mean, or on the axes step, tokens and hours the last value; loss_low
    and loss_high then are the lowest and the highest loss in each stretch."""
    tokens, trained, seconds = steps.column("tokens"), steps.column("trained_tokens"), _seconds(steps)
    columns = {name: steps.column(name) for name in STEP_FIGURES if name in steps.columns}
    columns["tokens_per_s"] = steps.column("tokens_per_s")
    nonzero = np.where(seconds > 0, seconds, math.nan)
    columns["trained_per_s"] = trained / nonzero
    if run.fill:
        columns["padded_per_s"] = columns["tokens_per_s"] / run.fill
    flops = weight_flops(run.model, run.num_params, tokens, trained) / nonzero
    columns["gflops"] = flops / 1e9
    num_ranks = run.world_size or 1
    if run.matmul_flops:
        columns["mfu"] = flops / (run.matmul_flops * num_ranks)
    if peak := peak_flops(run.device_name or "", run.precision or ""):
        columns["mfu_peak"] = flops / (peak * num_ranks)
        if run.model and run.sequence_length:
            attention = attention_flops(run.model, run.sequence_length) * tokens / nonzero
            columns["mfu_attention"] = (flops + attention) / (peak * num_ranks)
    if "memory_bytes" in steps.columns:
        columns["memory_gb"] = steps.column("memory_bytes") / 1e9
    edges = np.unique(np.linspace(0, steps.num_steps, min(steps.num_steps, POINTS) + 1).astype(int))
    curves = {name: _rounded(_means(values, edges)) for name, values in columns.items()}
    axes = {
        "step": steps.column("step"),
        "tokens": np.cumsum(np.nan_to_num(tokens)),
        "hours": np.cumsum(np.nan_to_num(seconds)) / 3600,
    }
    curves |= {name: _rounded(values[edges[1:] - 1]) for name, values in axes.items()}
    if len(edges) - 1 < steps.num_steps:
        loss, begins = columns["loss"], edges[:-1]
        low = np.minimum.reduceat(np.nan_to_num(loss, nan=math.inf), begins)
        high = np.maximum.reduceat(np.nan_to_num(loss, nan=-math.inf), begins)
        curves |= {"loss_low": _rounded(low), "loss_high": _rounded(high)}
    return curves


def _means(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the mean of the values from each of `edges` to the next, [len(edges) - 1], without NaN; NaN if none is
    left."""
    is_number = ~np.isnan(values)
    sums = np.add.reduceat(np.where(is_number, values, 0), edges[:-1])
    counts = np.add.reduceat(is_number.astype(float), edges[:-1])
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


def _rounded(values: np.ndarray) -> list[float | None]:
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values.tolist()]


def _last(steps: StepTable, vals: Sequence[Metrics]) -> dict[str, float | None]:
    """Return the newest figures by name: the last step's loss and PAIR_FIGURES, all figures of the last validation, and
    best_val_loss with its step best_val_step, as far as the run has them."""
    last: dict[str, float | None] = {}
    if steps.num_steps:
        newest = {name: steps.columns[name][-1] for name in ("loss", *PAIR_FIGURES) if name in steps.columns}
        last |= {name: None if math.isnan(value) else value for name, value in newest.items()}
    if vals:
        last |= {name: value for name, value in vals[-1].items() if name.startswith("val_")}
        losses = [(loss, _step(val)) for val in vals if (loss := val.get("val_loss")) is not None]
        if losses:
            last["best_val_loss"], last["best_val_step"] = min(losses, key=lambda pair: pair[0])
    return last


def _events(run_dir: Path, run: RunRecord, skipped: np.ndarray, limit: float) -> list[Event]:
    """Return recorded events, resumptions ("resume", from run.json) and skipped updates ("skip", after the steps
    `skipped`) up to the step `limit`, in the order of their steps; each event at most once per step."""
    events = read_records(run_dir / EVENTS, Event)
    events += [Event(one.step, "resume", f"{one.device}, world size {one.world_size}") for one in run.resumed or ()]
    events += [Event(int(step), "skip") for step in skipped]
    unique = {(event.step, event.event): event for event in events if event.step <= limit}
    return [unique[key] for key in sorted(unique)]


# --- chains of runs


class RunReader:
    """Returns the figures of runs, computed again only when the modification time or size of a run's file has changed."""

    def __init__(self) -> None:
        self._metrics: dict[Path, MetricsReader] = {}
        self._figures: dict[tuple[Path, int | None], tuple[Any, RunFigures]] = {}

    def run(self, run_dir: Path, until: int | None = None) -> RunFigures:
        """Return the result of `run_figures` as a shallow copy, to which the caller may add keys."""
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
    """Return the figures of `run_dir` and the runs whose weights it was started from, oldest first; of an earlier run
    only up to the checkpoint that the next one started from, if its step is known. `offset` of each run has the steps,
    tokens and hours of all runs before it. If an earlier run no longer exists, the chain begins after it, and `missing`
    of the first run is its path. Raise CheckpointError if `run_dir` is not a run."""
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
    """Return the directory of the run that an init checkpoint belongs to, and the checkpoint's step (None if its name
    does not have it); (None, None) for a run that began with new weights. A directory that is not there any more is
    replaced by one of the same name next to `run_dir`. init: the record of the run's start in run.json."""
    if not init or not init.get("dir"):
        return None, None
    path = Path(init["dir"])
    number = path.name.removeprefix("step-")
    step = int(number) if number.isdecimal() else None
    parent = path.parent.parent if path.parent.name == "checkpoints" else path
    beside = run_dir.resolve().parent / parent.name
    return (parent if (parent / RUN).exists() or not (beside / RUN).exists() else beside), step


def figures(run_dirs: Sequence[Path], reader: RunReader | None = None) -> dict[str, list[list[RunFigures]]]:
    """Return the chains of runs as {"chains": [[figures of a run, …], …]}; a run in another's chain has none of its
    own."""
    reader = reader or RunReader()
    chains: dict[Path, list[RunFigures]] = {}
    for run_dir in run_dirs:
        chains.setdefault(run_dir.resolve(), chain(run_dir, reader))
    ancestors = {Path(run["dir"]).resolve() for runs in chains.values() for run in runs[:-1]}
    return {"chains": [runs for run_dir, runs in chains.items() if run_dir not in ancestors]}
