"""The batches of a packed dataset as torch tensors. Imported only for `mmdata.load(…).torch()`."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from mmdata.errors import DatasetError, UsageError
from mmdata.shards.dataset import IGNORED, Dataset
from mmdata.shards.loader import MicroBatch
from mmdata.shards.pairs import make_loader


class TorchBatches(IterableDataset):
    """The batches of one split, in the order in which `mm train` takes them with the same seed and number of tokens.

    Each is a dictionary of int64 tensors [1, T], sequences one after another without padding. input_ids: tokens.
    labels: the same, -100 where a token is not trained on; not shifted, as transformers' models expect. position_ids:
    from 0 in each sequence, by which transformers' models keep them apart if `use_cache` is False. Of pairs the sequences are chosen and
    rejected reply in turn, each with its prompt in front. With workers of a DataLoader, each makes every n-th batch.
    """

    def __init__(self, dataset: Dataset, split: str, batch_tokens: int, epochs: int = 1, seed: int = 0):
        for name, value in (("batch_tokens", batch_tokens), ("epochs", epochs)):
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} is {value!r}", "a number from 1")
        micro_tokens = 2**31 if dataset.kind == "pair" else batch_tokens  # one micro-batch is the whole batch
        self._loader = make_loader(
            [dataset], split=split, batch_tokens=batch_tokens, micro_tokens=micro_tokens, seed=seed
        )
        if not self._loader.num_samples:
            raise DatasetError(f"{dataset.dir}: the {split} split is empty", "mm pack with another --val-fraction")
        self._steps = self._loader.steps_per_epoch * epochs

    def __len__(self) -> int:
        """The number of batches."""
        return self._steps

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in range(first, self._steps, stride):
            for micro in self._loader.batch(step):
                yield _tensors(micro)


def _tensors(micro: MicroBatch) -> dict[str, torch.Tensor]:
    lengths = np.diff(micro.cu_seqlens)
    arrays = {
        "input_ids": micro.ids,
        "labels": np.where(micro.loss_mask, micro.ids, IGNORED),
        "position_ids": np.arange(len(micro.ids)) - np.repeat(micro.cu_seqlens[:-1], lengths),
    }
    return {name: torch.from_numpy(array.astype(np.int64))[None] for name, array in arrays.items()}
