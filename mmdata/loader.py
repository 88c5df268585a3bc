"""Shards in, micro-batches of numpy buffers out. The batch of a step follows from (digest, seed, step): no other state.

Samples are grouped into cells of equal width, so that every batch costs the same whatever the buckets: a cell is one
sample of the largest bucket, or as many of a smaller one as fit in its place. Order is a keyed permutation computed on
demand (nothing stored, any step at once). Assembling a batch is one copy out of the mapped shards: no worker processes.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmdata.errors import DatasetError
from mmdata.shards import Dataset, PackView, PairView, Split, loss_mask

DEFAULT_MICRO_TOKENS = 32_768
FEISTEL_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences end to end. For pairs: chosen_0, rejected_0, chosen_1, …, each with its prompt in front, n = 2 S."""

    ids: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # uint8 [T], 1 where a token is trained on (not shifted)
    cu_seqlens: np.ndarray  # int32 [n + 1], ends of the sequences, beginning with 0
    max_seqlen: int
    samples: np.ndarray  # int64 [S], sample numbers within the split (over all datasets, in their order)
    num_loss_tokens: int


def permute(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where each index stands in the permutation of 0..size-1 that `key` names. index: integers [N]; O(N), any size.

    A Feistel network on the digits of a two-digit number, walked again in the rare case that it leaves the range.
    Integers only: the same on every machine and with every numpy.
    """
    high = math.isqrt(size - 1) + 1  # high * low is at least size, and more by less than high
    low = np.uint64(-(-size // high))
    round_keys = np.frombuffer(hashlib.sha512(key.encode()).digest(), "<u8")[:FEISTEL_ROUNDS]
    result = np.array(index, np.uint64)
    todo = np.arange(len(result))
    while len(todo):
        left, right = np.divmod(result[todo], low)
        for even, odd in round_keys.reshape(-1, 2):
            left = (left + _mix(right ^ even)) % np.uint64(high)
            right = (right + _mix(left ^ odd)) % low
        result[todo] = left * low + right
        todo = todo[result[todo] >= size]
    return result.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Scrambles 64 bits to 32 with the multipliers of splitmix64 (Steele, Lea, Flood 2014)."""
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(32)) * np.uint64(0x94D049BB133111EB)
    return x >> np.uint64(32)


@dataclass(frozen=True, slots=True)
class _Group:
    """One bucket of one dataset: where its samples and its cells begin among all."""

    split: Split
    bucket: int
    num_samples: int
    samples_per_cell: int
    first_sample: int
    first_cell: int

    @property
    def num_cells(self) -> int:
        return -(-self.num_samples // self.samples_per_cell)


class Loader:
    """The batches of a split. `batch(step)` gives this rank's micro-batches of an optimizer step.

    Over all ranks a step's micro-batches hold the same samples whatever the world size and `micro_tokens`; steps of one
    epoch hold every sample once. Widths (batch_tokens, micro_tokens) are nominal: padding that is not there counts.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        *,
        split: str = "train",
        batch_tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_tokens: int | None = None,
        shuffle: bool = True,
    ):
        assert 0 <= rank < world_size and batch_tokens > 0, (rank, world_size, batch_tokens)
        _check_alike(datasets)
        self.kind = datasets[0].kind
        self._rank, self._world_size = rank, world_size
        self._seed, self._shuffle = seed, shuffle
        digests = [dataset.digest for dataset in datasets]
        self.digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        sequences = 2 if self.kind == "pair" else 1  # of a sample, side by side
        self.cell_tokens = sequences * max(dataset.buckets[-1] for dataset in datasets)
        self._cells_per_step = max(1, batch_tokens // self.cell_tokens)
        self._cells_per_micro = max(1, (micro_tokens or DEFAULT_MICRO_TOKENS) // self.cell_tokens)
        self._groups = self._make_groups([dataset.split(split) for dataset in datasets], sequences)
        self.num_samples = sum(group.num_samples for group in self._groups)
        self._num_cells = sum(group.num_cells for group in self._groups)
        self.steps_per_epoch = -(-self._num_cells // self._cells_per_step)
        self.tokens_per_epoch = sum(dataset.split(split).totals.model_tokens for dataset in datasets)

    def _make_groups(self, splits: Sequence[Split], sequences: int) -> list[_Group]:
        groups: list[_Group] = []
        sample = cell = 0
        for split in splits:
            for bucket in split.buckets:
                per_cell = self.cell_tokens // (sequences * bucket)
                group = _Group(split, bucket, split.num_samples(bucket), per_cell, sample, cell)
                sample, cell = sample + group.num_samples, cell + group.num_cells
                groups.append(group)
        return [group for group in groups if group.num_samples]

    def batch(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of optimizer step `step` (from 0, over all epochs).

        Empty when the epoch's last, partial batch has no cell left for this rank.
        """
        if not self._num_cells:
            raise DatasetError(
                "the split is empty", "pack more rows, or choose --val-fraction so that both splits get some"
            )
        epoch, k = divmod(step, self.steps_per_epoch)
        begin = k * self._cells_per_step
        places = np.arange(begin, min(begin + self._cells_per_step, self._num_cells))[self._rank :: self._world_size]
        cells = permute(places, self._num_cells, self._key(epoch, "cells")) if self._shuffle else places
        return [self._assemble(self._samples(part, epoch)) for part in self._micro(cells)]

    def micro_batches(self) -> Iterator[MicroBatch]:
        """This rank's share of the whole split once, in the order of the shards."""
        for cells in self._micro(np.arange(self._num_cells)[self._rank :: self._world_size]):
            yield self._assemble(self._samples(cells, None))

    def _micro(self, cells: np.ndarray) -> list[np.ndarray]:
        return [cells[i : i + self._cells_per_micro] for i in range(0, len(cells), self._cells_per_micro)]

    def _key(self, epoch: int, what: str) -> str:
        return f"{self.digest}:{self._seed}:{epoch}:{what}"

    def _samples(self, cells: np.ndarray, epoch: int | None) -> list[tuple[_Group, int]]:
        """(group, index in its bucket) of every sample in these cells, in cell order; unshuffled without an epoch."""
        first_cells = [group.first_cell for group in self._groups]
        of_cell = np.searchsorted(first_cells, cells, side="right") - 1
        found: list[list[tuple[_Group, int]]] = [[] for _ in cells]
        for g in np.unique(of_cell).tolist():
            group = self._groups[g]
            at = np.flatnonzero(of_cell == g)
            first = (cells[at] - group.first_cell) * group.samples_per_cell
            places = first[:, None] + np.arange(group.samples_per_cell)
            is_there = places < group.num_samples  # the group's last cell may be partial
            order = places[is_there]
            if epoch is not None and self._shuffle:
                order = permute(order, group.num_samples, self._key(epoch, f"bucket {g}"))
            for cell, index in zip(np.repeat(at, is_there.sum(1)).tolist(), order.tolist(), strict=True):
                found[cell].append((group, index))
        return [sample for cell in found for sample in cell]

    def _assemble(self, samples: Sequence[tuple[_Group, int]]) -> MicroBatch:
        views = [group.split.sample(group.bucket, index) for group, index in samples]
        numbers = np.array([group.first_sample + index for group, index in samples], np.int64)
        return _pair_batch(views, numbers) if self.kind == "pair" else _pack_batch(views, numbers)


def _pack_batch(packs: Sequence[PackView], numbers: np.ndarray) -> MicroBatch:
    ids = np.concatenate([pack.ids for pack in packs], dtype=np.int32, casting="unsafe")  # ids < 2**31 by the manifest
    lengths = np.concatenate([pack.doc_len for pack in packs])
    begins = np.cumsum([0, *(len(pack.ids) for pack in packs[:-1])])
    spans = np.concatenate([pack.span for pack in packs], dtype=np.int64)
    spans += np.repeat(begins, [len(pack.span) for pack in packs])
    return _micro_batch(ids, lengths, spans, numbers, sum(pack.n_loss for pack in packs))


def _pair_batch(pairs: Sequence[PairView], numbers: np.ndarray) -> MicroBatch:
    pieces: list[np.ndarray] = []
    lengths: list[int] = []
    spans: list[np.ndarray] = []
    begin = 0
    for pair in pairs:
        for reply, span in ((pair.chosen, pair.chosen_span), (pair.rejected, pair.rejected_span)):
            pieces += (pair.prompt, reply)
            lengths.append(len(pair.prompt) + len(reply))
            spans.append(span.astype(np.int64) + begin + len(pair.prompt))
            begin += lengths[-1]
    ids = np.concatenate(pieces, dtype=np.int32, casting="unsafe")
    num_loss = sum(pair.n_chosen + pair.n_rejected for pair in pairs)
    return _micro_batch(ids, np.array(lengths), np.concatenate(spans), numbers, num_loss)


def _micro_batch(
    ids: np.ndarray, lengths: np.ndarray, spans: np.ndarray, numbers: np.ndarray, num_loss: int
) -> MicroBatch:
    cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    return MicroBatch(ids, loss_mask(spans, len(ids)), cu_seqlens, int(lengths.max()), numbers, num_loss)


def _check_alike(datasets: Sequence[Dataset]) -> None:
    """Datasets of one batch must share row kind and tokenizer."""
    assert datasets, "no dataset"
    first = datasets[0]
    for other in datasets[1:]:
        if other.kind != first.kind:
            raise DatasetError(
                f"{other.dir} holds {other.kind} rows, {first.dir} {first.kind} rows", "train on one kind at a time"
            )
        if other.tokenizer_sha256 != first.tokenizer_sha256:
            raise DatasetError(
                f"{other.dir} was packed with another tokenizer than {first.dir}",
                f"mm pack FILE --tokenizer {first.dir / 'tokenizer'} --out {other.dir}",
            )
