"""The training loop: what is learned, what is refused, and that a run can be stopped anywhere and go on as if it had not."""

import json
import math
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from train_data import Data, pack_to, run_json
from train_runs import at_step, config_of, interrupt, lines, refused_run, steps

from mmdata.errors import CheckpointError, DatasetError, TrainError, UsageError
from mmdata.io.files import alone
from mmdata.shards.dataset import open_dataset
from mmdata.shards.pairs import make_loader
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain import checkpoint, config
from mmtrain.config import TrainOptions
from mmtrain.inference.evaluate import evaluate, names_of
from mmtrain.model.batch import Batch
from mmtrain.model.model import Model
from mmtrain.model.preference import Objective
from mmtrain.model.stages import STAGES, Outcome, next_token
from mmtrain.records import BestRecord
from mmtrain.train import loop, plan, reference
from mmtrain.train.loop import TrainResult, train


@pytest.fixture(scope="module")
def whole(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sft run with the settings of `config_of`, to compare interrupted ones with; it is not changed."""
    torch.set_num_threads(1)
    return train(config_of("sft", data, tmp_path_factory.mktemp("whole") / "run", model="tiny", quiet=True)).run_dir


def test_the_three_stages_follow_each_other_and_learn(runs: Path) -> None:
    for stage in STAGES:
        facts, found = run_json(runs / stage), steps(runs / stage)
        assert facts["status"] == "finished" and facts["final_step"] == len(found) == facts["num_steps"]
        assert found[-1]["loss"] < 0.9 * found[0]["loss"]
        assert (runs / stage / "tokenizer" / "tokenizer.json").exists()
        assert checkpoint.find(runs / stage).dir.name == f"step-{len(found)}"
    assert run_json(runs / "dpo")["init"]["dir"] == str(checkpoint.find(runs / "sft").dir)


def test_run_json_says_where_every_setting_came_from(runs: Path) -> None:
    settings = run_json(runs / "sft")["settings"]
    assert settings["lr"] == {"value": 3e-3, "from": "flag"} and settings["clip"] == {"value": 1.0, "from": "default"}
    assert settings["model"]["value"] is None
    assert set(settings) == set(config.TrainSettings.__dataclass_fields__)


def test_dpo_starts_at_ln_2_and_ends_preferring_the_chosen(runs: Path) -> None:
    first, *_, last = steps(runs / "dpo")
    assert abs(first["loss"] - math.log(2)) < 1e-3 and abs(first["reward_margin"]) < 1e-3
    assert last["accuracy"] > 0.9 and last["reward_margin"] > 0.5
    assert {"val_loss", "val_accuracy", "val_reward_margin", "val_bits_per_byte"} <= set(lines(runs / "dpo")[-1])


def test_accumulation_equals_one_batch(data: Data, tmp_path: Path) -> None:
    for name, micro_tokens in (("one", 1024), ("many", 128)):
        train(config_of("pretrain", data, tmp_path / name, model="tiny", micro_tokens=micro_tokens, quiet=True))
    for one, many in zip(lines(tmp_path / "one"), lines(tmp_path / "many"), strict=True):
        assert one == pytest.approx(many, rel=1e-5)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_killed_and_resumed_equals_undisturbed_to_the_last_bit(
    stage: str, data: Data, runs: Path, tmp_path: Path
) -> None:
    init = runs / ("pretrain" if stage == "sft" else "sft")
    whole, broken = (config_of(stage, data, tmp_path / name, init=init) for name in ("whole", "broken"))
    train(replace(whole, quiet=True))
    with pytest.raises(KeyboardInterrupt):
        train(broken, log=at_step(5, interrupt))  # steps 4 and 5 come after the last checkpoint
    assert run_json(broken.out)["status"] == "failed"
    resumed = TrainOptions(stage, (), broken.out, resume=True, device="cpu", quiet=True)
    result = train(resumed)
    assert (result.first_step, result.final_step) == (3, 7)
    assert lines(broken.out) == lines(whole.out)
    one, other = (checkpoint.find(run.out) for run in (whole, broken))
    assert one.weights_sha256 == other.weights_sha256


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_saved_and_resumable(number: int, whole: Path, data: Data, tmp_path: Path) -> None:
    broken = config_of("sft", data, tmp_path / "broken", model="tiny")
    before = signal.getsignal(number)
    result = train(broken, log=at_step(4, lambda: os.kill(os.getpid(), number)))
    assert result.is_interrupted and result.final_step == 5 and signal.getsignal(number) == before
    assert run_json(broken.out)["status"] == "interrupted"
    assert result.checkpoint == checkpoint.find(broken.out).dir
    train(replace(broken, resume=True, quiet=True))
    assert lines(broken.out) == lines(whole) and run_json(broken.out)["status"] == "finished"


def test_a_stop_file_ends_the_run_saved_and_resumable(whole: Path, data: Data, tmp_path: Path) -> None:
    broken = config_of("sft", data, tmp_path / "broken", model="tiny")
    result = train(broken, log=at_step(4, (broken.out / "STOP").touch))
    assert result.is_interrupted and result.final_step == 5
    train(replace(broken, resume=True, quiet=True))
    assert lines(broken.out) == lines(whole) and not (broken.out / "STOP").exists()


def test_the_best_checkpoint_stays_when_later_ones_are_worse(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: {"loss": next(losses)})
    run = config_of("sft", data, tmp_path / "run", model="tiny", val_every=1, save_every=1, keep_last=2, quiet=True)
    result = train(run)
    kept = sorted(path.name for path in (run.out / "checkpoints").iterdir())
    assert kept == ["step-2", "step-6", "step-7"] and result.best_checkpoint == run.out / "checkpoints/step-2"
    assert checkpoint.find(run.out).state.best == BestRecord(2, 1.0, since=5)


def test_a_new_best_is_saved_between_the_usual_saves(data: Data, tmp_path: Path) -> None:
    run = config_of("sft", data, tmp_path / "run", model="tiny", val_every=2, save_every=0, quiet=True)
    train(run)
    best = checkpoint.find(run.out / "checkpoints/step-6").state.best
    assert best is not None and best.step == 6


def test_when_memory_runs_out_the_micro_batch_is_halved_and_nothing_else_changes(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = {"batch_tokens": 1024, "micro_tokens": 1024}
    whole, small = (config_of("sft", data, tmp_path / name, model="tiny", **tokens) for name in ("a", "b"))
    train(replace(whole, quiet=True))
    sizes: list[int] = []

    def small_memory(model: Model, batch: Batch, ref: None, objective: Objective) -> Outcome:
        if batch.num_tokens > 300:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        sizes.append(batch.num_tokens)
        return next_token(model, batch, ref, objective)

    with_loss(monkeypatch, small_memory)
    said: list[str] = []
    train(small, log=said.append)
    (line,) = (line for line in said if "out of memory" in line)  # said once
    assert "halved 2 times" in line and max(sizes) <= 300
    events = [json.loads(line) for line in (small.out / "events.jsonl").read_text().splitlines()]
    (event,) = (event for event in events if event["event"] == "halved")
    assert event["step"] == 1 and event["note"] in line and max(sizes) <= int(event["note"].split()[0]) <= 300
    for one, other in zip(lines(whole.out), lines(small.out), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_document_that_fits_no_memory_ends_the_run(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(model: Model, batch: Batch, ref: None, beta: float) -> Outcome:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried")

    with_loss(monkeypatch, no_memory)
    with pytest.raises(TrainError, match="one document at a time"):
        train(config_of("sft", data, tmp_path / "run", model="tiny", quiet=True))


def test_other_data_is_taken_when_told(data: Data, tmp_path: Path) -> None:
    run = config_of("sft", data, tmp_path / "run", model="tiny", quiet=True)
    train(replace(run, steps=3))
    pack_to(data, "sft", tmp_path / "other", val_fraction=0.4)
    other = replace(run, data=(tmp_path / "other",), resume=True, steps=3)
    with pytest.raises(CheckpointError, match="was trained on dataset"):
        train(other)
    assert train(replace(other, other_data=True)).final_step == 3
    refused_run(
        UsageError, "--other-data goes with --resume", "leave it out", replace(run, out=tmp_path / "x", other_data=True)
    )


def test_a_run_is_lengthened_more_than_once(data: Data, tmp_path: Path) -> None:
    for schedule, lengths in (("wsd", (4, 8, 9)), ("constant", (1, 2))):
        run = config_of("sft", data, tmp_path / schedule, model="tiny", quiet=True, schedule=schedule, steps=lengths[0])
        train(run)
        for length in lengths[1:]:
            assert train(replace(run, steps=length, resume=True)).final_step == length
        assert [step["step"] for step in steps(run.out)] == list(range(1, lengths[-1] + 1))
        facts = run_json(run.out)
        assert (facts["num_steps"], facts["settings"]["steps"]) == (lengths[-1], {"value": lengths[-1], "from": "flag"})
        shorter = replace(run, steps=lengths[-1] - 1, resume=True)
        refused_run(UsageError, f"has made {lengths[-1]} steps, more than {lengths[-1] - 1}", "more --steps", shorter)


def test_kill_9_leaves_a_run_that_goes_on(whole: Path, data: Data, tmp_path: Path) -> None:
    broken = config_of("sft", data, tmp_path / "broken", model="tiny")
    code = (
        "import os, signal, torch, pathlib\nfrom mmtrain.config import TrainOptions\nfrom mmtrain.train.loop import train\n"
        "from pathlib import PosixPath\ntorch.set_num_threads(1)\n"
        f"train({broken!r}, log=lambda t: t.startswith('step 5/') and os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    done = subprocess.run([*warm.command(), "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    train(replace(broken, resume=True, quiet=True))
    assert lines(broken.out) == lines(whole)


def test_two_at_once_do_not_train_one_run(
    whole: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = TrainOptions(
        "sft", (), Path(shutil.copytree(whole, tmp_path / "run")), resume=True, device="cpu", quiet=True
    )
    before = lines(resumed.out)
    with alone(resumed.out, "mm train"):
        refused_run(UsageError, "another mm train works in", "wait for it", resumed)
    new = config_of("sft", data, tmp_path / "new", model="tiny")
    real = plan.make_plan

    def planned(*arguments: Any) -> Any:  # and meanwhile another one begins
        made = real(*arguments)
        shutil.copytree(whole, new.out)
        return made

    monkeypatch.setattr(loop, "make_plan", planned)
    refused_run(UsageError, "already holds a run", "--resume", new)
    assert lines(resumed.out) == lines(new.out) == before


def test_resuming_a_finished_run_changes_nothing(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    before = lines(run), run_json(run)["result"]
    result = train(TrainOptions("sft", (), run, resume=True, device="cpu", quiet=True))
    assert result.first_step == result.final_step and not result.is_interrupted
    assert (lines(run), run_json(run)["result"]) == before


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(whole: Path, data: Data, tmp_path: Path) -> None:
    run = config_of("sft", data, shutil.copytree(whole, tmp_path / "run"), model="tiny")
    newest = checkpoint.find(run.out).dir / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    said: list[str] = []
    result = train(replace(run, resume=True), log=said.append)
    assert result.first_step == 6 and any("is damaged" in line for line in said)
    assert lines(run.out) == lines(whole)


def with_loss(monkeypatch: pytest.MonkeyPatch, loss: Callable[..., Outcome]) -> None:
    monkeypatch.setitem(STAGES, "sft", replace(STAGES["sft"], loss=loss))


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def sometimes_nan(model: Model, batch: Batch, ref: None, objective: Objective) -> Outcome:
        outcome = next_token(model, batch, ref, objective)
        calls.append(1)
        return replace(outcome, loss=outcome.loss * math.nan) if len(calls) == 3 else outcome

    with_loss(monkeypatch, sometimes_nan)
    run = config_of("sft", data, tmp_path / "run", model="tiny", micro_tokens=1024)
    said: list[str] = []
    result = train(run, log=said.append)
    assert result.num_skipped == 1 and any("skipped" in line for line in said)
    found = steps(run.out)
    assert [line["skipped"] for line in found] == [0, 0, 1, 1, 1, 1, 1] and found[2]["loss"] is None
    assert found[-1]["loss"] < found[0]["loss"]


def test_too_many_skipped_steps_end_the_run_and_name_the_last_good_checkpoint(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nan(model: Model, batch: Batch, ref: None, objective: Objective) -> Outcome:
        outcome = next_token(model, batch, ref, objective)
        return replace(outcome, loss=outcome.loss * math.nan)

    with_loss(monkeypatch, nan)
    run = config_of("sft", data, tmp_path / "run", model="tiny", max_skipped=5, quiet=True)
    with pytest.raises(TrainError, match=r"5 steps in a row.*step-3"):
        train(run)
    saved = checkpoint.load_model(run.out)[0]
    torch.manual_seed(42)
    assert torch.equal(saved.head_weight, Model(saved.config).head_weight)


def test_a_batch_without_trained_tokens_changes_nothing(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(model: Model, batch: Batch, ref: None, objective: Objective) -> Outcome:
        none = replace(batch, trained=batch.trained[:0], sequence_ids=batch.sequence_ids[:0], num_trained=0)
        return next_token(model, none, ref, objective)

    with_loss(monkeypatch, nothing)
    run = config_of("sft", data, tmp_path / "run", model="tiny", quiet=True)
    result = train(run)
    assert result.num_skipped == 0 and [line["loss"] for line in steps(run.out)] == [None] * 7
    saved = checkpoint.load_model(run.out)[0]
    torch.manual_seed(42)
    assert torch.equal(saved.head_weight, Model(saved.config).head_weight)


def test_a_stale_reference_is_noticed_at_step_0(
    data: Data, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = reference.compute
    stale = torch.tensor([0.5, -0.5])
    monkeypatch.setattr(reference, "compute", lambda *args, **options: compute(*args, **options) + stale)
    pack_to(data, "dpo", tmp_path / "dpo", val_fraction=0.1)  # a dataset of its own, without a cache beside it
    with pytest.raises(TrainError, match=r"step 0: dpo loss .*expected ln 2"):
        train(
            replace(config_of("dpo", data, tmp_path / "run", init=runs / "sft", quiet=True), data=(tmp_path / "dpo",))
        )


def test_a_run_without_a_val_split_says_so(data: Data, tmp_path: Path) -> None:
    pack_to(data, "sft", tmp_path / "no_val", val_fraction=0.0)
    said: list[str] = []
    run = replace(config_of("sft", data, tmp_path / "run", model="tiny"), data=(tmp_path / "no_val",))
    result = train(run, log=said.append)
    assert result.val == {} and sum("val split is empty" in line for line in said) == 1


def test_several_datasets_are_one_stream(data: Data, tmp_path: Path) -> None:
    pack_to(data, "sft", tmp_path / "more", val_fraction=0.5)
    run = config_of("sft", data, tmp_path / "run", model="tiny", epochs=1, steps=None, quiet=True)
    result: TrainResult = train(replace(run, data=(data.sft, tmp_path / "more")))
    assert result.final_step > train(replace(run, out=tmp_path / "alone")).final_step


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_val_figures_of_several_datasets_are_given_in_all_and_for_each(
    stage: str, data: Data, runs: Path, tmp_path: Path
) -> None:
    pack_to(data, stage, tmp_path / "more", val_fraction=0.4)
    both = (getattr(data, stage), tmp_path / "more")
    init = runs / ("pretrain" if stage == "sft" else "sft")
    base = config_of(stage, data, tmp_path / "run", init=init, loss=None if stage == "sft" else "sigmoid", report=True)
    said: list[str] = []
    train(replace(base, data=both, weights=(0.7, 0.3), steps=3), log=said.append)
    (found,) = (line for line in lines(tmp_path / "run") if "val_loss" in line)
    names = [path.name for path in both]
    assert {f"val_{figure}/{name}" for figure in ("loss", "bits_per_byte") for name in names} <= set(found)
    model, tokenizer = checkpoint.load_model(tmp_path / "run")[0], Tokenizer.load(data.tokenizer)
    means = [found[f"val_bits_per_byte/{name}"] for name in names]
    assert min(means) < found["val_bits_per_byte"] < max(means)
    if stage == "sft":
        alone = [
            evaluate(model, make_loader([open_dataset(p)], split="val", batch_tokens=512, seed=0), tokenizer)
            for p in both
        ]
        for name, figures in zip(names, alone, strict=True):
            assert found[f"val_loss/{name}"] == pytest.approx(figures["loss"], rel=1e-5)
            assert found[f"val_bits_per_byte/{name}"] == pytest.approx(figures["bits_per_byte"], rel=1e-5)
        tokens = [figures["tokens"] for figures in alone]
        assert sum(tokens) == found["val_tokens"]
        losses = (figures["loss"] * n for figures, n in zip(alone, tokens, strict=True))
        assert found["val_loss"] == pytest.approx(sum(losses) / sum(tokens), rel=1e-5)
    else:
        assert {f"val_accuracy/{name}" for name in names} <= set(found)
    place = next(i for i, line in enumerate(said) if line.startswith("step 3/3 val"))
    assert [line.split(":")[0].strip() for line in said[place + 1 : place + 3]] == names
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert all(f'"name":"{name}"' in page for name in names)


def test_val_figures_of_one_dataset_have_no_names(runs: Path) -> None:
    assert not any("/" in name for stage in STAGES for line in lines(runs / stage) for name in line)


def test_datasets_of_one_name_are_told_apart_by_their_path() -> None:
    assert names_of([Path("a/sft"), Path("b/sft")]) == ["a/sft", "b/sft"]
    assert names_of([Path("a/sft"), Path("a/sft")]) == ["sft-1", "sft-2"]


# --- what is refused, each with a fix -------------------------------------------------------------------------------


def test_the_wrong_kind_of_dataset_names_the_right_stage(data: Data, tmp_path: Path) -> None:
    run = replace(config_of("pretrain", data, tmp_path / "run", model="tiny"), data=(data.dpo,))
    refused_run(DatasetError, "holds pair rows", "mm train dpo", run)
    assert not run.out.exists()


@pytest.mark.parametrize(("stage", "first"), [("sft", "mm train pretrain"), ("dpo", "mm train sft")])
def test_without_a_run_to_start_from_a_stage_warns_and_takes_new_weights(
    stage: str, first: str, data: Data, tmp_path: Path
) -> None:
    lines: list[str] = []
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "run.json").write_text(json.dumps({"stage": first.split()[-1], "status": "interrupted", "ended": 1.0}))
    config = replace(config_of(stage, data, tmp_path / "run", model="tiny"), steps=1, quiet=False, runs_dir=tmp_path)
    train(config, log=lines.append)
    assert any(line.startswith("warning: ") and first in line for line in lines)
    assert any(f"`{first} --out {earlier} --resume` finishes it" in line for line in lines)
    assert any(line.startswith(f"{getattr(data, stage)}: ") for line in lines)  # the data is named
    assert (tmp_path / "run" / "checkpoints" / "step-1" / "state.json").exists()
    resumed = train(replace(config, steps=None, model=None, resume=True))  # dpo's reference is found again
    assert resumed.final_step == 1


def test_another_tokenizer_than_the_checkpoints_is_refused(data: Data, runs: Path, tmp_path: Path) -> None:
    run = config_of("sft", data, tmp_path / "run", init=runs / "pretrain")
    refused_run(CheckpointError, "another tokenizer", "--tokenizer", replace(run, data=(data.other,)))
    refused_run(CheckpointError, "another tokenizer", "mm pack", replace(run, data=(data.sft, data.other)))
    scratch = config_of("sft", data, tmp_path / "run", model="tiny")
    refused_run(DatasetError, "another tokenizer", "mm pack", replace(scratch, data=(data.sft, data.other)))


def test_a_run_is_not_overwritten(data: Data, runs: Path) -> None:
    refused_run(UsageError, "already holds a run", "--resume", config_of("sft", data, runs / "sft"))


def test_resuming_with_other_data_or_settings_is_refused(whole: Path, data: Data, tmp_path: Path) -> None:
    run = config_of("sft", data, whole, model="tiny", quiet=True)
    again = replace(run, resume=True)
    refused_run(CheckpointError, "started with lr 0.002, now 0.1", "--lr", replace(again, lr=0.1))
    pack_to(data, "sft", tmp_path / "other", val_fraction=0.4)
    refused_run(CheckpointError, "was trained on dataset", "--data", replace(again, data=(tmp_path / "other",)))
    refused_run(CheckpointError, "is a sft run", "mm train sft", replace(again, stage="pretrain"))
    refused_run(UsageError, "--init starts a run", "leave one", replace(again, init=run.out))


def test_flags_that_contradict_each_other_are_refused(data: Data, tmp_path: Path) -> None:
    run = config_of("pretrain", data, tmp_path / "run", model="tiny")
    refused_run(UsageError, "contradict", "give one", replace(run, epochs=1))
    refused_run(UsageError, "--beta belongs to dpo", "leave --beta out", replace(run, beta=0.2))
    refused_run(UsageError, "--lr -1 must be greater", "default", replace(run, lr=-1))
    refused_run(UsageError, "--model huge is unknown", "minimind2", replace(run, model="huge"))
    refused_run(UsageError, "--schedule step is unknown", "cosine", replace(run, schedule="step"))
