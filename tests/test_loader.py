import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pack_data import write_rows

from mmdata.errors import DatasetError
from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack
from mmdata.shards import checksums, order
from mmdata.shards.dataset import Dataset, open_dataset
from mmdata.shards.loader import Loader, MicroBatch, ahead
from mmdata.shards.order import permute, permute_each
from mmdata.shards.pairs import make_loader

KINDS = ("document", "conversation", "pair")


@pytest.fixture(scope="module")
def datasets(packed: dict[str, Any]) -> dict[str, Dataset]:
    return {kind: open_dataset(result.out) for kind, result in packed.items()}


def samples(batches: list[MicroBatch]) -> list[int]:
    return [number for batch in batches for number in batch.samples.tolist()]


def epoch_steps(dataset: Dataset, **options: Any) -> list[list[int]]:
    """The sample numbers of every step of the first epoch, ranks joined."""
    world_size = options.pop("world_size", 1)
    loaders = [make_loader([dataset], seed=7, rank=r, world_size=world_size, **options) for r in range(world_size)]
    return [[n for loader in loaders for n in samples(loader.batch(k))] for k in range(loaders[0].steps_per_epoch)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permute_is_a_bijection_for_every_size(size: int) -> None:
    assert sorted(permute(np.arange(size), size, "key").tolist()) == list(range(size))


def test_permute_of_some_indices_is_the_whole_permutation_at_those() -> None:
    whole = permute(np.arange(1000), 1000, "key")
    some = np.array([999, 0, 17, 500])
    assert permute(some, 1000, "key").tolist() == whole[some].tolist()


def test_indices_of_many_keys_are_permuted_at_once_as_each_key_does(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    for size in (1, 2, 90, 1000):
        index, of = draw.integers(0, size, 5000), draw.integers(0, 1200, 5000)
        expected = [permute(index[[i]], size, f"pass {of[i]}")[0] for i in range(300)]
        calls: list[int] = []
        real = order._mix
        monkeypatch.setattr(order, "_mix", lambda x: (calls.append(1), real(x))[1])  # noqa: B023
        assert permute_each(index, size, of, lambda k: f"pass {k}")[:300].tolist() == expected
        monkeypatch.setattr(order, "_mix", real)
        assert len(calls) <= 6 * 12  # not once a key: a tiny dataset with a large weight has thousands


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
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_pass_over_a_split_has_every_sample_once_and_one_dataset_a_micro_batch(
    datasets: dict[str, Dataset], kind: str, world_size: int
) -> None:
    both = [open_dataset(datasets[kind].dir) for _ in range(2)]
    counts = [dataset.split("train").num_samples() for dataset in both]
    seen: list[int] = []
    for rank in range(world_size):
        options = {"batch_tokens": 2000, "seed": 0, "rank": rank, "world_size": world_size, "micro_tokens": 3000}
        loader = make_loader(both, **options)
        for micro in loader.micro_batches():
            of = {int(sample >= counts[0]) for sample in micro.samples.tolist()}
            assert of == {loader.dataset_of(micro)}
            seen += micro.samples.tolist()
    assert sorted(seen) == list(range(sum(counts)))


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


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (2, 3), (6, 7)])
def test_a_batch_does_not_depend_on_how_much_is_put_in_order_at_once(
    datasets: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int
) -> None:
    options = {"batch_tokens": 3000, "micro_tokens": 1300, "seed": 3, "rank": rank, "world_size": world_size}
    both = [datasets["document"], open_dataset(datasets["document"].dir)]
    whole = Loader(both, weights=(0.7, 0.3), **options)
    monkeypatch.setattr("mmdata.shards.loader.MAX_BLOCK_CELLS", 9)
    pieces = Loader(both, weights=(0.7, 0.3), **options)
    for step in range(2 * whole.steps_per_epoch):
        for a, b in zip(whole.batch(step), pieces.batch(step), strict=True):
            assert np.array_equal(a.ids, b.ids) and np.array_equal(a.loss_mask, b.loss_mask)
            assert np.array_equal(a.cu_seqlens, b.cu_seqlens) and np.array_equal(a.samples, b.samples)


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


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token_of_a_sequence_is_never_trained(datasets: dict[str, Dataset], kind: str) -> None:
    for batch in make_loader([datasets[kind]], batch_tokens=3000, seed=0).micro_batches():
        assert not batch.loss_mask[batch.cu_seqlens[:-1]].any()


@pytest.mark.parametrize("world_size", [1, 3])
def test_micro_batches_pass_once_over_the_split_in_order(datasets: dict[str, Dataset], world_size: int) -> None:
    options = {"split": "val", "batch_tokens": 1000, "seed": 0, "world_size": world_size}
    found = [
        samples([batch])
        for rank in range(world_size)
        for batch in make_loader([datasets["pair"]], rank=rank, **options).micro_batches()
    ]
    numbers = [number for batch in found for number in batch]
    assert sorted(numbers) == list(range(datasets["pair"].split("val").num_samples()))
    if world_size == 1:
        assert numbers == sorted(numbers)


def test_tokens_per_epoch_are_those_of_its_batches(datasets: dict[str, Dataset]) -> None:
    for dataset in datasets.values():
        loader = make_loader([dataset], batch_tokens=3000, seed=0)
        batches = [batch for k in range(loader.steps_per_epoch) for batch in loader.batch(k)]
        assert sum(len(batch.ids) for batch in batches) == loader.tokens_per_epoch
        assert sum(batch.num_loss_tokens for batch in batches) == dataset.split("train").totals.loss_tokens


def test_several_datasets_are_one_epoch(
    tmp_path: Path,
    tokenizer_dir: Path,
    datasets: dict[str, Dataset],
) -> None:
    path = write_rows(tmp_path / "more.jsonl", "document", 40, seed=9)
    pack([path], tmp_path / "more", PackOptions(tokenizer=tokenizer_dir, max_len=1024))
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
    pack([tmp_path / "one.jsonl"], tmp_path / "one", PackOptions(tokenizer=tokenizer_dir, max_len=64, val_fraction=0))
    loader = Loader([open_dataset(tmp_path / "one")], split="val", batch_tokens=64, seed=0)
    assert list(loader.micro_batches()) == []
    with pytest.raises(DatasetError, match="empty"):
        loader.batch(0)


def test_ranks_hold_the_same_bucket_in_the_same_micro_step(datasets: dict[str, Dataset]) -> None:
    split, world_size = datasets["document"].split("train"), 3
    options = {"batch_tokens": 640 * 12, "micro_tokens": 640, "seed": 5, "world_size": world_size}
    loaders = [Loader([datasets["document"]], rank=rank, **options) for rank in range(world_size)]
    for step in range(loaders[0].steps_per_epoch - 1):
        micro_steps = zip(*(loader.batch(step) for loader in loaders), strict=True)
        buckets = [{split.locate(n)[0] for batch in row for n in batch.samples.tolist()} for row in micro_steps]
        assert sum(len(found) > 1 for found in buckets) <= len(split.buckets) - 1  # only where one bucket ends


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 3])
def test_a_run_resumed_at_another_world_size_sees_every_sample_once(
    datasets: dict[str, Dataset], before: int, after: int
) -> None:
    first = epoch_steps(datasets["conversation"], batch_tokens=4000, world_size=before)
    then = epoch_steps(datasets["conversation"], batch_tokens=4000, world_size=after, micro_tokens=700)
    half = len(first) // 2
    seen = [n for step in first[:half] + then[half:] for n in step]
    assert sorted(seen) == list(range(datasets["conversation"].split("train").num_samples()))


# --- datasets mixed by weight


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, datasets: dict[str, Dataset]) -> list[Dataset]:
    root = tmp_path_factory.mktemp("two")
    path = write_rows(root / "more.jsonl", "document", 500, seed=9)
    pack([path], root / "more", PackOptions(tokenizer=tokenizer_dir, max_len=64))
    return [datasets["document"], open_dataset(root / "more")]


def tokens_by_dataset(loader: Loader, steps: range, border: int) -> np.ndarray:
    """Tokens of the first dataset (sample numbers below `border`) and of the second."""
    found = np.zeros(2, np.int64)
    for step in steps:
        for batch in loader.batch(step):
            of = loader_rows(loader, batch)
            for number, tokens in zip(batch.samples.tolist(), of, strict=True):
                found[int(number >= border)] += tokens
    return found


def loader_rows(loader: Loader, batch: MicroBatch) -> list[int]:
    """Tokens of each sample of a batch of packs."""
    found = []
    for number in batch.samples.tolist():
        for share in loader.shares:
            split = share.dataset.split("train")
            if number < split.num_samples():
                found.append(len(split.sample(*split.locate(number)).ids))
                break
            number -= split.num_samples()
    return found


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 3), (0.05, 0.95)])
def test_weights_are_shares_of_an_epochs_tokens(two: list[Dataset], weights: tuple[float, float]) -> None:
    loader = Loader(two, batch_tokens=4096, seed=0, weights=weights)
    border = two[0].split("train").num_samples()
    found = tokens_by_dataset(loader, range(loader.steps_per_epoch), border)
    share = weights[0] / sum(weights)
    assert abs(found[0] / found.sum() - share) < 0.05 and abs(loader.shares[0].tokens - share) < 0.05
    plain = Loader(two, batch_tokens=4096, seed=0)
    assert abs(loader.tokens_per_epoch / plain.tokens_per_epoch - 1) < 0.06


def test_weighted_samples_are_seen_equally_often_over_epochs(two: list[Dataset]) -> None:
    loader = Loader(two, batch_tokens=4096, seed=0, weights=(0.9, 0.1))
    counts = np.zeros(loader.num_samples, np.int64)
    for step in range(4 * loader.steps_per_epoch):
        for batch in loader.batch(step):
            np.add.at(counts, batch.samples, 1)
    border = two[0].split("train").num_samples()
    for own, share in zip((counts[:border], counts[border:]), loader.shares, strict=True):
        assert own.max() - own.min() <= 1 and abs(own.mean() - 4 * share.passes) < 1


@pytest.mark.parametrize("world_size", [2, 5])
def test_a_weighted_batch_is_the_same_for_every_world_size_and_any_step(two: list[Dataset], world_size: int) -> None:
    options = {"batch_tokens": 4096, "seed": 3, "weights": (0.6, 0.4)}
    alone = Loader(two, **options)
    ranks = [Loader(two, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for step in (2 * alone.steps_per_epoch + 1, 0, alone.steps_per_epoch - 1):
        together = [n for loader in ranks for n in samples(loader.batch(step))]
        assert sorted(together) == sorted(samples(alone.batch(step)))


def test_other_weights_are_another_digest(two: list[Dataset]) -> None:
    found = {Loader(two, batch_tokens=4096, seed=0, weights=w).digest for w in (None, (0.5, 0.5), (0.6, 0.4))}
    assert len(found) == 3


# --- made ahead


def test_batches_made_ahead_are_those_asked_for(datasets: dict[str, Dataset]) -> None:
    loader = Loader([datasets["document"]], batch_tokens=2000, seed=0)
    steps = range(3, loader.steps_per_epoch)
    found = [samples(batches) for batches in ahead(loader.batch, steps)]
    assert found == [samples(loader.batch(step)) for step in steps]


def test_an_error_ahead_is_raised_at_its_step() -> None:
    def make(step: int) -> int:
        if step == 3:
            raise DatasetError("step 3", "none")
        return step

    batches = ahead(make, range(10))
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DatasetError, match="step 3"):
        next(batches)


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    batches = ahead(lambda step: step, range(10**9))
    assert next(batches) == 0 and threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


def test_buffers_come_from_the_allocator_that_is_given(datasets: dict[str, Dataset]) -> None:
    made: list[np.ndarray] = []

    def allocate(count: int, dtype: Any) -> np.ndarray:
        made.append(np.empty(count, dtype))
        return made[-1]

    (batch,) = Loader([datasets["document"]], batch_tokens=640, seed=0, allocate=allocate).batch(0)
    assert batch.ids is made[0] and batch.loss_mask is made[1]


# --- a dataset that has changed


def test_a_flipped_byte_is_refused_with_its_shard_and_the_repair_command(
    tmp_path: Path, datasets: dict[str, Dataset]
) -> None:
    shutil.copytree(datasets["document"].dir, tmp_path / "copy")
    dataset = open_dataset(tmp_path / "copy")
    shard = dataset.shards()[1].path
    content = bytearray((tmp_path / "copy" / shard).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "copy" / shard).write_bytes(content)
    with pytest.raises(DatasetError, match=shard) as caught:
        open_dataset(tmp_path / "copy")
    assert caught.value.fix == f"mm verify {tmp_path / 'copy'} --repair"


def test_bytes_are_read_once_for_each_state_of_a_file(
    tmp_path: Path, datasets: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    real = checksums.sha256_of
    monkeypatch.setattr(checksums, "sha256_of", lambda path: (read.append(path), real(path))[1])
    shutil.copytree(datasets["pair"].dir, tmp_path / "copy")
    dataset = open_dataset(tmp_path / "copy")
    assert len(read) == len([*dataset.parts.files])
    open_dataset(tmp_path / "copy")
    assert [path.name for path in read[len([*dataset.parts.files]) :]] == ["parts.jsonl"]
    (tmp_path / "copy" / dataset.shards()[0].path).touch()
    open_dataset(tmp_path / "copy")
    assert [path.name for path in read[-2:]] == ["parts.jsonl", "part-00000.arrow"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "tokenizer"])
def test_opening_refuses_and_names_what_is_damaged(tmp_path: Path, datasets: dict[str, Dataset], damage: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(datasets["document"].dir, copy)
    shard = copy / open_dataset(copy).shards()[0].path
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-9])
    elif damage == "missing":
        shard.unlink()
    else:
        shard = copy / "tokenizer" / "tokenizer.json"
        shard.write_text(shard.read_text() + " ")
    with pytest.raises(DatasetError, match=shard.name) as caught:
        open_dataset(copy)
    assert "--repair" in caught.value.fix
