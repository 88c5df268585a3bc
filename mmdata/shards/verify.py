"""A dataset directory in, the list of all that differs from its manifest out. Reads every byte once (about 1 GB/s).

The hashes alone would do for damage on disk; the counts and ranges also catch a writer that was wrong from the start.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmdata.errors import DatasetError
from mmdata.io.arrow import ArrowFile, Ragged, read_arrow
from mmdata.io.files import sha256_of
from mmdata.shards import checksums, dataset

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Problem:
    """`shard`: the file's path in the dataset; `what`: what differs, found and expected."""

    shard: str
    what: str

    def __str__(self) -> str:
        return f"{self.shard} {self.what}"


def verify(directory: Path, progress: Progress | None = None) -> list[Problem]:
    """All that differs, empty when nothing does. DatasetError when there is no manifest to hold the files to."""
    manifest = dataset.read_manifest(directory)
    entries = [*manifest["files"], *manifest["shards"]]
    total = sum(entry["bytes"] for entry in entries)
    problems = list(_check_manifest(manifest))
    done = 0
    for entry in entries:
        found = list(_check_bytes(directory, entry))
        if not found and "bucket" in entry:
            found = list(_check_shard(directory, manifest, entry))
        problems += found
        done += entry["bytes"]
        if progress:
            progress(done, total)
    known = {"manifest.json", dataset.REPORT, checksums.STAMPS_NAME, checksums.LOCK_NAME}
    known |= {entry["path"] for entry in entries}
    there = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    problems += [Problem(path, "is not in the manifest") for path in sorted(there - known)]
    if not problems:
        problems += _check_sequences(directory, manifest)
    if not problems:
        checksums.stamp_all(directory, manifest["shards"])
    return problems


def _check_manifest(manifest: Mapping[str, Any]) -> Iterator[Problem]:
    """The manifest's own sums."""
    totals, parts, entries = manifest["totals"], manifest["parts"], manifest["shards"]
    digest = dataset.dataset_digest(manifest["kind"], manifest["max_len"], entries)
    sums = {
        "rows": totals["kept"] + sum(totals["left_out"].values()),
        "tokens_in": totals["tokens"] + sum(totals["cut"].values()),
        "kept": sum(entry["rows"] for entry in entries),
        **{name: sum(entry[name] for entry in entries) for name in ("tokens", "loss_tokens", "sequences", "samples")},
    }
    for name, found in sums.items():
        if found != totals[name]:
            yield Problem("manifest.json", f"its {name} sum to {found:,}, its total says {totals[name]:,}")
    for name in ("rows", "kept", "tokens_in", "tokens", "sequences"):
        if (found := sum(part[name] for part in parts)) != totals[name]:
            yield Problem("manifest.json", f"{name} of its parts sum to {found:,}, its total says {totals[name]:,}")
    if digest != manifest["dataset_digest"]:
        yield Problem("manifest.json", f"dataset_digest is {manifest['dataset_digest']}, its shards give {digest}")


def _check_bytes(directory: Path, entry: Mapping[str, Any]) -> Iterator[Problem]:
    path = directory / entry["path"]
    if not path.is_file():
        yield Problem(entry["path"], "is missing")
        return
    if (size := path.stat().st_size) != entry["bytes"]:
        yield Problem(entry["path"], f"has {size:,} bytes, expected {entry['bytes']:,}")
        return
    if (digest := sha256_of(path)) != entry["sha256"]:
        yield Problem(entry["path"], f"sha256 is {digest}, expected {entry['sha256']}")


def _check_shard(directory: Path, manifest: dict[str, Any], entry: Mapping[str, Any]) -> Iterator[Problem]:
    """A shard whose bytes are the recorded ones: do they say what the manifest says?"""
    try:
        file = read_arrow(directory / entry["path"])
        dataset.check_metadata(file, manifest, entry, directory)
    except (ValueError, DatasetError) as error:
        yield Problem(entry["path"], str(error))
        return
    check = _check_pairs if manifest["kind"] == "pair" else _check_packs
    whats = [*_check_ids(file, manifest), *check(file, entry)]
    if file.num_rows != entry["samples"]:
        whats.append(f"holds {file.num_rows:,} samples, expected {entry['samples']:,}")
    if (digest := dataset.token_digest(file, manifest["kind"])) != entry["token_digest"]:
        whats.append(f"token_digest is {digest}, expected {entry['token_digest']}")
    yield from (Problem(entry["path"], what) for what in whats)


def _check_ids(file: ArrowFile, manifest: Mapping[str, Any]) -> Iterator[str]:
    vocab_size = manifest["tokenizer"]["vocab_size"]
    for name in ("prompt", "chosen", "rejected") if manifest["kind"] == "pair" else ("ids",):
        values = file.column(name).values
        if len(values) and values.max() >= vocab_size:
            yield f"token {values.max()} in {name} is outside the vocabulary of {vocab_size:,}"


def _check_packs(file: ArrowFile, entry: Mapping[str, Any]) -> Iterator[str]:
    ids, doc_len, doc, span = (file.column(name) for name in ("ids", "doc_len", "doc", "span"))
    num_loss = file.column("n_loss").astype(np.int64)
    lengths = ids.lengths()
    if not np.array_equal(_row_sums(doc_len), lengths):
        yield "doc_len does not sum to the ids of its pack"
    if lengths.max() > entry["bucket"]:
        yield f"a pack of {lengths.max():,} tokens is longer than its bucket"
    if not np.array_equal(doc_len.lengths(), doc.lengths()):
        yield "doc and doc_len differ in length"
    if not np.array_equal(_check_spans(span, lengths), num_loss):
        yield "spans are out of place, or do not sum to n_loss"
    yield from _check_counts(entry, int(lengths.sum()), int(num_loss.sum()), len(doc.values))


def _check_pairs(file: ArrowFile, entry: Mapping[str, Any]) -> Iterator[str]:
    prompt = file.column("prompt").lengths()
    tokens, loss = int(prompt.sum()), 0
    for side in ("chosen", "rejected"):
        lengths, span = file.column(side).lengths(), file.column(f"{side}_span")
        num_loss = file.column(f"n_{side}").astype(np.int64)
        if (prompt + lengths).max() > entry["bucket"]:
            yield f"prompt and {side} are longer than the bucket"
        expected = np.where(span.lengths() == 0, lengths, _check_spans(span, lengths))
        if not np.array_equal(expected, num_loss):
            yield f"{side}_span is out of place, or does not sum to n_{side}"
        tokens, loss = tokens + int(lengths.sum()), loss + int(num_loss.sum())
    yield from _check_counts(entry, tokens, loss, file.num_rows)


def _check_counts(entry: Mapping[str, Any], tokens: int, loss_tokens: int, sequences: int) -> Iterator[str]:
    for name, found in (("tokens", tokens), ("loss_tokens", loss_tokens), ("sequences", sequences)):
        if found != entry[name]:
            yield f"holds {found:,} {name}, expected {entry[name]:,}"


def _row_sums(column: Ragged) -> np.ndarray:
    """The sum of every row of a list column, int64."""
    sums = np.concatenate([[0], np.cumsum(column.values, dtype=np.int64)])
    return sums[column.offsets[1:]] - sums[column.offsets[:-1]]


def _check_spans(span: Ragged, lengths: np.ndarray) -> np.ndarray:
    """Trained tokens of every row by its spans; -1 where they are odd, out of order or outside 0..length."""
    values = span.values.astype(np.int64)
    is_end = np.arange(len(values)) % 2 == 1
    totals = _row_sums(Ragged(np.where(is_end, values, -values), span.offsets))
    row = np.repeat(np.arange(len(lengths)), span.lengths())
    is_wrong = values > lengths[row]
    is_wrong[1:] |= (row[1:] == row[:-1]) & np.where(is_end[1:], values[1:] <= values[:-1], values[1:] < values[:-1])
    totals[row[is_wrong]] = -1
    totals[span.lengths() % 2 == 1] = -1
    return totals


def _check_sequences(directory: Path, manifest: Mapping[str, Any]) -> Iterator[Problem]:
    """Every sequence of a part stands in its shards exactly once, and its sources name as many rows as were kept."""
    for part in manifest["parts"]:
        if not part["kept"]:
            continue
        path = dataset.sources_path(part["part"])
        if (found := read_arrow(directory / path).num_rows) != part["kept"]:
            yield Problem(path, f"names {found:,} rows, expected {part['kept']:,}")
        ordinals = []
        for entry in manifest["shards"]:
            if entry["part"] == part["part"]:
                doc = read_arrow(directory / entry["path"]).column("doc")
                ordinals.append(doc.values if isinstance(doc, Ragged) else doc)
        if not np.array_equal(np.sort(np.concatenate(ordinals)), np.arange(part["sequences"])):
            yield Problem(path, "a sequence of this part is missing from its shards, or stands in them twice")
