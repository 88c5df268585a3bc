"""Copy the numpy arrays of a micro-batch to the device, and compute the log-probabilities of its trained tokens. A
batch has the positions of these tokens instead of labels with -100, because selecting by a mask on the device would
make the host wait until the device has counted them."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdata.shards.loader import Limits, MicroBatch
from mmtrain.model.logps import sum_by_sequence, trained_logps
from mmtrain.model.model import Model
from mmtrain.model.precision import is_autocast

# A padded micro-batch has room for one sequence per FILL_TOKENS tokens, so its shape stays the same as long as the mean
# length of the sequences is at least this.
FILL_TOKENS = 128


@dataclass(frozen=True)
class Batch:
    """One micro-batch as tensors on its device: T tokens, N of them trained, in `num_sequences` sequences.

    ids, position_ids: int64 [T]. cu_seqlens: int32 [n + 1], the ends of n sequences beginning with 0; on the CPU unless
    the device is CUDA's, because elsewhere the host lays out attention. These three are longer if the batch is padded
    (see `filled`). max_seqlen: upper bound of the sequence lengths. trained: int64 [N], positions of the trained tokens
    in `ids`, ascending. sequence_ids: int64 [N], the sequence of each. samples: int64, numbers of the packs or pairs
    within the split. num_tokens, num_trained: T and N, without padding. For pairs, `num_sequences` and `sequence_ids`
    count each side as a sequence; with `shared`, n in `cu_seqlens` is the number of pairs.
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
    # If each pair is laid out as prompt + chosen + rejected, with one copy of the prompt: int64 [S, 3] on the CPU, the
    # number of tokens of the three. None for packs, and for pairs whose two sides each have their own copy of the
    # prompt.
    shared: Tensor | None = None


def pinned(count: int, dtype: Any) -> np.ndarray:
    """Return an uninitialised array of `count` elements of a numpy type in page-locked memory, from which a CUDA device
    can copy while it computes (the speed-up has not been measured). Requires CUDA."""
    return torch.from_numpy(np.empty(0, dtype)).new_empty(count, pin_memory=True).numpy()


def cut(micro: MicroBatch, most_tokens: int | None, is_pairs: bool = False) -> list[MicroBatch]:
    """Divide a micro-batch into consecutive ones of at most `most_tokens` tokens (None: no limit), without splitting a
    sequence or a pair; a longer one is a micro-batch of its own. Summed losses and gradients of the results add up to
    those of `micro`. is_pairs: `samples` is divided as well; for packs, every result has all `samples` of `micro`."""
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
    """Return the lengths (int64) of the padding sequences that bring a micro-batch of `num_tokens` tokens in
    `num_documents` sequences to one of few shapes, so that compiled code is not compiled again for every micro-batch.
    The padded number of tokens is the smallest of `limits.tokens` times a power of two (..., 1/4, 1/2, 1, 2, ...) that
    is enough. That of sequences is a power of two, and at least one per FILL_TOKENS padded tokens. No padding sequence
    is longer than `limits.sequence`, and most are empty."""
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
    """Copy a micro-batch to the device, on CUDA padded to the loader's `limits` (see `filled`), on the CPU never.
    Asserts that no sequence has its first token marked trained, because no hidden state predicts it."""
    return filled(micro, device, limits if device.type == "cuda" else None)


def filled(micro: MicroBatch, device: torch.device, limits: Limits | None) -> Batch:
    """Copy a micro-batch to `device`; if `limits` is given, append padding sequences (see `filling`) without trained
    tokens, also on the CPU, which the tests use. `max_seqlen` then is `limits.sequence` for every batch. Asserts that
    no sequence (or reply without a prompt) has its first token marked trained."""
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
        return torch.from_numpy(values).to(device, non_blocking=device.type == "cuda").to(dtype)

    return Batch(
        ids=F.pad(put(micro.ids), (0, len(position_ids) - num_tokens)),
        position_ids=put(position_ids),
        cu_seqlens=put(cu_seqlens, torch.int32) if device.type == "cuda" else torch.from_numpy(cu_seqlens).int(),
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
    """Return the length of each side, int64 [2 S], alternately prompt + chosen and rejected alone, and the position id
    of every token, int64 [T], for pairs laid out as prompt + chosen + rejected. shared: int64 [S, 3], their tokens.
    Position ids of rejected continue from the end of its prompt, as if chosen were not there."""
    prompt, chosen, rejected = shared.T
    sides = np.stack([prompt + chosen, rejected], 1).ravel()
    before = np.stack([np.zeros_like(prompt), prompt], 1).ravel()
    begins = np.cumsum(sides) - sides
    return sides, np.arange(sides.sum()) - np.repeat(begins - before, sides)


def token_logps_of(model: Model, batch: Batch) -> Tensor:
    """Return the log-probabilities of a batch's trained tokens, fp32 [N]. The forward pass and the product with the
    output embedding run in the type of the caller's autocast context."""
    hidden = model(batch.ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, batch.shared)
    device = batch.ids.device
    is_low = is_autocast(device)
    dtype = torch.get_autocast_dtype(device.type) if is_low else torch.float32
    with torch.autocast(device.type, enabled=False) if is_low else nullcontext():
        shared = None if batch.shared is None else batch.shared.to(device)
        return trained_logps(hidden, model.head_weight, batch.ids, batch.trained, shared=shared, dtype=dtype)


def logps_of(model: Model, batch: Batch) -> Tensor:
    """Return the log-probability of each sequence, float64 [num_sequences]: the sum over its trained tokens."""
    return sum_by_sequence(token_logps_of(model, batch), batch.sequence_ids, batch.num_sequences)


def counts_of(batch: Batch) -> Tensor:
    """Return the number of trained tokens of each sequence, float64 [num_sequences]."""
    return sum_by_sequence(
        torch.ones_like(batch.sequence_ids, dtype=torch.float32), batch.sequence_ids, batch.num_sequences
    )
