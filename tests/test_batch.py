"""Micro-batches become tensors: positions restart, padding and first tokens never carry loss, packing changes no loss."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from mmdata.shards.loader import Limits, MicroBatch
from mmtrain.model.batch import FILL_TOKENS, counts_of, cut, filled, filling, logps_of, to_device, token_logps_of
from mmtrain.model.model import AttentionLayout, Model, RMSNorm, attend, make_layout
from mmtrain.model.preference import Objective, pair_figures
from mmtrain.shapes import MODEL_SHAPES
from mmtrain.train.optim import flat_gradient

CPU = torch.device("cpu")


def micro(lengths: list[int], spans: list[tuple[int, int, int]], seed: int = 1) -> MicroBatch:
    """Sequences of these lengths; spans are (sequence, begin, end) of trained tokens."""
    cu_seqlens = np.cumsum([0, *lengths]).astype(np.int32)
    mask = np.zeros(cu_seqlens[-1], np.uint8)
    for sequence, begin, end in spans:
        mask[cu_seqlens[sequence] + begin : cu_seqlens[sequence] + end] = 1
    ids = np.random.default_rng(seed).integers(0, 97, len(mask), dtype=np.int32)
    return MicroBatch(ids, mask, cu_seqlens, max(lengths), np.arange(1), int(mask.sum()))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    model = Model(replace(MODEL_SHAPES["tiny"], vocab_size=97))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_positions_restart_and_trained_tokens_know_their_sequence() -> None:
    batch = to_device(micro([3, 2, 4], [(0, 1, 3), (2, 2, 3)]), CPU)
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert batch.trained.tolist() == [1, 2, 7] and batch.sequence_ids.tolist() == [0, 0, 2]
    assert (batch.num_sequences, batch.num_tokens, batch.num_trained) == (3, 9, 3)


def test_a_first_token_is_never_trained() -> None:
    with pytest.raises(AssertionError, match="first token"):
        to_device(micro([3, 3], [(1, 0, 2)]), CPU)


def test_packed_loss_equals_padded_loss(model: Model) -> None:
    """Every document alone, its loss from all its logits in float64, as a padded row would give."""
    lengths = [5, 17, 1, 9, 5]
    packed = micro(lengths, [(i, 1, n) for i, n in enumerate(lengths) if n > 1])
    loss = -token_logps_of(model, to_device(packed, CPU)).sum()
    expected = 0.0
    for begin, end in zip(packed.cu_seqlens, packed.cu_seqlens[1:], strict=False):
        ids = torch.from_numpy(packed.ids[begin:end].astype(np.int64))
        length = len(ids)
        hidden = model(ids, torch.arange(length), torch.tensor([0, length], dtype=torch.int32), length).double()
        log_softmax = (hidden @ model.head_weight.double().T).log_softmax(-1)
        expected -= log_softmax[:-1].gather(1, ids[1:, None]).sum().item()
    assert abs(loss.item() - expected) < 1e-5 * expected


def test_logps_are_sums_over_a_sequences_trained_tokens(model: Model) -> None:
    batch = to_device(micro([6, 8], [(0, 2, 5), (1, 4, 8)]), CPU)
    tokens = token_logps_of(model, batch)
    assert torch.allclose(logps_of(model, batch), torch.stack([tokens[:3].sum(), tokens[3:].sum()]).double())


def test_long_pairs_have_the_loss_and_gradient_of_float64() -> None:
    """Of replies of thousands of nats, by a policy that has moved a little: sums in float32 are off by 1e-5 and more."""
    torch.manual_seed(0)
    lengths = [1020, 920, 820, 1020]
    batch = to_device(micro(lengths, [(i, 20, length) for i, length in enumerate(lengths)]), CPU)
    start = Model(replace(MODEL_SHAPES["tiny"], vocab_size=97))
    moved = deepcopy(start)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.02 * torch.randn_like(parameter) * parameter.abs().mean()

    def exact(model: Model) -> torch.Tensor:
        hidden = model(batch.ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        tokens = (hidden[batch.trained - 1] @ model.head_weight.T).log_softmax(-1)
        tokens = tokens.gather(1, batch.ids[batch.trained, None])[:, 0]
        return torch.stack([tokens[batch.sequence_ids == i].sum() for i in range(4)])

    found = []
    for policy, reference, of in (
        (moved, start, lambda model: logps_of(model, batch)),
        (deepcopy(moved).double(), deepcopy(start).double(), exact),
    ):
        with torch.no_grad():
            ref = of(reference).view(2, 2)
        loss = pair_figures(Objective(), of(policy).view(2, 2), counts_of(batch).view(2, 2), ref)[0].sum()
        loss.backward()
        found.append(
            (loss.item(), torch.cat([p.grad.flatten().double() for p in policy.parameters() if p.grad is not None]))
        )
    (loss, gradient), (true_loss, true_gradient) = found
    assert abs(loss - true_loss) < 3e-6 * true_loss
    assert (gradient - true_gradient).norm() < 3e-6 * true_gradient.norm()


def test_no_trained_tokens_give_no_gradient_and_no_nan(model: Model) -> None:
    loss = token_logps_of(model, to_device(micro([6, 8], []), CPU)).sum()
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@given(st.integers(1, 5000), st.integers(1, 400), st.integers(1, 700), st.integers(1, 3000))
def test_filling_gives_few_shapes(num_tokens: int, num_documents: int, longest: int, budget: int) -> None:
    lengths = filling(num_tokens, num_documents, Limits(budget, longest))
    assert lengths.min() >= 0 and lengths.max() <= longest
    width, documents = num_tokens + int(lengths.sum()), num_documents + len(lengths)
    assert width in [budget >> k for k in range(20)] + [budget << k for k in range(20)] and width <= 2 * num_tokens + 1
    assert documents & (documents - 1) == 0 and documents * FILL_TOKENS >= width - FILL_TOKENS


@pytest.mark.parametrize("budget", [64, 80, 41])
def test_a_filled_micro_batch_has_the_same_loss_and_gradient_and_counts(model: Model, budget: int) -> None:
    lengths = [5, 17, 2, 9, 8]
    whole = micro(lengths, [(i, 1, n) for i, n in enumerate(lengths)])
    plain, full = to_device(whole, CPU), filled(whole, CPU, Limits(budget, 30))
    assert len(plain.ids) == 41 and len(full.ids) == len(full.position_ids) == int(full.cu_seqlens[-1]) == budget
    assert full.max_seqlen == 30 and int(full.cu_seqlens.diff().max()) <= 30
    for name in ("num_tokens", "num_trained", "num_sequences"):
        assert getattr(full, name) == getattr(plain, name)
    gradient = flat_gradient(model)
    sums = []
    for batch in (plain, full):
        gradient.zero_()
        logps = logps_of(model, batch)
        (-logps).sum().backward()
        sums.append((logps.detach().clone(), gradient.clone()))
    for a, b in zip(*sums, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_filled_micro_batches_of_one_budget_run_in_one_graph(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the layout of CUDA, its kernel replaced by an operator of ours; documents, their number and lengths differ."""

    @torch.library.custom_op("mm_test::by_document", mutates_args=())
    def by_document(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int
    ) -> torch.Tensor:
        assert int(ends.diff().max()) <= longest
        layout = make_layout(ends, longest, CPU)
        assert layout.order is None or layout.restore is not None
        order = slice(None) if layout.order is None else layout.order
        out = attend(q[order], k[order], v[order], layout)
        return out.clone() if layout.restore is None else out[layout.restore]

    @by_document.register_fake
    def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int) -> torch.Tensor:
        return torch.empty_like(q)

    def like_cuda(ends: torch.Tensor, longest: int, device: torch.device) -> AttentionLayout:
        return AttentionLayout(None, None, [], ends, longest)

    monkeypatch.setattr("mmtrain.model.model.make_layout", like_cuda)
    monkeypatch.setattr(
        "mmtrain.model.model._attend_varlen",
        lambda q, k, v, layout: by_document(q, k, v, layout.cu_seqlens, layout.max_seqlen),
    )
    monkeypatch.setattr(RMSNorm, "forward", lambda norm, x: F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps))
    monkeypatch.setattr("mmtrain.model.batch.FILL_TOKENS", 2)
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        graphs.append(1)
        return graph.forward

    torch._dynamo.reset()
    for block in model.model.layers:
        block.compile(backend=backend)
    with torch.no_grad():
        for seed, lengths in enumerate(([30, 5, 20, 31], [3] * 31, [17, 25, 28, 19], [32, 32, 32], [29, 2, 2, 30, 21])):
            token_logps_of(model, filled(micro(lengths, [(0, 1, 3)], seed), CPU, Limits(128, 32)))
            if seed == 0:
                warm = len(graphs)
    assert len(graphs) == warm


@given(st.lists(st.integers(2, 30), min_size=2, max_size=12), st.integers(1, 90), st.booleans())
@examples(40)
def test_any_cut_of_a_micro_batch_has_the_same_gradient(lengths: list[int], most: int, is_pairs: bool) -> None:
    lengths = lengths[: len(lengths) // 2 * 2] if is_pairs else lengths
    whole = micro(lengths, [(i, 1, n) for i, n in enumerate(lengths) if i % 3 or i == 0])
    whole = replace(whole, samples=np.arange(len(lengths) // 2)) if is_pairs else whole
    pieces = cut(whole, most, is_pairs)
    unit = 2 if is_pairs else 1
    for piece in pieces:
        assert len(piece.ids) <= most or len(piece.cu_seqlens) == unit + 1
        assert piece.max_seqlen == np.diff(piece.cu_seqlens).max() and piece.num_loss_tokens == piece.loss_mask.sum()
    assert np.array_equal(np.concatenate([piece.ids for piece in pieces]), whole.ids)
    assert np.array_equal(np.concatenate([np.diff(piece.cu_seqlens) for piece in pieces]), lengths)
    if is_pairs:
        assert np.array_equal(np.concatenate([piece.samples for piece in pieces]), whole.samples)
    torch.manual_seed(0)
    model = Model(replace(MODEL_SHAPES["tiny"], vocab_size=97, hidden_size=16, ffn_size=16, num_layers=1))
    gradient = flat_gradient(model)
    sums = []
    for parts in ([whole], pieces):
        gradient.zero_()
        for part in parts:
            (-token_logps_of(model, to_device(part, CPU)).sum()).backward()
        sums.append(gradient.clone())
    assert torch.allclose(*sums, rtol=1e-4, atol=1e-4 * float(sums[0].abs().max()))
