"""One update, and the learning rate over a run."""

import math

import pytest
import torch
from torch import nn

from mmtrain.train import optim
from mmtrain.train.optim import flat_gradient, learning_rate, update


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7))


@pytest.mark.parametrize("size", [0.1, 100.0])
def test_an_update_is_adamw_on_the_averaged_clipped_gradient(size: int) -> None:
    ours, plain = make(), make()
    gradient = flat_gradient(ours)
    optimizer = optim.make(ours, "adamw", lr=0.01, weight_decay=0.1)
    groups = [
        {"params": [p for p in plain.parameters() if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    expected = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), foreach=False)
    for step in range(4):
        values = torch.randn(len(gradient), generator=torch.Generator().manual_seed(step)) * size
        gradient.copy_(values)
        norm, is_taken = update(optimizer, gradient, lr=0.01, count=8, clip=1.0)
        begin = 0
        for p in plain.parameters():
            p.grad = values[begin : begin + p.numel()].view_as(p) / 8
            begin += p.numel()
        assert is_taken and abs(norm - nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item()) < 1e-4 * norm
        expected.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    model = make()
    gradient, optimizer = flat_gradient(model), optim.make(model, "adamw", lr=0.01, weight_decay=0.1)
    gradient.fill_(1.0)
    update(optimizer, gradient, lr=0.01, count=1, clip=1.0)
    before = [p.clone() for p in model.parameters()]
    moments = [v.clone() for state in optimizer.state.values() for v in state.values()]
    gradient.fill_(1.0)
    gradient[3] = bad
    norm, is_taken = update(optimizer, gradient, lr=0.01, count=1, clip=1.0)
    assert not is_taken and not math.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    after = [v for state in optimizer.state.values() for v in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


def test_gradients_are_views_of_the_flat_vector() -> None:
    model = make()
    gradient = flat_gradient(model)
    model(torch.randn(3, 5)).pow(2).sum().backward()
    assert torch.equal(gradient, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradient.any()


def rates(schedule: str, n: int = 100, warmup: float = 0.1) -> list[float]:
    return [learning_rate(step, n, peak=2.0, schedule=schedule, warmup=warmup) for step in range(n)]


def test_every_schedule_rises_over_the_warmup() -> None:
    for schedule in ("cosine", "wsd", "constant"):
        assert rates(schedule)[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])


def test_cosine_falls_to_a_tenth() -> None:
    found = rates("cosine")
    assert found[10] == pytest.approx(2.0) and found[55] == pytest.approx(1.1) and 0.2 < found[-1] < 0.21
    assert found[10:] == sorted(found[10:], reverse=True)


def test_wsd_holds_and_then_falls_to_nothing() -> None:
    found = rates("wsd")
    assert found[10:81] == [2.0] * 71 and found[90] == pytest.approx(1.0) and found[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_the_shortest_runs_have_a_rate(num_steps: int) -> None:
    for schedule in ("cosine", "wsd", "constant"):
        assert all(0 < rate <= 2 for rate in rates(schedule, num_steps))
