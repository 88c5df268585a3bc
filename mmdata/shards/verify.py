"""`mm verify`: find everything in which a dataset differs from its manifest. Every byte is read (about 1 GB/s).

Hashes find damage on disk. The checks of counts and value ranges also find errors made when the dataset was written.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmdata.errors import DatasetError
from mmdata.io.arrow import ArrowFile, Ragged, read_arrow
from mmdata.io.files import Progress, no_progress
from mmdata.shards import checksums, dataset
from mmdata.shards.manifest import MANIFEST, Manifest, ShardRecord, dataset_digest, read_manifest


@dataclass(frozen=True, slots=True)
class Problem:
    """One difference: the file it concerns (of any kind, relative to the dataset), and what is found and expected."""

    shard: str
    what: str

    def __str__(self) -> str:
        return f"{self.shard} {self.what}"


def verify(directory: Path, progress: Progress = no_progress) -> list[Problem]:
    """Return all differences between a dataset and its manifest: sizes and hashes of files, counts and value ranges of
    shards, the manifest's sums, unlisted files and, if nothing else differs, sequences not stored exactly once.
    progress: bytes checked so far and in all. Raises DatasetError if the manifest is missing or unreadable."""
    manifest = read_manifest(directory)
    files, shards = manifest.all_files, {shard.path: shard for shard in manifest.shards}
    total, done = sum(file.bytes for file in files), 0
    problems = list(_check_manifest(manifest))
    for file in files:
        if what := checksums.difference(directory, file):
            problems.append(Problem(file.path, what))
        elif file.path in shards:
            problems += [Problem(file.path, what) for what in _check_shard(directory, manifest, shards[file.path])]
        done += file.bytes
        progress(done, total)
    listed = {MANIFEST, dataset.REPORT, checksums.VERIFIED_NAME, checksums.LOCK_NAME, *(file.path for file in files)}
    present = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    problems += [Problem(path, "is not in the manifest") for path in sorted(present - listed)]
    if not problems:
        problems += _check_sequences(directory, manifest)
    if not problems:
        checksums.mark_verified(directory, [shard.file for shard in manifest.shards])
    return problems


def _check_manifest(manifest: Manifest) -> Iterator[Problem]:
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
            yield Problem(MANIFEST, f"its {name} sum to {actual:,}, its total says {total:,}")
    for name in ("rows", "kept", "tokens_in", "tokens", "sequences"):
        if (actual := sum(getattr(part, name) for part in parts)) != (total := getattr(totals, name)):
            yield Problem(MANIFEST, f"{name} of its parts sum to {actual:,}, its total says {total:,}")
    digest = dataset_digest(manifest.kind, manifest.max_len, shards)
    if digest != manifest.dataset_digest:
        yield Problem(MANIFEST, f"dataset_digest is {manifest.dataset_digest}, its shards give {digest}")


def _check_shard(directory: Path, manifest: Manifest, shard: ShardRecord) -> Iterator[str]:
    """Yield how the content of a shard differs from its record; size and sha256 must have been compared before."""
    try:
        file = read_arrow(directory / shard.path)
        dataset.check_metadata(file, manifest, shard, directory)
    except (ValueError, DatasetError) as error:
        yield str(error)
        return
    yield from _check_ids(file, manifest)
    yield from (_check_pairs if manifest.kind == "pair" else _check_packs)(file, shard)
    if file.num_rows != shard.samples:
        yield f"holds {file.num_rows:,} samples, expected {shard.samples:,}"
    if (digest := dataset.token_digest(file, manifest.kind)) != shard.token_digest:
        yield f"token_digest is {digest}, expected {shard.token_digest}"


def _check_ids(file: ArrowFile, manifest: Manifest) -> Iterator[str]:
    """Yield a description for each id column that has a token id outside the vocabulary."""
    vocab_size = manifest.tokenizer.vocab_size
    for name in ("prompt", "chosen", "rejected") if manifest.kind == "pair" else ("ids",):
        values = file.column(name).values
        if len(values) and values.max() >= vocab_size:
            yield f"token {values.max()} in {name} is outside the vocabulary of {vocab_size:,}"


def _check_packs(file: ArrowFile, shard: ShardRecord) -> Iterator[str]:
    """Yield the differences found in a shard of packs: lengths, buckets, spans and counts."""
    ids, doc_len, doc, span = (file.column(name) for name in ("ids", "doc_len", "doc", "span"))
    num_loss = file.column("n_loss").astype(np.int64)
    lengths = ids.lengths()
    if not np.array_equal(_row_sums(doc_len), lengths):
        yield "doc_len does not sum to the ids of its pack"
    if lengths.max() > shard.bucket:
        yield f"a pack of {lengths.max():,} tokens is longer than its bucket"
    if not np.array_equal(doc_len.lengths(), doc.lengths()):
        yield "doc and doc_len differ in length"
    if not np.array_equal(_check_spans(span, lengths), num_loss):
        yield "spans are out of place, or do not sum to n_loss"
    yield from _check_counts(shard, int(lengths.sum()), int(num_loss.sum()), len(doc.values))


def _check_pairs(file: ArrowFile, shard: ShardRecord) -> Iterator[str]:
    """Yield the differences found in a shard of pairs: lengths, buckets, spans and counts."""
    prompt = file.column("prompt").lengths()
    tokens, loss = int(prompt.sum()), 0
    for side in ("chosen", "rejected"):
        lengths, span = file.column(side).lengths(), file.column(f"{side}_span")
        num_loss = file.column(f"n_{side}").astype(np.int64)
        if (prompt + lengths).max() > shard.bucket:
            yield f"prompt and {side} are longer than the bucket"
        expected = np.where(span.lengths() == 0, lengths, _check_spans(span, lengths))
        if not np.array_equal(expected, num_loss):
            yield f"{side}_span is out of place, or does not sum to n_{side}"
        tokens, loss = tokens + int(lengths.sum()), loss + int(num_loss.sum())
    yield from _check_counts(shard, tokens, loss, file.num_rows)


def _check_counts(shard: ShardRecord, tokens: int, loss_tokens: int, sequences: int) -> Iterator[str]:
    for name, actual in (("tokens", tokens), ("loss_tokens", loss_tokens), ("sequences", sequences)):
        if actual != (expected := getattr(shard, name)):
            yield f"holds {actual:,} {name}, expected {expected:,}"


def _row_sums(column: Ragged) -> np.ndarray:
    sums = np.concatenate([[0], np.cumsum(column.values, dtype=np.int64)])
    return sums[column.offsets[1:]] - sums[column.offsets[:-1]]


def _check_spans(span: Ragged, lengths: np.ndarray) -> np.ndarray:
    """Return the trained tokens of every row, int64 [rows], or -1 if its spans (begin, end, …) are odd in number, not
    ascending, or outside 0..length. lengths: tokens of each row."""
    values = span.values.astype(np.int64)
    is_end = np.arange(len(values)) % 2 == 1
    totals = _row_sums(Ragged(np.where(is_end, values, -values), span.offsets))
    row = np.repeat(np.arange(len(lengths)), span.lengths())
    is_wrong = values > lengths[row]
    is_wrong[1:] |= (row[1:] == row[:-1]) & np.where(is_end[1:], values[1:] <= values[:-1], values[1:] < values[:-1])
    totals[row[is_wrong]] = -1
    totals[span.lengths() % 2 == 1] = -1
    return totals


def _check_sequences(directory: Path, manifest: Manifest) -> Iterator[Problem]:
    """Yield a Problem for each part of which a sequence is not stored exactly once, or whose sources file has another
    number of rows than were packed."""
    for part in manifest.parts:
        if not part.kept:
            continue
        path = dataset.sources_path(part.part)
        if (actual := read_arrow(directory / path).num_rows) != part.kept:
            yield Problem(path, f"names {actual:,} rows, expected {part.kept:,}")
        ordinals = []
        for shard in manifest.shards:
            if shard.part == part.part:
                doc = read_arrow(directory / shard.path).column("doc")
                ordinals.append(doc.values if isinstance(doc, Ragged) else doc)
        if not np.array_equal(np.sort(np.concatenate(ordinals)), np.arange(part.sequences)):
            yield Problem(path, "a sequence of this part is missing from its shards, or is in them twice")
