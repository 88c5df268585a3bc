"""One split of a packed dataset for other programs, made by `mmdata.load`: as torch batches, for Hugging Face datasets,
and as a polars LazyFrame (docs/python.md).
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from mmdata.encode.sequences import PAIR_MARKS, Sequences, take
from mmdata.errors import UsageError
from mmdata.io.files import atomic_path
from mmdata.shards.columns import read_back
from mmdata.shards.dataset import IGNORED, loss_mask, open_dataset, open_sources
from mmdata.shards.manifest import SPLITS

if TYPE_CHECKING:
    import datasets
    import polars as pl

    from mmdata.torch_batches import TorchBatches

_TOKENS = pa.list_(pa.int32())
_PLACE = [("file", pa.string()), ("line", pa.int64())]
SEQUENCE = pa.schema([*_PLACE, ("input_ids", _TOKENS), ("labels", _TOKENS)])
PAIR = pa.schema(
    [
        *_PLACE,
        *((name, _TOKENS) for name in ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_labels", "rejected_labels")),
    ]
)


class PackedSplit:
    """The split "train" or "val" of the packed dataset in a directory. Raises UsageError for another split,
    DatasetError if the dataset is missing or damaged.

    kind: "document", "conversation" or "pair". tokenizer_dir: the tokenizer, which transformers' AutoTokenizer loads.
    """

    def __init__(self, directory: str | Path, split: str = "train"):
        if split not in SPLITS:
            raise UsageError(f"there is no split {split!r}", f"one of {', '.join(SPLITS)}")
        if not isinstance(directory, str | Path):
            raise UsageError(f"{directory!r} is no path of a dataset", 'such as "shards/sft_512"')
        self.dataset = open_dataset(Path(directory))
        self.split = split
        self.kind = self.dataset.kind
        self.tokenizer_dir = self.dataset.tokenizer_dir
        self._shards = self.dataset.shards(split)

    def __len__(self) -> int:
        """The number of samples: packs or pairs."""
        return self.dataset.split(self.split).num_samples()

    def torch(self, batch_tokens: int = 32_768, *, epochs: int = 1, seed: int = 0) -> "TorchBatches":
        """Return the batches of `mm train` as a torch IterableDataset, for a loop or for DataLoader(batch_size=None).

        batch_tokens: tokens of a batch, counted as by `mm train --batch-tokens`. seed: determines the order. Raises
        UsageError for numbers below 1, DatasetError if the split is empty. What a batch holds: `TorchBatches`.
        """
        from mmdata.torch_batches import TorchBatches

        return TorchBatches(self.dataset, self.split, batch_tokens, epochs, seed)

    def polars(self) -> "pl.LazyFrame":
        """Return a LazyFrame with the columns of SEQUENCE or, of pairs, PAIR; shards are read when it is collected."""
        from mmdata.stats.frames import lazy_tables

        return lazy_tables(self.schema, self.tables)

    def hf(self) -> "datasets.Dataset":
        """Return a datasets.Dataset with the columns of SEQUENCE or, of pairs, PAIR. It is memory-mapped from a file in
        the cache of Hugging Face's datasets, which is written at the first call. Raises UsageError without that package.
        """
        try:
            import datasets.config
        except ImportError as error:
            raise UsageError("this needs Hugging Face's datasets", "pip install 'mm-toolkit[hf]'") from error
        key = hashlib.sha256(repr((self.dataset.digest, self.split, self.dataset.inputs)).encode()).hexdigest()
        path = Path(datasets.config.HF_DATASETS_CACHE, "mm", f"{key}.arrow")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as partial, pa.ipc.new_stream(str(partial), self.schema) as stream:
                for table in self.tables():
                    stream.write_table(table)
        return datasets.Dataset.from_file(str(path))

    @property
    def schema(self) -> pa.Schema:
        """PAIR for pairs, otherwise SEQUENCE."""
        return PAIR if self.kind == "pair" else SEQUENCE

    def tables(self) -> Iterator[pa.Table]:
        """Yield the sequences (conversations, documents and pieces of documents) or pairs of each shard as a table.
        file, line: where it came from. *_ids: token ids. *labels: the same, IGNORED where a token is not trained on.
        """
        for shard in self._shards:
            ordinals, sequences = read_back(self.dataset.open_shard(*shard.key), self.kind)
            sources = open_sources(self.dataset, shard.part)
            rows = np.searchsorted(sources["first"], ordinals, side="right") - 1
            columns = [pa.array(self.dataset.inputs).take(pa.array(sources["file"][rows])), sources["line"][rows]]
            yield pa.table([*columns, *_lists(sequences)], names=self.schema.names).cast(self.schema)


def _lists(sequences: Sequences) -> list[pa.ListArray]:
    """Return the token ids and labels of sequences: of pairs, ids of prompt and both replies, and labels of the replies."""
    begins, spans, at = sequences.begins, sequences.marks, np.repeat(sequences.begins, sequences.num_marks)
    places = [(begins, sequences.lengths)]
    if sequences.is_pairs:
        marks = sequences.pair_marks()
        places = list(zip((begins[:, None] + np.cumsum(marks[:, :3], 1) - marks[:, :3]).T, marks[:, :3].T, strict=True))
        spans = take(spans, sequences.mark_begins + PAIR_MARKS, sequences.num_marks - PAIR_MARKS)
        at = np.repeat(np.stack([begin for begin, _ in places[1:]], 1).reshape(-1), marks[:, 3:].reshape(-1))
    ids = sequences.ids.astype(np.int32)
    labels = np.where(loss_mask(spans + at, len(ids)), ids, IGNORED)
    trained = places[1:] if sequences.is_pairs else places
    return [_list(ids, *place) for place in places] + [_list(labels, *place) for place in trained]


def _list(values: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """Return the slices values[begins[i] : begins[i] + lengths[i]] as a list array."""
    return pa.ListArray.from_arrays(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), take(values, begins, lengths)
    )
