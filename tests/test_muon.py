"""Muon against torch's own step by step, its orthogonalisation against a singular value decomposition, and its skips."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from train_data import Data, run_json
from train_runs import at_step, config_of, interrupt, lines

from mmdata.errors import UsageError
from mmtrain import checkpoint
from mmtrain.config import TrainOptions
from mmtrain.train import muon
from mmtrain.train.loop import train
from mmtrain.train.muon import COEFFICIENTS, EPS, ITERATIONS, MOMENTUM, Muon, orthogonalized
from mmtrain.train.optim import flat_gradient, make, update

SHAPES = [(24, 40), (40, 24), (24, 40), (32, 32), (24, 40)]


def hidden_matrices() -> nn.ParameterList:
    draw = torch.Generator().manual_seed(1)
    return nn.ParameterList(nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES)


def gradients(step: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=draw) * 10.0 ** (step % 3 - 1) for shape in SHAPES]


def by_svd(x: torch.Tensor) -> torch.Tensor:
    """The same map on singular values alone, in double precision."""
    a, b, c = COEFFICIENTS
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm().clamp(min=EPS)
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12), (1, 9), (9, 1)])
def test_orthogonalising_maps_the_singular_values_and_nothing_else(shape: tuple[int, int]) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for found, matrix in zip(orthogonalized(x), x, strict=True):
        assert (found.double() - by_svd(matrix)).abs().max() < 2e-5


def test_a_zero_matrix_stays_zero_and_batches_do_not_mix() -> None:
    x = torch.randn(2, 6, 8)
    x[1] = 0
    found = orthogonalized(x)
    assert not found[1].any() and torch.allclose(found[0], orthogonalized(x[:1])[0], atol=1e-6)


@pytest.mark.parametrize("chunk_elements", [1, 2 * 24 * 40, 2**25])
def test_steps_equal_torchs_muon(chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's works in bf16 one matrix at a time, so does ours here; batched products may round once differently."""
    monkeypatch.setattr(muon, "_product_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(muon, "CHUNK_ELEMENTS", chunk_elements)
    ours, torchs = hidden_matrices(), hidden_matrices()
    settings = {"lr": 0.02, "weight_decay": 0.1}
    optimizer = Muon(
        ours.parameters(), [{"params": [nn.Parameter(torch.ones(2))]}], betas=(0.9, 0.95), eps=1e-8, **settings
    )
    expected = torch.optim.Muon(torchs.parameters(), momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw", **settings)
    for step in range(12):
        for a, b, gradient in zip(ours, torchs, gradients(step), strict=True):
            a.grad, b.grad = gradient.clone(), gradient.clone()
        begun = [p.detach().clone() for p in torchs]
        optimizer.step()
        expected.step()
        for a, b, c in zip(ours, torchs, begun, strict=True):
            moved = (b - c).norm()
            assert (a - b).norm() < 0.01 * moved, f"step {step}"
            assert torch.allclose(optimizer.state[a]["momentum"], expected.state[b]["momentum_buffer"], atol=1e-6)
            with torch.no_grad():
                a.copy_(b)  # every step is compared on its own


def test_in_fp32_steps_equal_the_rule_in_double_precision() -> None:
    ours = hidden_matrices()
    optimizer = Muon(
        ours.parameters(),
        [{"params": [nn.Parameter(torch.ones(2))]}],
        lr=0.02,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    weights = [p.detach().double() for p in ours]
    buffers = [torch.zeros_like(w) for w in weights]
    for step in range(6):
        for i, gradient in enumerate(gradients(step)):
            ours[i].grad = gradient
            buffers[i] = MOMENTUM * buffers[i] + (1 - MOMENTUM) * gradient.double()
            direction = by_svd(MOMENTUM * buffers[i] + (1 - MOMENTUM) * gradient.double())
            weights[i] = weights[i] * (1 - 0.02 * 0.1) - 0.02 * 0.2 * math.sqrt(max(SHAPES[i])) * direction
        optimizer.step()
    for found, expected in zip(ours, weights, strict=True):
        assert (found.double() - expected).abs().max() < 2e-5


class Small(nn.Module):
    """A model with each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
        self.norm = nn.LayerNorm(6)


def fill(gradient: torch.Tensor, step: int) -> torch.Tensor:
    return gradient.copy_(torch.randn(len(gradient), generator=torch.Generator().manual_seed(step)))


def test_embedding_and_norms_go_by_adamw() -> None:
    ours, plain = Small(), Small()
    optimizers = [make(ours, "muon", lr=0.01, weight_decay=0.1), make(plain, "adamw", lr=0.01, weight_decay=0.1)]
    flats = [flat_gradient(ours), flat_gradient(plain)]
    for step in range(3):
        for optimizer, flat in zip(optimizers, flats, strict=True):
            update(optimizer, fill(flat, step), lr=0.02 / (step + 1), count=3, clip=1.0)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b) == ("layers" not in name), name
        assert set(optimizers[0].state[a]) == ({"momentum"} if "layers" in name else {"step", "exp_avg", "exp_avg_sq"})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_found_infinite_changes_nothing(bad: float) -> None:
    """By `found_inf`, as fused AdamW has it: the device is not asked."""
    model = Small()
    gradient, optimizer = flat_gradient(model), make(model, "muon", lr=0.01, weight_decay=0.1)
    update(optimizer, fill(gradient, 0), lr=0.01, count=1, clip=1.0)
    before = [p.clone() for p in model.parameters()]
    state = [v.clone() for s in optimizer.state.values() for v in s.values()]
    fill(gradient, 1)[:50] = bad
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    after = [v for s in optimizer.state.values() for v in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
    update(optimizer, fill(gradient, 2), lr=0.01, count=1, clip=1.0)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_grad_scale_divides_the_gradient() -> None:
    """Muon forgets a gradient's size but not how it weighs against the momentum."""
    scaled, plain = Small(), Small()
    optimizers = [make(m, "muon", lr=0.01, weight_decay=0.1) for m in (scaled, plain)]
    flats = [flat_gradient(scaled), flat_gradient(plain)]
    for step, scale in enumerate((1.0, 64.0, 1 / 16)):
        fill(flats[0], step).mul_(scale)
        fill(flats[1], step)
        optimizers[0].grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


# --- in a run -------------------------------------------------------------------------------------------------------


def test_a_run_learns_with_muon_and_resumes_to_the_last_bit(data: Data, tmp_path: Path) -> None:
    whole, broken = (
        config_of("pretrain", data, tmp_path / name, model="tiny", optimizer="muon") for name in ("whole", "broken")
    )
    train(replace(whole, quiet=True))
    with pytest.raises(KeyboardInterrupt):
        train(broken, log=at_step(5, interrupt))
    train(TrainOptions("pretrain", (), broken.out, resume=True, device="cpu", quiet=True))
    assert lines(broken.out) == lines(whole.out) and lines(whole.out)[-2]["loss"] < lines(whole.out)[0]["loss"]
    assert checkpoint.find(broken.out).weights_sha256 == checkpoint.find(whole.out).weights_sha256
    assert run_json(whole.out)["settings"]["optimizer"] == {"value": "muon", "from": "flag"}


def test_sft_goes_by_muon_only_from_weights_that_muon_has_trained(data: Data, tmp_path: Path) -> None:
    for name in ("muon", "adamw"):
        train(config_of("pretrain", data, tmp_path / name, model="tiny", optimizer=name, steps=2, quiet=True))
    sft = config_of(
        "sft", data, tmp_path / "sft", init=tmp_path / "adamw", optimizer="muon", quiet=True, steps=2, lr=None
    )
    with pytest.raises(UsageError, match="was not trained by muon"):
        train(sft)
    train(replace(sft, init=tmp_path / "muon"))
    assert run_json(sft.out)["settings"]["lr"] == {"value": 1.2e-3, "from": "default"}
