"""`mm verify`: check packed datasets against their manifests, and rebuild damaged files with --repair."""

import os
from pathlib import Path
from typing import Annotated

import typer

from mmdata.commands.options import Json
from mmdata.commands.terminal import print_json, progress, result, say
from mmdata.errors import UsageError
from mmdata.options import Option


def verify(
    datasets: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Packed datasets.")],
    repair: Annotated[
        bool, Option("First rebuild damaged files from the dataset's input files, byte for byte.")
    ] = False,
    tokenizer: Annotated[
        Path | None,
        Option("With --repair: the original tokenizer directory, if the dataset's copy is damaged.", metavar="DIR"),
    ] = None,
    workers: Annotated[
        int | None, Option("With --repair: number of processes.", least=1, default_text="one per core")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hash every file of a dataset again, and check manifest, counts and token ranges. Exit code 1 if anything differs.

    Example: mm verify shards/sft_512
    """
    from mmdata.pack.repair import repair as repair_dataset
    from mmdata.shards.verify import verify as verify_dataset

    if (tokenizer or workers) and not repair:
        raise UsageError("--tokenizer and --workers belong to --repair", "mm verify DIR --repair")
    for path in datasets if repair else ():
        with progress(f"repair {path}", quiet=as_json) as update:
            rebuilt = repair_dataset(
                path, tokenizer_dir=tokenizer, workers=workers or os.cpu_count() or 1, progress=update
            )
        for name in rebuilt:
            say(f"rebuilt {path / name}")
    problems = {}
    for path in datasets:
        with progress(f"verify {path}", quiet=as_json) as update:
            problems[str(path)] = verify_dataset(path, progress=update)
    if as_json:
        print_json({path: {"ok": not damaged, "problems": damaged} for path, damaged in problems.items()})
    for path, damaged in problems.items():
        for problem in damaged:
            say(f"error: {Path(path) / problem.shard}: {problem.what}")
        if not as_json and not damaged:
            result(f"{path}: every shard is as packed")
    if bad := [path for path, damaged in problems.items() if damaged]:
        say(
            f"fix: mm verify {' '.join(bad)} --repair"
            if not repair
            else "fix: pack it again from its inputs (`mm pack`)"
        )
        raise typer.Exit(1)
