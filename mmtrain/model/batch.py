"""Bring the buffers of a micro-batch to the device as tensors, and compute log-probabilities of its trained tokens.

Instead of labels with -100, a batch holds the positions of the trained tokens, so that the loss can select them without
waiting for the device to count them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdata.shards.loader import Limits, MicroBatch
from mmtrain.model.logps import sum_by_sequence, trained_logps
from mmtrain.model.model import Model

FILL_TOKENS = 128  # a filled-up micro-batch keeps its shape for documents of at least this mean length


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device: T tokens, N of them trained, in `num_sequences` sequences.

    ids and position_ids int64 [T], cu_seqlens int32 [n + 1]; if it is filled up, these three are longer. `trained` int64 [N]
    are positions on the flat axis, ascending; `sequence_ids` int64 [N] the sequence of each. Both sides of a pair count as
    sequences, whether or not they share their prompt.
    """

    ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    trained: Tensor
    sequence_ids: Tensor
    num_sequences: int
    samples: np.ndarray
    num_tokens: int
    num_trained: int
    shared: Tensor | None = None  # int64 [S, 3] on the CPU: prompt, chosen and rejected of pairs laid as one sequence


def pinned(count: int, dtype: Any) -> np.ndarray:
    """A buffer in page-locked memory, from which a CUDA device copies while it computes. Not measured."""
    return torch.from_numpy(np.empty(0, dtype)).new_empty(count, pin_memory=True).numpy()


def cut(micro: MicroBatch, most_tokens: int | None, is_pairs: bool = False) -> list[MicroBatch]:
    """Divide a micro-batch into pieces of whole documents (or pairs), at most `most_tokens` tokens each unless a single one is
    longer. Losses and gradients of the pieces add up to those of the micro-batch. For packs, each piece keeps all `samples`.
    """
    if most_tokens is None or len(micro.ids) <= most_tokens:
        return [micro]
    step = 2 if is_pairs and micro.shared is None else 1
    ends = np.asarray(micro.cu_seqlens, np.int64)[::step]
    pieces = []
    first = 0
    while first < len(ends) - 1:
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + most_tokens, side="right")) - 1)
        tokens = slice(int(ends[first]), int(ends[last]))
        cu_seqlens = micro.cu_seqlens[first * step : last * step + 1] - micro.cu_seqlens[first * step]
        samples = micro.samples[first:last] if is_pairs else micro.samples
        mask = micro.loss_mask[tokens]
        longest = int(np.diff(cu_seqlens).max())
        shared = None if micro.shared is None else micro.shared[first:last]
        pieces.append(MicroBatch(micro.ids[tokens], mask, cu_seqlens, longest, samples, int(mask.sum()), shared))
        first = last
    return pieces


def filling(num_tokens: int, num_documents: int, limits: Limits) -> np.ndarray:
    """Lengths, int64, of documents to append to a micro-batch so that it has one of few shapes and nothing is compiled twice.

    The number of tokens becomes the limit times a power of two (…, 1/4, 1/2, 1, 2, …), the smallest that holds them; the
    number of documents a power of two, at least one per FILL_TOKENS tokens. Most of the documents are empty, none is longer
    than a sequence may be.
    """
    width = limits.tokens
    while width // 2 >= max(num_tokens, 1):
        width //= 2
    while width < num_tokens:
        width *= 2
    full, rest = divmod(width - num_tokens, limits.sequence)
    lengths = [limits.sequence] * full + [rest]
    count = max(num_documents + len(lengths), width // FILL_TOKENS)
    count = 1 << (count - 1).bit_length()
    return np.array(lengths + [0] * (count - num_documents - len(lengths)), np.int64)


def to_device(micro: MicroBatch, device: torch.device, limits: Limits | None = None) -> Batch:
    """Bring a micro-batch to the device; on CUDA it is filled up to the loader's `limits`, if given. A document's first token
    has no predecessor and must not be trained."""
    return filled(micro, device, limits if device.type == "cuda" else None)


def filled(micro: MicroBatch, device: torch.device, limits: Limits | None) -> Batch:
    """As `to_device`, on any device: with `limits`, documents without loss are appended as `filling` says, and `max_seqlen` is
    that of the limits."""
    cu_seqlens = np.asarray(micro.cu_seqlens, dtype=np.int64)
    lengths = np.diff(cu_seqlens)
    trained = np.flatnonzero(micro.loss_mask)
    starts = cu_seqlens[:-1][lengths > 0]
    assert not np.asarray(micro.loss_mask)[starts].any(), "a document's first token is marked trained"
    shared = micro.shared
    if shared is None:
        sides = lengths
        position_ids = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    else:
        sides, position_ids = _shared_places(shared)
        first_alone = (cu_seqlens[1:] - shared[:, 2])[(shared[:, 0] == 0) & (shared[:, 2] > 0)]
        assert not np.asarray(micro.loss_mask)[first_alone].any(), (
            "a reply without a prompt has its first token trained"
        )
    sequence_ids = np.repeat(np.arange(len(sides)), sides)[trained]
    num_tokens = len(position_ids)
    if limits is not None:
        behind = filling(num_tokens, len(lengths), limits)
        position_ids = np.concatenate([position_ids, *map(np.arange, behind[behind > 0])])
        cu_seqlens = np.concatenate([cu_seqlens, num_tokens + np.cumsum(behind)])
        shared = None if shared is None else np.concatenate([shared, np.outer(behind, [1, 0, 0])])

    def put(values: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True).to(dtype)

    return Batch(
        ids=F.pad(put(micro.ids), (0, len(position_ids) - num_tokens)),
        position_ids=put(position_ids),
        cu_seqlens=put(cu_seqlens, torch.int32),
        max_seqlen=int(micro.max_seqlen) if limits is None else limits.sequence,
        trained=put(trained),
        sequence_ids=put(sequence_ids),
        num_sequences=len(sides),
        samples=np.asarray(micro.samples),
        num_tokens=num_tokens,
        num_trained=len(trained),
        shared=None if shared is None else torch.from_numpy(shared),
    )


def _shared_places(shared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For pairs laid out as prompt + chosen + rejected, lengths int64 [S, 3]: the length of each side on the flat axis (that of
    chosen includes the prompt), and every token's position, which for rejected continues from the prompt's."""
    prompt, chosen, rejected = shared.T
    sides = np.stack([prompt + chosen, rejected], 1).ravel()
    before = np.stack([np.zeros_like(prompt), prompt], 1).ravel()
    begins = np.cumsum(sides) - sides
    return sides, np.arange(sides.sum()) - np.repeat(begins - before, sides)


def token_logps_of(model: Model, batch: Batch) -> Tensor:
    """Log-probabilities fp32 [N] of a batch's trained tokens, under the caller's autocast."""
    hidden = model(batch.ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, batch.shared)
    device = batch.ids.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    with torch.autocast(device, enabled=False):
        shared = None if batch.shared is None else batch.shared.to(batch.ids.device)
        return trained_logps(hidden, model.head_weight, batch.ids, batch.trained, shared=shared, dtype=dtype)


def logps_of(model: Model, batch: Batch) -> Tensor:
    """Log-probabilities float64 [num_sequences], each summed over the sequence's trained tokens."""
    return sum_by_sequence(token_logps_of(model, batch), batch.sequence_ids, batch.num_sequences)


def counts_of(batch: Batch) -> Tensor:
    """Trained tokens of each sequence, float64 [num_sequences]."""
    return sum_by_sequence(
        torch.ones_like(batch.sequence_ids, dtype=torch.float32), batch.sequence_ids, batch.num_sequences
    )
