"""What a run will take is known before it begins: memory by part, the largest micro-batch that fits, disk."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from train_data import Data

from mmdata.errors import DiskError, TrainError
from mmdata.shards.dataset import open_dataset
from mmdata.shards.loader import MicroBatch
from mmdata.shards.pairs import make_loader, pair_lengths
from mmtrain import checkpoint
from mmtrain.config import TrainOptions
from mmtrain.model.batch import cut, to_device
from mmtrain.train import preflight
from mmtrain.train.loop import train
from mmtrain.train.run import needs_of


@pytest.fixture
def run(data: Data, tmp_path: Path) -> TrainOptions:
    base = TrainOptions("sft", (data.sft,), tmp_path / "run", model="tiny", steps=2, batch_tokens=1024)
    return replace(base, device="cpu", quiet=True, runs_dir=tmp_path)


def test_a_forecast_counts_every_part_and_writes_nothing(run: TrainOptions) -> None:
    few, many = (needs_of(replace(run, micro_tokens=size)) for size in (128, 512))
    assert not run.out.exists()
    assert few.parts["weights"] == 4 * few.num_params and few.parts["optimizer"] == 8 * few.num_params
    assert few.parts["checkpoint copy"] == 12 * few.num_params and few.disk_bytes == 4 * 12 * few.num_params
    assert 3 < many.parts["activations"] / few.parts["activations"] < 5
    assert few.peak_bytes == sum(few.parts.values()) and few.num_steps == 2 and few.seconds > 0


@pytest.mark.parametrize(("each", "size"), [(1e-5, 2048), (3e-3, 1024), (1e-2, 256), (0.07, 64), (1.0, 64)])
def test_the_probe_ends_in_time_and_measures_the_largest_size_it_can(
    run: TrainOptions, monkeypatch: pytest.MonkeyPatch, each: float, size: int
) -> None:
    """Small batches are slower by the token: a plan that only knew them would promise a longer run. An interrupted pass
    is not the speed."""
    passes: list[int] = []
    now = [0.0]

    def take(model: object, micro: MicroBatch) -> float:
        passes.append(len(micro.ids))
        seconds = each * len(micro.ids) * (4 if passes.count(len(micro.ids)) == 2 else 1)
        now[0] += seconds
        return seconds

    monkeypatch.setattr(preflight, "_pass_seconds", take)
    monkeypatch.setattr(preflight, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    needs = needs_of(replace(run, batch_tokens=2048, micro_tokens=2048))
    assert passes[-1] == pytest.approx(size, rel=0.25) and needs.tokens_per_s == pytest.approx(1 / each)
    assert now[0] <= preflight.PROBE_S or len(set(passes)) == 1
    assert len(passes) <= len(preflight.PROBE_TOKENS) + preflight.PASSES - 1


def test_the_beginning_of_a_micro_batch_has_so_many_tokens(data: Data) -> None:
    """Whole sequences and pairs, except for a first one that is too long."""
    for path, is_pairs in ((data.sft, False), (data.dpo, True)):
        for share in (False, True) if is_pairs else (False,):
            options = {"share_prompt": share, "batch_tokens": 1024, "seed": 0}
            (micro, *_) = make_loader([open_dataset(path)], **options).batch(0)
            first = len(cut(micro, 1, is_pairs)[0].ids)
            for tokens in (8, first - 1, first, len(micro.ids), 10**6):
                part = preflight.beginning(micro, tokens, is_pairs)
                size = len(part.ids)
                assert size == tokens if tokens < first else first <= size <= tokens
                assert (part.ids == micro.ids[:size]).all() and part.cu_seqlens[-1] == size
                assert part.num_loss_tokens == part.loss_mask.sum() > 0
                assert to_device(part, torch.device("cpu")).num_tokens == size


@pytest.mark.parametrize("share_prompt", [True, False])
def test_the_time_of_pairs_is_that_of_the_tokens_that_are_computed(
    data: Data, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share_prompt: bool
) -> None:
    monkeypatch.setattr(preflight, "_pass_seconds", lambda _, micro: len(micro.ids) / 100)  # 100 tokens a second
    options = TrainOptions("dpo", (data.dpo,), tmp_path / "run", init=runs / "sft", epochs=1.0, batch_tokens=1024)
    needs = needs_of(replace(options, device="cpu", quiet=True, share_prompt=share_prompt, val_every=0))
    train_tokens, val_tokens = (
        int((pair_lengths(open_dataset(data.dpo).split(split)) @ (1 if share_prompt else 2, 1, 1)).sum())
        for split in ("train", "val")
    )
    known = needs.reference_s or (train_tokens + val_tokens) / 3 / 100  # 0: another test has left the logps
    assert known == pytest.approx((train_tokens + val_tokens) / 3 / 100, rel=0.01)
    run_s = needs.seconds - needs.reference_s - needs.forecast_s
    assert run_s == pytest.approx((train_tokens + 2 / 3 * val_tokens) / 100, rel=0.05)


def test_what_autograd_keeps_is_counted(run: TrainOptions) -> None:
    """By hand for a block of width C with KV = C / 2 and feed-forward F: two inputs, two norms, q and what attention gives
    (before and after documents are joined) are 7 C; q, k and v stand together once more; gate, up, silu and product 4 F."""
    forecast = needs_of(replace(run, micro_tokens=128))
    width, ffn = 64, 176
    by_hand = 4 * 2 * (7 * width + 2 * width + width + 4 * ffn) * 128
    assert 0.8 < forecast.parts["activations"] / by_hand < 1.25


def test_checkpointed_activations_take_less_memory_and_give_the_same_run(run: TrainOptions) -> None:
    plain, lean = (replace(run, out=run.out.with_name(name), checkpoint_activations=name == "b") for name in "ab")
    few, many = needs_of(lean), needs_of(plain)
    assert few.parts["activations"] < 0.8 * many.parts["activations"]
    train(plain), train(lean)
    weights = [checkpoint.load_model(one.out)[0].state_dict() for one in (plain, lean)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_run_that_cannot_fit_is_refused_with_the_largest_that_does(
    run: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "used_bytes", lambda device: 0)  # this process grows from test to test
    forecast = needs_of(replace(run, micro_tokens=1024))
    room = forecast.peak_bytes - forecast.parts["activations"] // 3
    monkeypatch.setattr(preflight, "free_bytes", lambda device: int(room / preflight.HEADROOM))
    with pytest.raises(TrainError, match="1,024 tokens at once need about") as caught:
        train(replace(run, micro_tokens=1024))
    assert "--micro-tokens" in caught.value.fix and not run.out.exists()
    train(run)  # with none given a size is chosen that fits
    assert checkpoint.find(run.out).state.settings["micro_tokens"] < 1024
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 1000)
    with pytest.raises(TrainError, match="tokens at once") as caught:
        train(replace(run, out=run.out.with_name("other")))
    assert "--checkpoint-activations" in caught.value.fix


def test_a_full_disk_is_noticed_before_the_first_step(run: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(DiskError, match="checkpoints need up to"):
        train(run)
    assert not run.out.exists()
