"""Sends the figures of a run to experiment trackers: tensorboard, wandb, swanlab or trackio, through their libraries.

A tracker that is not installed or does not start is an error before the first step. A later failure is reported once
and recorded in run.json, and training continues without the tracker. A resumed run continues its earlier run in the
tracker, whose id is derived from the run.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdata.errors import TrainError, UsageError
from mmtrain.config import SettingValues

PROJECT = "mm"
NAMES = ("tensorboard", "wandb", "swanlab", "trackio")
HELP = {
    "wandb": "`wandb login`, or set WANDB_MODE=offline and `wandb sync` later",
    "swanlab": "`swanlab login`, or set SWANLAB_MODE=offline and `swanlab sync` later",
}


@dataclass(frozen=True)
class TrackedRun:
    """What trackers need of a run. id: the same when it is resumed. first_step: steps done before this session."""

    dir: Path
    id: str
    first_step: int
    settings: SettingValues

    def init_options(self) -> dict[str, Any]:
        """Return the arguments that wandb.init, swanlab.init and trackio.init have in common."""
        return {"project": PROJECT, "name": self.dir.name, "resume": "allow", "config": dict(self.settings)}


@dataclass(frozen=True)
class Sink:
    """An open tracker: `write(step, figures)` logs figures; `close(is_failed)` ends the run, failed or not."""

    write: Callable[[int, Mapping[str, float]], object]
    close: Callable[[bool], object]


def check(names: Sequence[str]) -> None:
    """Raise UsageError if one of the trackers in `names` is unknown or not installed."""
    for name in names:
        if name not in NAMES:
            raise UsageError(f"--log {name} is unknown", f"use {', '.join(NAMES)}; metrics.jsonl is always written")
        spec = importlib.util.find_spec(name)
        # Without origin it is not a package but a directory of that name, such as the one that wandb creates.
        if spec is None or spec.origin is None:
            raise UsageError(f"--log {name}: {name} is not installed", f"pip install 'mm-toolkit[{name}]'")


class Trackers:
    """The open trackers of a run, on the first rank. say: prints a warning to the user. failed: the reason for each
    tracker that failed after its start, by name. Raise TrainError if a tracker cannot be started."""

    def __init__(self, names: Sequence[str], run: TrackedRun, say: Callable[[str], None]):
        self._say = say
        self._open: dict[str, Sink] = {}
        self.failed: dict[str, str] = {}
        for name in names:
            try:
                with contextlib.redirect_stdout(sys.stderr):  # stdout is only for results
                    self._open[name] = OPEN[name](run)
            except Exception as error:  # a tracker's library may raise anything
                self.close(is_failed=True)
                fix = HELP.get(name, "look at the error above")
                raise TrainError(f"--log {name} does not start: {_first_line(error)}", fix) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Log a record of metrics.jsonl to all trackers at its step, as train/NAME or, for val_NAME, val/NAME."""
        figures = {
            f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}": float(value)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float)
        }
        for name, sink in list(self._open.items()):
            self._try(name, lambda sink=sink: sink.write(record["step"], figures), f"at step {record['step']}")

    def close(self, *, is_failed: bool = False) -> None:
        """Close all trackers. is_failed: whether training failed. A second call has no effect."""
        for name, sink in list(self._open.items()):
            self._try(name, lambda sink=sink: sink.close(is_failed), "when closing")
        self._open.clear()

    def _try(self, name: str, act: Callable[[], object], when: str) -> None:
        """Call `act` for the tracker `name`. If it raises an exception, drop the tracker, record the failure and print
        a warning. when: when this happened, for the message, such as "at step 10"."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                act()
        except Exception as error:  # a tracker must never end a run
            del self._open[name]
            self.failed[name] = f"{when}: {_first_line(error)}"
            self._say(f"warning: --log {name} failed {self.failed[name]}; the run goes on without it")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tensorboard(run: TrackedRun) -> Sink:
    """Open tensorboard's log in RUN/tensorboard. Steps after `first_step`, written by a session that was resumed from
    an earlier checkpoint, are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.dir / "tensorboard"), purge_step=run.first_step + 1)
    if not run.first_step:
        writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in run.settings.items()))

    def write(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return Sink(write, lambda is_failed: writer.close())


def _wandb(run: TrackedRun) -> Sink:
    """Open a run of wandb. The step is logged as a figure, since wandb's counter cannot go back to an earlier
    checkpoint's step."""
    import wandb  # pyright: ignore[reportMissingImports]

    setup = {"project": wandb.setup().settings.project or PROJECT, "settings": wandb.Settings(console="off")}
    opened = wandb.init(**(run.init_options() | setup), id=run.id, dir=str(run.dir))
    opened.define_metric("*", step_metric="step")
    return Sink(
        lambda step, figures: opened.log({"step": step, **figures}),
        lambda is_failed: opened.finish(exit_code=int(is_failed)),
    )


def _swanlab(run: TrackedRun) -> Sink:
    """Open a run of swanlab, with its local files in RUN/swanlog."""
    import swanlab  # pyright: ignore[reportMissingImports]

    opened = swanlab.init(**run.init_options(), id=run.id, log_dir=str(run.dir / "swanlog"))
    return Sink(lambda step, figures: opened.log(dict(figures), step=step), lambda is_failed: opened.finish())


def _trackio(run: TrackedRun) -> Sink:
    """Open a run of trackio. trackio identifies runs by name, so the name contains the id."""
    import trackio  # pyright: ignore[reportMissingImports]

    opened = trackio.init(**(run.init_options() | {"name": f"{run.dir.name}-{run.id}"}), embed=False)
    return Sink(lambda step, figures: opened.log(dict(figures), step=step), lambda is_failed: opened.finish())


OPEN: Mapping[str, Callable[[TrackedRun], Sink]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "swanlab": _swanlab,
    "trackio": _trackio,
}
