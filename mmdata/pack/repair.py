"""`mm verify --repair`: rebuild damaged files of a dataset, byte for byte, from the inputs that its manifest names.

Only the parts with damaged files are packed again, in a separate directory. A rebuilt file replaces the damaged one
only if its sha256 is the recorded one. If an input has changed, an error names it and the shards are not changed.
"""

import os
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mmdata.errors import DatasetError, InputError, TokenizerError
from mmdata.io import remote
from mmdata.io.files import Progress, info_of_bytes, move_into_place, no_progress, write_bytes, write_json
from mmdata.io.records import FileEntry, plain
from mmdata.io.workers import run_jobs
from mmdata.pack.inputs import plan
from mmdata.pack.part import Part, PartPacker, PartResult, PartSettings
from mmdata.pack.staging import only_writer
from mmdata.pack.summary import Summary
from mmdata.shards.checksums import difference
from mmdata.shards.manifest import Manifest, Parts, read_manifest
from mmdata.tokenizer.tokenizer import Tokenizer

STATS = "stats.json"  # needs the results of all parts


def repair(
    directory: Path, *, tokenizer_dir: Path | None = None, workers: int = 1, progress: Progress = no_progress
) -> list[str]:
    """Rebuild the missing or damaged files of a dataset and return their paths, relative to its directory.

    tokenizer_dir: the tokenizer to copy from if the dataset's own copy is damaged; TokenizerError if it is needed and
    missing or another one. progress: called with the bytes of input packed so far and in all. Raises InputError if an
    input is missing or has changed, and DatasetError if there is no manifest, another process packs to this directory,
    or the inputs now give other bytes.
    """
    manifest = read_manifest(directory)
    with only_writer(Path(os.path.realpath(directory))) as staging:
        damaged = sorted(
            (file for file in Parts(directory, manifest).files if difference(directory, file)), key=lambda f: f.path
        )
        if not damaged:
            return []
        scratch = staging.out.parent / f".{staging.out.name}.repair"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            tokenizer = _restore_tokenizer(directory, manifest, damaged, tokenizer_dir)
            settings = PartSettings(scratch / "dataset", tokenizer, manifest)
            _rebuild(directory, manifest, damaged, settings, workers, progress)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return [file.path for file in damaged]


def _restore_tokenizer(directory: Path, manifest: Manifest, damaged: Sequence[FileEntry], source: Path | None) -> Path:
    """Return the dataset's tokenizer directory, damaged files replaced by copies from `source`. Raises TokenizerError
    if that is None or different."""
    lost = [file for file in damaged if file.path.startswith("tokenizer/")]
    if not lost:
        return directory / "tokenizer"
    fix = f"mm verify {directory} --repair --tokenizer DIR (the one it was packed with)"
    if source is None:
        raise TokenizerError(f"{directory / lost[0].path} is damaged, and no tokenizer to copy it from is named", fix)
    files = manifest.arguments.amend(Tokenizer.load(source)).files
    contents = [files.get(file.path.removeprefix("tokenizer/"), b"") for file in lost]
    for file, content in zip(lost, contents, strict=True):
        if info_of_bytes(content).sha256 != file.sha256:
            raise TokenizerError(
                f"{source} is not the tokenizer that {directory} was packed with ({file.path} differs)", fix
            )
    for file, content in zip(lost, contents, strict=True):
        write_bytes(directory / file.path, content)
    return directory / "tokenizer"


def _rebuild(
    directory: Path,
    manifest: Manifest,
    damaged: Sequence[FileEntry],
    settings: PartSettings,
    num_workers: int,
    progress: Progress,
) -> None:
    """Pack the parts of the damaged files again and move the rebuilt files, except the tokenizer's, into the dataset;
    move nothing and raise DatasetError if one is not as recorded."""
    rebuilt = [file for file in damaged if not file.path.startswith("tokenizer/")]
    if not rebuilt:
        return
    numbers = {int(match[1]) for file in rebuilt if (match := re.search(r"part-(\d+)\.", file.path))}
    needs_stats = any(file.path == STATS for file in rebuilt)
    inputs, parts = _same_inputs(directory, manifest)
    todo = [part for part in parts if part.number in numbers or needs_stats]
    run_parts = partial(run_jobs, workers=num_workers)
    if manifest.arguments.screens:
        from mmdata.pack.filter.screen import screen

        screen(settings, parts, todo, run_parts, progress)
    total = sum(part.num_bytes for part in todo)
    results: list[PartResult] = run_parts(partial(PartPacker, settings), todo, total=total, progress=progress)
    if needs_stats:
        summary = Summary(manifest)
        for result in results:
            summary.add(result)
        write_json(settings.dir / STATS, plain(summary.stats()))
    for file in rebuilt:
        if difference(settings.dir, file):
            raise DatasetError(
                f"{directory / file.path}: the same inputs ({', '.join(map(str, inputs))}) now give other bytes; another "
                "version of mm, pyarrow or tokenizers packed them",
                f"pack it again: mm pack {' '.join(map(str, inputs))} --out {directory}",
            )
    for file in rebuilt:
        (directory / file.path).parent.mkdir(parents=True, exist_ok=True)
        move_into_place(settings.dir / file.path, directory / file.path)


def _same_inputs(directory: Path, manifest: Manifest) -> tuple[list[Path], list[Part]]:
    """Return the inputs and their parts. Raises InputError, naming them, if some are missing or have changed."""
    inputs = [remote.file_at(file.path) for file in manifest.inputs]
    if missing := [str(path) for path in inputs if not path.is_file()]:
        raise InputError(
            f"{', '.join(missing)}: not here, and {directory} was packed from it",
            "bring it back (`mm fetch` downloads the known files), and run this where it was packed: paths are relative",
        )
    records, parts = plan(inputs, manifest.arguments.part_bytes, manifest.arguments.reading)
    if changed := [now.path for now, then in zip(records, manifest.inputs, strict=True) if now != then]:
        raise InputError(
            f"{', '.join(changed)}: has changed since {directory} was packed from it",
            f"bring the old file back, or pack anew: mm pack {' '.join(map(str, inputs))} --out {directory}",
        )
    return inputs, parts
