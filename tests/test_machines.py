"""Machines without CUDA: Apple's GPU (simulated), and systems without the POSIX-only modules."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Run, fine
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from train_data import Data
from train_runs import config_of

from mmdata.errors import UsageError
from mmdata.shards.loader import Limits, MicroBatch
from mmtrain import distributed
from mmtrain.distributed import GradientSum, World, choose_device, join
from mmtrain.inference.evaluate import _pair_sums, _text_sums
from mmtrain.model import precision
from mmtrain.model.batch import to_device, token_logps_of
from mmtrain.model.model import Model
from mmtrain.model.precision import LossScale
from mmtrain.shapes import shape_of
from mmtrain.train import optim
from mmtrain.train.loop import _add_up, train
from mmtrain.train.plan import make_plan

META = torch.device("meta")
ROOT = Path(__file__).parent.parent
ROOMS = ("mmdata", "mmtrain")


class AnyDeviceAdamW(torch.optim.AdamW):
    """torch's AdamW with an implementation that there is for every device, which takes no scale."""

    def __init__(self, groups: Any, **options: Any) -> None:
        options |= {"fused": False, "foreach": True}
        super().__init__(groups, **options)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.grad_scale = self.found_inf = None
        super().step(closure)


class WithoutFp64(TorchDispatchMode):
    """Raises for a tensor of fp64 on the meta device, as Apple's MPS does; counts the operations there."""

    num_ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                assert tensor.dtype != torch.float64, func
                self.num_ops += 1
        return out


@pytest.mark.parametrize(
    ("stage", "given"),
    [
        ("pretrain", {}),
        ("sft", {}),
        ("dpo", {"share_prompt": False}),
        ("dpo", {"share_prompt": True}),
        ("dpo", {"loss": "orpo"}),
    ],
)
def test_every_stage_runs_on_a_device_without_fp64(
    stage: str, given: dict[str, Any], data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On torch's meta device, which has shapes and types but no values, so nothing may read one on the host."""
    monkeypatch.setattr(precision, "WITHOUT_FP64", ("meta",))
    monkeypatch.setattr(optim, "TAKE_SCALE", ("meta",))  # else the host reads whether the step is taken
    monkeypatch.setattr(torch.optim, "AdamW", AnyDeviceAdamW)
    plan = make_plan(config_of(stage, data, tmp_path / "run", model="tiny", **given), World(0, 1, torch.device("cpu")))
    with META:
        model = Model(plan.shape)
    run = SimpleNamespace(
        plan=plan,
        world=World(0, 1, META),
        model=model,
        gradient=optim.flat_gradient(model),
        gradient_sum=GradientSum(World(0, 1, META), torch.empty(0), []),
        scale=LossScale(torch.float32, META),
        ref={"train": torch.zeros(plan.loader.num_samples, 2, dtype=torch.float64)} if plan.is_pairs else {},
        most_tokens=None,
        step=0,
        log=SimpleNamespace(within=lambda *_: None),
        largest_micro=0,
    )
    optimizers = [optim.make(model, name, lr=1e-3, weight_decay=0.1) for name in ("adamw", "muon")]
    with WithoutFp64() as mode:
        sums = _add_up(run, plan.loader.batch(0))  # type: ignore[arg-type]
        batch = to_device(next(iter(plan.val_loader.micro_batches())), META)
        token_bytes = torch.ones(plan.shape.vocab_size, dtype=torch.int64, device=META)
        figures = [_text_sums(batch, token_logps_of(model, batch), token_bytes, chosen_only=plan.is_pairs)]
        if plan.is_pairs:
            figures.append(_pair_sums(batch, token_logps_of(model, batch), None, plan.objective))
        for optimizer in optimizers:
            figures += optim.update(optimizer, run.gradient, lr=1e-3, count=sums[1], clip=1.0)
    assert mode.num_ops > 100 and run.largest_micro > 0
    assert all(each.is_meta and each.dtype == torch.float32 for each in (sums, *figures))


@pytest.mark.skipif(
    not torch.backends.cuda.is_built() or torch.cuda.is_available(),
    reason="needs torch built with CUDA, on a machine without a card; this torch has none to trace, or a card runs it",
)
@pytest.mark.parametrize("given", [{}, {"qk_norm": True, "tied": False, "qkv_bias": True}])
def test_the_forward_pass_is_traced_on_cuda_without_a_card(given: dict[str, Any]) -> None:
    """With autocast and padding as in training: types and shapes of torch's CUDA kernels, without values."""
    ids = torch.arange(40).int().numpy()
    mask = (ids % 20 > 0).astype("uint8")
    micro = MicroBatch(ids, mask, np.append(ids[::20], np.int32(40)), 20, ids[:2], int(mask.sum()))
    cuda = torch.device("cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with cuda:
            model = Model(replace(shape_of("tiny", 300), **given))
        torch.set_autocast_enabled("cuda", True)  # torch.autocast does nothing without a card
        try:
            batch = to_device(micro, cuda, Limits(64, 32))
            assert len(batch.ids) == 64 and batch.cu_seqlens.is_cuda
            hidden = model(batch.ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
            logps = token_logps_of(model, batch)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert hidden.is_cuda and hidden.shape == (64, 64) and hidden.requires_grad
    assert logps.is_cuda and logps.shape == (38,) and logps.dtype == torch.float32


def test_an_optimizer_without_a_scale_of_its_own_makes_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def stepped(gradients: list[float]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = optim.make(model, "adamw", lr=0.1, weight_decay=0.1)
        flat = optim.flat_gradient(model)
        for value in gradients:
            flat.copy_(torch.arange(15.0) * value)
            norm, is_taken = optim.update(optimizer, flat, lr=0.1, count=7.0, clip=1.0)
            assert is_taken.item() == (value == value), norm
        return [p.detach().clone() for p in model.parameters()]

    expected = stepped([1.0, float("nan"), -3.0])
    monkeypatch.setattr(optim, "TAKE_SCALE", ())
    for ours, theirs in zip(stepped([1.0, float("nan"), -3.0]), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_auto_takes_apples_gpu_where_torch_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    for name in ("cuda", "mps"):
        with pytest.raises(UsageError, match=f"torch sees no {name.upper()} device"):
            choose_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("mps") == torch.device("mps")
    assert precision.widest(torch.device("mps")) == precision.autocast_dtype(torch.device("mps")) == torch.float32
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="2 ranks on MPS"):
        join("auto")
    assert not distributed.dist.is_initialized()


def test_a_run_on_the_cpu_does_not_touch_a_card_that_is_there(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*_: Any, **__: Any) -> None:
        raise AssertionError("the card is used")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("max_memory_allocated", "memory_allocated", "mem_get_info", "get_rng_state", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, touched)
    result = train(config_of("sft", data, tmp_path / "run", model="tiny", steps=1, quiet=True))
    assert result.final_step == 1 and result.peak_bytes > 10**7


def test_commands_work_without_posix_only_modules(home: Path, mm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: an import of one of them fails. test_architecture.py checks that none is imported at a top."""
    for name in ("fcntl", "resource", "pwd", "grp", "termios", "pty", "posix"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        import resource  # noqa: F401
    ours = sorted(str(path.relative_to(ROOT).with_suffix("")) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    names = [name.replace("/", ".").removesuffix(".__init__") for name in [*ours, "cli"]]
    imported = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    try:
        assert len(names) > 100 and all(importlib.import_module(name).__name__ == name for name in names)
    finally:  # the commands below use the modules that the other tests have
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(imported)
    fine(mm("pack --workers 1 --no-report"))
    fine(mm("verify shards/pretrain_hq"))
    fine(mm("train pretrain --model tiny --steps 2 --quiet"))
    fine(mm("train sft --steps 2 --quiet"))
    answer = json.loads(fine(mm("chat --prompt 'one and two?' --max-new-tokens 3 --json")).out)
    assert isinstance(answer["answer"], str)
    run = json.loads((home / "runs/sft-1/run.json").read_text())
    assert run["result"]["peak_bytes"] > 0 and run["preflight"]["free_bytes"] > 0
