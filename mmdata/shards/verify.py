"""`mm verify`: find everything in which a dataset differs from its manifest. Every byte is read (about 1 GB/s a thread).

Hashes find damage on disk. The checks of counts and value ranges also find errors made when the dataset was written.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmdata.io.arrow import Ragged, read_arrow
from mmdata.io.files import Progress, no_progress
from mmdata.io.records import FileEntry
from mmdata.io.workers import in_threads
from mmdata.shards import checksums, dataset
from mmdata.shards.manifest import MANIFEST, Parts, check_sums, read_manifest


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
    parts = Parts(directory, manifest)
    content_problem = dataset.content_check(directory, manifest, parts)
    total, done, listed = sum(file.bytes for file in parts.files), 0, {MANIFEST}
    problems = [Problem(MANIFEST, what) for what in check_sums(manifest, parts)]

    def wrong(file: FileEntry) -> str:
        if what := checksums.difference(directory, file) or content_problem(file):
            return what
        part = parts.of_file(file.path)
        shard = next((shard for shard in part.shards if shard.file == file), None) if part else None
        if shard is None:
            return ""
        digest = dataset.token_digest(read_arrow(directory / file.path), manifest.kind)
        return "" if digest == shard.token_digest else f"token_digest is {digest}, expected {shard.token_digest}"

    for file, what in in_threads(wrong, parts.files):
        problems += [Problem(file.path, what)] if what else []
        listed.add(file.path)
        done += file.bytes
        progress(done, total)
    listed |= {dataset.REPORT, dataset.CARD, checksums.VERIFIED_NAME, checksums.LOCK_NAME}
    present = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    problems += [Problem(path, "is not in the manifest") for path in sorted(present - listed)]
    if not problems:
        problems += _check_sequences(directory, parts)
    if not problems:
        checksums.mark_verified(directory, parts.files, manifest.content_digest)
    return problems


def _check_sequences(directory: Path, parts: Parts) -> Iterator[Problem]:
    """Yield a Problem for each part of which a sequence is not stored exactly once, or whose sources file has another
    number of rows than were packed."""
    for part in parts:
        if not part.kept:
            continue
        path = part.file_in("sources")
        if (actual := read_arrow(directory / path).num_rows) != part.kept:
            yield Problem(path, f"names {actual:,} rows, expected {part.kept:,}")
        ordinals = []
        for shard in part.shards:
            doc = read_arrow(directory / shard.path).column("doc")
            ordinals.append(doc.values if isinstance(doc, Ragged) else doc)
        if not np.array_equal(np.sort(np.concatenate(ordinals)), np.arange(part.sequences)):
            yield Problem(path, "a sequence of this part is missing from its shards, or is in them twice")
