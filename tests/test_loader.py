import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pack_data import fixture_packed, fixture_tokenizer_dir, write_rows  # noqa: F401

from mmdata.errors import DatasetError
from mmdata.loader import Loader, MicroBatch, permute
from mmdata.pipeline import pack
from mmdata.shards import Dataset, open_dataset

KINDS = ("document", "conversation", "pair")


@pytest.fixture(scope="module")
def datasets(packed: dict[str, Any]) -> dict[str, Dataset]:
    return {kind: open_dataset(result.out) for kind, result in packed.items()}


def samples(batches: list[MicroBatch]) -> list[int]:
    return [number for batch in batches for number in batch.samples.tolist()]


def epoch_steps(dataset: Dataset, **options: Any) -> list[list[int]]:
    """The sample numbers of every step of the first epoch, ranks joined."""
    world_size = options.pop("world_size", 1)
    loaders = [Loader([dataset], seed=7, rank=r, world_size=world_size, **options) for r in range(world_size)]
    return [[n for loader in loaders for n in samples(loader.batch(k))] for k in range(loaders[0].steps_per_epoch)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permute_is_a_bijection_for_every_size(size: int) -> None:
    assert sorted(permute(np.arange(size), size, "key").tolist()) == list(range(size))


def test_permute_of_some_indices_is_the_whole_permutation_at_those() -> None:
    whole = permute(np.arange(1000), 1000, "key")
    some = np.array([999, 0, 17, 500])
    assert permute(some, 1000, "key").tolist() == whole[some].tolist()


def test_the_order_is_shuffled_as_well_as_a_random_one() -> None:
    size = 20_000
    order = permute(np.arange(size), size, "a key").astype(np.float64)
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 4 / size**0.5
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 4 / size**0.5
    assert abs(np.abs(np.diff(order)).mean() / (size / 3) - 1) < 0.02  # neighbours are a third of the range apart
    assert (order == np.arange(size)).sum() < 10  # a random permutation has one fixed point on average
    rises = np.diff(order) > 0
    assert abs(rises.mean() - 0.5) < 0.02
    other = permute(np.arange(size), size, "another key")
    assert abs(np.corrcoef(order, other)[0, 1]) < 4 / size**0.5


def test_every_cell_of_a_small_permutation_is_reached_about_equally_often() -> None:
    size, keys = 7, 1400
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), permute(np.arange(size), size, str(key))] += 1
    expected = keys / size
    assert np.abs(counts - expected).max() < 5 * expected**0.5


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_holds_every_sample_once(datasets: dict[str, Dataset], kind: str) -> None:
    steps = epoch_steps(datasets[kind], batch_tokens=2000)
    assert sorted(n for step in steps for n in step) == list(range(datasets[kind].split("train").num_samples()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", range(1, 9))
def test_ranks_partition_the_same_global_batch_for_every_world_size(
    datasets: dict[str, Dataset], kind: str, world_size: int
) -> None:
    alone = epoch_steps(datasets[kind], batch_tokens=4000)
    together = epoch_steps(datasets[kind], batch_tokens=4000, world_size=world_size)
    assert [sorted(step) for step in together] == [sorted(step) for step in alone]


@pytest.mark.parametrize("micro_tokens", [1, 700, 1300, 5000, None])
def test_micro_tokens_cut_the_same_batch_into_other_pieces(
    datasets: dict[str, Dataset], micro_tokens: int | None
) -> None:
    dataset = datasets["conversation"]
    assert epoch_steps(dataset, batch_tokens=4000, micro_tokens=micro_tokens) == epoch_steps(dataset, batch_tokens=4000)
    for batch in Loader([dataset], batch_tokens=4000, seed=7, micro_tokens=micro_tokens).batch(0):
        assert len(batch.ids) <= max(640, micro_tokens or 4000)


def test_a_batch_is_a_pure_function_of_digest_seed_and_step(datasets: dict[str, Dataset]) -> None:
    loader = Loader([datasets["document"]], batch_tokens=1500, seed=3)
    other = Loader([open_dataset(datasets["document"].dir)], batch_tokens=1500, seed=3)
    last = 2 * loader.steps_per_epoch
    for step in (last, 0, 5):  # in any order, with nothing read before
        for a, b in zip(loader.batch(step), other.batch(step), strict=True):
            assert np.array_equal(a.ids, b.ids) and np.array_equal(a.samples, b.samples)
    assert samples(Loader([datasets["document"]], batch_tokens=1500, seed=4).batch(0)) != samples(loader.batch(0))


def test_epochs_differ_in_order_and_not_in_content(datasets: dict[str, Dataset]) -> None:
    loader = Loader([datasets["conversation"]], batch_tokens=2000, seed=0)
    n = loader.steps_per_epoch
    first, second = ([s for k in range(e * n, (e + 1) * n) for s in samples(loader.batch(k))] for e in (0, 1))
    assert first != second and sorted(first) == sorted(second)


def test_batches_cost_the_same_whatever_their_buckets(datasets: dict[str, Dataset]) -> None:
    loader = Loader([datasets["document"]], batch_tokens=1280, seed=0)
    sizes = [sum(len(batch.ids) for batch in loader.batch(k)) for k in range(loader.steps_per_epoch)]
    assert max(sizes) <= 1280


@pytest.mark.parametrize("kind", ["document", "conversation"])
def test_a_micro_batch_holds_what_its_packs_hold(datasets: dict[str, Dataset], kind: str) -> None:
    split = datasets[kind].split("train")
    for batch in Loader([datasets[kind]], batch_tokens=3000, seed=1).batch(2):
        views = [split.sample(*split.locate(number)) for number in batch.samples.tolist()]
        assert batch.ids.dtype == np.int32 and batch.ids.tolist() == [i for view in views for i in view.ids.tolist()]
        assert np.diff(batch.cu_seqlens).tolist() == [n for view in views for n in view.doc_len.tolist()]
        expected = []
        for view in views:
            mask = [0] * len(view.ids)
            for begin, end in view.span.reshape(-1, 2).tolist():
                mask[begin:end] = [1] * (end - begin)
            expected += mask
        assert batch.loss_mask.tolist() == expected
        assert batch.num_loss_tokens == sum(expected) and batch.max_seqlen == np.diff(batch.cu_seqlens).max()


def test_a_pair_gives_chosen_then_rejected_each_with_its_prompt(datasets: dict[str, Dataset]) -> None:
    split = datasets["pair"].split("train")
    for batch in Loader([datasets["pair"]], batch_tokens=6000, seed=1).batch(0):
        assert len(batch.cu_seqlens) == 2 * len(batch.samples) + 1
        cuts = list(pairwise(batch.cu_seqlens.tolist()))
        for i, number in enumerate(batch.samples.tolist()):
            view = split.sample(*split.locate(number))
            sides = ((view.chosen, view.chosen_span), (view.rejected, view.rejected_span))
            for (begin, end), (reply, span) in zip(cuts[2 * i : 2 * i + 2], sides, strict=True):
                assert batch.ids[begin:end].tolist() == [*view.prompt.tolist(), *reply.tolist()]
                trained = (np.flatnonzero(batch.loss_mask[begin:end]) - len(view.prompt)).tolist()
                assert trained == [t for b, e in span.reshape(-1, 2).tolist() for t in range(b, e)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token_of_a_sequence_is_never_trained(datasets: dict[str, Dataset], kind: str) -> None:
    for batch in Loader([datasets[kind]], batch_tokens=3000, seed=0).micro_batches():
        assert not batch.loss_mask[batch.cu_seqlens[:-1]].any()


@pytest.mark.parametrize("world_size", [1, 3])
def test_micro_batches_pass_once_over_the_split_in_order(datasets: dict[str, Dataset], world_size: int) -> None:
    options = {"split": "val", "batch_tokens": 1000, "seed": 0, "world_size": world_size}
    found = [
        samples([batch])
        for rank in range(world_size)
        for batch in Loader([datasets["pair"]], rank=rank, **options).micro_batches()
    ]
    numbers = [number for batch in found for number in batch]
    assert sorted(numbers) == list(range(datasets["pair"].split("val").num_samples()))
    if world_size == 1:
        assert numbers == sorted(numbers)


def test_tokens_per_epoch_are_those_of_its_batches(datasets: dict[str, Dataset]) -> None:
    for dataset in datasets.values():
        loader = Loader([dataset], batch_tokens=3000, seed=0)
        batches = [batch for k in range(loader.steps_per_epoch) for batch in loader.batch(k)]
        assert sum(len(batch.ids) for batch in batches) == loader.tokens_per_epoch
        assert sum(batch.num_loss_tokens for batch in batches) == dataset.split("train").totals.loss_tokens


def test_several_datasets_are_one_epoch(
    tmp_path: Path,
    tokenizer_dir: Path,
    datasets: dict[str, Dataset],
) -> None:
    path = write_rows(tmp_path / "more.jsonl", "document", 40, seed=9)
    pack([path], tmp_path / "more", tokenizer_dir=tokenizer_dir, max_len=1024)
    both = [datasets["document"], open_dataset(tmp_path / "more")]
    loader = Loader(both, batch_tokens=4096, seed=0)
    numbers = [n for k in range(loader.steps_per_epoch) for n in samples(loader.batch(k))]
    assert sorted(numbers) == list(range(sum(dataset.split("train").num_samples() for dataset in both)))
    assert loader.digest not in (both[0].digest, both[1].digest)


def test_datasets_of_different_kinds_are_refused(datasets: dict[str, Dataset]) -> None:
    with pytest.raises(DatasetError, match="pair rows"):
        Loader([datasets["document"], datasets["pair"]], batch_tokens=1000, seed=0)


def test_an_empty_split_is_named(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "one boat"}) + "\n")
    pack([tmp_path / "one.jsonl"], tmp_path / "one", tokenizer_dir=tokenizer_dir, max_len=64, val_fraction=0)
    loader = Loader([open_dataset(tmp_path / "one")], split="val", batch_tokens=64, seed=0)
    assert list(loader.micro_batches()) == []
    with pytest.raises(DatasetError, match="empty"):
        loader.batch(0)
