"""Packed datasets on disk: columns in, Arrow files and a manifest out; and back as views of a memory map.

Reading copies nothing: a sample is a handful of slices of the mapped file. Opening checks sizes, Arrow's magic bytes,
schema and tokenizer against the manifest in about a tenth of a millisecond a shard; `check_bytes` hashes what has not been
hashed since it was last written; `verify` re-hashes everything.
The format is written down in shards/README.md.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmdata.errors import DatasetError
from mmdata.io.arrow import ArrowFile, num_rows, read_arrow
from mmdata.shards import checksums

FORMAT_VERSION = 1
SPLITS = ("train", "val")
REPORT = "report.html"  # a page for people beside the manifest, which does not name it: no part of the dataset
TOKENS_PER_BATCH = 2**25  # of a record batch: 65,536 rows of 512, 32,768 of 1024, 16,384 of 2048
SOURCES_PER_BATCH = 2**20
MANIFEST_KEYS = ("kind", "max_len", "buckets", "tokenizer", "inputs", "arguments", "parts", "shards", "totals", "files")
PACK_LISTS = ("ids", "doc_len", "span")  # the token content of a pack; `doc` says where it came from
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


# --- digests: what a dataset holds, apart from how it is stored


def token_digest(file: ArrowFile, kind: str) -> str:
    """sha256 of a shard's token content, lists as 32-bit lengths and values: the same for any Arrow version or id width."""
    digest = hashlib.sha256()
    for name in PAIR_LISTS if kind == "pair" else PACK_LISTS:
        column = file.column(name)
        for array in (column.lengths(), column.values):
            digest.update(np.ascontiguousarray(array, "<u4").data)
    return digest.hexdigest()


def dataset_digest(kind: str, max_len: int, shards: Sequence[Mapping[str, Any]]) -> str:
    """sha256 over kind, length limit and every shard's split, bucket, part, samples and token digest, in that order."""
    lines = sorted((s["split"], s["bucket"], s["part"], s["samples"], s["token_digest"]) for s in shards)
    return hashlib.sha256(json.dumps([kind, max_len, lines]).encode()).hexdigest()


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


# --- reading a dataset


@dataclass(frozen=True, slots=True)
class Totals:
    """What a split holds: source rows, stored tokens, tokens a model sees (a pair's prompt twice), trained tokens."""

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
        entries = [entry for entry in dataset.manifest["shards"] if entry["split"] == name]
        self.totals = Totals(
            *(sum(entry[key] for entry in entries) for key in ("rows", "tokens", "model_tokens", "loss_tokens"))
        )
        self._batches: dict[int, list[dict[str, Any]]] = {bucket: [] for bucket in self.buckets}
        self._begins: dict[int, list[int]] = {bucket: [0] for bucket in self.buckets}  # first sample of each batch
        self._parts: dict[int, list[int]] = {bucket: [] for bucket in self.buckets}
        for entry in sorted(entries, key=lambda entry: entry["part"]):
            bucket = entry["bucket"]
            for batch in dataset.open_shard(entry).batches:
                self._batches[bucket].append(batch)
                self._begins[bucket].append(self._begins[bucket][-1] + num_rows(batch))
                self._parts[bucket].append(entry["part"])

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

    def batches(self, bucket: int) -> list[tuple[int, dict[str, Any]]]:
        """Record batches of a bucket: the number of the first sample in each, and its columns."""
        return list(zip(self._begins[bucket], self._batches[bucket], strict=False))

    def list_lengths(self, name: str) -> np.ndarray:
        """Entries of a list column of every sample, int64 [num_samples], in the order of sample numbers."""
        lengths = [batch[name].lengths() for bucket in self.buckets for batch in self._batches[bucket]]
        return np.concatenate(lengths, dtype=np.int64) if lengths else np.zeros(0, np.int64)

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


def pair_view(columns: Mapping[str, Any], i: int) -> PairView:
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
    """A packed dataset: its manifest, and its splits as views. Made by `open_dataset`."""

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.dir = directory
        self.manifest = manifest
        self.kind: str = manifest["kind"]
        self.digest: str = manifest["dataset_digest"]
        self.max_len: int = manifest["max_len"]
        self.buckets: tuple[int, ...] = tuple(manifest["buckets"])
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.tokenizer_sha256: str = manifest["tokenizer"]["sha256"]
        self.tokenizer_dir = directory / "tokenizer"
        _allow_open_files(len(manifest["shards"]))
        self._files: dict[str, ArrowFile] = {}
        self._splits = {name: Split(self, name) for name in SPLITS}

    def __reduce__(self) -> tuple[Any, ...]:
        return open_dataset, (self.dir,)

    def split(self, name: str) -> Split:
        """The split "train" or "val"; it may be empty."""
        return self._splits[name]

    def open_shard(self, entry: Mapping[str, Any]) -> ArrowFile:
        """A shard of the manifest, mapped once; DatasetError when it is missing, of another size, or of another dataset."""
        if entry["path"] not in self._files:
            path = self.dir / entry["path"]
            check_size(path, entry["bytes"], self.dir)
            try:
                file = read_arrow(path)
            except ValueError as error:
                raise _damaged(self.dir, f"{path}: {error}") from error
            check_metadata(file, self.manifest, entry, self.dir)
            self._files[entry["path"]] = file
        return self._files[entry["path"]]

    def check_bytes(self, progress: Callable[[int, int], None] | None = None) -> None:
        """DatasetError unless every shard holds the bytes that were packed; reads those not read since they changed."""
        for path, digest in checksums.check(self.dir, self.manifest["shards"], progress):
            raise _damaged(self.dir, f"{self.dir / path}: its bytes have changed since it was packed (sha256 {digest})")

    @cached_property
    def inputs(self) -> list[str]:
        """The input files as they were named when packing."""
        return [entry["path"] for entry in self.manifest["inputs"]]


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files, often 1,024, where it may: a mapped shard stays open."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * count + 256  # twice: a run may map a second dataset of this size beside it
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard)
        )


def shard_metadata(manifest: Mapping[str, Any], bucket: int) -> dict[str, str]:
    """What a shard's schema says about it."""
    return {
        "format_version": str(manifest["format_version"]),
        "kind": manifest["kind"],
        "bucket": str(bucket),
        "vocab_size": str(manifest["tokenizer"]["vocab_size"]),
        "tokenizer_sha256": manifest["tokenizer"]["sha256"],
        "template_sha256": manifest["tokenizer"]["template_sha256"],
    }


def check_metadata(file: ArrowFile, manifest: Mapping[str, Any], entry: Mapping[str, Any], directory: Path) -> None:
    """DatasetError unless the shard's schema says what the manifest says."""
    expected = shard_metadata(manifest, entry["bucket"])
    found = {key: file.metadata.get(f"mm.{key}") for key in expected}
    if found != expected:
        key = next(key for key in expected if found[key] != expected[key])
        raise _damaged(directory, f"{directory / entry['path']}: {key} is {found[key]}, expected {expected[key]}")


def check_size(path: Path, num_bytes: int, directory: Path) -> None:
    """DatasetError unless the file is there with this size (a map of a shorter file would crash the reader)."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise _damaged(directory, f"{path} is missing") from None
    if found != num_bytes:
        raise _damaged(directory, f"{path} has {found:,} bytes, expected {num_bytes:,}")


def _damaged(directory: Path, message: str) -> DatasetError:
    return DatasetError(message, f"mm verify {directory} --repair")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a dataset; DatasetError when there is none, or none of ours, or of a later format."""
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(
            f"{directory} is not a packed dataset: it has no manifest.json", f"mm pack FILE --out {directory}"
        ) from None
    except ValueError as error:
        raise _damaged(directory, f"{path} is not json: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != "mm":
        raise DatasetError(f"{path} was not written by mm pack", f"mm pack FILE --out {directory}")
    found = manifest.get("format_version")
    if found != FORMAT_VERSION:
        raise DatasetError(f"{path} has format {found}, this mm reads {FORMAT_VERSION}", f"pack {directory} again")
    if missing := [key for key in MANIFEST_KEYS if key not in manifest]:
        raise _damaged(directory, f"{path} lacks {', '.join(missing)}")
    return manifest


def open_dataset(directory: Path) -> Dataset:
    """Opens a packed dataset. DatasetError when it is missing, incomplete, truncated, or its tokenizer was exchanged."""
    manifest = read_manifest(directory)
    path = directory / "tokenizer" / "tokenizer.json"
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"
    if found != manifest["tokenizer"]["sha256"]:
        raise _damaged(directory, f"{path}: sha256 is {found}, expected {manifest['tokenizer']['sha256']}")
    return Dataset(directory, manifest)


# --- from samples back to rows


class _PartSequences:
    """Every sequence of a part in one split's shards: ordinal -> ids and loss mask (for pairs the three lists)."""

    def __init__(self, dataset: Dataset, part: int, splits: Sequence[str]):
        self._kind = dataset.kind
        self._at: dict[int, tuple[dict[str, Any], int, int, int]] = {}  # ordinal -> columns, row, begin, end
        for entry in dataset.manifest["shards"]:
            if entry["part"] == part and entry["split"] in splits:
                for columns in dataset.open_shard(entry).batches:
                    self._add(columns)

    def _add(self, columns: dict[str, Any]) -> None:
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


def open_sources(dataset: Dataset, part: int) -> dict[str, Any]:
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
    for part in dataset.manifest["parts"]:
        if part["sequences"] == 0:
            continue
        sequences = _PartSequences(dataset, part["part"], splits)
        sources = open_sources(dataset, part["part"])
        firsts = [*sources["first"].tolist(), part["sequences"]]
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
