"""Combine the results of all parts to the content of manifest.json and stats.json, and to the result of `pack`."""

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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

Key = TypeVar("Key")


def header_of(
    kind: str, max_len: int, tokenizer: Tokenizer, inputs: list[FileEntry], arguments: PackArguments
) -> DatasetHeader:
    """Return the header of a manifest: everything that the bytes of the dataset depend on."""
    identity = msgspec.convert(tokenizer, TokenizerRecord, from_attributes=True)
    buckets = buckets_for(max_len)
    return DatasetHeader(
        kind=kind, max_len=max_len, buckets=buckets, tokenizer=identity, inputs=inputs, arguments=arguments
    )


def manifest_of(header: DatasetHeader, results: Sequence[PartResult], files: Sequence[FileEntry]) -> Manifest:
    """Return the manifest of a dataset of these parts. files: those of no part, such as the tokenizer's."""
    shards = sorted((s for result in results for s in result.shards), key=lambda s: (s.split, s.bucket, s.part))
    every = [*files, *(file for result in results for file in result.files)]
    return Manifest(
        **msgspec.structs.asdict(header),
        encoders=_encoders(results),
        parts=[_part_record(result) for result in results],
        shards=shards,
        totals=_totals(results, shards),
        dataset_digest=dataset_digest(header.kind, header.max_len, shards),
        files=sorted(every, key=lambda file: file.path),
    )


def total_of(counters: Iterable[Mapping[Key, int]]) -> Counter[Key]:
    """Return the sum of several counters."""
    total: Counter[Key] = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _encoders(results: Sequence[PartResult]) -> list[EncoderRecord]:
    """Return a record of each encoder that parts were encoded with, by name."""
    by_name: dict[str, list[PartResult]] = {}
    for result in results:
        by_name.setdefault(result.encoder, []).append(result)
    return [
        EncoderRecord(
            name,
            parts=len(group),
            rows_compared=sum(result.compared for result in group),
            hostile_compared=0 if name.startswith(REFERENCE) else NUM_HOSTILE,
            given_up=sum(bool(result.warning) for result in group),
        )
        for name, group in sorted(by_name.items())
    ]


def _part_record(result: PartResult) -> PartRecord:
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
    )


def _totals(results: Sequence[PartResult], shards: Sequence[ShardRecord]) -> DatasetTotals:
    figures: dict[str, Any] = {
        name: sum(getattr(result, name) for result in results)
        for name in ("rows", "kept", "tokens_in", "tokens", "sequences", "text_bytes", "unknown_bytes")
    }
    if not figures["text_bytes"]:  # the tokenizer knows every text
        del figures["text_bytes"], figures["unknown_bytes"]
    for name in ("left_out", "cut", "control_strings", "extra_keys", "not_written"):
        figures[name] = dict(sorted(total_of(getattr(result, name) for result in results).items()))
    for name in ("extra_keys", "not_written"):
        if not figures[name]:
            del figures[name]
    return DatasetTotals(
        **figures,
        loss_tokens=sum(shard.loss_tokens for shard in shards),
        samples=sum(shard.samples for shard in shards),
        val_rows=sum(shard.rows for shard in shards if shard.split == "val"),
    )


# --- stats.json


def stats_of(manifest: Manifest, results: Sequence[PartResult]) -> DatasetStats:
    """Return the content of stats.json. manifest: must have its totals and shards. results: those of all its parts."""
    kind, totals, shards = manifest.kind, manifest.totals, manifest.shards
    characters = sum(result.characters for result in results)
    counts = np.zeros(manifest.max_len + 1, np.int64)
    for result in results:
        lengths = np.frombuffer(result.lengths, "<u4").reshape(-1, 2)
        counts[lengths[:, 0]] += lengths[:, 1]
    fill = fill_of(kind, shards)
    return DatasetStats(
        kind=kind,
        max_len=manifest.max_len,
        dataset_digest=manifest.dataset_digest,
        **msgspec.structs.asdict(totals),
        trained_share=totals.loss_tokens / max(1, totals.tokens),
        characters=characters,
        characters_per_token=characters / max(1, totals.tokens_in),
        fill=fill,
        waste=1 - fill,
        splits={name: _figures(kind, [s for s in shards if s.split == name]) for name in SPLITS},
        buckets={str(bucket): _figures(kind, [s for s in shards if s.bucket == bucket]) for bucket in manifest.buckets},
        lengths=length_figures(counts),
    )


def _figures(kind: str, shards: Sequence[ShardRecord]) -> ShardFigures:
    names = ("samples", "sequences", "rows", "tokens", "loss_tokens")
    return ShardFigures(**{name: sum(getattr(s, name) for s in shards) for name in names}, fill=fill_of(kind, shards))


def fill_of(kind: str, shards: Sequence[ShardRecord]) -> float:
    """Return the share of positions that have a token, 0 to 1; 0 without shards. A pair takes up its bucket once for
    each side, and its prompt counts twice."""
    positions = sum(shard.samples * shard.bucket for shard in shards) * (2 if kind == "pair" else 1)
    return sum(shard.model_tokens for shard in shards) / max(1, positions)


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
    out: Path, manifest: Manifest, start: float, *, up_to_date: bool = False, parts_left: int | None = None
) -> PackResult:
    """Summarize a manifest. start: time.monotonic() at the start of packing."""
    totals = manifest.totals
    samples = dict.fromkeys(manifest.buckets, 0)
    for shard in manifest.shards:
        samples[shard.bucket] += shard.samples
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
        fill=fill_of(manifest.kind, manifest.shards),
        encoders={encoder.name: encoder.parts for encoder in manifest.encoders},
        digest=manifest.dataset_digest,
        parts_left=parts_left,
        seconds=time.monotonic() - start,
    )
