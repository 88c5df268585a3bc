"""`mm select`: choose rows of files by conditions on their columns, and write them as they are."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mmdata.commands.options import Json, data_files, optional_tokenizer, pack_command
from mmdata.commands.terminal import next_command, percent, print_json, progress, result, same_command, say, table
from mmdata.io.options import ReadOptions
from mmdata.options import Option
from mmdata.pack.options import OUTPUT, SelectOptions


def select(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Files of rows of one kind: jsonl, parquet, csv and others.")
    ],
    *,
    options: SelectOptions,
    out: Annotated[
        Path | None,
        Option("Write the rows to this .jsonl, .jsonl.gz, .jsonl.zst or .parquet file.", OUTPUT, metavar="FILE"),
    ] = None,
    rest: Annotated[Path | None, Option("Write all other rows to this file.", OUTPUT, metavar="FILE")] = None,
    explain: Annotated[
        bool, Option("Show rows that each condition and each rule of --quality leaves out.", OUTPUT)
    ] = False,
    as_json: Json = False,
) -> None:
    """Choose rows by conditions on their columns, and write their lines byte for byte. Without --out only count them.

    Example: mm select data/sft_512.jsonl --where "language = 'Chinese' and repeated < 0.3" --dedup exact --out zh.jsonl
    """
    from mmdata.pack.filter import select as selecting

    paths = data_files(files, is_read_once=False)
    for option, target in (("--out", out), ("--rest", rest)):
        if target:
            selecting.check_target(target, [*paths, *([out] if option == "--rest" and out else [])], option)
    tokenizer = optional_tokenizer(options.tokenizer)
    options = replace(options, tokenizer=tokenizer, workers=options.workers or os.cpu_count() or 1)
    with progress("read", quiet=as_json) as update:
        selection = selecting.select(paths, options, progress=update)
    if out:
        selecting.write_selection(selection, out, rest)
    num_rows, num_chosen = len(selection.frame), len(selection.order)
    left_out, conditions = selection.left_out(), selection.details()
    if as_json:
        print_json({"rows": num_rows, "selected": num_chosen, "left_out": left_out, "conditions": conditions})
        return
    result(f"selected {num_chosen:,} of {num_rows:,} rows ({percent(num_chosen, num_rows)})")
    table("", ("left out", "rows", "share"), [(why, n, percent(n, num_rows)) for why, n in left_out.items()])
    table("", ("not selected", "rows", "share"), [(why, n, percent(n, num_rows)) for why, n in conditions.items()])
    for condition, rows in selection.examples().items() if explain else ():
        result(f"{condition}: {conditions[condition]:,} rows")
        for place, text in rows:
            result(f"  {place}: {text}")
    for target in (out, rest):
        if target and out:
            say(
                f"wrote {target}; {selecting.sources_beside(target).name} names file and line of each row"
                if not target.name.endswith(".parquet")
                else f"wrote {target}"
            )
    read = ReadOptions(kind=options.kind, mapping=options.mapping)  # what is written is jsonl in UTF-8
    next_command(pack_command([out], read, tokenizer) if out else same_command(add="--out FILE.jsonl"))
