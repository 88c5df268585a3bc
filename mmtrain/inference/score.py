"""A model and packed datasets in; held-out figures out, by dataset and by bucket, all summed from one line a sequence.

A line (`Scored`, `mm eval --per-sequence`) says where its sequence came from, how many of its tokens are trained on and how
unlikely the model finds them: sorted by nats a token it shows the rows that fit the rest of the data least.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from mmdata.errors import TokenizerError
from mmdata.shards.dataset import Dataset, loss_mask, open_sources
from mmdata.shards.loader import MicroBatch
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.model.batch import to_device, token_logps_of
from mmtrain.model.logps import sum_by_sequence
from mmtrain.model.model import Model

MICRO_TOKENS = 2048  # run at once; on a CPU more is no faster
MIN_TOKENS = 8  # fewer say little about a row


@dataclass(frozen=True, slots=True)
class Scored:
    """One sequence of a dataset. `tokens` are those trained on, `nll` their summed nats; `bytes` what they stand for, and
    `byte_nll` the nats of those that stand for any. `side` is chosen or rejected for a pair's replies, else None.

    A row longer than the dataset's longest sequence has several lines.
    """

    dataset: str
    split: str
    bucket: int
    file: str
    line: int
    side: str | None
    tokens: int
    nll: float
    bytes: int
    byte_nll: float

    def record(self) -> dict[str, Any]:
        """The line of `--per-sequence`: file, line, tokens, nll, loss (nats a token) and where it stands."""
        loss = self.nll / self.tokens if self.tokens else None
        return {**{name: value for name, value in asdict(self).items() if name != "byte_nll"}, "loss": loss}


@torch.no_grad()
def score(
    model: Model,
    tokenizer: Tokenizer,
    dataset: Dataset,
    split: str,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Scored]:
    """Every sequence of a split once, in the order of its shards; for pairs the chosen reply, then the rejected one.

    TokenizerError when the dataset was packed with another tokenizer than the model's.
    """
    if dataset.tokenizer_sha256 != tokenizer.sha256:
        raise TokenizerError(
            f"{dataset.dir} was packed with another tokenizer than the model's ({tokenizer.dir})",
            f"mm pack FILE --tokenizer {tokenizer.dir}",
        )
    token_bytes = torch.from_numpy(np.asarray(tokenizer.token_bytes(), dtype=np.int64))
    places = _Places(dataset, split)
    total = dataset.split(split).num_samples()
    for samples, micro in _micro_batches(dataset, split):
        batch = to_device(micro, model.head_weight.device)
        nats = -token_logps_of(model, batch).cpu()
        ids, num = batch.sequence_ids.cpu(), batch.num_sequences
        num_bytes = token_bytes[batch.ids[batch.trained].cpu()]
        sums = [
            sum_by_sequence(values, ids, num).tolist()
            for values in (torch.ones_like(nats), nats, num_bytes.float(), nats * (num_bytes > 0))
        ]
        where = [place for sample in samples for place in places.of(sample)]
        for (bucket, file, line, side), tokens, nll, size, byte_nll in zip(where, *sums, strict=True):
            yield Scored(str(dataset.dir), split, bucket, file, line, side, int(tokens), nll, int(size), byte_nll)
        if progress:
            progress(samples.stop, total)


def _micro_batches(dataset: Dataset, name: str) -> Iterator[tuple[range, MicroBatch]]:
    """A split's samples in order, as many at a time as MICRO_TOKENS holds, and at least one; each with their numbers."""
    split = dataset.split(name)
    begin, ids, masks, lengths = 0, [], [], []
    for number in range(split.num_samples()):
        own_ids, own_masks, own_lengths = _laid_out(split.sample(*split.locate(number)), dataset.kind)
        if lengths and sum(lengths) + sum(own_lengths) > MICRO_TOKENS:
            yield range(begin, number), _micro_batch(ids, masks, lengths)
            begin, ids, masks, lengths = number, [], [], []
        ids += own_ids
        masks += own_masks
        lengths += own_lengths
    if lengths:
        yield range(begin, split.num_samples()), _micro_batch(ids, masks, lengths)


def _laid_out(view: Any, kind: str) -> tuple[list[np.ndarray], list[np.ndarray], list[int]]:
    """A sample's ids and loss masks in pieces, and the lengths of its sequences; a pair's prompt stands before each reply."""
    if kind != "pair":
        return [view.ids], [loss_mask(view.span, len(view.ids))], view.doc_len.tolist()
    ids, masks, lengths = [], [], []
    for reply, span in ((view.chosen, view.chosen_span), (view.rejected, view.rejected_span)):
        ids += [view.prompt, reply]
        masks += [np.zeros(len(view.prompt), np.uint8), loss_mask(span, len(reply))]
        lengths.append(len(view.prompt) + len(reply))
    return ids, masks, lengths


def _micro_batch(ids: list[np.ndarray], masks: list[np.ndarray], lengths: list[int]) -> MicroBatch:
    mask = np.concatenate(masks)
    return MicroBatch(
        ids=np.concatenate(ids).astype(np.int32),
        loss_mask=mask,
        cu_seqlens=np.array([0, *np.cumsum(lengths)], dtype=np.int32),
        max_seqlen=max(lengths),
        samples=np.arange(len(lengths)),
        num_loss_tokens=int(mask.sum()),
    )


class _Places:
    """Where the sequences of a split's samples came from. Keeps a part's source columns, which are mapped files."""

    def __init__(self, dataset: Dataset, split: str):
        self._dataset, self._split = dataset, dataset.split(split)
        self._sources: dict[int, dict[str, Any]] = {}

    def of(self, sample: int) -> list[tuple[int, str, int, str | None]]:
        """(bucket, file, line, side) of each sequence of a sample."""
        bucket, i = self._split.locate(sample)
        part = self._split.part_of(bucket, i)
        if part not in self._sources:
            self._sources[part] = open_sources(self._dataset, part)
        sources, view = self._sources[part], self._split.sample(bucket, i)
        is_pair = self._dataset.kind == "pair"
        ordinals = [view.doc] if is_pair else view.doc.tolist()
        rows = np.searchsorted(sources["first"], ordinals, side="right") - 1
        found = [(self._dataset.inputs[sources["file"][row]], int(sources["line"][row])) for row in rows]
        sides = ("chosen", "rejected") if is_pair else (None,)
        return [(bucket, file, line, side) for file, line in found for side in sides]


def figures(scored: Iterable[Scored]) -> dict[str, dict[int | str, dict[str, float]]]:
    """By dataset, its figures by bucket and under "all": sequences, tokens, loss (nats a token), bits_per_byte, perplexity.

    Pairs have, besides, accuracy (share whose chosen reply is the likelier one), accuracy_per_token (the same of the mean
    over its tokens) and margin (mean nats by which it is); their other figures are those of the chosen replies.
    """
    groups: dict[str, dict[int | str, list[Scored]]] = defaultdict(lambda: defaultdict(list))
    for one in scored:
        groups[one.dataset][one.bucket].append(one)
    found: dict[str, dict[int | str, dict[str, float]]] = {}
    for dataset, buckets in groups.items():
        whole = [one for bucket in sorted(buckets) for one in buckets[bucket]]
        parts = {bucket: buckets[bucket] for bucket in sorted(buckets)}
        found[dataset] = {name: _figures(group) for name, group in {**parts, "all": whole}.items()}
    return found


def _figures(scored: list[Scored]) -> dict[str, float]:
    shown = [one for one in scored if one.side != "rejected"]
    tokens, nll = sum(one.tokens for one in shown), math.fsum(one.nll for one in shown)
    num_bytes, byte_nll = sum(one.bytes for one in shown), math.fsum(one.byte_nll for one in shown)
    loss = nll / max(tokens, 1)
    found: dict[str, float] = {
        "sequences": len(shown),
        "tokens": tokens,
        "loss": loss,
        "bits_per_byte": byte_nll / math.log(2) / max(num_bytes, 1),
        "perplexity": math.exp(min(loss, 700)),
    }
    if scored[0].side:
        pairs = list(zip(scored[::2], scored[1::2], strict=True))
        found["accuracy"] = sum(c.nll < r.nll for c, r in pairs) / len(pairs)
        found["accuracy_per_token"] = sum(_mean(c) < _mean(r) for c, r in pairs) / len(pairs)
        found["margin"] = math.fsum(r.nll - c.nll for c, r in pairs) / len(pairs)
    return found


def _mean(one: Scored) -> float:
    return one.nll / max(one.tokens, 1)


def noisiest(scored: Iterable[Scored], count: int) -> list[Scored]:
    """The sequences the model finds least likely by nats a token, those with at least MIN_TOKENS before the shorter ones;
    a pair's rejected replies are left out, since they are meant to be unlikely."""
    shown = [one for one in scored if one.side != "rejected"]
    return sorted(shown, key=lambda one: (one.tokens >= MIN_TOKENS, _mean(one)), reverse=True)[:count]
