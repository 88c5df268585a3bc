"""A prompt computed once for both replies gives what computing it twice gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmdata.shards.dataset import loss_mask
from mmdata.shards.loader import Limits, MicroBatch
from mmtrain.model.attention import BLOCK, attend_pairs, block_mask, make_pair_layout
from mmtrain.model.batch import filled, logps_of, to_device
from mmtrain.model.model import Model
from mmtrain.shapes import ModelConfig

CPU = torch.device("cpu")
SHAPE = ModelConfig(97, 32, 3, 4, 2, 64, qk_norm=True, max_positions=512)
Pairs = list[tuple[int, int, int]]
CASES = {
    "plain": [(20, 15, 11), (3, 30, 8)],
    "empty prompt": [(0, 12, 9), (7, 5, 6), (0, 4, 4)],
    "several turns": [(9, 40, 25), (30, 31, 2)],
    "one side at the limit": [(100, 412, 1), (511, 1, 1), (1, 511, 511)],
}


def micro_batch(pairs: Pairs, *, shared: bool, seed: int = 0) -> MicroBatch:
    """Random pairs of these lengths in either layout, the same tokens in both; replies of over 20 tokens have two spans."""
    draw = np.random.default_rng(seed)
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    ends = [0]
    for prompt, chosen, rejected in pairs:
        head, *replies = (draw.integers(0, 97, n) for n in (prompt, chosen, rejected))
        for side, reply in enumerate(replies):
            first = 0 if prompt else 1
            spans = [first, len(reply)] if len(reply) <= 20 else [first, 7, 12, len(reply)]
            if not (shared and side):
                ids.append(head)
                masks.append(np.zeros(prompt, np.uint8))
            ids.append(reply)
            masks.append(loss_mask(np.array(spans), len(reply)))
            if side or not shared:
                ends.append(sum(map(len, ids)))
    mask = np.concatenate(masks)
    lengths = np.array(pairs, np.int64) if shared else None
    cu_seqlens = np.array(ends, np.int32)
    flat = np.concatenate(ids).astype(np.int32)
    longest = int(np.diff(cu_seqlens).max())
    return MicroBatch(flat, mask, cu_seqlens, longest, np.arange(len(pairs)), int(mask.sum()), lengths)


def run(model: Model, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed logps and the gradient of a mixture of them."""
    model.zero_grad()
    logps = logps_of(model, to_device(micro, CPU))
    (logps * torch.linspace(-1, 1.3, len(logps))).sum().backward()
    return logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", list(CASES))
def test_shared_equals_separate(name: str) -> None:
    torch.manual_seed(1)
    model = Model(SHAPE)
    shared, separate = (run(model, micro_batch(CASES[name], shared=is_shared)) for is_shared in (True, False))
    for a, b in zip(shared, separate, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_filled_pairs_give_the_same_logps() -> None:
    """The documents that fill up are prompts without replies; on the CPU those of no length are left out."""
    torch.manual_seed(2)
    model = Model(SHAPE)
    micro = micro_batch(CASES["plain"], shared=True)
    batch = filled(micro, CPU, Limits(128, 50))
    assert batch.shared is not None and len(batch.ids) == int(batch.shared.sum()) == 128
    batch = replace(batch, shared=batch.shared[batch.shared.sum(1) > 0])
    expected = logps_of(model, to_device(micro, CPU))
    assert (logps_of(model, batch) - expected).norm() <= 1e-6 * expected.norm()


def test_packed_equals_one_pair_at_a_time() -> None:
    torch.manual_seed(2)
    model = Model(SHAPE)
    micro = micro_batch(CASES["plain"], shared=True)
    logps, _ = run(model, micro)
    cut = int(micro.cu_seqlens[1])
    for i, (begin, end) in enumerate(((0, cut), (cut, len(micro.ids)))):
        ends = np.array([0, end - begin], np.int32)
        mask = micro.loss_mask[begin:end]
        assert micro.shared is not None
        one = MicroBatch(micro.ids[begin:end], mask, ends, end - begin, np.arange(1), 0, micro.shared[i : i + 1])
        alone, _ = run(model, one)
        assert (alone - logps[2 * i : 2 * i + 2]).abs().max() <= 1e-5 * alone.abs().max()


def test_rejected_does_not_see_chosen() -> None:
    torch.manual_seed(3)
    model = Model(SHAPE)
    micro = micro_batch([(6, 10, 9)], shared=True)
    before, _ = run(model, micro)
    micro.ids[6:16] = (micro.ids[6:16] + 1) % 97
    after, _ = run(model, micro)
    assert after[1] == before[1] and after[0] != before[0]


def test_a_first_trained_token_without_anything_before_it_is_refused() -> None:
    micro = micro_batch([(0, 5, 4)], shared=True)
    micro.loss_mask[5] = 1
    with pytest.raises(AssertionError, match="without a prompt"):
        to_device(micro, CPU)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_mask_for_cuda_allows_the_same_and_its_blocks_cover_it() -> None:
    pairs = torch.tensor([[5, 7, 3], [0, 9, 4], [130, 160, 177], [20, 3, 9]])
    size = int(pairs.sum())
    mask = block_mask(pairs)
    torch.manual_seed(0)
    q, k, v = (torch.randn(size, heads, 16) for heads in (4, 2, 2))
    from mmtrain.model.attention import PairLayout

    found = attend_pairs(q, k, v, PairLayout([], mask))
    expected = attend_pairs(q, k, v, make_pair_layout(pairs, CPU))
    assert (found - expected).abs().max() < 1e-5
    at = torch.arange(size)
    seen = mask.mask_mod(0, 0, at[:, None], at[None])
    blocks = mask.to_dense()[0, 0].bool()
    rows, columns = (x // BLOCK for x in seen.nonzero().T)
    assert blocks[rows, columns].all()
