"""manifest.json and parts.jsonl of a packed dataset: records, reading, and the dataset's digest. shards/README.md
explains the keys."""

import hashlib
import json
import mmap
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path

import msgspec

from mmdata.encode.rows import Columns
from mmdata.errors import DatasetError
from mmdata.io.files import info_of, read_bytes
from mmdata.io.options import ReadOptions
from mmdata.io.records import Count, FileEntry, PathText, Positive, Share, convert_record, decode_record, explain
from mmdata.shards.checksums import difference
from mmdata.tokenizer.tokenizer import Tokenizer

FORMAT_VERSION = 1
MANIFEST, PARTS = "manifest.json", "parts.jsonl"
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
    def key(self) -> tuple[str, int, int]:
        """Split, bucket and part, which no other shard has."""
        return self.split, self.bucket, self.part

    @property
    def tokens_key(self) -> tuple[str, int, int, int, str]:
        """Split, bucket, part, number of samples and token digest: what the dataset's digest depends on."""
        return *self.key, self.samples, self.token_digest

    @property
    def file(self) -> FileEntry:
        """The path, size and sha256 of the shard's file."""
        return FileEntry(self.path, self.bytes, self.sha256)


class PartRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of parts.jsonl: the counts of one part, rows = kept + left out and tokens in = tokens + cut, its shards, and
    its other files. kept: rows that were packed."""

    part: Count
    rows: Count
    kept: Count
    left_out: dict[str, Count]  # rows by reason
    tokens_in: Count
    tokens: Count
    cut: dict[str, Count]  # tokens dropped, by reason
    sequences: Count
    sequence_digest: str
    shards: list[ShardRecord] = []
    files: list[FileEntry] = []  # sources and rejected rows

    @property
    def all_files(self) -> Iterator[FileEntry]:
        """All files of the part."""
        return chain((shard.file for shard in self.shards), self.files)

    def file_in(self, directory: str) -> str:
        """Return the path of the part's file in "sources" or "rejected", whether there is one or not."""
        found = (file.path for file in self.files if file.path.startswith(f"{directory}/"))
        return next(found, part_path(directory, self.part))


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
    """The content of manifest.json. parts, shards: only in datasets of older versions, whose `files` also have those of
    the parts; see `Parts`."""

    encoders: list[EncoderRecord] = []
    parts: list[PartRecord] | msgspec.UnsetType = msgspec.UNSET
    shards: list[ShardRecord] | msgspec.UnsetType = msgspec.UNSET
    totals: DatasetTotals
    dataset_digest: str
    files: list[FileEntry]  # of no part: the tokenizer's, stats.json, parts.jsonl

    def __post_init__(self) -> None:
        """Raise ValueError if a field has a value that cannot be: a file outside of the dataset, kind, or buckets."""
        _check_inside(self.files)
        if self.kind not in KINDS or list(self.buckets) != sorted({*self.buckets}):
            raise ValueError(f"kind is {self.kind}, buckets are {list(self.buckets)}")

    @property
    def content_digest(self) -> str:
        """The sha256 of all fields, in hex digits: what files were compared with."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class Parts:
    """The records of the parts of a dataset, by number: lines of parts.jsonl, which is mapped; a line is decoded when it
    is asked for. Datasets of older versions have them in the manifest. Raises DatasetError if the file is not the one
    that the manifest names, or a record is invalid."""

    def __init__(self, directory: Path, manifest: Manifest):
        self._dir, self._manifest = directory, manifest
        self._ends = array("q", [0])
        if manifest.parts is not msgspec.UNSET:
            try:
                self._lines = b"".join(msgspec.json.encode(part) + b"\n" for part in _parts_inside(manifest))
            except ValueError as error:
                raise damaged(directory, f"{directory / MANIFEST}: {error}") from None
        else:
            entry = next((file for file in manifest.files if file.path == PARTS), FileEntry(PARTS, 1, ""))
            if what := difference(directory, entry):
                raise DatasetError(f"{directory / PARTS} {what}", f"mm pack FILE --out {directory}")
            with (directory / PARTS).open("rb") as file:
                self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if entry.bytes else b""
        while end := self._lines.find(b"\n", self._ends[-1]) + 1:
            self._ends.append(end)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[PartRecord]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> PartRecord:
        try:
            part = _part_decoder.decode(self._lines[self._ends[number] : self._ends[number + 1]])
            self._check(part, number)
        except (msgspec.DecodeError, ValueError) as error:
            what = explain(error) if isinstance(error, msgspec.ValidationError) else str(error)
            raise damaged(self._dir, f"{self._dir / PARTS}: part {number}: {what}") from None
        return part

    def _check(self, part: PartRecord, number: int) -> None:
        """Raise ValueError if a record names what cannot be."""
        if part.part != number:
            raise ValueError(f"it is of part {part.part}")
        _check_inside(part.all_files)
        for file in part.all_files:
            if _number_in(file.path) != number:
                raise ValueError(f"{file.path} is not named as a file of this part")
        for shard in part.shards:
            if shard.split not in SPLITS or shard.bucket not in self._manifest.buckets or shard.part != number:
                raise ValueError(f"{shard.path} is of split {shard.split}, bucket {shard.bucket}, part {shard.part}")
            if not shard.samples:
                raise ValueError(f"{shard.path} has no samples")

    @property
    def shards(self) -> Iterator[ShardRecord]:
        """The shards of all parts, by part, split and bucket."""
        return (shard for part in self for shard in part.shards)

    @property
    def files(self) -> Iterator[FileEntry]:
        """All files of the dataset except the manifest: those of no part, then those of each part."""
        return chain(self._shared, chain.from_iterable(part.all_files for part in self))

    @cached_property
    def _shared(self) -> list[FileEntry]:
        is_old = self._manifest.parts is not msgspec.UNSET
        return [file for file in self._manifest.files if not (is_old and _number_in(file.path) is not None)]

    def of_file(self, path: str) -> PartRecord | None:
        """Return the part that a file is of; None if it is of none."""
        number = _number_in(path)
        return self[number] if number is not None and number < len(self) else None


_part_decoder = msgspec.json.Decoder(PartRecord)


def _check_inside(files: Iterable[FileEntry]) -> None:
    for file in files:
        if ".." in Path(file.path).parts or Path(file.path).is_absolute():
            raise ValueError(f"{file.path} is not inside the dataset")


def _number_in(path: str) -> int | None:
    """Return the number of the part that a file is of; None for a file of no part."""
    match = re.search(r"part-(\d+)\.(?:arrow|jsonl)$", path)
    return int(match[1]) if match else None


def _parts_inside(manifest: Manifest) -> Iterator[PartRecord]:
    """Yield the records of the parts of a manifest that has them inside, with their shards and files."""
    shards: dict[int, list[ShardRecord]] = {}
    files: dict[int | None, list[FileEntry]] = {}
    for shard in manifest.shards or ():
        shards.setdefault(shard.part, []).append(shard)
    for file in manifest.files:
        files.setdefault(_number_in(file.path), []).append(file)
    for part in manifest.parts or ():
        yield msgspec.structs.replace(part, shards=shards.pop(part.part, []), files=files.pop(part.part, []))
    if unknown := {*shards, *files} - {None}:
        raise ValueError(f"it has files of part {unknown.pop()}, but no record of it")


def folder_of(part: int) -> str:
    """Return the folder of a part's files in their directory: none for the first PARTS_A_DIRECTORY parts, then "001/"."""
    return f"{part // PARTS_A_DIRECTORY:03d}/" if part >= PARTS_A_DIRECTORY else ""


def part_path(directory: str, part: int) -> str:
    """Return the path, relative to a dataset, of a part's file in a directory such as "sources" or "rejected"."""
    return f"{directory}/{folder_of(part)}part-{part:05d}{'.jsonl' if directory == 'rejected' else '.arrow'}"


def dataset_digest(kind: str, max_len: int, tokens: Iterable[tuple[str, int, int, int, str]]) -> str:
    """Return the sha256 over row kind, length limit, and `ShardRecord.tokens_key` of all shards, in any order."""
    return hashlib.sha256(json.dumps([kind, max_len, sorted(tokens)]).encode()).hexdigest()


def check_sums(manifest: Manifest, parts: Parts) -> Iterator[str]:
    """Yield the differences between sums that must be equal within the records."""
    totals = manifest.totals
    of_parts: Counter[str] = Counter()
    of_shards: Counter[str] = Counter()
    for part in parts:
        for name in ("rows", "kept", "tokens_in", "tokens", "sequences"):
            of_parts[name] += getattr(part, name)
        for shard in part.shards:
            of_shards["kept"] += shard.rows
            for name in ("tokens", "loss_tokens", "sequences", "samples"):
                of_shards[name] += getattr(shard, name)
    of_totals = {
        "rows": totals.kept + sum(totals.left_out.values()),
        "tokens_in": totals.tokens + sum(totals.cut.values()),
    }
    for whose, sums in (("its", of_totals), ("its shards'", of_shards), ("its parts'", of_parts)):
        for name, actual in sums.items():
            if actual != (total := getattr(totals, name)):
                yield f"{whose} {name} sum to {actual:,}, its total says {total:,}"
    digest = dataset_digest(manifest.kind, manifest.max_len, (shard.tokens_key for shard in parts.shards))
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
            fix = "run the same mm pack command again; after --shard, with --finish in place of it"
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
    parts = Parts(directory, read_manifest(directory))
    return [*parts.files, FileEntry(MANIFEST, *info_of(directory / MANIFEST))]
