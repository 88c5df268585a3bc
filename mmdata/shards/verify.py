"""`mm verify`: find everything in which a dataset differs from its manifest. Every byte is read (about 1 GB/s a thread).

Hashes find damage on disk. The checks of counts and value ranges also find errors made when the dataset was written.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmdata.io.arrow import Ragged, read_arrow
from mmdata.io.files import Progress, no_progress
from mmdata.io.records import FileEntry
from mmdata.shards import checksums, dataset
from mmdata.shards.manifest import MANIFEST, Manifest, check_sums, part_files, part_path, read_manifest


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
    content_problem = dataset.content_check(directory, manifest)
    total, done = sum(file.bytes for file in files), 0
    problems = [Problem(MANIFEST, what) for what in check_sums(manifest)]

    def wrong(file: FileEntry) -> str:
        if what := checksums.difference(directory, file) or content_problem(file):
            return what
        if file.path not in shards:
            return ""
        digest = dataset.token_digest(read_arrow(directory / file.path), manifest.kind)
        expected = shards[file.path].token_digest
        return "" if digest == expected else f"token_digest is {digest}, expected {expected}"

    with ThreadPoolExecutor(min(checksums.MAX_THREADS, os.cpu_count() or 1)) as pool:
        for file, what in zip(files, pool.map(wrong, files), strict=True):
            problems += [Problem(file.path, what)] if what else []
            done += file.bytes
            progress(done, total)
    beside = {dataset.REPORT, dataset.CARD, checksums.VERIFIED_NAME, checksums.LOCK_NAME}
    listed = {MANIFEST, *beside, *(file.path for file in files)}
    present = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    problems += [Problem(path, "is not in the manifest") for path in sorted(present - listed)]
    if not problems:
        problems += _check_sequences(directory, manifest)
    if not problems:
        checksums.mark_verified(directory, files, manifest.content_digest)
    return problems


def _check_sequences(directory: Path, manifest: Manifest) -> Iterator[Problem]:
    """Yield a Problem for each part of which a sequence is not stored exactly once, or whose sources file has another
    number of rows than were packed."""
    shards: dict[int, list[str]] = {}
    sources = part_files(manifest, "sources")
    for shard in manifest.shards:
        shards.setdefault(shard.part, []).append(shard.path)
    for part in manifest.parts:
        if not part.kept:
            continue
        path = sources.get(part.part, part_path("sources", part.part))
        if (actual := read_arrow(directory / path).num_rows) != part.kept:
            yield Problem(path, f"names {actual:,} rows, expected {part.kept:,}")
        ordinals = []
        for shard in shards.get(part.part, ()):
            doc = read_arrow(directory / shard).column("doc")
            ordinals.append(doc.values if isinstance(doc, Ragged) else doc)
        if not np.array_equal(np.sort(np.concatenate(ordinals)), np.arange(part.sequences)):
            yield Problem(path, "a sequence of this part is missing from its shards, or is in them twice")
