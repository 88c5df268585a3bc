"""Loss and related metrics of a model on a dataset, by dataset and bucket (`mm eval`), from one record per sequence
(`Scored`, also a line of `mm eval --per-sequence`). The most nats per token show the noisiest rows of the data."""

import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mmdata.errors import TokenizerError
from mmdata.io.files import Progress, no_progress, write_bytes, write_text
from mmdata.shards.dataset import Dataset, PackView, PairView, loss_mask, open_sources
from mmdata.shards.loader import MicroBatch
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.vocabulary import token_bytes
from mmtrain.model.batch import to_device, token_logps_of
from mmtrain.model.logps import sum_by_sequence
from mmtrain.model.model import Model

MICRO_TOKENS = 2048  # the most tokens of one forward pass; more are no faster on a CPU
MIN_TOKENS = 8  # sequences with fewer trained tokens are not called noisy: too few for a meaningful mean


@dataclass(frozen=True, slots=True)
class Scored:
    """The score of one sequence of a dataset; a document cut into several sequences has one for each. file, line: the
    input row, lines from 1. tokens: trained tokens. nll: their summed negative log-likelihood in nats. bytes: that they
    decode to. byte_nll: nats of those with at least one byte. side: "chosen" or "rejected" reply of a pair, else
    None."""

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

    @property
    def loss(self) -> float:
        """Negative log-likelihood in nats per trained token; 0 without trained tokens."""
        return self.nll / max(self.tokens, 1)

    def record(self) -> dict[str, str | int | float | None]:
        """Return the fields that `--per-sequence` writes: all but `byte_nll`, and loss (None if nothing is trained)."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "byte_nll"}
        return {**values, "loss": self.loss if self.tokens else None}


def write_scores(path: Path, scored: Iterable[Scored]) -> None:
    """Write the records of sequences: as JSON lines or, if the name ends with .parquet, as a parquet file with the same
    keys as columns."""
    records = [one.record() for one in scored]
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        buffer, table = io.BytesIO(), pa.Table.from_pylist(records)
        types = [field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in table.schema]
        parquet.write_table(table.cast(pa.schema(types)), buffer)
        write_bytes(path, buffer.getvalue())
    else:
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


@torch.no_grad()
def score(
    model: Model, tokenizer: Tokenizer, dataset: Dataset, split: str, *, progress: Progress = no_progress
) -> Iterator[Scored]:
    """Yield the score of every sequence of a split in the order of its samples; of a pair, chosen then rejected. split:
    "train" or "val". progress: called with (samples scored, all samples) after each forward pass. Raise TokenizerError
    for a dataset packed with another tokenizer."""
    if dataset.tokenizer_sha256 != tokenizer.sha256:
        raise TokenizerError(
            f"{dataset.dir} was packed with another tokenizer than the model's ({tokenizer.dir})",
            f"mm pack FILE --tokenizer {tokenizer.dir}",
        )
    sizes = torch.from_numpy(token_bytes(tokenizer))
    sources = cache(lambda part: open_sources(dataset, part))  # columns are memory-mapped files
    samples = dataset.split(split)
    total = samples.num_samples()
    for micro in micro_batches(_laid_out(samples.sample(*samples.locate(number))) for number in range(total)):
        batch = to_device(micro, model.head_weight.device)
        nats = -token_logps_of(model, batch).cpu()
        ids, num = batch.sequence_ids.cpu(), batch.num_sequences
        num_bytes = sizes[batch.ids[batch.trained].cpu()]
        sums = [
            sum_by_sequence(values, ids, num).tolist()
            for values in (torch.ones_like(nats), nats, num_bytes.float(), nats * (num_bytes > 0))
        ]
        places = [place for number in micro.samples.tolist() for place in _places(dataset, split, number, sources)]
        for (bucket, file, line, side), tokens, nll, size, byte_nll in zip(places, *sums, strict=True):
            yield Scored(str(dataset.dir), split, bucket, file, line, side, int(tokens), nll, int(size), byte_nll)
        progress(int(micro.samples[-1]) + 1, total)


class LaidOut(NamedTuple):
    """One sample as sequences laid end to end: ids and loss mask, both [T], and each sequence's length in tokens."""

    ids: np.ndarray
    loss_mask: np.ndarray
    lengths: list[int]


def micro_batches(samples: Iterable[LaidOut]) -> Iterator[MicroBatch]:
    """Join consecutive samples to micro-batches of at most MICRO_TOKENS tokens; a longer sample is a micro-batch of its
    own. `MicroBatch.samples` numbers the samples from 0."""
    group: list[LaidOut] = []
    begin = size = 0
    for number, sample in enumerate(samples):
        if group and size + len(sample.ids) > MICRO_TOKENS:
            yield _micro_batch(group, begin)
            group, begin, size = [], number, 0
        group.append(sample)
        size += len(sample.ids)
    if group:
        yield _micro_batch(group, begin)


def _micro_batch(group: list[LaidOut], begin: int) -> MicroBatch:
    """Concatenate samples to one micro-batch. begin: number of the first sample."""
    mask = np.concatenate([sample.loss_mask for sample in group])
    lengths = [length for sample in group for length in sample.lengths]
    return MicroBatch(
        ids=np.concatenate([sample.ids for sample in group]).astype(np.int32),
        loss_mask=mask,
        cu_seqlens=np.array([0, *np.cumsum(lengths)], dtype=np.int32),
        max_seqlen=max(lengths),
        samples=np.arange(begin, begin + len(group)),
        num_loss_tokens=int(mask.sum()),
    )


def _laid_out(view: PackView | PairView) -> LaidOut:
    """Return a pack's sequences or, for a pair, prompt + chosen and prompt + rejected; prompts have loss mask 0."""
    if isinstance(view, PackView):
        return LaidOut(view.ids, loss_mask(view.span, len(view.ids)), view.doc_len.tolist())
    replies = ((view.chosen, view.chosen_span), (view.rejected, view.rejected_span))
    no_loss = np.zeros(len(view.prompt), np.uint8)
    ids = [part for reply, _ in replies for part in (view.prompt, reply)]
    masks = [part for reply, span in replies for part in (no_loss, loss_mask(span, len(reply)))]
    return LaidOut(np.concatenate(ids), np.concatenate(masks), [len(view.prompt) + len(reply) for reply, _ in replies])


def _places(
    dataset: Dataset, split: str, number: int, sources: Callable[[int], dict]
) -> list[tuple[int, str, int, str | None]]:
    """Return bucket, input file, line and side (see `Scored`) of each sequence of a sample. sources: returns the
    columns of `open_sources` for a part, a fixed byte range of an input file that was packed as a unit."""
    samples = dataset.split(split)
    bucket, i = samples.locate(number)
    columns, view = sources(samples.part_of(bucket, i)), samples.sample(bucket, i)
    is_pair = dataset.kind == "pair"
    rows = np.searchsorted(columns["first"], [view.doc] if is_pair else view.doc.tolist(), side="right") - 1
    lines = [(dataset.inputs[columns["file"][row]], int(columns["line"][row])) for row in rows]
    return [
        (bucket, file, line, side) for file, line in lines for side in (("chosen", "rejected") if is_pair else (None,))
    ]


def figures(scored: Iterable[Scored]) -> dict[str, dict[int | str, dict[str, float]]]:
    """Compute {dataset: {bucket: {metric: value}}}, with "all" over all buckets: sequences and tokens (trained ones),
    loss (nats per trained token), bits_per_byte and perplexity. For pairs these are of the chosen replies, with
    accuracy (share of pairs whose chosen reply has the higher summed log-probability), accuracy_per_token (the same
    with the mean) and margin (mean over pairs of chosen minus rejected summed log-probability, in nats)."""
    groups: dict[str, dict[int | str, list[Scored]]] = defaultdict(lambda: defaultdict(list))
    for one in scored:
        groups[one.dataset][one.bucket].append(one)
    by_dataset: dict[str, dict[int | str, dict[str, float]]] = {}
    for dataset, unsorted in groups.items():
        buckets = {bucket: unsorted[bucket] for bucket in sorted(unsorted)}
        buckets["all"] = [one for group in buckets.values() for one in group]
        by_dataset[dataset] = {name: _figures(group) for name, group in buckets.items()}
    return by_dataset


def _figures(scored: list[Scored]) -> dict[str, float]:
    """Compute the metrics of one bucket (see `figures`). Those of pairs must alternate between chosen and rejected."""
    counted = [one for one in scored if one.side != "rejected"]
    tokens, nll = sum(one.tokens for one in counted), math.fsum(one.nll for one in counted)
    num_bytes, byte_nll = sum(one.bytes for one in counted), math.fsum(one.byte_nll for one in counted)
    loss = nll / max(tokens, 1)
    values: dict[str, float] = {
        "sequences": len(counted),
        "tokens": tokens,
        "loss": loss,
        "bits_per_byte": byte_nll / math.log(2) / max(num_bytes, 1),
        "perplexity": math.exp(min(loss, 700)),
    }
    if scored[0].side:
        pairs = list(zip(scored[::2], scored[1::2], strict=True))
        values["accuracy"] = sum(chosen.nll < rejected.nll for chosen, rejected in pairs) / len(pairs)
        values["accuracy_per_token"] = sum(chosen.loss < rejected.loss for chosen, rejected in pairs) / len(pairs)
        values["margin"] = math.fsum(rejected.nll - chosen.nll for chosen, rejected in pairs) / len(pairs)
    return values


def noisiest(scored: Iterable[Scored], count: int) -> list[Scored]:
    """Return the `count` sequences with the most nats per trained token, the highest first; those with fewer than
    MIN_TOKENS trained tokens come last. Rejected replies are left out, because they are meant to be unlikely."""
    counted = [one for one in scored if one.side != "rejected"]
    return sorted(counted, key=lambda one: (one.tokens >= MIN_TOKENS, one.loss), reverse=True)[:count]
