"""What the steps of a recipe will take, from the plan that each command makes itself."""

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmdata.commands.options import HOME
from mmdata.commands.terminal import waiting, without_option
from mmtrain.commands.project.recipe import NEW_MODEL, SHARDS_DIR, Step
from mmtrain.commands.project.runner import ALONE, DONE, Runner, resuming

SAMPLE_ROWS = 400  # of a file that is not packed yet, to measure training on


class NoPlanError(Exception):
    """What a step takes is not known; the text says why."""


@dataclass(frozen=True)
class StepPlan:
    """What a step is expected to take: seconds, bytes to download, of disk and of memory; None where it is not known.
    state: done, interrupted or to do. note: why something is not known."""

    step: str = ""
    state: str = "to do"
    seconds: float | None = None
    download_bytes: int | None = None
    disk_bytes: int | None = None
    memory_bytes: int | None = None
    note: str = ""


class Planner:
    """Asks the command of each step of a recipe for its plan. Data that is not packed yet is measured on a sample.
    scale: share of the rows that will be packed."""

    def __init__(self, runner: Runner, scale: float = 1.0) -> None:
        self.runner, self.scale, self.root = runner, scale, HOME if scale < 1 else runner.root
        self.tokens: dict[str, int] = {}  # dataset -> tokens that packing will give
        self.files: dict[str, Step] = {}  # dataset -> the step that packs it

    def plans(self, steps: list[Step]) -> Iterator[StepPlan]:
        """Yield the outlook of each step except those done after a training step."""
        model: list[str] = []  # the words that say the shape of the first model
        for step in steps:
            if step.name != step.base:
                continue
            if step.command == ("pack",):
                self.files |= dict.fromkeys(step.places, step)
            if step.command == ("train",) and NEW_MODEL & step.values.keys():
                model = [word for name in NEW_MODEL & step.values.keys() for word in _option(step, name)]
            known = self.runner.record.steps.get(step.name)
            if self.runner.is_done(step) and step.command != ("fetch",):
                yield StepPlan(step.name, DONE)
                continue
            state = known.status if known and known.status != DONE else "to do"
            plan = {"fetch": self._fetch, "pack": self._pack, "train": self._train}.get(step.command[0])
            try:
                found = plan(step, model) if plan else StepPlan()
            except NoPlanError as reason:
                found = StepPlan(note=str(reason))
            yield replace(found, step=step.name, state=state)

    def _ask(self, argv: list[str]) -> Any:
        """Return what a command prints as JSON. Raise NoPlanError with its error if it fails."""
        with waiting(f"mm {' '.join(argv)}"):
            ended = self.runner.launch(argv, self.root, is_captured=True, is_quiet=True, changes=ALONE)
        if ended.code == 0:
            with suppress(ValueError):
                return json.loads(ended.out)
        errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        raise NoPlanError(errors[-1].removeprefix("error: ") if errors else f"mm {' '.join(argv)} fails")

    def _fetch(self, step: Step, _: list[str]) -> StepPlan:
        found = self._ask([*step.argv, "--dry-run", "--json"])
        return StepPlan(download_bytes=found["get_bytes"], disk_bytes=found["get_bytes"])

    def _pack(self, step: Step, _: list[str]) -> StepPlan:
        if missing := [file for file in step.values["files"] if not (self.root / file).is_file()]:
            return StepPlan(note=f"known when {missing[0]} is here")
        found = self._ask([*step.argv, "--plan", "--json"])
        wanted = step.values.get("max_len")
        chosen = [next((o for o in one["outlooks"] if o["max_len"] == wanted), one["outlooks"][-1]) for one in found]
        self.tokens |= {place: round(self.scale * o["tokens"]) for place, o in zip(step.places, chosen, strict=False)}
        disk_bytes, seconds = (self.scale * sum(o[name] for o in chosen) for name in ("disk_bytes", "seconds"))
        return StepPlan(seconds=seconds, disk_bytes=round(disk_bytes))

    def _train(self, step: Step, model: list[str]) -> StepPlan:
        """Return the needs of a training step. If its data is not packed yet, those of a sample of it are taken, with the
        time of all its tokens; if the run that it starts from is not there yet, the shape of the first model."""
        argv = list(step.argv)
        init, run = step.values.get("init"), self.root / step.outputs[0]
        known = self.runner.record.steps.get(step.name)
        if known and known.status != DONE and any(run.glob("checkpoints/step-*")):
            return self._needs(resuming(argv))
        if run.exists():  # it will be begun again
            argv = [*without_option(argv, "--out"), "--out", f"{step.outputs[0]}.new"]
        if init and not (self.root / init).exists():
            argv = [*without_option(argv, "--init"), *model]
        data = [self._dataset(text) for text in _listed(step.values.get("data"))]
        packed = [path for path in data if (self.root / path / "manifest.json").exists()]
        if data and len(packed) == len(data) and self.scale == 1:
            return self._needs(argv)
        if not data or any(path not in self.tokens for path in data):
            return StepPlan(note="known when its data is packed")
        with tempfile.TemporaryDirectory() as temporary:
            sample = Path(temporary) / "sample"
            source = self.files[data[0]]
            file = self.root / dict(zip(source.places, source.values["files"], strict=False))[data[0]]
            sample_rows(file, sample.with_suffix(".jsonl"), most=SAMPLE_ROWS)
            words = [*without_option(list(source.argv), "--out"), "--out", str(sample), "--no-report"]
            words = [word for word in words if word not in source.values["files"]]
            self._ask(["pack", str(sample.with_suffix(".jsonl")), *words[1:], "--json"])
            words = [*without_option(argv, "--data"), "--data", str(sample)]
            return self._needs(words, _run_tokens(step, sum(self.tokens[path] for path in data)))

    def _dataset(self, text: str) -> str:
        """Return the directory of a dataset as --data names it: with a weight, or by its name under shards/."""
        names = [text, text.rpartition(":")[0]]
        places = [place for name in names if name for place in (name, str(SHARDS_DIR / name))]
        return next((place for place in places if place in self.files or (self.root / place).is_dir()), text)

    def _needs(self, argv: list[str], tokens: int = 0) -> StepPlan:
        """Return what `mm train --plan` says. tokens: of the whole run; 0: those of the data asked for."""
        found = self._ask([*argv, "--plan", "--json"])
        from mmdata.stats.report.page import short

        seconds = (tokens / found["tokens_per_s"] if tokens else found["seconds"]) / self.runner.nproc
        tokens = tokens or found["run_tokens"]
        note = f"{short(float(found['num_params']))} parameters, {short(float(tokens))} tokens"
        return StepPlan(seconds=seconds, disk_bytes=found["disk_bytes"], memory_bytes=found["peak_bytes"], note=note)


def _run_tokens(step: Step, tokens: int) -> int:
    """Return the tokens of a whole run on a dataset of so many tokens."""
    from mmtrain.sizing import settings_for

    given = {name: step.values[name] for name in ("epochs", "steps", "batch_tokens") if name in step.values}
    chosen = settings_for(step.values["stage"], tokens, **given)
    return chosen.steps * chosen.batch_tokens if chosen.steps else round((chosen.epochs or 1) * tokens)


def _listed(value: Any) -> list[str]:
    return [] if value is None else [str(each) for each in (value if isinstance(value, list) else [value])]


def _option(step: Step, name: str) -> list[str]:
    """Return the words of one option of a step, flag and value."""
    flag = f"--{name.replace('_', '-')}"
    value = step.values[name]
    return [flag] if value is True else [flag, str(value)]


def sample_rows(path: Path, out: Path, *, share: float = 1.0, most: int | None = None) -> None:
    """Write this share of the rows of a file, evenly spaced and with the first, as lines of JSON; or the first `most`."""
    from mmdata.io.files import atomic_path
    from mmdata.io.lines import iter_lines

    with atomic_path(out) as partial, partial.open("wb") as file:
        for index, line in enumerate(iter_lines(path)):
            if most is not None and index >= most:
                break
            if math.ceil((index + 1) * share) > math.ceil(index * share):
                file.write(line.raw + b"\n")
