"""Combine the results of all parts to the content of manifest.json and stats.json, and to the result of `pack`."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mmdata.io.records import FileEntry
from mmdata.pack.packing import buckets_for
from mmdata.pack.part import PartResult
from mmdata.shards.manifest import (
    SPLITS,
    DatasetHeader,
    DatasetStats,
    DatasetTotals,
    EncoderRecord,
    LengthBin,
    LengthFigures,
    Manifest,
    PackArguments,
    PartRecord,
    ShardFigures,
    ShardRecord,
    TokenizerRecord,
    dataset_digest,
)
from mmdata.tokenizer.encoders import NUM_HOSTILE, REFERENCE
from mmdata.tokenizer.tokenizer import Tokenizer

SUMS: tuple[str, ...] = (
    "rows",
    "kept",
    "tokens_in",
    "tokens",
    "sequences",
    "text_bytes",
    "unknown_bytes",
    "characters",
)
COUNTERS = ("left_out", "cut", "control_strings", "extra_keys", "not_written")
SHARD_COUNTS = ("samples", "sequences", "rows", "tokens", "model_tokens", "loss_tokens")
ShardSums = dict[tuple[str, int], Counter[str]]  # by split and bucket: SHARD_COUNTS


def header_of(
    kind: str, max_len: int, tokenizer: Tokenizer, inputs: list[FileEntry], arguments: PackArguments
) -> DatasetHeader:
    """Return the header of a manifest: everything that the bytes of the dataset depend on."""
    identity = msgspec.convert(tokenizer, TokenizerRecord, from_attributes=True)
    buckets = buckets_for(max_len)
    return DatasetHeader(
        kind=kind, max_len=max_len, buckets=buckets, tokenizer=identity, inputs=inputs, arguments=arguments
    )


class Summary:
    """What several parts are together: `add` takes the result of one after the other, by ascending number. It holds 0.3
    kB of each shard, for the dataset's digest, and nothing else of a part. sums, counts: fields of PartResult, summed up.
    warnings: of all parts. unused: `unused_columns` that are so in all parts. rejected: path of the first file of rows
    left out, or ""."""

    def __init__(self, header: DatasetHeader):
        self._header = header
        self.sums: Counter[str] = Counter(dict.fromkeys(SUMS, 0))
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in COUNTERS}
        self.encoders: dict[str, Counter[str]] = {}
        self.warnings: dict[str, None] = {}
        self.unused: list[str] | None = None
        self.rejected = ""
        self.shards: ShardSums = {}
        self._lengths = np.zeros(header.max_len + 1, np.int64)
        self._tokens: list[tuple[str, int, int, int, str]] = []

    def add(self, result: PartResult) -> None:
        """Add the result of a part."""
        for name in SUMS:
            self.sums[name] += getattr(result, name)
        for name, counter in self.counts.items():
            counter.update(getattr(result, name))
        encoder = self.encoders.setdefault(result.encoder, Counter())
        encoder.update(parts=1, rows_compared=result.compared, given_up=int(bool(result.warning)))
        self.warnings |= dict.fromkeys([result.warning] if result.warning else ())
        unused = result.unused_columns if self.unused is None else self.unused
        self.unused = [entry for entry in unused if entry in result.unused_columns]
        rejected = (file.path for file in result.files if file.path.startswith("rejected/"))
        self.rejected = self.rejected or next(rejected, "")
        add_shards(self.shards, result.shards)
        lengths = np.frombuffer(result.lengths, "<u4").reshape(-1, 2)
        self._lengths[lengths[:, 0]] += lengths[:, 1]
        self._tokens += [shard.tokens_key for shard in result.shards]

    def manifest(self, files: Sequence[FileEntry]) -> Manifest:
        """Return the manifest of a dataset of these parts. files: those of no part, such as the tokenizer's."""
        return Manifest(
            **msgspec.structs.asdict(self._header),
            encoders=[
                EncoderRecord(name, **of, hostile_compared=0 if name.startswith(REFERENCE) else NUM_HOSTILE)
                for name, of in sorted(self.encoders.items())
            ],
            totals=self._totals(),
            dataset_digest=dataset_digest(self._header.kind, self._header.max_len, self._tokens),
            files=sorted(files, key=lambda file: file.path),
        )

    def _totals(self) -> DatasetTotals:
        figures: dict[str, Any] = dict(self.sums)
        del figures["characters"]
        if not figures["text_bytes"]:  # the tokenizer knows every text
            del figures["text_bytes"], figures["unknown_bytes"]
        figures |= {name: dict(sorted(counter.items())) for name, counter in self.counts.items()}
        for name in ("extra_keys", "not_written"):
            if not figures[name]:
                del figures[name]
        every = total_of(self.shards.values())
        val = total_of(of for (split, _), of in self.shards.items() if split == "val")
        return DatasetTotals(
            **figures, loss_tokens=every["loss_tokens"], samples=every["samples"], val_rows=val["rows"]
        )

    def stats(self) -> DatasetStats:
        """Return the content of stats.json."""
        header, totals, fill = self._header, self._totals(), fill_of(self._header.kind, self.shards)
        characters = self.sums["characters"]

        def figures(chosen: Callable[[str, int], bool]) -> ShardFigures:
            some = {key: of for key, of in self.shards.items() if chosen(*key)}
            sums = total_of(some.values())
            names = ("samples", "sequences", "rows", "tokens", "loss_tokens")
            return ShardFigures(**{name: sums[name] for name in names}, fill=fill_of(header.kind, some))

        return DatasetStats(
            kind=header.kind,
            max_len=header.max_len,
            dataset_digest=dataset_digest(header.kind, header.max_len, self._tokens),
            **msgspec.structs.asdict(totals),
            trained_share=totals.loss_tokens / max(1, totals.tokens),
            characters=characters,
            characters_per_token=characters / max(1, totals.tokens_in),
            fill=fill,
            waste=1 - fill,
            splits={name: figures(lambda split, _, name=name: split == name) for name in SPLITS},
            buckets={str(bucket): figures(lambda _, of, bucket=bucket: of == bucket) for bucket in header.buckets},
            lengths=length_figures(self._lengths),
        )


def part_record(result: PartResult) -> PartRecord:
    """Return the record of a part for parts.jsonl."""
    return PartRecord(
        part=result.number,
        rows=result.rows,
        kept=result.kept,
        left_out=dict(sorted(result.left_out.items())),
        tokens_in=result.tokens_in,
        tokens=result.tokens,
        cut=dict(sorted(result.cut.items())),
        sequences=result.sequences,
        sequence_digest=f"{result.digest:032x}",
        shards=sorted(result.shards, key=lambda shard: shard.key),
        files=sorted(result.files, key=lambda file: file.path),
    )


def add_shards(sums: ShardSums, shards: Iterable[ShardRecord]) -> None:
    """Add the counts of shards to those of their split and bucket."""
    for shard in shards:
        of = sums.setdefault(shard.key[:2], Counter())
        of.update({name: getattr(shard, name) for name in SHARD_COUNTS})


def total_of(counters: Iterable[Mapping[str, int]]) -> Counter[str]:
    """Return the sum of several counters."""
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total


def fill_of(kind: str, sums: ShardSums) -> float:
    """Return the share of positions that have a token, 0 to 1; 0 without shards. A pair takes up its bucket once for
    each side, and its prompt counts twice."""
    positions = sum(of["samples"] * bucket for (_, bucket), of in sums.items()) * (2 if kind == "pair" else 1)
    return total_of(sums.values())["model_tokens"] / max(1, positions)


def length_figures(counts: np.ndarray) -> LengthFigures:
    """Return the figures of lengths, with a histogram with boundaries at powers of two. counts: int64 [longest + 1], the
    number of sequences of each length.
    """
    total = int(counts.sum())
    tokens = counts * np.arange(len(counts))
    reached = np.cumsum(counts)
    p50, p90, p99 = (int(np.searchsorted(reached, -(-total * q // 100))) if total else 0 for q in (50, 90, 99))
    present = np.flatnonzero(counts) if total else np.zeros(1, np.int64)
    edges = [0, *(2**k for k in range(5, 31) if 2**k < len(counts) - 1), len(counts) - 1]
    bins = ((slice(low + 1, high + 1), high) for low, high in itertools.pairwise(edges))
    return LengthFigures(
        sequences=total,
        tokens=int(tokens.sum()),
        mean=float(tokens.sum() / max(1, total)),
        shortest=int(present[0]),
        p50=p50,
        p90=p90,
        p99=p99,
        longest=int(present[-1]),
        histogram=[LengthBin(high, int(counts[within].sum()), int(tokens[within].sum())) for within, high in bins],
    )


@dataclass(frozen=True, slots=True)
class PackResult:
    """What `pack` did with the inputs or, with --shard, the parts of a shard: rows = kept + left out, tokens in =
    tokens + cut; left_out and cut are by reason."""

    out: Path
    kind: str
    up_to_date: bool  # an equal dataset existed already and nothing was done
    rows: int
    kept: int
    left_out: dict[str, int]
    val_rows: int
    tokens_in: int
    tokens: int
    loss_tokens: int
    cut: dict[str, int]
    control_strings: dict[str, int]  # how often each special token's text occurs in content
    not_written: dict[str, int]  # packed rows of which the chat template leaves out a part, by reason
    unknown_share: float | None  # share of the texts' bytes that the tokenizer does not know; None if it knows all
    extra_keys: dict[str, int]  # how often rows have each key that is ignored
    samples: dict[int, int]  # bucket -> packs or pairs of both splits
    fill: float  # share of positions that hold tokens
    encoders: dict[str, int]  # encoder -> parts it encoded
    digest: str  # the dataset's digest; "" if nothing was published
    parts_left: int | None  # with --shard: parts not packed yet by any shard; None: the dataset was published
    seconds: float


def result_of(
    out: Path,
    manifest: Manifest,
    sums: ShardSums,
    start: float,
    *,
    up_to_date: bool = False,
    parts_left: int | None = None,
) -> PackResult:
    """Summarize a manifest and the sums of its shards. start: time.monotonic() at the start of packing."""
    totals = manifest.totals
    samples = dict.fromkeys(manifest.buckets, 0)
    for (_, bucket), of in sums.items():
        samples[bucket] += of["samples"]
    return PackResult(
        out=out,
        kind=manifest.kind,
        up_to_date=up_to_date,
        rows=totals.rows,
        kept=totals.kept,
        left_out=totals.left_out,
        val_rows=totals.val_rows,
        tokens_in=totals.tokens_in,
        tokens=totals.tokens,
        loss_tokens=totals.loss_tokens,
        cut=totals.cut,
        control_strings=totals.control_strings,
        not_written=totals.not_written or {},
        unknown_share=totals.unknown_bytes / totals.text_bytes if totals.unknown_bytes and totals.text_bytes else None,
        extra_keys=totals.extra_keys or {},
        samples=samples,
        fill=fill_of(manifest.kind, sums),
        encoders={encoder.name: encoder.parts for encoder in manifest.encoders},
        digest=manifest.dataset_digest,
        parts_left=parts_left,
        seconds=time.monotonic() - start,
    )
