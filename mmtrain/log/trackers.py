"""Figures of a run -> tensorboard, wandb, swanlab or trackio, through their own libraries. metrics.jsonl is written anyway.

A tracker that is not installed is refused before the run begins, and one that will not start ends it before its first step:
nothing is lost yet. One that fails later is said once, noted in run.json and left alone from then on; training goes on.
A resumed run continues what it began: its id follows from the run.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdata.errors import TrainError, UsageError

PROJECT = "mm"
NAMES = ("tensorboard", "wandb", "swanlab", "trackio")
HELP = {
    "tensorboard": "look at the error above",
    "wandb": "`wandb login`, or set WANDB_MODE=offline and `wandb sync` later",
    "swanlab": "`swanlab login`, or set SWANLAB_MODE=offline and `swanlab sync` later",
    "trackio": "look at the error above",
}


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told of a run: its directory, an id that stays, the first step to come, and its settings."""

    dir: Path
    id: str
    first_step: int
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Sink:
    """An open tracker: takes the figures of a step, and the end with whether the run failed."""

    write: Callable[[int, Mapping[str, float]], object]
    close: Callable[[bool], object]


def check(names: Sequence[str]) -> None:
    """UsageError for a tracker mm does not know or that is not installed."""
    for name in names:
        if name not in NAMES:
            raise UsageError(f"--log {name} is unknown", f"use {', '.join(NAMES)}; metrics.jsonl is always written")
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a directory wandb/ here, which wandb makes, is no package
            raise UsageError(f"--log {name}: {name} is not installed", f"pip install 'mm-toolkit[{name}]'")


class Trackers:
    """The open trackers of a run; none on all ranks but the first."""

    def __init__(self, names: Sequence[str], run: Tracked, say: Callable[[str], None]):
        self._say = say
        self._open: dict[str, Sink] = {}
        self.failed: dict[str, str] = {}
        for name in names:
            try:
                with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                    self._open[name] = OPEN[name](run)
            except Exception as error:  # other people's code: it may raise anything
                self.close(is_failed=True)
                raise TrainError(f"--log {name} does not start: {_first_line(error)}", HELP[name]) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Hand a line of metrics.jsonl on: its numbers as train/NAME, those of a validation as val/NAME."""
        figures = {
            f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}": float(value)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float)
        }
        for name, sink in list(self._open.items()):
            self._try(name, lambda sink=sink: sink.write(record["step"], figures), f"at step {record['step']}")

    def close(self, *, is_failed: bool = False) -> None:
        """Let every tracker finish its work; nothing the second time."""
        for name, sink in list(self._open.items()):
            self._try(name, lambda sink=sink: sink.close(is_failed), "when closing")
        self._open.clear()

    def _try(self, name: str, act: Callable[[], object], when: str) -> None:
        """Act; a tracker that fails is not asked again."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                act()
        except Exception as error:  # other people's code, and never worth a run
            del self._open[name]
            self.failed[name] = f"{when}: {_first_line(error)}"
            self._say(f"warning: --log {name} failed {self.failed[name]}; the run goes on without it")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tensorboard(run: Tracked) -> Sink:
    """RUN/tensorboard; what an earlier session wrote of the steps to come is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.dir / "tensorboard"), purge_step=run.first_step + 1)
    if not run.first_step:
        writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in run.settings.items()))

    def write(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return Sink(write, lambda is_failed: writer.close())


def _wandb(run: Tracked) -> Sink:
    """A run of that id, resumed where the server has it. The step is a figure of its own: wandb's own counter refuses to
    go back to a checkpoint."""
    import wandb  # pyright: ignore[reportMissingImports]

    opened = wandb.init(
        project=wandb.setup().settings.project or PROJECT,
        name=run.dir.name,
        id=run.id,
        resume="allow",
        dir=str(run.dir),
        config=dict(run.settings),
        settings=wandb.Settings(console="off"),
    )
    opened.define_metric("*", step_metric="step")
    return Sink(
        lambda step, figures: opened.log({"step": step, **figures}), lambda bad: opened.finish(exit_code=int(bad))
    )


def _swanlab(run: Tracked) -> Sink:
    """A run of that id, resumed where the server has it; its files in RUN/swanlog."""
    import swanlab  # pyright: ignore[reportMissingImports]

    opened = swanlab.init(
        project=PROJECT,
        name=run.dir.name,
        id=run.id,
        resume="allow",
        log_dir=str(run.dir / "swanlog"),
        config=dict(run.settings),
    )
    return Sink(lambda step, figures: opened.log(dict(figures), step=step), lambda is_failed: opened.finish())


def _trackio(run: Tracked) -> Sink:
    """A run in trackio's own place, found again by its name, hence the id in it."""
    import trackio  # pyright: ignore[reportMissingImports]

    name = f"{run.dir.name}-{run.id}"
    opened = trackio.init(project=PROJECT, name=name, resume="allow", config=dict(run.settings), embed=False)
    return Sink(lambda step, figures: opened.log(dict(figures), step=step), lambda is_failed: opened.finish())


OPEN: Mapping[str, Callable[[Tracked], Sink]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "swanlab": _swanlab,
    "trackio": _trackio,
}
