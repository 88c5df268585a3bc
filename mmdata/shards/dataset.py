"""Packed datasets on disk as views of memory-mapped shards. Reading copies nothing: a sample is a few slices of a file.

Opening checks sizes, Arrow's magic bytes, schema and tokenizer against the manifest, about 0.1 ms a shard. `check_bytes`
hashes what has not been hashed since it was last written; `verify` (verify.py) hashes everything. shards/README.md
specifies the format.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmdata.io.arrow import ArrowFile, BatchColumns, num_rows, read_arrow
from mmdata.io.files import sha256_of
from mmdata.shards import checksums
from mmdata.shards.manifest import SPLITS, Manifest, ShardRecord, damaged, read_manifest

REPORT = "report.html"  # a page beside the manifest, which does not list it: no part of the dataset
TOKENS_PER_BATCH = 2**25  # of a record batch: 65,536 rows of 512, 32,768 of 1024, 16,384 of 2048
SOURCES_PER_BATCH = 2**20
PACK_LISTS = ("ids", "doc_len", "span")  # the token content of a pack; `doc` says which rows it came from
PAIR_LISTS = ("prompt", "chosen", "rejected", "chosen_span", "rejected_span")


class PackView(NamedTuple):
    """One pack: views of the shard. span is flat: begin, end, begin, end, … in the pack's own positions."""

    ids: np.ndarray
    doc_len: np.ndarray
    span: np.ndarray
    n_loss: int
    doc: np.ndarray


class PairView(NamedTuple):
    """One pair: views of the shard. Spans are flat and count from the reply's own first token."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_span: np.ndarray
    rejected_span: np.ndarray
    n_chosen: int
    n_rejected: int
    doc: int


def id_dtype(vocab_size: int) -> np.dtype:
    """The type token ids are stored as: 16 bits while the vocabulary fits."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def position_dtype(bucket: int) -> np.dtype:
    """The type positions and lengths inside a sample are stored as; the bucket itself must fit."""
    return np.dtype(np.uint16 if bucket < 2**16 else np.uint32)


def token_digest(file: ArrowFile, kind: str) -> str:
    """sha256 of a shard's token content, lists as 32-bit lengths and values: the same for any Arrow version or id width."""
    digest = hashlib.sha256()
    for name in PAIR_LISTS if kind == "pair" else PACK_LISTS:
        column = file.column(name)
        for array in (column.lengths(), column.values):
            digest.update(np.ascontiguousarray(array, "<u4").data)
    return digest.hexdigest()


def sequence_digest(ids: np.ndarray, lengths: np.ndarray, marks: np.ndarray, num_marks: np.ndarray) -> int:
    """A digest of a multiset of sequences: their 128-bit hashes summed, so that their order is no matter.

    ids: all ids end to end, `lengths` of them each; marks: all spans (and what else must be equal), `num_marks` each.
    """
    id_bytes, mark_bytes = (np.ascontiguousarray(array, "<u4").data.cast("B") for array in (ids, marks))
    total = id_begin = mark_begin = 0
    id_ends, mark_ends = (4 * np.cumsum(lengths)).tolist(), (4 * np.cumsum(num_marks)).tolist()
    for id_end, mark_end in zip(id_ends, mark_ends, strict=True):
        salt = (id_end - id_begin).to_bytes(8, "little")  # where ids end and marks begin
        digest = hashlib.blake2b(id_bytes[id_begin:id_end], digest_size=16, salt=salt)
        digest.update(mark_bytes[mark_begin:mark_end])
        total += int.from_bytes(digest.digest(), "little")
        id_begin, mark_begin = id_end, mark_end
    return total % 2**128


class SplitTotals(NamedTuple):
    """Sums over a split: source rows, stored tokens, tokens a model sees (a pair's prompt twice), trained tokens."""

    rows: int
    tokens: int
    model_tokens: int
    loss_tokens: int


class Split:
    """The samples of one split, by bucket and index, or by number: all buckets ascending, then their shards in order."""

    def __init__(self, dataset: "Dataset", name: str):
        self.name = name
        self.kind = dataset.kind
        self.buckets = dataset.buckets
        shards = [shard for shard in dataset.manifest.shards if shard.split == name]
        self.totals = SplitTotals(*(sum(getattr(shard, name) for shard in shards) for name in SplitTotals._fields))
        self._batches: dict[int, list[BatchColumns]] = {bucket: [] for bucket in self.buckets}
        self._begins: dict[int, list[int]] = {bucket: [0] for bucket in self.buckets}  # first sample of each batch
        self._parts: dict[int, list[int]] = {bucket: [] for bucket in self.buckets}
        for shard in sorted(shards, key=lambda shard: shard.part):
            begins = self._begins[shard.bucket]
            for batch in dataset.open_shard(shard).batches:
                self._batches[shard.bucket].append(batch)
                begins.append(begins[-1] + num_rows(batch))
                self._parts[shard.bucket].append(shard.part)

    def num_samples(self, bucket: int | None = None) -> int:
        """Samples of a bucket, or of all."""
        return sum(self._begins[b][-1] for b in (self.buckets if bucket is None else (bucket,)))

    def locate(self, number: int) -> tuple[int, int]:
        """(bucket, index in it) of a sample number; IndexError past the end."""
        for bucket in self.buckets:
            if 0 <= number < self.num_samples(bucket):
                return bucket, number
            number -= self.num_samples(bucket)
        raise IndexError(f"{self.name} has {self.num_samples()} samples")

    def part_of(self, bucket: int, i: int) -> int:
        """The part a sample was packed in; its `doc` ordinals count within it."""
        return self._parts[bucket][bisect_right(self._begins[bucket], i) - 1]

    def batches(self, bucket: int) -> list[tuple[int, BatchColumns]]:
        """Record batches of a bucket: the number of the first sample in each, and its columns."""
        return list(zip(self._begins[bucket], self._batches[bucket], strict=False))

    def list_lengths(self, name: str) -> np.ndarray:
        """Entries of a list column of every sample, int64 [num_samples], in the order of sample numbers."""
        lengths = [batch[name].lengths() for bucket in self.buckets for batch in self._batches[bucket]]
        return np.concatenate(lengths, dtype=np.int64) if lengths else np.zeros(0, np.int64)

    def samples(self) -> Iterator[Any]:
        """Every sample, in the order of sample numbers."""
        return (self.sample(bucket, i) for bucket in self.buckets for i in range(self.num_samples(bucket)))

    def sample(self, bucket: int, i: int) -> Any:
        """Sample i of a bucket: a PackView, or for pairs a PairView."""
        begins = self._begins[bucket]
        at = bisect_right(begins, i) - 1
        columns = self._batches[bucket][at]
        i -= begins[at]
        if self.kind == "pair":
            return pair_view(columns, i)
        return PackView(
            columns["ids"].row(i),
            columns["doc_len"].row(i),
            columns["span"].row(i),
            int(columns["n_loss"][i]),
            columns["doc"].row(i),
        )


def pair_view(columns: BatchColumns, i: int) -> PairView:
    """The empty list that stands for a wholly trained reply becomes its one span."""
    chosen, rejected = columns["chosen"].row(i), columns["rejected"].row(i)
    chosen_span, rejected_span = columns["chosen_span"].row(i), columns["rejected_span"].row(i)
    return PairView(
        columns["prompt"].row(i),
        chosen,
        rejected,
        chosen_span if len(chosen_span) else np.array([0, len(chosen)], chosen_span.dtype),
        rejected_span if len(rejected_span) else np.array([0, len(rejected)], rejected_span.dtype),
        int(columns["n_chosen"][i]),
        int(columns["n_rejected"][i]),
        int(columns["doc"][i]),
    )


class Dataset:
    """A packed dataset: its manifest, and its splits as views. Made by `open_dataset`; pickles as its directory."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.dir = directory
        self.manifest = manifest
        self.kind = manifest.kind
        self.digest = manifest.dataset_digest
        self.max_len = manifest.max_len
        self.buckets = manifest.buckets
        self.vocab_size = manifest.tokenizer.vocab_size
        self.tokenizer_sha256 = manifest.tokenizer.sha256
        self.tokenizer_dir = directory / "tokenizer"
        self.inputs = [file.path for file in manifest.inputs]  # as they were named when packing
        _allow_open_files(len(manifest.shards))
        self._files: dict[str, ArrowFile] = {}
        self._splits = {name: Split(self, name) for name in SPLITS}

    def __reduce__(self) -> tuple[Any, ...]:
        return open_dataset, (self.dir,)

    def split(self, name: str) -> Split:
        """The split "train" or "val"; it may be empty."""
        return self._splits[name]

    def open_shard(self, shard: ShardRecord) -> ArrowFile:
        """A shard, mapped once; DatasetError when it is missing, of another size, or of another dataset."""
        if shard.path not in self._files:
            path = self.dir / shard.path
            check_size(path, shard.bytes, self.dir)
            try:
                file = read_arrow(path)
            except ValueError as error:
                raise damaged(self.dir, f"{path}: {error}") from error
            check_metadata(file, self.manifest, shard, self.dir)
            self._files[shard.path] = file
        return self._files[shard.path]

    def check_bytes(self, progress: Callable[[int, int], None] | None = None) -> None:
        """DatasetError unless every shard holds the bytes that were packed; reads those not read since they changed."""
        files = [shard.file for shard in self.manifest.shards]
        for path, digest in checksums.check(self.dir, files, progress):
            raise damaged(self.dir, f"{self.dir / path}: its bytes have changed since it was packed (sha256 {digest})")


def _allow_open_files(count: int) -> None:
    """Raise this process's limit of open files, often 1,024, as far as allowed: a mapped shard stays open."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * count + 256  # twice: a run may map a second dataset of this size beside it
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def check_metadata(file: ArrowFile, manifest: Manifest, shard: ShardRecord, directory: Path) -> None:
    """DatasetError unless the metadata in the shard's schema agrees with the manifest."""
    for key, expected in manifest.shard_metadata(shard.bucket).items():
        if (actual := file.metadata.get(f"mm.{key}")) != expected:
            raise damaged(directory, f"{directory / shard.path}: {key} is {actual}, expected {expected}")


def check_size(path: Path, num_bytes: int, directory: Path) -> None:
    """DatasetError unless the file is there with this size (a map of a shorter file would crash the reader)."""
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        raise damaged(directory, f"{path} is missing") from None
    if actual != num_bytes:
        raise damaged(directory, f"{path} has {actual:,} bytes, expected {num_bytes:,}")


def open_dataset(directory: Path) -> Dataset:
    """Open a packed dataset. DatasetError when it is missing, incomplete, truncated, or its tokenizer was exchanged."""
    manifest = read_manifest(directory)
    path = directory / "tokenizer" / "tokenizer.json"
    actual = sha256_of(path) if path.exists() else "missing"
    if actual != manifest.tokenizer.sha256:
        raise damaged(directory, f"{path}: sha256 is {actual}, expected {manifest.tokenizer.sha256}")
    return Dataset(directory, manifest)


# --- from samples back to rows


class _PartSequences:
    """Every sequence of a part in one split's shards: ordinal -> ids and loss mask (for pairs the three lists)."""

    def __init__(self, dataset: Dataset, part: int, splits: Sequence[str]):
        self._kind = dataset.kind
        self._at: dict[int, tuple[BatchColumns, int, int, int]] = {}  # ordinal -> columns, row, begin, end
        for shard in dataset.manifest.shards:
            if shard.part == part and shard.split in splits:
                for columns in dataset.open_shard(shard).batches:
                    self._add(columns)

    def _add(self, columns: BatchColumns) -> None:
        if self._kind == "pair":
            self._at |= {ordinal: (columns, i, 0, 0) for i, ordinal in enumerate(columns["doc"].tolist())}
            return
        for i in range(num_rows(columns)):
            end = 0
            lengths = columns["doc_len"].row(i).tolist()
            for ordinal, length in zip(columns["doc"].row(i).tolist(), lengths, strict=True):
                begin, end = end, end + length
                self._at[ordinal] = (columns, i, begin, end)

    def __contains__(self, ordinal: int) -> bool:
        return ordinal in self._at

    def record(self, ordinals: range) -> dict[str, Any]:
        """The sequences of one row, joined in order, as `mm show --json` prints them."""
        if self._kind == "pair":
            columns, i, _, _ = self._at[ordinals.start]
            return _pair_record(pair_view(columns, i))
        ids: list[int] = []
        mask: list[int] = []
        for ordinal in ordinals:
            columns, i, begin, end = self._at[ordinal]
            row = columns["ids"].row(i)
            ids += row[begin:end].tolist()
            mask += loss_mask(columns["span"].row(i), len(row))[begin:end].tolist()
        return {"input_ids": ids, "loss_mask": mask}


def loss_mask(spans: np.ndarray, length: int) -> np.ndarray:
    """uint8 [length]: 1 inside the flat begin, end, … of `spans`. Costs one pass, whatever the number of spans."""
    edges = np.empty(len(spans) + 2, np.int64)
    edges[0], edges[1:-1], edges[-1] = 0, spans, length
    ones = np.zeros(len(edges) - 1, np.uint8)
    ones[1::2] = 1
    return ones.repeat(edges[1:] - edges[:-1])


def _pair_record(pair: PairView) -> dict[str, Any]:
    return {
        "prompt_ids": pair.prompt.tolist(),
        "chosen_ids": pair.chosen.tolist(),
        "rejected_ids": pair.rejected.tolist(),
        "chosen_mask": loss_mask(pair.chosen_span, len(pair.chosen)).tolist(),
        "rejected_mask": loss_mask(pair.rejected_span, len(pair.rejected)).tolist(),
    }


def open_sources(dataset: Dataset, part: int) -> dict[str, np.ndarray]:
    """A part's provenance columns, one entry a kept row: file, line, offset, sha [n, 8], first (sequence ordinal)."""
    file = read_arrow(dataset.dir / sources_path(part))
    return {name: file.column(name) for name in ("file", "line", "offset", "sha", "first")}


def sources_path(part: int) -> str:
    """Where a part's provenance stands in a dataset."""
    return f"sources/part-{part:05d}.arrow"


def source_rows(dataset: Dataset, split: str = "all") -> Iterator[dict[str, Any]]:
    """One record a source row, in source order: file, line, then ids and loss mask (for pairs, of prompt and replies).

    split: "train", "val", or "all" for both merged. Documents and fragments of one row are joined. One part in memory.
    """
    splits = SPLITS if split == "all" else (split,)
    for part in dataset.manifest.parts:
        if part.sequences == 0:
            continue
        sequences = _PartSequences(dataset, part.part, splits)
        sources = open_sources(dataset, part.part)
        firsts = [*sources["first"].tolist(), part.sequences]
        for i, (file, line) in enumerate(zip(sources["file"].tolist(), sources["line"].tolist(), strict=True)):
            if firsts[i] in sequences:
                ordinals = range(firsts[i], firsts[i + 1])
                yield {"file": dataset.inputs[file], "line": line, **sequences.record(ordinals)}


def sample_rows(dataset: Dataset, split: str, number: int) -> list[dict[str, Any]]:
    """What stands in one sample: for each of its sequences a record as `source_rows` makes. IndexError past the end."""
    bucket, i = dataset.split(split).locate(number)
    view = dataset.split(split).sample(bucket, i)
    sources = open_sources(dataset, dataset.split(split).part_of(bucket, i))
    ordinals = [view.doc] if dataset.kind == "pair" else view.doc.tolist()
    rows = np.searchsorted(sources["first"], ordinals, side="right") - 1
    places = [{"file": dataset.inputs[sources["file"][row]], "line": int(sources["line"][row])} for row in rows]
    if dataset.kind == "pair":
        return [{**places[0], **_pair_record(view)}]
    ends = np.cumsum(view.doc_len, dtype=np.int64)
    ids = np.split(view.ids, ends[:-1])
    masks = np.split(loss_mask(view.span, len(view.ids)), ends[:-1])
    return [
        {**place, "input_ids": i.tolist(), "loss_mask": m.tolist()}
        for place, i, m in zip(places, ids, masks, strict=True)
    ]
