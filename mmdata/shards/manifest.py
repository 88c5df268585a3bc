"""manifest.json of a packed dataset: records, reading, and the dataset's digest. shards/README.md explains the keys."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from mmdata.encode.rows import Columns
from mmdata.errors import DatasetError
from mmdata.io.files import info_of, read_bytes
from mmdata.io.options import ReadOptions
from mmdata.io.records import Count, FileEntry, PathText, Positive, Share, convert_record, decode_record, explain
from mmdata.tokenizer.tokenizer import Tokenizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
KINDS = ("document", "conversation", "pair")
PARTS_A_DIRECTORY = 4096  # more files slow some file systems down


class TokenizerRecord(msgspec.Struct, frozen=True):
    """The tokenizer that a dataset was packed with."""

    sha256: str  # of tokenizer.json
    template_sha256: str  # of the chat template
    vocab_size: Positive
    bos_id: Count | None
    eos_id: Count | None
    pad_id: Count | None


class ExcludedFile(msgspec.Struct, frozen=True):
    """A file whose texts the rows must not overlap with: a row that has at least the share `share` (0 to 1) of the
    `n`-grams of one of its texts is left out."""

    path: PathText
    sha256: str
    n: Positive
    share: Share


class PackArguments(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `mm pack` that determine a dataset's bytes, by name, and the limits for bad rows (shares, 0 to
    1)."""

    val_fraction: Share
    on_bad: str
    max_bad: Share | None
    max_bad_by_reason: dict[str, Share]
    seed: int
    era: str
    train_on: str
    part_bytes: Positive
    dedup: str | None = None
    exclude: list[ExcludedFile] = []
    where: str | msgspec.UnsetType = msgspec.UNSET
    end_of_turn: str | msgspec.UnsetType = msgspec.UNSET
    date: str | msgspec.UnsetType = msgspec.UNSET  # also the default, if the chat template writes a date
    generation_prompt: str | msgspec.UnsetType = msgspec.UNSET  # added to a template that has none
    encoding: str | msgspec.UnsetType = msgspec.UNSET
    text: str | msgspec.UnsetType = msgspec.UNSET
    on_lost: str | msgspec.UnsetType = msgspec.UNSET  # if it is not the default
    kind: str | msgspec.UnsetType = msgspec.UNSET  # --kind: rows of other kinds were to be set aside
    map: dict[str, str] | msgspec.UnsetType = msgspec.UNSET  # --map: the column that holds a field of rows, by field

    @property
    def screens(self) -> bool:
        """Whether rows are left out that are valid in themselves."""
        return bool(self.dedup or self.exclude or self.where)

    def amend(self, tokenizer: Tokenizer) -> Tokenizer:
        """Return the tokenizer with the chat template that the rows were rendered with."""
        changes = {name: getattr(self, name) for name in ("end_of_turn", "date", "generation_prompt")}
        return tokenizer.amended(**{name: value for name, value in changes.items() if value is not msgspec.UNSET})

    @property
    def reading(self) -> ReadOptions:
        """How the inputs are read."""
        mapping = tuple(f"{name}={column}" for name, column in (self.map or {}).items())
        return ReadOptions(
            encoding=self.encoding or None, text=self.text or None, kind=self.kind or None, mapping=mapping
        )

    @property
    def columns(self) -> Columns:
        """The columns from which the fields of rows are read."""
        return Columns.parse(self.reading.mapping)


class DatasetHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a manifest that are known before packing. They determine the bytes of the shards."""

    format: str = "mm"
    format_version: int = FORMAT_VERSION
    kind: str
    max_len: Positive
    buckets: tuple[Positive, ...]
    tokenizer: TokenizerRecord
    inputs: list[FileEntry]  # with paths as they were given to `mm pack`
    arguments: PackArguments

    def shard_metadata(self, bucket: int) -> dict[str, str]:
        """Return the metadata that the Arrow schema of each shard of this bucket has."""
        return {
            "format_version": str(self.format_version),
            "kind": self.kind,
            "bucket": str(bucket),
            "vocab_size": str(self.tokenizer.vocab_size),
            "tokenizer_sha256": self.tokenizer.sha256,
            "template_sha256": self.tokenizer.template_sha256,
        }


class EncoderRecord(msgspec.Struct, frozen=True):
    """A text encoder that parts of a dataset were encoded with, and how it was compared with the reference encoder."""

    name: str  # and version
    parts: Count
    rows_compared: Count
    hostile_compared: Count  # artificial texts compared, made to reveal differences between encoders
    given_up: Count  # parts packed with the reference encoder after a difference was found


class PartRecord(msgspec.Struct, frozen=True):
    """The counts of one part: rows = kept + left out, and tokens in = tokens + cut. kept: rows that were packed."""

    part: Count
    rows: Count
    kept: Count
    left_out: dict[str, Count]  # rows by reason
    tokens_in: Count
    tokens: Count
    cut: dict[str, Count]  # tokens dropped, by reason
    sequences: Count
    sequence_digest: str


class ShardRecord(msgspec.Struct, frozen=True):
    """One shard. model_tokens: tokens that a model computes (a pair's prompt counts twice). loss_tokens: trained
    tokens."""

    path: PathText
    split: str
    bucket: Positive
    part: Count
    samples: Count
    sequences: Count
    rows: Count
    tokens: Count
    model_tokens: Count
    loss_tokens: Count
    bytes: Count
    sha256: str
    token_digest: str

    @property
    def file(self) -> FileEntry:
        """The path, size and sha256 of the shard's file."""
        return FileEntry(self.path, self.bytes, self.sha256)


class DatasetTotals(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of a whole dataset: rows = kept + left out, tokens in = tokens + cut; `left_out` and `cut` are by reason.
    not_written: packed rows of which the chat template leaves out a part, by reason. text_bytes, unknown_bytes: UTF-8
    bytes of the rendered texts, and of their characters that the tokenizer does not know; missing if it knows all.
    extra_keys: how often rows have each ignored key, metadata included. Missing means none."""

    rows: Count
    kept: Count
    left_out: dict[str, Count]
    tokens_in: Count
    tokens: Count
    cut: dict[str, Count]
    loss_tokens: Count
    control_strings: dict[str, Count] = {}  # special tokens' texts in content, packed as text
    sequences: Count
    samples: Count
    val_rows: Count
    extra_keys: dict[str, Count] | msgspec.UnsetType = msgspec.UNSET
    not_written: dict[str, Count] | msgspec.UnsetType = msgspec.UNSET
    text_bytes: Count | msgspec.UnsetType = msgspec.UNSET
    unknown_bytes: Count | msgspec.UnsetType = msgspec.UNSET


class LengthBin(msgspec.Struct, frozen=True):
    """The sequences of lengths up to `up_to` that are longer than those of the bin before, and their tokens."""

    up_to: Count
    sequences: Count
    tokens: Count


class LengthFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The lengths of sequences, in tokens; pq is a length that at least q % of them do not exceed."""

    sequences: Count
    tokens: Count
    mean: float
    shortest: Count
    p50: Count
    p90: Count
    p99: Count
    longest: Count
    histogram: list[LengthBin]


class ShardFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of several shards, and the share of their positions that hold tokens."""

    samples: Count
    sequences: Count
    rows: Count
    tokens: Count
    loss_tokens: Count
    fill: float


class DatasetStats(msgspec.Struct, frozen=True, kw_only=True):
    """The content of stats.json: the fields of `DatasetTotals` in their order, and what is computed from them. Shares
    are from 0 to 1."""

    kind: str
    max_len: Count
    dataset_digest: str
    rows: Count
    kept: Count
    left_out: dict[str, Count]
    tokens_in: Count
    tokens: Count
    cut: dict[str, Count]
    loss_tokens: Count
    control_strings: dict[str, Count] = {}  # special tokens' texts in content, packed as text
    sequences: Count
    samples: Count
    val_rows: Count
    extra_keys: dict[str, Count] | msgspec.UnsetType = msgspec.UNSET
    not_written: dict[str, Count] | msgspec.UnsetType = msgspec.UNSET
    text_bytes: Count | msgspec.UnsetType = msgspec.UNSET
    unknown_bytes: Count | msgspec.UnsetType = msgspec.UNSET
    trained_share: float
    characters: Count
    characters_per_token: float
    fill: float
    waste: float
    splits: dict[str, ShardFigures]
    buckets: dict[str, ShardFigures]
    lengths: LengthFigures


class Manifest(DatasetHeader, frozen=True, kw_only=True):
    """The content of manifest.json."""

    encoders: list[EncoderRecord] = []
    parts: list[PartRecord]
    shards: list[ShardRecord]
    totals: DatasetTotals
    dataset_digest: str
    files: list[FileEntry]  # all other files: sources, rejected rows, tokenizer, stats.json

    def __post_init__(self) -> None:
        """Raise ValueError if a field names what cannot be: a file outside of the dataset, a bucket, split or part."""
        parts = {part.part for part in self.parts}
        for file in self.all_files:
            if ".." in Path(file.path).parts or Path(file.path).is_absolute():
                raise ValueError(f"{file.path} is not inside the dataset")
        if self.kind not in KINDS or list(self.buckets) != sorted({*self.buckets}):
            raise ValueError(f"kind is {self.kind}, buckets are {list(self.buckets)}")
        for shard in self.shards:
            if shard.split not in SPLITS or shard.bucket not in self.buckets or shard.part not in parts:
                raise ValueError(f"{shard.path} is of split {shard.split}, bucket {shard.bucket}, part {shard.part}")
            if not shard.samples:
                raise ValueError(f"{shard.path} has no samples")

    @property
    def content_digest(self) -> str:
        """The sha256 of all fields, in hex digits: what files were compared with."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()

    @property
    def all_files(self) -> list[FileEntry]:
        """All files of the dataset except the manifest."""
        return [*self.files, *(shard.file for shard in self.shards)]


def folder_of(part: int) -> str:
    """Return the folder of a part's files in their directory: none for the first PARTS_A_DIRECTORY parts, then "001/"."""
    return f"{part // PARTS_A_DIRECTORY:03d}/" if part >= PARTS_A_DIRECTORY else ""


def part_path(directory: str, part: int) -> str:
    """Return the path, relative to a dataset, of a part's file in a directory such as "sources" or "rejected"."""
    return f"{directory}/{folder_of(part)}part-{part:05d}{'.jsonl' if directory == 'rejected' else '.arrow'}"


def part_files(manifest: Manifest, directory: str) -> dict[int, str]:
    """Return the paths of the files in "sources" or "rejected" by the number of their part. Older datasets have them all
    in one folder."""
    found = ((re.search(r"part-(\d+)\.", file.path), file.path) for file in manifest.files)
    return {int(match[1]): path for match, path in found if match and path.startswith(f"{directory}/")}


def dataset_digest(kind: str, max_len: int, shards: Sequence[ShardRecord]) -> str:
    """Return the sha256 over row kind, length limit, and split, bucket, part, number of samples and token digest of all
    shards, in any order."""
    lines = sorted((s.split, s.bucket, s.part, s.samples, s.token_digest) for s in shards)
    return hashlib.sha256(json.dumps([kind, max_len, lines]).encode()).hexdigest()


def check_sums(manifest: Manifest) -> Iterator[str]:
    """Yield the differences between sums that must be equal within the manifest."""
    totals, parts, shards = manifest.totals, manifest.parts, manifest.shards
    sums = {
        "rows": totals.kept + sum(totals.left_out.values()),
        "tokens_in": totals.tokens + sum(totals.cut.values()),
        "kept": sum(shard.rows for shard in shards),
        **{
            name: sum(getattr(shard, name) for shard in shards)
            for name in ("tokens", "loss_tokens", "sequences", "samples")
        },
    }
    for name, actual in sums.items():
        if actual != (total := getattr(totals, name)):
            yield f"its {name} sum to {actual:,}, its total says {total:,}"
    for name in ("rows", "kept", "tokens_in", "tokens", "sequences"):
        if (actual := sum(getattr(part, name) for part in parts)) != (total := getattr(totals, name)):
            yield f"{name} of its parts sum to {actual:,}, its total says {total:,}"
    digest = dataset_digest(manifest.kind, manifest.max_len, shards)
    if digest != manifest.dataset_digest:
        yield f"dataset_digest is {manifest.dataset_digest}, its shards give {digest}"


def damaged(directory: Path, message: str) -> DatasetError:
    """Create the DatasetError for files that are not those that were packed; it suggests `mm verify --repair`."""
    return DatasetError(message, f"mm verify {directory} --repair")


def is_unfinished(directory: Path) -> bool:
    """Return whether packing to `directory` has begun and the dataset is not published there."""
    return not directory.exists() and (directory.parent / f".{directory.name}.packing").is_dir()


def read_manifest(directory: Path) -> Manifest:
    """Read a dataset's manifest. Raises DatasetError if it is missing, damaged, not written by `mm pack`, or of another
    format version, or if the dataset is not published yet."""
    path = directory / MANIFEST
    pack_it = f"mm pack FILE --out {directory}"
    try:
        content = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        if is_unfinished(directory):
            fix = "the same mm pack command goes on; what was packed with --shard is published by --finish in its place"
            raise DatasetError(f"{directory} is not published yet: its packing has not ended", fix) from None
        raise DatasetError(f"{directory} is not a packed dataset: it has no {MANIFEST}", pack_it) from None
    except OSError as error:
        raise damaged(directory, f"{path}: {error.strerror}") from None
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
    """Return the records of all files of a dataset in the order in which to copy them: the manifest last."""
    return [*read_manifest(directory).all_files, FileEntry(MANIFEST, *info_of(directory / MANIFEST))]
