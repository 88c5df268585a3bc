"""Pairs by token budget: every pair once, the same steps for all ranks and layouts, nothing padded."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mmdata.shards.dataset import Dataset, open_dataset
from mmdata.shards.loader import MicroBatch
from mmdata.shards.pairs import PairLoader, spread


@pytest.fixture(scope="module")
def dataset(packed: dict[str, Any]) -> Dataset:
    return open_dataset(packed["pair"].out)


def steps_of(dataset: Dataset, *, world_size: int = 1, **options: Any) -> list[set[int]]:
    """The pairs of every step of two epochs, ranks joined."""
    loaders = [PairLoader([dataset], seed=7, rank=r, world_size=world_size, **options) for r in range(world_size)]
    return [
        {n for loader in loaders for micro in loader.batch(k) for n in micro.samples.tolist()}
        for k in range(2 * loaders[0].steps_per_epoch)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("share_prompt", [False, True])
@pytest.mark.parametrize("micro_tokens", [1, 900, None])
def test_the_pairs_of_a_step_depend_on_neither_ranks_nor_micro_batches_nor_layout(
    dataset: Dataset, world_size: int, share_prompt: bool, micro_tokens: int | None
) -> None:
    alone = steps_of(dataset, batch_tokens=3000)
    options = {"share_prompt": share_prompt, "micro_tokens": micro_tokens}
    assert steps_of(dataset, batch_tokens=3000, world_size=world_size, **options) == alone


@pytest.mark.parametrize("batch_tokens", [1, 700, 3000, 10**6])
def test_an_epoch_has_every_pair_once_and_no_step_is_empty(dataset: Dataset, batch_tokens: int) -> None:
    steps = steps_of(dataset, batch_tokens=batch_tokens)
    half = len(steps) // 2
    assert all(steps) and sum(map(len, steps[:half])) == dataset.split("train").num_samples()
    assert set.union(*steps[:half]) == set.union(*steps[half:]) == set(range(dataset.split("train").num_samples()))
    if half > 1:
        assert steps[:half] != steps[half:]


def test_steps_hold_about_the_tokens_asked_for(dataset: Dataset) -> None:
    loader = PairLoader([dataset], batch_tokens=4000, seed=0)
    sizes = [sum(len(micro.ids) for micro in loader.batch(k)) for k in range(loader.steps_per_epoch)]
    largest = int((loader.lengths @ [2, 1, 1]).max())
    assert sum(sizes) == loader.tokens_per_epoch == dataset.split("train").totals.model_tokens
    assert max(sizes) <= 4000 + largest and min(sizes) >= loader.tokens_per_epoch / len(sizes) - largest


def test_a_micro_batch_keeps_to_its_budget_however_many_pairs_it_takes(dataset: Dataset) -> None:
    largest = int(PairLoader([dataset], batch_tokens=1, seed=0).lengths.sum(1).max())
    loader = PairLoader([dataset], batch_tokens=10_000, seed=0, micro_tokens=largest, share_prompt=True)
    micros = [*loader.batch(0), *loader.micro_batches()]
    assert all(len(micro.ids) <= largest for micro in micros) and len({len(micro.samples) for micro in micros}) > 1


@pytest.mark.parametrize("seed", range(20))
def test_spreading_loses_nothing_and_balances(seed: int) -> None:
    draw = np.random.default_rng(seed)
    costs = draw.integers(1, 1000, draw.integers(1, 60))
    multiple = int(draw.integers(1, 5))
    bins = spread(costs, 1500, multiple)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(costs))) and len(bins) % multiple == 0
    loads = [costs[items].sum() for items in bins]
    assert max(loads) <= 1500 and max(loads) - min(loads) <= costs.max()


def sides(micro: MicroBatch) -> list[tuple[list[int], list[int]]]:
    """Ids and mask of chosen_0, rejected_0, chosen_1, … each with its prompt, from either layout."""
    cuts = list(pairwise(micro.cu_seqlens.tolist()))
    if micro.shared is None:
        return [(micro.ids[a:b].tolist(), micro.loss_mask[a:b].tolist()) for a, b in cuts]
    found = []
    for (begin, end), (prompt, chosen, rejected) in zip(cuts, micro.shared.tolist(), strict=True):
        ids, mask = micro.ids[begin:end].tolist(), micro.loss_mask[begin:end].tolist()
        assert len(ids) == prompt + chosen + rejected and not any(mask[:prompt])
        found += [(ids[: prompt + chosen], mask[: prompt + chosen])]
        found += [(ids[:prompt] + ids[prompt + chosen :], mask[:prompt] + mask[prompt + chosen :])]
    return found


@pytest.mark.parametrize("share_prompt", [False, True])
def test_a_micro_batch_holds_what_its_pairs_hold(dataset: Dataset, share_prompt: bool) -> None:
    split = dataset.split("train")
    for micro in PairLoader([dataset], batch_tokens=6000, seed=1, share_prompt=share_prompt).batch(0):
        expected = []
        for number in micro.samples.tolist():
            view = split.sample(*split.locate(number))
            for reply, span in ((view.chosen, view.chosen_span), (view.rejected, view.rejected_span)):
                trained = [0] * (len(view.prompt) + len(reply))
                for begin, end in (span.reshape(-1, 2) + len(view.prompt)).tolist():
                    trained[begin:end] = [1] * (end - begin)
                expected.append(([*view.prompt.tolist(), *reply.tolist()], trained))
        assert sides(micro) == expected
        assert micro.num_loss_tokens == micro.loss_mask.sum() == sum(sum(mask) for _, mask in expected)
