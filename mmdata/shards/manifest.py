"""manifest.json of a packed dataset: typed records, reading, and the digest of a dataset. The keys are in shards/README.md."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import msgspec

from mmdata.errors import DatasetError
from mmdata.io.files import info_of
from mmdata.io.records import FileEntry, convert_record, decode_record, explain

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")


class TokenizerRecord(msgspec.Struct, frozen=True):
    """The tokenizer a dataset was packed with."""

    sha256: str  # of tokenizer.json
    template_sha256: str  # of the chat template
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None


class ExcludedFile(msgspec.Struct, frozen=True):
    """A file of texts that rows must not overlap with: a row is left out that holds `share` of a text's `n`-grams."""

    path: str
    sha256: str
    n: int
    share: float


class PackArguments(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `mm pack` that the bytes of a dataset depend on, and the budget of bad rows it kept."""

    val_fraction: float
    on_bad: str
    max_bad: float | None
    max_bad_by_reason: dict[str, float]
    seed: int
    era: str
    train_on: str
    part_bytes: int
    dedup: str | None = None
    exclude: list[ExcludedFile] = []


class DatasetHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a manifest that is known before packing: all that the bytes of the shards depend on."""

    format: str = "mm"
    format_version: int = FORMAT_VERSION
    kind: str
    max_len: int
    buckets: tuple[int, ...]
    tokenizer: TokenizerRecord
    inputs: list[FileEntry]  # paths as they were named
    arguments: PackArguments

    def shard_metadata(self, bucket: int) -> dict[str, str]:
        """The metadata that the schema of each shard of this bucket holds."""
        return {
            "format_version": str(self.format_version),
            "kind": self.kind,
            "bucket": str(bucket),
            "vocab_size": str(self.tokenizer.vocab_size),
            "tokenizer_sha256": self.tokenizer.sha256,
            "template_sha256": self.tokenizer.template_sha256,
        }


class EncoderRecord(msgspec.Struct, frozen=True):
    """An encoder that text was encoded with: in how many parts, and what was compared with the reference encoder."""

    name: str  # and version
    parts: int
    rows_compared: int
    hostile_compared: int  # texts made up to tell encoders apart
    given_up: int  # parts packed with the reference instead, after a difference


class PartRecord(msgspec.Struct, frozen=True):
    """The sums of one part: rows = kept + left out, tokens in = tokens + cut."""

    part: int
    rows: int
    kept: int
    left_out: dict[str, int]  # by reason
    tokens_in: int
    tokens: int
    cut: dict[str, int]  # tokens by reason
    sequences: int
    sequence_digest: str


class ShardRecord(msgspec.Struct, frozen=True):
    """One shard: what it holds, and size and hash of its file. model_tokens counts a pair's prompt twice."""

    path: str
    split: str
    bucket: int
    part: int
    samples: int
    sequences: int
    rows: int
    tokens: int
    model_tokens: int
    loss_tokens: int
    bytes: int
    sha256: str
    token_digest: str

    @property
    def file(self) -> FileEntry:
        return FileEntry(self.path, self.bytes, self.sha256)


class DatasetTotals(msgspec.Struct, frozen=True, kw_only=True):
    """The sums of a whole dataset; counts by reason as in `PartRecord`."""

    rows: int
    kept: int
    left_out: dict[str, int]
    tokens_in: int
    tokens: int
    cut: dict[str, int]
    loss_tokens: int
    control_strings: dict[str, int] = {}  # special-token strings in content, packed as plain text
    sequences: int
    samples: int
    val_rows: int


class Manifest(DatasetHeader, frozen=True, kw_only=True):
    """The content of manifest.json."""

    encoders: list[EncoderRecord] = []
    parts: list[PartRecord]
    shards: list[ShardRecord]
    totals: DatasetTotals
    dataset_digest: str
    files: list[FileEntry]  # besides shards: sources, rejected rows, tokenizer, stats.json

    @property
    def all_files(self) -> list[FileEntry]:
        """Every file of the dataset but the manifest."""
        return [*self.files, *(shard.file for shard in self.shards)]


def dataset_digest(kind: str, max_len: int, shards: Sequence[ShardRecord]) -> str:
    """sha256 over kind, length limit and every shard's split, bucket, part, samples and token digest, in that order."""
    lines = sorted((s.split, s.bucket, s.part, s.samples, s.token_digest) for s in shards)
    return hashlib.sha256(json.dumps([kind, max_len, lines]).encode()).hexdigest()


def damaged(directory: Path, message: str) -> DatasetError:
    """The error for a dataset whose files are not those that were packed."""
    return DatasetError(message, f"mm verify {directory} --repair")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a dataset; DatasetError when there is none, or it is damaged, foreign, or of a later format."""
    path = directory / MANIFEST
    pack_it = f"mm pack FILE --out {directory}"
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(f"{directory} is not a packed dataset: it has no {MANIFEST}", pack_it) from None
    value = decode_record(content, dict, str(path), DatasetError, f"mm verify {directory} --repair")
    if value.get("format") != "mm":
        raise DatasetError(f"{path} was not written by mm pack", pack_it)
    if (version := value.get("format_version")) != FORMAT_VERSION:
        raise DatasetError(f"{path} has format {version}, this mm reads {FORMAT_VERSION}", f"pack {directory} again")
    try:
        return convert_record(value, Manifest)
    except msgspec.ValidationError as error:
        raise damaged(directory, f"{path}: {explain(error)}") from None


def every_file(directory: Path) -> list[FileEntry]:
    """All files of a dataset, its manifest last: what to copy, in this order."""
    return [*read_manifest(directory).all_files, FileEntry(MANIFEST, *info_of(directory / MANIFEST))]
