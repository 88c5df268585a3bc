"""dpo's start: the reference is computed once and found again, and never taken for another's."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_data import Data, pack_to

from mmdata.errors import CheckpointError, UsageError
from mmtrain import checkpoint
from mmtrain.config import TrainOptions
from mmtrain.train import reference
from mmtrain.train.loop import train


@pytest.fixture(scope="module")
def pairs(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair dataset of our own."""
    out = tmp_path_factory.mktemp("pairs") / "dpo"
    pack_to(data, "dpo", out, val_fraction=0.2)
    return out


@pytest.fixture
def dpo(runs: Path, pairs: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Run two steps of dpo with options; gives what it said."""
    numbers = iter(range(100))

    def run(**options: Any) -> list[str]:
        said: list[str] = []
        base: dict[str, Any] = {"steps": 2, "batch_tokens": 512, "lr": 1e-4, "device": "cpu", "init": runs / "sft"}
        base |= {
            "data": (pairs,),
            "out": tmp_path / f"run-{next(numbers)}",
            "report": False,
            "samples": False,
        } | options
        train(TrainOptions(stage="dpo", **base), log=said.append)
        return said

    return run


def computed(said: list[str]) -> bool:
    """Whether the reference was computed, not taken from a cache."""
    made, taken = (any(word in line for line in said) for word in ("pairs computed in", "pairs taken from"))
    assert made != taken
    return made


def test_a_later_run_takes_the_cache_and_learns_the_same(dpo: Callable[..., list[str]], tmp_path: Path) -> None:
    assert computed(dpo(out=tmp_path / "one"))
    assert not computed(dpo(out=tmp_path / "two"))
    one, two = (checkpoint.find(tmp_path / name).weights_sha256 for name in ("one", "two"))
    assert one == two


def test_another_weight_or_dataset_or_precision_computes_anew(
    dpo: Callable[..., list[str]], runs: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dpo()
    assert computed(dpo(init=runs / "pretrain"))
    pack_to(data, "dpo", tmp_path / "dpo", val_fraction=0.3)
    assert computed(dpo(data=(tmp_path / "dpo",)))
    assert not computed(dpo())
    monkeypatch.setattr("mmtrain.train.reference.autocast_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr("mmtrain.train.reference.SPOT_TOLERANCE", {torch.bfloat16: 1.0})
    assert computed(dpo())


def test_a_truncated_cache_is_refused_said_and_replaced(dpo: Callable[..., list[str]], pairs: Path) -> None:
    dpo()
    caches = list(pairs.with_name("dpo.reference").glob("*.arrow"))
    for path in caches:
        path.write_bytes(path.read_bytes()[:-40])
    said = dpo()
    assert computed(said) and any("damaged" in line and "refused" in line for line in said)
    assert not computed(dpo())


def test_another_run_can_be_the_reference_and_is_held_against_its_cache(
    dpo: Callable[..., list[str]], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tmp_path / "one"
    assert computed(dpo(reference=str(runs / "pretrain"), out=one))
    first = json.loads((one / "metrics.jsonl").read_text().splitlines()[0])
    assert first["margin_size"] > 0 and abs(first["chosen_drift"]) > 1  # the policy is not this reference
    assert not computed(dpo(reference=str(runs / "pretrain")))
    load = reference.load
    monkeypatch.setattr(reference, "load", lambda *a: {k: v + 1 for k, v in load(*a).items()})
    with pytest.raises(CheckpointError, match="away from what the reference's weights give"):
        dpo(reference=str(runs / "pretrain"))


@pytest.mark.parametrize("options", [{"reference": "none"}, {"loss": "simpo"}, {"loss": "orpo"}])
def test_without_a_reference_only_the_val_split_is_measured_for_drift(
    dpo: Callable[..., list[str]], tmp_path: Path, options: dict[str, str]
) -> None:
    said = dpo(out=tmp_path / "run", **options)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["chosen_drift"] is None and lines[-1]["val_chosen_drift"] is not None
    assert not any("drift" in line for line in said if "val" not in line) and any("acc" in line for line in said)


@pytest.mark.parametrize("loss", ["sigmoid_norm", "hinge", "ipo"])
def test_every_loss_with_a_reference_starts_at_its_own_value(dpo: Callable[..., list[str]], loss: str) -> None:
    said = dpo(loss=loss, sft_weight=0.1)  # the check at step 0 would stop it
    assert any("acc" in line for line in said)


def test_a_resumed_run_computes_a_lost_cache_again_or_says_that_it_cannot(
    dpo: Callable[..., list[str]], runs: Path, tmp_path: Path, data: Data
) -> None:
    pack_to(data, "dpo", tmp_path / "dpo", val_fraction=0.1)
    out = tmp_path / "run"
    dpo(data=(tmp_path / "dpo",), out=out)
    for path in (tmp_path / "dpo.reference").iterdir():
        path.unlink()
    again = TrainOptions("dpo", (), out, resume=True, device="cpu")
    said: list[str] = []
    train(again, log=said.append)
    assert computed(said)
    scratch = tmp_path / "scratch"
    dpo(data=(tmp_path / "dpo",), init=None, model="tiny", out=scratch, runs_dir=tmp_path)
    for path in (tmp_path / "dpo.reference").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match="are gone"):
        train(replace(again, out=scratch, quiet=True))


def test_where_the_datasets_side_cannot_be_written_the_run_keeps_the_cache(
    dpo: Callable[..., list[str]], tmp_path: Path, data: Data
) -> None:
    pack_to(data, "dpo", tmp_path / "dpo", val_fraction=0.1)
    (tmp_path / "dpo.reference").write_text("in the way")
    said = dpo(data=(tmp_path / "dpo",), out=tmp_path / "run")
    assert any("cannot be written" in line for line in said) and (tmp_path / "run" / "reference.arrow").exists()
    train(TrainOptions("dpo", (), tmp_path / "run", resume=True, device="cpu", quiet=True))


def test_share_prompt_changes_nothing_but_the_work(dpo: Callable[..., list[str]], tmp_path: Path) -> None:
    found = []
    for share in (True, False):
        out = tmp_path / f"share-{share}"
        dpo(share_prompt=share, out=out)
        found.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    for shared, separate in zip(*found, strict=True):
        same = [k for k in shared if k not in ("tokens", "tokens_per_s")]
        assert {k: shared[k] for k in same} == pytest.approx({k: separate[k] for k in same}, rel=1e-4, abs=1e-4)
    assert found[0][0]["tokens"] < found[1][0]["tokens"]


def test_contradicting_options_are_refused(dpo: Callable[..., list[str]], tmp_path: Path, data: Data) -> None:
    with pytest.raises(UsageError, match="belongs to dpo"):
        train(TrainOptions("sft", (data.sft,), tmp_path / "x", model="tiny", loss="ipo", device="cpu"))
    with pytest.raises(UsageError, match="needs --label-smoothing"):
        dpo(loss="robust")
