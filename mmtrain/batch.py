"""Buffers of a micro-batch -> device tensors: ids, restarting position_ids, cu_seqlens and where the trained tokens stand.

Instead of labels with -100 in them, a batch holds the positions of the trained tokens: the loss then picks them without
asking the device how many there are.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdata.loader import MicroBatch
from mmtrain.losses import sum_by_sequence, trained_logps
from mmtrain.model import Model


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device. T tokens, N of them trained, in `num_sequences` sequences.

    `trained` int64 [N] are positions on the flat axis, ascending; `sequence_ids` int64 [N] the sequence of each.
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


def pinned(count: int, dtype: Any) -> np.ndarray:
    """A buffer in page-locked memory, which a CUDA device copies from while it computes. Not measured."""
    return torch.from_numpy(np.empty(0, dtype)).new_empty(count, pin_memory=True).numpy()


def to_device(micro: MicroBatch, device: torch.device) -> Batch:
    """Bring a micro-batch to the device. A document's first token has no predecessor and must not be trained."""
    cu_seqlens = np.asarray(micro.cu_seqlens, dtype=np.int64)
    lengths = np.diff(cu_seqlens)
    trained = np.flatnonzero(micro.loss_mask)
    starts = cu_seqlens[:-1][lengths > 0]
    assert not np.asarray(micro.loss_mask)[starts].any(), "a document's first token is marked trained"
    sequence_ids = np.repeat(np.arange(len(lengths)), lengths)[trained]
    position_ids = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)

    def put(values: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True).to(dtype)

    return Batch(
        ids=put(micro.ids),
        position_ids=put(position_ids),
        cu_seqlens=put(cu_seqlens, torch.int32),
        max_seqlen=int(micro.max_seqlen),
        trained=put(trained),
        sequence_ids=put(sequence_ids),
        num_sequences=len(lengths),
        samples=np.asarray(micro.samples),
        num_tokens=len(position_ids),
        num_trained=len(trained),
    )


def token_logps_of(model: Model, batch: Batch) -> Tensor:
    """Log-probabilities fp32 [N] of a batch's trained tokens, under the autocast the caller has set."""
    hidden = model(batch.ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
    device = batch.ids.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    with torch.autocast(device, enabled=False):
        return trained_logps(hidden, model.head_weight, batch.ids, batch.trained, dtype=dtype)


def logps_of(model: Model, batch: Batch) -> Tensor:
    """Log-probabilities fp32 [num_sequences], each summed over the sequence's trained tokens."""
    return sum_by_sequence(token_logps_of(model, batch), batch.sequence_ids, batch.num_sequences)
