"""Losses against plain float64 references, written here without looking at the implementation."""

from fractions import Fraction

import pytest
import torch

from mmtrain.model.logps import sum_by_sequence, token_logps, trained_logps


def inputs(n: int = 37, c: int = 16, v: int = 53) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(n, c, generator=generator) * 3
    weight = torch.randn(v, c, generator=generator)
    targets = torch.randint(0, v, (n,), generator=generator)
    return hidden, weight, targets, torch.randn(n, generator=generator)


@pytest.mark.parametrize("chunk", [1, 7, 37, 1000])
def test_chunked_logps_and_gradients_equal_a_float64_reference(chunk: int) -> None:
    hidden, weight, targets, upstream = inputs()
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = (h64 @ w64.T).log_softmax(-1)[torch.arange(len(targets)), targets]
    (expected * upstream.double()).sum().backward()
    hidden.requires_grad_(), weight.requires_grad_()
    logps = token_logps(hidden, weight, targets, chunk=chunk)
    (logps * upstream).sum().backward()
    assert logps.dtype == torch.float32 and (logps - expected).abs().max() < 2e-5
    for found, reference in ((hidden.grad, h64.grad), (weight.grad, w64.grad)):
        assert found is not None and reference is not None
        assert (found - reference).abs().max() < 1e-5 * reference.abs().max()


def test_half_width_inputs_still_give_full_width_logps() -> None:
    hidden, weight, targets, upstream = inputs()
    low_hidden, low_weight = hidden.bfloat16().double(), weight.bfloat16().double()
    expected = (low_hidden @ low_weight.T).log_softmax(-1)[torch.arange(len(targets)), targets]
    hidden.requires_grad_(), weight.requires_grad_()
    logps = token_logps(hidden, weight, targets, chunk=8, dtype=torch.bfloat16)
    (logps * upstream).sum().backward()
    assert logps.dtype == torch.float32 and (logps - expected).abs().max() < 2e-5
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32 and hidden.grad.isfinite().all()


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, targets, _ = inputs()
    hidden = (hidden * 1e4).requires_grad_()
    token_logps(hidden, weight, targets).sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_the_token_is_predicted_from_the_position_before_it() -> None:
    hidden, weight, _, _ = inputs()
    ids = torch.randint(0, 53, (37,), generator=torch.Generator().manual_seed(4))
    trained = torch.tensor([1, 5, 36])
    log_softmax = (hidden @ weight.T).log_softmax(-1)
    expected = torch.stack([log_softmax[t - 1, ids[t]] for t in (1, 5, 36)])
    assert (trained_logps(hidden, weight, ids, trained) - expected).abs().max() < 2e-5


def test_without_trained_tokens_the_loss_is_zero_and_so_are_its_gradients() -> None:
    hidden, weight, _, _ = inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    loss = -trained_logps(hidden, weight, torch.zeros(37, dtype=torch.int64), none).sum()
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


def test_sums_go_to_their_sequence() -> None:
    sums = sum_by_sequence(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2]), 4)
    assert sums.tolist() == [1, 0, 6, 0]


def test_the_sum_of_a_long_reply_loses_nothing() -> None:
    logps = -4 * torch.rand(3000, generator=torch.Generator().manual_seed(0))
    total = sum_by_sequence(logps, torch.zeros(3000, dtype=torch.int64), 1)
    exact = sum(Fraction(value) for value in logps.tolist())
    assert (
        abs(float(exact)) > 4096 and abs(Fraction(total.item()) - exact) < 1e-8
    )  # float32's neighbours are 5e-4 apart
