"""`mm lineage`: show what an export, run or dataset was made from, down to the raw files."""

from pathlib import Path
from typing import Annotated

import typer

from mmdata.commands.options import Json
from mmdata.commands.terminal import print_json, result, say
from mmdata.options import Option


def lineage(
    path: Annotated[Path, typer.Argument(metavar="RUN|EXPORT|DATASET", help="Directory of a run, export or dataset.")],
    check: Annotated[
        bool, Option("Hash everything that is still there and compare it; exit code 1 if something has changed.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a run, export or dataset was made from, as a tree: weights, settings, samples, datasets, tokenizer and raw
    files, each with its hash.

    Example: mm lineage runs/dpo-1    mm lineage shards/sft_512 --check
    """
    from mmdata.io.records import plain
    from mmtrain.lineage import MISSING, is_intact, lines_of, origin_of

    origin = origin_of(path, is_checked=check)
    if as_json:
        print_json(plain(origin))
    else:
        for line in lines_of(origin):
            result(line)
    if check:
        missing = sum(node.state == MISSING for node in origin.walk())
        say(
            f"{'nothing has changed' if is_intact(origin) else 'something has changed'}; {missing} are not here any more"
        )
        raise typer.Exit(not is_intact(origin))
