"""Micro-batches of pairs with a limit of tokens, so that the cost of a batch does not depend on its number of pairs.

Nothing is padded, and both replies of a pair are always in one micro-batch. With `share_prompt` a pair is one sequence,
prompt + chosen + rejected; otherwise two, each with the prompt in front. Which pairs a step has is a function of
(digest, seed, step), whatever the ranks, micro-batches and `share_prompt`. Takes 24 bytes of memory a pair.
"""

import heapq
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from mmdata.shards.dataset import Dataset, PairView, Split
from mmdata.shards.loader import BatchLoader, Limits, Loader, MicroBatch, assemble

PROMPT_TWICE = np.array([2, 1, 1])  # times that the prompt, the chosen and the rejected reply of a pair are computed


class PairLoader(BatchLoader):
    """The batches of datasets of pairs. Every step has at least one pair. batch_tokens: about how many tokens a step
    has over all ranks, with a prompt counted once for each reply. micro_tokens: the most tokens of a micro-batch as
    computed (with share_prompt a prompt counts once); a single longer pair may exceed it."""

    def _prepare(self, batch_tokens: int, micro_tokens: int) -> list[int]:
        self.lengths = np.concatenate([pair_lengths(split) for split in self._splits])  # int64 [num_samples, 3]
        self._sizes = self.lengths @ PROMPT_TWICE
        self._costs = self.lengths.sum(1) if self.share_prompt else self._sizes
        self.computed_share = float(self._costs.sum() / max(1, self._sizes.sum()))
        sides = self._costs if self.share_prompt else self.lengths[:, 0] + self.lengths[:, 1:].max(1, initial=0)
        self.limits = Limits(micro_tokens, int(sides.max(initial=1)))
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)
        return np.diff(self._split_begins).tolist()

    def _num_steps(self, batch_tokens: int) -> int:
        """tokens_per_epoch / batch_tokens rounded up, but few enough that every step has a pair: middles of
        neighbouring pairs are at most the largest size apart, so a step with that share of the tokens (`_plan_epoch`)
        has one."""
        if not self.num_samples:
            return 0
        tokens = self.tokens_per_epoch
        return max(1, min(-(-tokens // batch_tokens), tokens // int(self._sizes.max())))

    def _batch(self, epoch: int, step: int) -> list[MicroBatch]:
        order, begins = self._epoch(epoch)
        pairs = order[begins[step] : begins[step + 1]]
        bins = spread(self._costs[pairs], self.limits.tokens, self._world_size)
        return [self._assemble(pairs[chosen]) for chosen in bins[self._rank :: self._world_size] if len(chosen)]

    def micro_batches(self, micro_tokens: int | None = None) -> Iterator[MicroBatch]:
        """Yield this rank's share of the whole split once, in stored order; each micro-batch is of one dataset.
        micro_tokens: the most tokens in one, the loader's own limit if None."""
        budget = micro_tokens or self.limits.tokens
        begins = set(self._split_begins.tolist())
        ends = []
        filled = 0
        for i, cost in enumerate(self._costs.tolist()):
            if filled and (filled + cost > budget or i in begins):
                ends.append(i)
                filled = 0
            filled += cost
        cuts = np.split(np.arange(self.num_samples), ends)
        for numbers in cuts[self._rank :: self._world_size]:
            if len(numbers):
                yield self._assemble(numbers)

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch's sample numbers in the order of training (int64), and where in it each step begins (int64
        [steps + 1]). A step has the pairs whose middle token lies in its equal share of the epoch's tokens."""
        order, _ = self._mixture.draw(np.arange(self._mixture.size), epoch, self._key)
        sizes = self._sizes[order]
        middles = 2 * np.cumsum(sizes) - sizes  # times 2, so that they are integers
        steps = middles * self.steps_per_epoch // (2 * int(sizes.sum()))
        return order, np.searchsorted(steps, np.arange(self.steps_per_epoch + 1))

    def _assemble(self, numbers: np.ndarray) -> MicroBatch:
        of_split = np.searchsorted(self._split_begins, numbers, side="right") - 1
        views = []
        for s, number in zip(of_split.tolist(), numbers.tolist(), strict=True):
            split = self._splits[s]
            views.append(split.sample(*split.locate(number - int(self._split_begins[s]))))
        shared = self.lengths[numbers] if self.share_prompt else None
        return assemble(*_lay_out(views, self.share_prompt), numbers, self._allocate, shared)


def make_loader(datasets: Sequence[Dataset], **options: Any) -> BatchLoader:
    """Create the loader for datasets of one row kind. options: keyword arguments of `BatchLoader`."""
    return (PairLoader if datasets[0].kind == "pair" else Loader)(datasets, **options)


def pair_lengths(split: Split) -> np.ndarray:
    """Return the tokens of prompt, chosen and rejected of every pair of a split: int64 [N, 3], by sample number."""
    columns = [split.list_lengths(name) for name in ("prompt", "chosen", "rejected")]
    return np.stack(columns, 1)


def saved_share(datasets: Sequence[Dataset]) -> float:
    """Return the share (0 to 1) of the train splits' tokens that `share_prompt` does not compute."""
    lengths = np.concatenate([pair_lengths(dataset.split("train")) for dataset in datasets])
    return float(lengths[:, 0].sum() / max(1, (lengths @ PROMPT_TWICE).sum()))


def spread(costs: np.ndarray, budget: int, multiple: int) -> list[np.ndarray]:
    """Return the indices of the items in each bin, distributed so that the sums of their costs are about equal: from
    the largest item to the smallest, each into the bin with the smallest sum (Graham 1969). costs: int64 [N], N > 0. No
    sum exceeds `budget`, or the largest cost if that is more. The number of bins is a multiple of `multiple`; bins may
    be empty."""
    order = np.argsort(-costs, kind="stable").tolist()
    budget = max(budget, int(costs.max()))
    count = -(-int(costs.sum()) // budget)
    count = -(-count // multiple) * multiple
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        filled = [(0, b) for b in range(count)]
        for item in order:
            load, b = filled[0]
            heapq.heapreplace(filled, (load + int(costs[item]), b))
            bins[b].append(item)
        if max(filled)[0] <= budget:
            return [np.array(chosen, np.int64) for chosen in bins]
        count += multiple


def _lay_out(pairs: Sequence[PairView], share_prompt: bool) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Return what `assemble` needs for these pairs: pieces of ids, lengths of the sequences, and the trained spans in
    positions of the micro-batch (in `PairView` they count from the reply's first token)."""
    pieces: list[np.ndarray] = []
    ends = [0]
    spans: list[np.ndarray] = []
    at = 0
    for pair in pairs:
        for is_second, reply, span in (
            (False, pair.chosen, pair.chosen_span),
            (True, pair.rejected, pair.rejected_span),
        ):
            if not (is_second and share_prompt):
                pieces.append(pair.prompt)
                at += len(pair.prompt)
            spans.append(span.astype(np.int64) + at)
            pieces.append(reply)
            at += len(reply)
            if is_second or not share_prompt:
                ends.append(at)
    return pieces, np.diff(ends), np.concatenate(spans)
