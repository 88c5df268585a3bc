"""Read packed datasets as views of memory-mapped shards; nothing is copied. shards/README.md specifies the format.

Opening a dataset compares every file with the manifest. A file is read only the first time that a state of it is seen
(module `checksums`); after that opening takes about 0.1 ms a shard. `verify` (verify.py) reads every file again.
"""

import hashlib
import os
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmdata.encode.sequences import Sequences, TokenSequence, join, reorder
from mmdata.io.arrow import ArrowFile, BatchColumns, Ragged, num_rows, read_arrow
from mmdata.io.records import FileEntry
from mmdata.shards import checksums
from mmdata.shards.columns import read_back, shard_problems, source_problems
from mmdata.shards.manifest import (
    MANIFEST,
    PARTS,
    SPLITS,
    Manifest,
    PartRecord,
    Parts,
    ShardRecord,
    check_sums,
    damaged,
    read_manifest,
)

TOKENIZER = "tokenizer/tokenizer.json"
OPTIONAL = ("sources/", "rejected/", "stats.json")  # a dataset without these files can be trained on
REPORT, CARD = "report.html", "README.md"  # in the dataset's directory, but not in the manifest: no part of the dataset
TOKENS_PER_BATCH = 2**25  # positions in a record batch: 65,536 samples of 512, 32,768 of 1024, …
SOURCES_PER_BATCH = 2**20
MAX_MAPPED = 2**13  # shards of a dataset that stay mapped at most; Linux allows a process 65,530 maps
DIGEST_VALUES = 2**16  # number of values that are converted for a digest at once: they stay in the cache
IGNORED = -100  # label of a token that is not trained on, which torch's cross entropy leaves out
PACK_LISTS = ("ids", "doc_len", "span")  # the columns with the tokens of a pack; `doc` only says where they came from
PAIR_LISTS = ("prompt", "chosen", "rejected", "chosen_span", "rejected_span")


class PackView(NamedTuple):
    """One pack, as views of its shard. ids: of all sequences, one after another. doc_len: length of each sequence.
    span: the trained tokens as begin, end, begin, end, … (end exclusive), in positions of the pack. n_loss: number of
    trained tokens. doc: ordinal of each sequence: its number in its part, from 0, in the order of the rows."""

    ids: np.ndarray
    doc_len: np.ndarray
    span: np.ndarray
    n_loss: int
    doc: np.ndarray


class PairView(NamedTuple):
    """One pair, as views of its shard. prompt, chosen, rejected: token ids; replies are without the prompt.
    chosen_span, rejected_span: as in `PackView`, counted from the reply's first token. n_chosen, n_rejected: number of
    trained tokens. doc: the pair's number in its part, from 0."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_span: np.ndarray
    rejected_span: np.ndarray
    n_chosen: int
    n_rejected: int
    doc: int


def id_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype of stored token ids: uint16 for at most 65,536 entries, otherwise uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def position_dtype(bucket: int) -> np.dtype:
    """Return the dtype of positions and lengths inside a sample. `bucket` itself must fit: it is the largest length."""
    return np.dtype(np.uint16 if bucket < 2**16 else np.uint32)


def token_digest(file: ArrowFile, kind: str) -> str:
    """Return the sha256 (hex) of the tokens and trained spans of a shard, as 32-bit integers, so that neither the Arrow
    version nor the width of the stored ids matters. kind: "pair", or another row kind for packs."""
    digest = hashlib.sha256()
    for name in PAIR_LISTS if kind == "pair" else PACK_LISTS:
        column = file.column(name)
        for array in (column.lengths(), column.values):
            for begin in range(0, len(array), DIGEST_VALUES):
                digest.update(np.ascontiguousarray(array[begin : begin + DIGEST_VALUES], "<u4").data)
    return digest.hexdigest()


def sequence_digest(ids: np.ndarray, lengths: np.ndarray, marks: np.ndarray, num_marks: np.ndarray) -> int:
    """Return the sum of the 128-bit hashes of sequences modulo 2^128, which does not depend on their order. ids: token
    ids of all sequences, end to end. lengths: of each. marks: the other values that must be equal, such as trained
    spans, end to end. num_marks: of each."""
    id_bytes, mark_bytes = (np.ascontiguousarray(array, "<u4").data.cast("B") for array in (ids, marks))
    total = id_begin = mark_begin = 0
    id_ends, mark_ends = (4 * np.cumsum(lengths)).tolist(), (4 * np.cumsum(num_marks)).tolist()
    for id_end, mark_end in zip(id_ends, mark_ends, strict=True):
        salt = (id_end - id_begin).to_bytes(8, "little")  # where ids end and marks begin in the hash in the hash
        digest = hashlib.blake2b(id_bytes[id_begin:id_end], digest_size=16, salt=salt)
        digest.update(mark_bytes[mark_begin:mark_end])
        total += int.from_bytes(digest.digest(), "little")
        id_begin, mark_begin = id_end, mark_end
    return total % 2**128


class SplitTotals(NamedTuple):
    """Sums over a split: source rows, stored tokens, computed tokens (a pair's prompt counts twice), trained tokens."""

    rows: int
    tokens: int
    model_tokens: int
    loss_tokens: int


class Split:
    """The samples (packs or pairs) of the split "train" or "val", addressed by bucket and index in it or by sample
    number, which counts from 0 through all buckets, ascending. Within a bucket shards are ordered by part."""

    def __init__(self, dataset: "Dataset", name: str):
        self.name = name
        self.kind = dataset.kind
        self.buckets = dataset.buckets
        self._dataset = dataset
        self._sums: Counter[str] = Counter()
        self._parts: dict[int, list[int]] = {bucket: [] for bucket in self.buckets}  # that each shard is of
        self._begins: dict[int, list[int]] = {bucket: [0] for bucket in self.buckets}  # of each shard: its first sample

    def _add(self, shard: ShardRecord) -> None:
        """Add a shard; those of a bucket by ascending parts."""
        self._parts[shard.bucket].append(shard.part)
        self._begins[shard.bucket].append(self._begins[shard.bucket][-1] + shard.samples)
        self._sums.update({name: getattr(shard, name) for name in SplitTotals._fields})

    @property
    def totals(self) -> SplitTotals:
        """Sums over all shards."""
        return SplitTotals(*(self._sums[name] for name in SplitTotals._fields))

    def num_samples(self, bucket: int | None = None) -> int:
        """Return the number of samples in a bucket, or in all buckets if it is None."""
        return sum(self._begins[b][-1] for b in (self.buckets if bucket is None else (bucket,)))

    def locate(self, number: int) -> tuple[int, int]:
        """Return (bucket, index in that bucket) for a sample number. Raises IndexError if there is no such sample."""
        for bucket in self.buckets:
            if 0 <= number < self.num_samples(bucket):
                return bucket, number
            number -= self.num_samples(bucket)
        raise IndexError(f"{self.name} has {self.num_samples()} samples")

    def part_of(self, bucket: int, i: int) -> int:
        """Return the part that sample i of a bucket was packed from; the ordinals in its `doc` count within the
        part."""
        return self._parts[bucket][bisect_right(self._begins[bucket], i) - 1]

    def shard_begins(self, bucket: int) -> list[int]:
        """Return the index in the bucket of the first sample of each of its shards."""
        return self._begins[bucket][:-1]

    def shard(self, bucket: int, number: int) -> ArrowFile:
        """Return a shard of a bucket, by its number from 0."""
        return self._dataset.open_shard(self.name, bucket, self._parts[bucket][number])

    def batches(self, bucket: int, shard: int) -> list[tuple[int, BatchColumns]]:
        """Return (index in the bucket of the first sample, columns by name) of each Arrow record batch of shard number
        `shard` of a bucket, counted from 0."""
        batches = self.shard(bucket, shard).batches
        begins = accumulate(map(num_rows, batches[:-1]), initial=self._begins[bucket][shard])
        return list(zip(begins, batches, strict=True))

    def list_lengths(self, name: str) -> np.ndarray:
        """Return the lengths of the list column `name`: int64 [num_samples], by sample number."""
        shards = (self.shard(bucket, i) for bucket in self.buckets for i in range(len(self._parts[bucket])))
        lengths = [batch[name].lengths() for shard in shards for batch in shard.batches]
        return np.concatenate(lengths, dtype=np.int64) if lengths else np.zeros(0, np.int64)

    def samples(self) -> Iterator[Any]:
        """Return an iterator over all samples, by sample number."""
        return (self.sample(bucket, i) for bucket in self.buckets for i in range(self.num_samples(bucket)))

    def _at(self, bucket: int, i: int) -> tuple[BatchColumns, int]:
        """Return the record batch of sample i of a bucket, and the sample's row in it."""
        batches = self.batches(bucket, bisect_right(self._begins[bucket], i) - 1)
        begin, columns = next(batch for batch in reversed(batches) if batch[0] <= i)
        return columns, i - begin

    def columns(self, bucket: int, i: int) -> BatchColumns:
        """Return the columns of sample i of a bucket alone."""
        columns, i = self._at(bucket, i)
        return {
            name: Ragged(column.row(i), np.array([0, len(column.row(i))]))
            if isinstance(column, Ragged)
            else column[[i]]
            for name, column in columns.items()
        }

    def sample(self, bucket: int, i: int) -> Any:
        """Return sample i of a bucket: a PairView in a dataset of pairs, otherwise a PackView."""
        columns, i = self._at(bucket, i)
        if self.kind == "pair":
            return pair_view(columns, i)
        ids, doc_len, span, doc = (columns[name].row(i) for name in (*PACK_LISTS, "doc"))
        return PackView(ids, doc_len, span, int(columns["n_loss"][i]), doc)


def pair_view(columns: BatchColumns, i: int) -> PairView:
    """Return row i of a shard of pairs. An empty stored span list is returned as one span over the whole reply."""
    prompt, *replies, chosen_span, rejected_span = (columns[name].row(i) for name in PAIR_LISTS)
    spans = (
        span if len(span) else np.array([0, len(reply)], span.dtype)
        for span, reply in zip((chosen_span, rejected_span), replies, strict=True)
    )
    return PairView(prompt, *replies, *spans, *(int(columns[name][i]) for name in ("n_chosen", "n_rejected", "doc")))


class Dataset:
    """An opened packed dataset; create it with `open_dataset`. Pickling stores only the directory."""

    def __init__(self, directory: Path, manifest: Manifest, parts: Parts):
        self.dir, self.manifest, self.parts = directory, manifest, parts
        self.kind = manifest.kind
        self.digest = manifest.dataset_digest
        self.max_len = manifest.max_len
        self.buckets = manifest.buckets
        self.vocab_size = manifest.tokenizer.vocab_size
        self.tokenizer_sha256 = manifest.tokenizer.sha256
        self.tokenizer_dir = directory / "tokenizer"
        self.inputs = [file.path for file in manifest.inputs]  # paths as they were given to `mm pack`
        # The files that are mapped, by ShardRecord.key, the one used last at the end.
        self._files: OrderedDict[tuple[str, int, int], ArrowFile] = OrderedDict()
        self._lock = threading.Lock()  # a loader reads ahead in a thread
        self._splits = {name: Split(self, name) for name in SPLITS}
        for shard in self.parts.shards:
            self._splits[shard.split]._add(shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.dir,)

    def split(self, name: str) -> Split:
        """Return the split "train" or "val". It may have no samples."""
        return self._splits[name]

    def shards(self, split: str = "") -> list[ShardRecord]:
        """Return the records of the shards of a split, or of both, by split, bucket and part."""
        chosen = (shard for shard in self.parts.shards if split in ("", shard.split))
        return sorted(chosen, key=lambda shard: shard.key)

    def open_shard(self, split: str, bucket: int, part: int) -> ArrowFile:
        """Return a memory-mapped shard. The MAX_MAPPED shards used last stay mapped. Raises DatasetError if it is no
        Arrow file, or has another number of samples than its record."""
        key = (split, bucket, part)
        with self._lock:
            if (file := self._files.get(key)) is None:
                shard = next(each for each in self.parts[part].shards if each.key == key)
                path = self.dir / shard.path
                try:
                    file = read_arrow(path)
                except ValueError as error:
                    raise damaged(self.dir, f"{path}: {error}") from error
                if file.num_rows != shard.samples:
                    raise damaged(self.dir, f"{path} holds {file.num_rows:,} samples, expected {shard.samples:,}")
                self._files[key] = file
                if len(self._files) > MAX_MAPPED:
                    self._files.popitem(last=False)
            self._files.move_to_end(key)
        return file


def open_dataset(directory: Path) -> Dataset:
    """Open a packed dataset, after comparing its files with the manifest: their hashes, and the structure, value ranges
    and counts of Arrow files. Files are read only the first time that a state of them is seen (about 1 GB/s a thread).
    Sources, statistics and rows left out may be missing. Raises DatasetError, which names the file."""
    manifest = read_manifest(directory)
    parts = Parts(directory, manifest)
    for what in check_sums(manifest, parts):
        raise damaged(directory, f"{directory / MANIFEST}: {what}")
    if (TOKENIZER, manifest.tokenizer.sha256) not in {(file.path, file.sha256) for file in manifest.files}:
        raise damaged(directory, f"{directory / MANIFEST}: the sha256 of {TOKENIZER} is missing or another one")
    files = (
        file
        for file in parts.files
        if file.path != PARTS  # hashed by Parts
        if not file.path.startswith(OPTIONAL) or os.path.exists(os.path.join(directory, file.path))
    )
    content_problem = content_check(directory, manifest, parts)
    for path, what in checksums.check(directory, files, manifest.content_digest, content_problem):
        raise damaged(directory, f"{directory / path}: {what}")
    return Dataset(directory, manifest, parts)


def _open_again(directory: Path) -> Dataset:
    """Open a dataset that another process has opened already."""
    manifest = read_manifest(directory)
    return Dataset(directory, manifest, Parts(directory, manifest))


def content_check(directory: Path, manifest: Manifest, parts: Parts) -> Callable[[FileEntry], str]:
    """Return a function that returns the first problem of an Arrow file of a dataset whose hash is right: "" for none,
    and for other files."""

    def problem_of(file: FileEntry) -> str:
        if not file.path.endswith(".arrow") or (part := parts.of_file(file.path)) is None:
            return ""
        try:
            opened = read_arrow(directory / file.path, is_checked=True)
        except ValueError as error:
            return str(error)
        if file in part.files:
            return next(source_problems(opened, manifest, part), "")
        shard = next((shard for shard in part.shards if shard.file == file), None)
        return next(shard_problems(opened, manifest, shard, part), "") if shard else ""

    return problem_of


# --- from samples back to rows


class PartRows:
    """The encoded rows of one part, in the order of the input; with `splits` only the rows of these. `sources`: their
    provenance, see `open_sources`. Takes the memory of the part's ids."""

    def __init__(self, dataset: Dataset, part: PartRecord, splits: Sequence[str] = SPLITS):
        self.sources = open_sources(dataset, part.part)
        # Row i consists of the sequences numbered from _ends[i] to _ends[i + 1] (exclusive).
        self._ends = [*self.sources["first"].tolist(), part.sequences]
        shards = (shard for shard in part.shards if shard.split in splits)
        stored = [read_back(dataset.open_shard(*shard.key), dataset.kind) for shard in shards]
        self._flat = join([flat for _, flat in stored])
        self._place = np.full(part.sequences, -1)  # of each sequence in _flat; -1 in another split
        ordinals = np.concatenate([np.empty(0, np.int64), *(ordinals for ordinals, _ in stored)])
        self._place[ordinals] = np.arange(len(ordinals))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def encoded(self, row: int) -> Sequences:
        """Return a row: a pair, a conversation, or the documents (or parts of them) of a text; none if in another
        split."""
        places = self._place[self._ends[row] : self._ends[row + 1]]
        return reorder(self._flat, places[places >= 0])


def loss_mask(spans: np.ndarray, length: int) -> np.ndarray:
    """Return the loss mask uint8 [length], 1 at trained positions. spans: ascending begin, end, … (end exclusive)."""
    edges = np.empty(len(spans) + 2, np.int64)
    edges[0], edges[1:-1], edges[-1] = 0, spans, length
    ones = np.zeros(len(edges) - 1, np.uint8)
    ones[1::2] = 1
    return ones.repeat(edges[1:] - edges[:-1])


def sequence_records(sequences: Sequences) -> list[dict[str, list[int]]]:
    """Return the ids and loss mask of each sequence as `mm show --json` names them: input_ids and loss_mask, or for a
    pair prompt_ids, chosen_ids, chosen_mask, rejected_ids and rejected_mask."""
    records = []
    for one in sequences:
        if isinstance(one, TokenSequence):
            records.append({"input_ids": one.ids.tolist(), "loss_mask": one.loss_mask.tolist()})
            continue
        record = {f"{name}_ids": getattr(one, name).tolist() for name in ("prompt", "chosen", "rejected")}
        for name, ids, spans in (
            ("chosen_mask", one.chosen, one.chosen_spans),
            ("rejected_mask", one.rejected, one.rejected_spans),
        ):
            record[name] = loss_mask(spans.reshape(-1), len(ids)).tolist()
        records.append(record)
    return records


def open_sources(dataset: Dataset, part: int) -> dict[str, np.ndarray]:
    """Read where the packed rows of a part came from: arrays with an entry for each row that was not left out. file:
    index in `dataset.inputs`. line: from 1. offset: byte offset of the line. sha: uint8 [n, 8], first bytes of the
    line's sha256. first: number, in the part, of the row's first sequence."""
    file = read_arrow(dataset.dir / dataset.parts[part].file_in("sources"))
    return {name: file.column(name) for name in ("file", "line", "offset", "sha", "first")}


def source_rows(dataset: Dataset, split: str = "all") -> Iterator[dict[str, Any]]:
    """Yield a record for each packed source row, in source order: "file", "line", and the keys of `sequence_records`; a
    row packed as several sequences is joined. One part is in memory at a time. split: "train", "val" or "all"."""
    for part in dataset.parts:
        if part.sequences == 0:
            continue
        rows = PartRows(dataset, part, SPLITS if split == "all" else (split,))
        for i, (file, line) in enumerate(
            zip(rows.sources["file"].tolist(), rows.sources["line"].tolist(), strict=True)
        ):
            if records := sequence_records(rows.encoded(i)):
                joined = {name: list(chain.from_iterable(one[name] for one in records)) for name in records[0]}
                yield {"file": dataset.inputs[file], "line": line, **joined}


def sample_rows(dataset: Dataset, split: str, number: int) -> list[dict[str, Any]]:
    """Return a record as in `source_rows` for each sequence of a sample. split: "train" or "val". number: the sample
    number; IndexError if there is no such sample."""
    bucket, i = dataset.split(split).locate(number)
    sources = open_sources(dataset, dataset.split(split).part_of(bucket, i))
    ordinals, sequences = read_back(ArrowFile({}, (dataset.split(split).columns(bucket, i),)), dataset.kind)
    rows = np.searchsorted(sources["first"], ordinals, side="right") - 1
    return [
        {"file": dataset.inputs[sources["file"][row]], "line": int(sources["line"][row]), **record}
        for row, record in zip(rows, sequence_records(sequences), strict=True)
    ]
