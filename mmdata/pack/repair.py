"""`mm verify --repair`: a dataset with damaged files in; the same files rebuilt from the manifest's inputs, byte for byte.

Only the parts that damaged files belong to are packed again, beside the dataset; a file is put in place only when its
sha256 is the manifest's. Inputs that have changed since are named and nothing is touched.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmdata.errors import DatasetError, InputError, TokenizerError
from mmdata.io import remote
from mmdata.io import workers as engine
from mmdata.io.files import sha256_of, sync, write_bytes
from mmdata.pack import pipeline
from mmdata.pack.part import Part, PartPacker, PartResult, Settings
from mmdata.pack.pipeline import Progress
from mmdata.pack.staging import only_writer
from mmdata.shards import dataset
from mmdata.tokenizer.tokenizer import Tokenizer

STATS = "stats.json"  # follows from all parts


def repair(
    directory: Path, *, tokenizer_dir: Path | None = None, workers: int = 1, progress: Progress | None = None
) -> list[str]:
    """Rebuilds what is damaged and returns the paths; empty when all is whole.

    tokenizer_dir: needed when the dataset's own copy is damaged. InputError: an input is gone or another one.
    DatasetError: no manifest, or the same inputs now give other bytes.
    """
    manifest = dataset.read_manifest(directory)
    with only_writer(Path(os.path.realpath(directory))) as staging:
        damaged = find_damaged(directory, manifest)
        if not damaged:
            return []
        scratch = staging.out.parent / f".{staging.out.name}.repair"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir()
            tokenizer = _restore_tokenizer(directory, manifest, damaged, tokenizer_dir)
            _rebuild(directory, manifest, damaged, scratch, tokenizer, workers, progress)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return damaged


def find_damaged(directory: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The files of the manifest that are missing or hold other bytes, in order."""
    entries = [*manifest["shards"], *manifest["files"]]
    return sorted(entry["path"] for entry in entries if not _is_whole(directory / entry["path"], entry))


def _is_whole(path: Path, entry: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256_of(path) == entry["sha256"]


def _restore_tokenizer(
    directory: Path, manifest: Mapping[str, Any], damaged: Sequence[str], given: Path | None
) -> Path:
    """A tokenizer directory with the manifest's bytes; damaged copies in the dataset are replaced from `given`."""
    lost = [path for path in damaged if path.startswith("tokenizer/")]
    if not lost:
        return directory / "tokenizer"
    fix = f"mm verify {directory} --repair --tokenizer DIR (the one it was packed with)"
    if given is None:
        raise TokenizerError(f"{directory / lost[0]} is damaged, and nothing says where it came from", fix)
    files = Tokenizer.load(given).files
    expected = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    for path in lost:
        content = files.get(path.removeprefix("tokenizer/"), b"")
        if hashlib.sha256(content).hexdigest() != expected[path]:
            raise TokenizerError(f"{given} is not the tokenizer that {directory} was packed with ({path} differs)", fix)
    for path in lost:
        write_bytes(directory / path, files[path.removeprefix("tokenizer/")])
    return directory / "tokenizer"


def _rebuild(
    directory: Path,
    manifest: dict[str, Any],
    damaged: Sequence[str],
    scratch: Path,
    tokenizer_dir: Path,
    workers: int,
    progress: Progress | None,
) -> None:
    """Packs the parts of the damaged files again and puts those files in place."""
    numbers = {int(found[1]) for path in damaged if (found := re.search(r"part-(\d+)\.", path))}
    if not numbers and STATS not in damaged:
        return
    inputs, parts = _same_inputs(directory, manifest)
    todo = [part for part in parts if part.number in numbers or STATS in damaged]
    settings = Settings(scratch / "dataset", tokenizer_dir, manifest)
    run = partial(engine.run, workers=workers)
    pipeline.screen_rows(settings.screen, manifest, parts, todo, run, progress)
    total = sum(part.num_bytes for part in todo)
    results: list[PartResult] = run(partial(PartPacker, settings), todo, total=total, progress=progress)
    if STATS in damaged:
        write_bytes(settings.staging / STATS, pipeline.stats_json(manifest, results))
    entries = {entry["path"]: entry for entry in [*manifest["shards"], *manifest["files"]]}
    rebuilt = [path for path in damaged if not path.startswith("tokenizer/")]
    for path in rebuilt:
        if not _is_whole(settings.staging / path, entries[path]):
            raise DatasetError(
                f"{directory / path}: the same inputs ({', '.join(map(str, inputs))}) now give other bytes; another "
                "version of mm, pyarrow or tokenizers packed them",
                f"pack it again: mm pack {' '.join(map(str, inputs))} --out {directory}",
            )
    for path in rebuilt:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(settings.staging / path, directory / path)
        sync((directory / path).parent)


def _same_inputs(directory: Path, manifest: Mapping[str, Any]) -> tuple[list[Path], list[Part]]:
    """The inputs and their parts; InputError, with their names, when they are not those that were packed."""
    inputs = [remote.file_at(entry["path"]) for entry in manifest["inputs"]]
    if missing := [str(path) for path in inputs if not path.is_file()]:
        raise InputError(
            f"{', '.join(missing)}: not here, and {directory} was packed from it",
            "bring it back (`mm fetch` downloads the known files), and run this where it was packed: paths are relative",
        )
    entries, parts = pipeline.plan(inputs, manifest["arguments"]["part_bytes"])
    changed = [
        now["path"]
        for now, then in zip(entries, manifest["inputs"], strict=True)
        if (now["bytes"], now["sha256"]) != (then["bytes"], then["sha256"])
    ]
    if changed:
        raise InputError(
            f"{', '.join(changed)}: has changed since {directory} was packed from it",
            f"bring the old file back, or pack anew: mm pack {' '.join(map(str, inputs))} --out {directory}",
        )
    return inputs, parts
