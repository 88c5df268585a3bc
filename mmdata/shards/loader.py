"""Read micro-batches of numpy arrays from shards. The batch of a step is a function of (digest, seed, step); a loader
has no other state that would have to be saved.

Samples are grouped into cells of equal width, so that every batch costs about the same whatever the buckets: a cell is
one sample of the largest bucket, or as many of a smaller bucket as fit in its length. The order is a keyed permutation
of the cells, computed on demand. Assembling a batch is one copy from the mapped shards; `ahead` does it in a thread
while the last batch is in use. Order, lengths and spans are computed for a block of thousands of cells at once: the
first batch of a block takes milliseconds, the others a hundredth of that.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from mmdata.errors import DatasetError
from mmdata.io.arrow import BatchColumns, Ragged, bounds, ragged, take
from mmdata.shards.dataset import MAX_MAPPED, Dataset, Split, loss_mask
from mmdata.shards.order import Mixture, draws_per_epoch, permute_each

DEFAULT_MICRO_TOKENS = 32_768
# Cells that are ordered at once (a block), so that the cost for a step is small. A block has BLOCK_CELLS for each rank,
# or BLOCK_CELLS_A_SHARD for each rank and shard if that is more; MAX_BLOCK_CELLS at most for all ranks.
BLOCK_CELLS = 8192
BLOCK_CELLS_A_SHARD = 32
MAX_BLOCK_CELLS = 2**18  # some 10 MB
AHEAD = 2
AT_ONCE = MAX_MAPPED // 8  # shards from which lengths and spans are taken at a time
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The sequences of a micro-batch one after another, without padding. T: tokens, S: samples, n: sequences. For pairs
    the sequences are chosen_0, rejected_0, chosen_1, …, each with its prompt in front: n = 2 S. With `shared` they are
    prompt + chosen + rejected of each pair: n = S, and rejected must not attend to chosen."""

    ids: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # uint8 [T], 1 where a token is trained on (not shifted)
    cu_seqlens: np.ndarray  # int32 [n + 1]: 0, then the end of each sequence
    max_seqlen: int
    samples: np.ndarray  # int64 [S], sample numbers, counted over the splits of all datasets in their order
    num_loss_tokens: int
    shared: np.ndarray | None = None  # int64 [S, 3]: lengths of prompt, chosen, rejected


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper limits of micro-batches. tokens: of all in one, unless a single sample is larger. sequence: of a
    sequence."""

    tokens: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Share:
    """What a dataset contributes to an epoch: `tokens`, its share of the tokens, 0 to 1, and `passes`, how often on
    average the epoch has each of its samples."""

    dataset: Dataset
    tokens: float
    passes: float


@dataclass(frozen=True, slots=True)
class _Group:
    """The samples of one bucket of one dataset. first_sample, first_cell: counted over all datasets and buckets."""

    split: Split
    bucket: int
    num_samples: int
    samples_per_cell: int
    first_sample: int
    first_cell: int

    @property
    def num_cells(self) -> int:
        """The number of cells; the last one may have fewer samples."""
        return -(-self.num_samples // self.samples_per_cell)


@dataclass(frozen=True, slots=True)
class _Samples:
    """The N samples of some cells, ordered by cell. Token ids are read when needed; lengths and spans are copies."""

    numbers: np.ndarray  # int64 [N]
    ids: "_Ids"
    places: np.ndarray  # int64 [N, 3]: for each sample the record batch, and begin and end in its ids
    doc_len: Ragged
    span: Ragged  # positions count through all N samples, one after another
    begins: np.ndarray  # int64 [N], the first position of each sample in the same count
    cell_ends: np.ndarray  # int64 [cells + 1]: 0, then the number of samples up to the end of each cell

    def assemble(self, cells: range, allocate: Callable[[int, Any], np.ndarray]) -> MicroBatch:
        """Return the samples of some cells, given by their indices in this object, as a micro-batch."""
        begin, end = int(self.cell_ends[cells.start]), int(self.cell_ends[cells.stop])
        ids = self.ids
        pieces = [ids[batch][a:b] for batch, a, b in self.places[begin:end].tolist()]
        spans = self.span.rows(begin, end) - self.begins[begin]
        return assemble(pieces, self.doc_len.rows(begin, end), spans, self.numbers[begin:end], allocate)


class BatchLoader(ABC):
    """The batches of one split of datasets of packs (`Loader`) or pairs (`PairLoader`).

    batch_tokens: tokens of a step over all ranks. micro_tokens: of a micro-batch, DEFAULT_MICRO_TOKENS if None. seed:
    determines the order. allocate: called as allocate(count, dtype) for the buffers of ids and loss mask, for example
    in pinned memory. weights: the datasets' shares of an epoch's tokens, of which it has as many as all datasets
    together; None: an epoch has every sample once. share_prompt: for pairs only. Raises DatasetError if the datasets
    differ in row kind or tokenizer, or if weights are given and a split is empty.
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
        weights: Sequence[float] | None = None,
        allocate: Callable[[int, Any], np.ndarray] = np.empty,
        share_prompt: bool = False,
    ):
        assert 0 <= rank < world_size and batch_tokens > 0, (rank, world_size, batch_tokens)
        check_alike(datasets)
        self.kind, self.share_prompt = datasets[0].kind, share_prompt
        self._rank, self._world_size = rank, world_size
        self._allocate = allocate
        self.weights = None if weights is None else list(weights)
        self.digest = digest_of(datasets, weights)
        self._key = f"{self.digest}:{seed}"
        self._splits = [dataset.split(split) for dataset in datasets]
        self._split_begins = np.cumsum([0, *(split.num_samples() for split in self._splits)])  # in sample numbers
        self.num_samples = int(self._split_begins[-1])
        cells = self._prepare(batch_tokens, micro_tokens or DEFAULT_MICRO_TOKENS)
        held = [split.totals.model_tokens for split in self._splits]
        draws = cells
        if weights is not None:
            for dataset, count in zip(datasets, cells, strict=True):
                if not count:
                    raise DatasetError(f"{dataset.dir}: the {split} split is empty", "leave it out of --data")
            draws = draws_per_epoch(held, cells, weights)
        self._mixture = Mixture(tuple(cells), tuple(draws))
        passes = [drawn / max(1, count) for drawn, count in zip(draws, cells, strict=True)]
        tokens = [own * times for own, times in zip(held, passes, strict=True)]
        self.tokens_per_epoch = round(sum(tokens))
        self.shares = [
            Share(dataset, own / max(1, sum(tokens)), times)
            for dataset, own, times in zip(datasets, tokens, passes, strict=True)
        ]
        self.steps_per_epoch = self._num_steps(batch_tokens)

    kind: str
    limits: Limits
    computed_share: float = 1.0  # of the tokens, those that are computed: fewer where pairs share their prompt

    @abstractmethod
    def micro_batches(self) -> Iterator[MicroBatch]:
        """Yield this rank's share of the whole split once, in stored order; each micro-batch is of one dataset."""

    @abstractmethod
    def _prepare(self, batch_tokens: int, micro_tokens: int) -> list[int]:
        """Set the limits and the tables of samples, and return how many cells (see order.py) each dataset has."""

    @abstractmethod
    def _num_steps(self, batch_tokens: int) -> int:
        """Return the number of steps of an epoch; 0 if the split is empty."""

    @abstractmethod
    def _batch(self, epoch: int, step: int) -> list[MicroBatch]:
        """Return what `batch` does for a step of an epoch, counted from 0."""

    def batch(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of optimizer step `step`, counted from 0 over all epochs; none if the step
        has too few samples for all ranks. Raises DatasetError if the split is empty."""
        if not self.num_samples:
            raise DatasetError(
                "the split is empty", "pack more rows, or choose --val-fraction so that both splits get some"
            )
        return self._batch(*divmod(step, self.steps_per_epoch))

    def dataset_of(self, micro: MicroBatch) -> int:
        """Return the index of the dataset that a micro-batch from `micro_batches` belongs to."""
        return int(np.searchsorted(self._split_begins, micro.samples[0], side="right")) - 1


class Loader(BatchLoader):
    """The batches of datasets of packs. batch_tokens and micro_tokens count every sample with the length of its bucket,
    although padding is not stored, and are rounded down to whole cells, at least one.

    All ranks together get the same samples in a step whatever world_size and micro_tokens are. A step's cells are dealt
    to the ranks in turn, largest bucket first, so that all ranks compute the same bucket at the same time, except for
    at most one cell where a bucket ends.
    """

    def _prepare(self, batch_tokens: int, micro_tokens: int) -> list[int]:
        assert self.kind != "pair", "PairLoader is for pairs"
        self.cell_tokens = max(split.buckets[-1] for split in self._splits)
        self._cells_per_step = max(1, batch_tokens // self.cell_tokens)
        self._cells_per_micro = max(1, micro_tokens // self.cell_tokens)
        self.limits = Limits(self._cells_per_micro * self.cell_tokens, self.cell_tokens)
        self._groups = self._make_groups()
        self._first_cells = np.array([group.first_cell for group in self._groups])
        self._first_samples = np.array([group.first_sample for group in self._groups], np.int64)
        self._tables = _Tables(self._groups)
        block_cells = self._world_size * max(BLOCK_CELLS, BLOCK_CELLS_A_SHARD * len(self._tables))
        self._steps_per_block = max(1, min(block_cells, MAX_BLOCK_CELLS) // self._cells_per_step)
        self._block: tuple[tuple[int, int], _Samples] | None = None  # the last block ordered
        return [sum(group.num_cells for group in self._groups if group.split is split) for split in self._splits]

    def _num_steps(self, batch_tokens: int) -> int:
        return -(-self._mixture.size // self._cells_per_step)

    def _make_groups(self) -> list[_Group]:
        """Return the non-empty buckets of all splits, with samples and cells numbered in that order."""
        groups: list[_Group] = []
        sample = cell = 0
        for split in self._splits:
            for bucket in split.buckets:
                per_cell = self.cell_tokens // bucket
                group = _Group(split, bucket, split.num_samples(bucket), per_cell, sample, cell)
                sample, cell = sample + group.num_samples, cell + group.num_cells
                groups.append(group)
        return [group for group in groups if group.num_samples]

    def _batch(self, epoch: int, step: int) -> list[MicroBatch]:
        num_cells = min(self._cells_per_step, self._mixture.size - step * self._cells_per_step)
        if not (num_own := self._num_own(num_cells)):
            return []
        begin = step % self._steps_per_block * self._num_own(self._cells_per_step)
        block = self._ordered(epoch, step // self._steps_per_block)
        return [block.assemble(part, self._allocate) for part in self._micro(range(begin, begin + num_own))]

    def micro_batches(self) -> Iterator[MicroBatch]:
        own = np.arange(sum(self._mixture.cells))[self._rank :: self._world_size]
        ends = np.cumsum(self._mixture.cells)[:-1]
        size = max(1, BLOCK_CELLS // self._cells_per_micro) * self._cells_per_micro
        for part in np.split(own, np.searchsorted(own, ends)):
            for begin in range(0, len(part), size):
                cells = part[begin : begin + size]
                samples = self._samples(cells, None)
                yield from (samples.assemble(micro, self._allocate) for micro in self._micro(range(len(cells))))

    def _num_own(self, num_cells: int) -> int:
        """Return how many of a step's `num_cells` cells, dealt to the ranks in turn, belong to this rank."""
        return len(range(self._rank, num_cells, self._world_size))

    def _micro(self, cells: range) -> list[range]:
        return [cells[i : i + self._cells_per_micro] for i in range(0, len(cells), self._cells_per_micro)]

    def _ordered(self, epoch: int, number: int) -> _Samples:
        """Return this rank's samples of block `number` of the epoch, in the order of the steps. The last block is cached."""
        if self._block and self._block[0] == (epoch, number):
            return self._block[1]
        size = self._steps_per_block * self._cells_per_step
        places = np.arange(number * size, min((number + 1) * size, self._mixture.size))
        cells, passes = self._mixture.draw(places, epoch, self._key)
        widths = np.array([group.bucket for group in self._groups])
        of_cell = np.searchsorted(self._first_cells, cells, side="right") - 1
        order = np.lexsort((-widths[of_cell], places // self._cells_per_step))  # stable: ties keep the drawn order
        own = order[np.arange(len(order)) % self._cells_per_step % self._world_size == self._rank]
        samples = self._samples(cells[own], passes[own])
        self._block = ((epoch, number), samples)
        return samples

    def _samples(self, cells: np.ndarray, passes: np.ndarray | None) -> _Samples:
        """Return the samples of these cells (int64 [n], over all datasets), ordered by cell. passes: int64 [n], how
        often the cell's dataset was gone through before; each pass deals the samples anew to the cells of their bucket.
        None: not shuffled."""
        of_cell = np.searchsorted(self._first_cells, cells, side="right") - 1
        per_cell = np.array([group.samples_per_cell for group in self._groups])[of_cell]
        group = np.repeat(of_cell, per_cell)
        within = np.arange(len(group)) - np.repeat(np.cumsum(per_cell) - per_cell, per_cell)
        index = np.repeat((cells - self._first_cells[of_cell]) * per_cell, per_cell) + within
        is_there = index < np.array([g.num_samples for g in self._groups])[group]  # a group's last cell may be partial
        if passes is not None:
            self._shuffle(group, index, np.repeat(passes, per_cell), is_there)
        ends = np.concatenate([[0], np.cumsum(is_there)])[np.concatenate([[0], np.cumsum(per_cell)])]
        return self._tables.samples(self._first_samples[group[is_there]] + index[is_there], ends)

    def _shuffle(self, group: np.ndarray, index: np.ndarray, passes: np.ndarray, is_there: np.ndarray) -> None:
        """Permute sample indices in place, each group and pass by itself. group, index, passes: of each slot of a cell,
        the group, the sample's index in it, and the pass. is_there: False for empty slots of a group's last cell.
        Groups with one sample in a cell are skipped, since they are shuffled with the cells."""
        for g, shuffled in enumerate(self._groups):
            if shuffled.samples_per_cell == 1:
                continue
            at = np.flatnonzero((group == g) & is_there)
            index[at] = permute_each(
                index[at], shuffled.num_samples, passes[at], lambda of_pass, g=g: f"{self._key}:{of_pass}:bucket {g}"
            )


def assemble(
    pieces: Sequence[Any],
    lengths: np.ndarray,
    spans: np.ndarray,
    numbers: np.ndarray,
    allocate: Callable[[int, Any], np.ndarray],
    shared: np.ndarray | None = None,
) -> MicroBatch:
    """Copy samples into a micro-batch. pieces: arrays of ids, of one dtype, in order. lengths: of each sequence. spans:
    the trained tokens as begin, end, … (end exclusive), ascending, in positions of the micro-batch. numbers: the sample
    numbers. allocate: as in `BatchLoader`. shared: as in `MicroBatch`."""
    cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
    lengths.cumsum(out=cu_seqlens[1:])
    total = int(cu_seqlens[-1])
    ids, mask = allocate(total, np.int32), allocate(total, np.uint8)
    # Join the bytes, then cast once (ids < 2**31 by the manifest); np.concatenate casts each piece: twice as slow.
    ids[:] = np.frombuffer(b"".join(pieces), pieces[0].dtype)
    mask[:] = loss_mask(spans, total)
    num_loss = int((spans[1::2] - spans[0::2]).sum())
    return MicroBatch(ids, mask, cu_seqlens, int(lengths.max()), numbers, num_loss, shared)


class _Ids(dict[int, np.ndarray]):
    """The ids of record batches, by number, read when they are missing; all are dropped when MAX_MAPPED have been read.
    There is a look-up for each sample, so it is a plain dict, and the numbers are dense: multiples of 2^16 collide."""

    def __init__(self, read: Callable[[int], np.ndarray]):
        super().__init__()
        self._read = read

    def __missing__(self, number: int) -> np.ndarray:
        if len(self) >= MAX_MAPPED:
            self.clear()
        self[number] = found = self._read(number)
        return found


class _Tables:
    """The shards of all groups, numbered from 0 in order; its length is how many there are. They are opened when they
    are read."""

    def __init__(self, groups: Sequence[_Group]):
        self._shards = [
            (group, shard) for group in groups for shard in range(len(group.split.shard_begins(group.bucket)))
        ]
        begins = [np.array(g.split.shard_begins(g.bucket), np.int64) + g.first_sample for g in groups]
        self._first_samples = np.concatenate([np.empty(0, np.int64), *begins])
        self._ids = _Ids(self._read_ids)

    def __len__(self) -> int:
        return len(self._shards)

    def _batches(self, number: int) -> list[tuple[int, BatchColumns]]:
        group, shard = self._shards[number]
        return group.split.batches(group.bucket, shard)

    def _read_ids(self, number: int) -> np.ndarray:
        batch, number = divmod(number, len(self))
        group, shard = self._shards[number]
        return group.split.shard(group.bucket, shard).batches[batch]["ids"].values

    def samples(self, numbers: np.ndarray, cell_ends: np.ndarray) -> _Samples:
        """Return the samples with these numbers (int64 [N], over all datasets) in order. cell_ends: as in
        `_Samples`."""
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        at = np.searchsorted(self._first_samples, ordered, side="right") - 1
        used, begins = np.unique(at, return_index=True)
        ends = [*begins[AT_ONCE::AT_ONCE].tolist(), len(ordered)]
        found = [
            self._of_shards(used[n : n + AT_ONCE].tolist(), ordered[begins[n] : end])
            for n, end in zip(range(0, len(used), AT_ONCE), ends, strict=True)
        ]
        back = np.argsort(order)
        places = np.concatenate([places for places, _ in found])[back]
        doc_len, span = (
            take([_joined(of_shards)], [back]) for of_shards in zip(*(lists for _, lists in found), strict=True)
        )
        lengths = places[:, 2] - places[:, 1]
        moved = np.cumsum(lengths) - lengths
        span = Ragged(span.values + np.repeat(moved, span.lengths()), span.offsets)
        return _Samples(numbers, self._ids, places, doc_len, span, moved, cell_ends)

    def _of_shards(self, shards: Sequence[int], numbers: np.ndarray) -> tuple[np.ndarray, tuple[Ragged, Ragged]]:
        """Return places, lengths and spans of samples of these shards, whose numbers (int64 [N]) are ascending."""
        batches = [
            (i * len(self) + shard, self._shards[shard][0].first_sample + begin, columns)
            for shard in shards
            for i, (begin, columns) in enumerate(self._batches(shard))
        ]
        batch, firsts = (np.array([each[n] for each in batches]) for n in (0, 1))
        at = np.searchsorted(firsts, numbers, side="right") - 1
        used, begins = np.unique(at, return_index=True)
        rows = np.split(numbers - firsts[at], begins[1:])
        ids, doc_len, span = ([batches[i][2][name] for i in used.tolist()] for name in ("ids", "doc_len", "span"))
        places = np.stack([batch[at], *bounds(ids, rows)], 1)
        return places, (take(doc_len, rows), take(span, rows))


def _joined(columns: Sequence[Ragged]) -> Ragged:
    """Return the rows of several list columns as one column."""
    if len(columns) == 1:
        return columns[0]
    lengths = np.concatenate([column.lengths() for column in columns])
    return ragged(np.concatenate([column.values for column in columns]), lengths)


def digest_of(datasets: Sequence[Dataset], weights: Sequence[float] | None) -> str:
    """Return what identifies the training data: the digest of a single dataset without weights, else a sha256 over the
    digests and weights of all datasets, in order."""
    digests = [dataset.digest for dataset in datasets]
    if len(digests) == 1 and weights is None:
        return digests[0]
    parts = digests if weights is None else [f"{d}:{w!r}" for d, w in zip(digests, weights, strict=True)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def ahead(make: Callable[[int], Made], steps: range) -> Generator[Made, None, None]:
    """Yield `make(step)` for each step in order; a thread computes up to AHEAD results in advance. An exception in
    `make` is raised when its step is requested. Closing the iterator stops the thread."""
    todo = iter(steps)
    with ThreadPoolExecutor(1, "batches ahead") as pool:
        try:
            waiting = deque(pool.submit(make, step) for step in islice(todo, AHEAD))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(make, step) for step in islice(todo, 1))
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def check_alike(datasets: Sequence[Dataset]) -> None:
    """Raise DatasetError if the datasets differ in row kind or tokenizer and so cannot be used in one batch."""
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
