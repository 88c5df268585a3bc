"""Run directories in, figures of what happened out: plain dictionaries for the report, its JSON and the terminal.

Reads run.json, metrics.jsonl, samples.jsonl and events.jsonl; never torch, so that a run is told about at once. Long runs are
thinned to POINTS a curve: each point the mean of a stretch of steps.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmdata.errors import CheckpointError

POINTS = 400
PAIR_FIGURES = ("accuracy", "reward_margin", "chosen_drift", "rejected_drift", "chosen_logps", "rejected_logps")
STEP_FIGURES = ("loss", "lr", "grad_norm", *PAIR_FIGURES)


@dataclass(slots=True)
class Log:
    """metrics.jsonl as far as it has been read: the lines of steps and of validations. `update` reads what came since."""

    path: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    vals: list[dict[str, Any]] = field(default_factory=list)
    _offset: int = 0
    _last: bytes = b""  # line read

    def update(self) -> None:
        """Read the lines that are whole by now; all anew when a resume has cut the file, though it may have grown since."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset - len(self._last))
            if file.read(len(self._last)) != self._last:
                self.steps, self.vals, self._offset, self._last = [], [], 0, b""
                file.seek(0)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.splitlines(keepends=True)
        self._last = lines[-1] if lines else self._last
        for record in _records(lines):
            if "loss" in record:
                self.steps.append(record)
            elif any(name.startswith("val_") for name in record):
                self.vals.append(record)


def _records(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """JSON objects with a step; what a kill has torn is passed over."""
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a jsonl file of ours; none when it is not there."""
    return _records(path.read_bytes().splitlines()) if path.exists() else []


def read_facts(run_dir: Path) -> dict[str, Any]:
    """A run's run.json; CheckpointError when it is missing or unreadable."""
    try:
        return json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run_dir}: no readable run.json", "give a run directory of `mm train`") from error


# --- one run


def run_figures(run_dir: Path, *, log: Log | None = None, until: int | None = None) -> dict[str, Any]:
    """Everything told about one run, its curves from its own beginning; `until` leaves away what came after that step."""
    facts = read_facts(run_dir)
    log = log or Log(run_dir / "metrics.jsonl")
    log.update()
    limit = math.inf if until is None else until
    steps = [record for record in log.steps if record["step"] <= limit]
    vals = [record for record in log.vals if record["step"] <= limit]
    curves, totals = _curves(steps, facts)
    events = _events(run_dir, facts, steps, limit)
    places = [record["step"] for record in steps]
    at = {name: [0.0, *_cumulative(steps, name)] for name in ("tokens", "hours")}

    def placed(step: int) -> dict[str, float]:
        done = bisect_right(places, step)  # the newest step logged by then: an event may come before its own
        return {"step": step, "tokens": at["tokens"][done], "hours": at["hours"][done]}

    return {
        "name": run_dir.resolve().name,
        "dir": str(run_dir),
        "stage": facts.get("stage", "?"),
        "status": facts.get("status", "?"),
        "started": facts.get("started"),
        "ended": facts.get("ended"),
        "device": facts.get("device_name") or facts.get("device", "?"),
        "precision": facts.get("precision", "?"),
        "world_size": facts.get("world_size", 1),
        "params": facts.get("num_params", 0),
        "num_steps": facts.get("num_steps", 0),
        "step": steps[-1]["step"] if steps else 0,
        **totals,
        "last": _last(steps, vals),
        "settings": facts.get("settings", {}),
        "model": facts.get("model", {}),
        "data": facts.get("data", []),
        "init": facts.get("init"),
        "versions": facts.get("versions", {}),
        "curves": curves,
        "vals": [{**placed(v["step"]), **{k: x for k, x in v.items() if k != "step"}} for v in _thinned(vals)],
        "events": [{**event, **placed(event["step"])} for event in events],
        "samples": [s for s in read_lines(run_dir / "samples.jsonl") if s["step"] <= limit],
    }


def _thinned(records: Sequence[Any]) -> list[Any]:
    """At most POINTS records, spread evenly, the last among them."""
    if len(records) <= POINTS:
        return list(records)
    return [records[i] for i in np.linspace(0, len(records) - 1, POINTS).astype(int)]


def _column(steps: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """float64 [steps]; NaN where a figure is missing or was not finite."""
    return np.array([math.nan if (v := step.get(name)) is None else v for step in steps], np.float64)


def _seconds(steps: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Seconds of each step: its tokens over its rate."""
    rate = _column(steps, "tokens_per_s")
    return np.where(rate > 0, _column(steps, "tokens") / np.where(rate > 0, rate, 1), 0.0)


def _cumulative(steps: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    values = _seconds(steps) / 3600 if name == "hours" else _column(steps, name)
    return np.cumsum(np.nan_to_num(values)).tolist()


def _curves(steps: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> tuple[dict[str, list], dict[str, Any]]:
    """Thinned curves of a run's steps, with tokens and hours from its beginning, and its totals."""
    if not steps:
        return {}, {"tokens": 0, "trained_tokens": 0, "hours": 0.0, "skipped": 0}
    tokens, trained, seconds = _column(steps, "tokens"), _column(steps, "trained_tokens"), _seconds(steps)
    columns = {name: _column(steps, name) for name in STEP_FIGURES if any(name in step for step in steps)}
    columns["tokens_per_s"] = _column(steps, "tokens_per_s")
    safe = np.where(seconds > 0, seconds, math.nan)
    columns["trained_per_s"] = trained / safe
    fill = facts.get("fill")
    if fill:
        columns["padded_per_s"] = columns["tokens_per_s"] / fill
    flops = flops_of(facts, tokens, trained)
    columns["gflops"] = flops / safe / 1e9
    peak = facts.get("matmul_flops")
    if peak:
        columns["mfu"] = flops / safe / (peak * facts.get("world_size", 1))
    if any("memory_bytes" in step for step in steps):
        columns["memory_gb"] = _column(steps, "memory_bytes") / 1e9
    columns |= {
        "step": _column(steps, "step"),
        "tokens": np.cumsum(np.nan_to_num(tokens)),
        "hours": np.cumsum(np.nan_to_num(seconds)) / 3600,
    }
    edges = np.unique(np.linspace(0, len(steps), min(len(steps), POINTS) + 1).astype(int))
    curves = {name: _plain(_means(values, edges)) for name, values in columns.items()}
    for name in ("step", "tokens", "hours"):
        curves[name] = _plain(columns[name][edges[1:] - 1])
    if len(edges) - 1 < len(steps):
        low, high = _ends(columns["loss"], edges)
        curves |= {"loss_low": _plain(low), "loss_high": _plain(high)}
    totals = {
        "tokens": int(np.nansum(tokens)),
        "trained_tokens": int(np.nansum(trained)),
        "hours": float(np.nansum(seconds) / 3600),
        "skipped": int(steps[-1].get("skipped") or 0),
    }
    return curves, totals


def flops_of(facts: Mapping[str, Any], tokens: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Floating point operations of steps: 6 a weight and token (2 forward, 4 backward), the output matrix on trained tokens
    only, as this trainer does it. Attention's own products are left out: under a tenth at these lengths."""
    model = facts.get("model", {})
    head = model.get("vocab_size", 0) * model.get("hidden_size", 0)
    return 6.0 * (max(facts.get("num_params", 0) - head, 0) * tokens + head * trained)


def _means(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    sums = np.add.reduceat(np.where(known, values, 0), edges[:-1])
    counts = np.add.reduceat(known.astype(float), edges[:-1])
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


def _ends(values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low = np.minimum.reduceat(np.where(np.isnan(values), math.inf, values), edges[:-1])
    high = np.maximum.reduceat(np.where(np.isnan(values), -math.inf, values), edges[:-1])
    return low, high


def _plain(values: np.ndarray) -> list[float | None]:
    """Numbers to six digits as JSON has them; what is not finite is null."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values.tolist()]


def _last(steps: Sequence[Mapping[str, Any]], vals: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The newest figures: of the last tenth of the steps the mean loss, of validations the last and the best."""
    found: dict[str, Any] = {}
    if steps:
        losses = _column(steps[-max(1, len(steps) // 10) :], "loss")
        finite = losses[np.isfinite(losses)]
        found["loss"] = float(finite.mean()) if len(finite) else None
        for name in PAIR_FIGURES:
            if name in steps[-1]:
                found[name] = steps[-1][name]
    if vals:
        found |= {name: value for name, value in vals[-1].items() if name.startswith("val_")}
        known = [v for v in vals if isinstance(v.get("val_loss"), (int, float))]
        if known:
            best = min(known, key=lambda v: v["val_loss"])
            found["best_val_loss"], found["best_val_step"] = best["val_loss"], best["step"]
    return found


def _events(
    run_dir: Path, facts: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], limit: float
) -> list[dict[str, Any]]:
    """What happened besides steps, in their order: {"step", "event", "note"}."""
    found = [
        {"step": event["step"], "event": str(event.get("event")), "note": str(event.get("note", ""))}
        for event in read_lines(run_dir / "events.jsonl")
    ]
    for again in facts.get("resumed", []):
        note = f"{again.get('device', '')}, world size {again.get('world_size', 1)}"
        found.append({"step": again["step"], "event": "resume", "note": note})
    before = 0
    for step in steps:
        count = step.get("skipped") or 0
        if count > before:
            found.append({"step": step["step"], "event": "skip", "note": ""})
        before = count
    unique = {(event["step"], event["event"]): event for event in found if event["step"] <= limit}
    return sorted(unique.values(), key=lambda event: (event["step"], event["event"]))


# --- chains of runs


class Reader:
    """Tells about runs again and again, and reads anew only what has changed since, by time and size of a run's files."""

    def __init__(self) -> None:
        self._logs: dict[Path, Log] = {}
        self._known: dict[tuple[Path, int | None], tuple[Any, dict[str, Any]]] = {}

    def run(self, run_dir: Path, until: int | None = None) -> dict[str, Any]:
        """`run_figures`; the caller may add to what it gets."""
        key = run_dir.resolve(), until
        state = [_state(run_dir / name) for name in _FILES]
        known = self._known.get(key)
        if known is None or known[0] != state:
            log = self._logs.setdefault(key[0], Log(run_dir / "metrics.jsonl"))
            self._known[key] = known = state, run_figures(run_dir, log=log, until=until)
        return dict(known[1])


_FILES = ("run.json", "metrics.jsonl", "samples.jsonl", "events.jsonl")  # all that is told of a run stands in them


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size


def chain(run_dir: Path, reader: Reader | None = None) -> list[dict[str, Any]]:
    """A run and those it goes back to, the first one first; each has `offset`: steps, tokens and hours before it.

    An ancestor that is no longer there ends the chain; `missing` of the run names it.
    """
    reader = reader or Reader()
    run = reader.run(run_dir)
    return _placed([*_ancestors(run, {run_dir.resolve()}, reader), run])


def _ancestors(run: dict[str, Any], seen: set[Path], reader: Reader) -> list[dict[str, Any]]:
    """The runs a run goes back to, the first one first."""
    parent, step = _parent(Path(run["dir"]), run["init"])
    if parent is None or parent.resolve() in seen:
        return []
    try:
        found = reader.run(parent, until=step)
    except CheckpointError:
        run["missing"] = str(parent)
        return []
    return [*_ancestors(found, seen | {parent.resolve()}, reader), found]


def _placed(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    before = {"step": 0, "tokens": 0, "hours": 0.0}
    for run in runs:
        run["offset"] = before
        before = {
            "step": before["step"] + run["step"],
            "tokens": before["tokens"] + run["tokens"],
            "hours": before["hours"] + run["hours"],
        }
    return runs


def _parent(run_dir: Path, init: Mapping[str, Any] | None) -> tuple[Path | None, int | None]:
    """The run a checkpoint lies in, where it was or beside this run, and the checkpoint's step."""
    if not init or not init.get("dir"):
        return None, None
    path = Path(init["dir"])
    name = path.name.removeprefix("step-")
    step = int(name) if name.isdigit() else None
    parent = path.parent.parent if path.parent.name == "checkpoints" else path
    beside = run_dir.resolve().parent / parent.name
    return (parent if (parent / "run.json").exists() or not (beside / "run.json").exists() else beside), step


def figures(run_dirs: Sequence[Path], reader: Reader | None = None) -> dict[str, Any]:
    """Everything about several runs: {"chains": [[run, …], …]}, a chain for each run named; a run that another's chain holds
    is not told twice."""
    reader = reader or Reader()
    chains = [chain(run_dir, reader) for run_dir in run_dirs]
    places = [Path(found[-1]["dir"]).resolve() for found in chains]
    kept = []
    for number, found in enumerate(chains):
        others = [other for i, other in enumerate(chains) if i != number]
        inside = any(places[number] in {Path(run["dir"]).resolve() for run in other[:-1]} for other in others)
        if not inside and places[number] not in places[:number]:
            kept.append(found)
    return {"chains": kept}
