"""Trackers, by stand-ins that keep what they are given: what is sent, what goes on, what is refused, what may fail."""

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from train_data import Data, run_json
from train_runs import at_step, config_of, interrupt, lines

from mmdata.errors import TrainError, UsageError
from mmtrain.config import TrainOptions
from mmtrain.log import trackers
from mmtrain.log.trackers import Sink, TrackedRun, Trackers
from mmtrain.train.loop import train


@dataclass
class Kept:
    """What the stand-ins were given: the arguments of init, then every line, then how often they were closed."""

    inits: list[dict[str, Any]] = field(default_factory=list)
    lines: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    closed: int = 0
    fail_at: int | None = None


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """Stand-ins for all four libraries."""
    kept = Kept()

    def log(figures: dict[str, float], step: int | None = None) -> None:
        print("noise of a library")
        at = int(figures.pop("step")) if step is None else step
        if at == kept.fail_at:
            raise ConnectionError("no route to host\nand much more")
        kept.lines.append((at, figures))

    def finish(exit_code: int = 0) -> None:
        kept.closed += 1

    def init(**options: Any) -> SimpleNamespace:
        kept.inits.append(options)
        return SimpleNamespace(log=log, finish=finish, define_metric=lambda *_, **__: None)

    class SummaryWriter:
        def __init__(self, directory: str, purge_step: int):
            kept.inits.append({"dir": directory, "purge_step": purge_step})

        def add_text(self, *_: str) -> None: ...

        def add_scalar(self, name: str, value: float, step: int) -> None:
            log({name: value}, step)

        def close(self) -> None:
            finish()

    for name in ("wandb", "swanlab", "trackio"):
        module = ModuleType(name)
        module.init = init  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    settings = SimpleNamespace(settings=SimpleNamespace(project=None))
    sys.modules["wandb"].setup = lambda: settings  # type: ignore[attr-defined]
    sys.modules["wandb"].Settings = dict  # type: ignore[attr-defined]
    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    find = importlib.util.find_spec
    here = SimpleNamespace(origin="here")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: here if name in trackers.NAMES else find(name, *rest)
    )
    return kept


def sent(run: Path, figure: str) -> list[tuple[int, float]]:
    """What should have been sent of a figure, by the run's metrics.jsonl."""
    return [(line["step"], line[figure]) for line in lines(run) if figure in line]


def got(kept: Kept, figure: str) -> list[tuple[int, float]]:
    return [(step, figures[figure]) for step, figures in kept.lines if figure in figures]


@pytest.mark.parametrize("name", trackers.NAMES)
def test_every_step_and_validation_is_sent_and_a_resumed_run_goes_on(
    name: str, kept: Kept, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config_of("sft", data, tmp_path / "run", model="tiny", trackers=(name,))
    with pytest.raises(KeyboardInterrupt):
        train(run, log=at_step(5, interrupt))
    assert kept.closed == 1
    train(TrainOptions("sft", (), run.out, resume=True, device="cpu", quiet=True))  # the run knows its trackers
    first, second = kept.inits
    if name == "tensorboard":
        assert (first["purge_step"], second["purge_step"]) == (1, 4) and first["dir"] == second["dir"]
    else:
        key = "name" if name == "trackio" else "id"
        assert first[key] == second[key] and second["resume"] == "allow" and first["config"]["lr"] == 2e-3
    again = got(kept, "train/loss")
    assert again[:5] + again[7:] == sent(run.out, "loss")  # steps 4 and 5 came twice, alike
    assert again[3:5] == again[5:7]
    assert got(kept, "val/bits_per_byte")[-1] == sent(run.out, "val_bits_per_byte")[-1]
    assert kept.closed == 2 and run_json(run.out)["trackers"] == {name: "open"}
    assert capsys.readouterr().out == ""  # stdout is for results


def test_several_at_once_and_other_runs_have_other_ids(kept: Kept, data: Data, tmp_path: Path) -> None:
    run = config_of("sft", data, tmp_path / "run", model="tiny", steps=1, quiet=True)
    train(replace(run, trackers=("wandb", "swanlab")))
    train(replace(run, out=tmp_path / "other", trackers=("wandb",)))
    assert len({options["id"] for options in kept.inits}) == 2 and kept.closed == 3


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(kept: Kept, data: Data, tmp_path: Path) -> None:
    kept.fail_at = 3
    run = config_of("sft", data, tmp_path / "run", model="tiny", trackers=("wandb",))
    said: list[str] = []
    assert train(run, log=said.append).final_step == 7
    assert [line for line in said if "--log" in line] == [
        "warning: --log wandb failed at step 3: no route to host; the run goes on without it"
    ]
    assert run_json(run.out)["trackers"] == {"wandb": "at step 3: no route to host"}
    assert got(kept, "train/loss") == sent(run.out, "loss")[:2] and kept.closed == 0


def test_one_that_will_not_start_ends_the_run_before_its_first_step(
    kept: Kept, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("not logged in")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    run = config_of("sft", data, tmp_path / "run", model="tiny", trackers=("swanlab", "wandb"), quiet=True)
    with pytest.raises(TrainError, match="--log wandb does not start: not logged in") as caught:
        train(run)
    assert "WANDB_MODE=offline" in caught.value.fix and kept.closed == 1  # swanlab was open
    assert not (run.out / "run.json").exists() and not (run.out / "checkpoints").exists()


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio"])
def test_one_that_is_not_installed_names_its_extra(
    name: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == name else find(n, *rest))
    with pytest.raises(UsageError, match=f"{name} is not installed") as caught:
        train(config_of("sft", data, tmp_path / "run", model="tiny", trackers=(name,)))
    assert caught.value.fix == f"pip install 'mm-toolkit[{name}]'" and not (tmp_path / "run").exists()


def test_a_directory_that_wandb_left_here_is_not_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [""])
    with pytest.raises(UsageError, match="wandb is not installed"):
        trackers.check(["wandb"])


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(UsageError, match="--log mlflow is unknown"):
        trackers.check(["mlflow"])


def test_extras_are_declared_under_their_names() -> None:
    import tomllib

    root = Path(__file__).resolve().parent.parent
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(trackers.NAMES) <= set(extras)


def test_what_is_not_a_number_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, float]] = []
    opened: dict[str, Callable[[TrackedRun], Sink]] = {
        "wandb": lambda run: Sink(lambda step, figures: found.append(dict(figures)), lambda is_failed: None)
    }
    monkeypatch.setattr(trackers, "OPEN", opened)
    several = Trackers(["wandb"], TrackedRun(tmp_path, "1", 0, {}), print)
    several.write(json.loads('{"step": 1, "loss": null, "lr": 0.1, "val_loss": 2}'))
    assert found == [{"train/lr": 0.1, "val/loss": 2.0}]
