"""`mm export`: write a model in the format of another program."""

import time
from pathlib import Path
from typing import Annotated

import typer

from mmdata.commands.options import HOME, Json
from mmdata.commands.terminal import next_command, print_json, result, size
from mmdata.options import Option


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run or checkpoint.")],
    format: Annotated[
        str,
        Option(
            "Format: hf for transformers, gguf for llama.cpp, minimind for MiniMind's scripts (.pth).",
            choices=("hf", "gguf", "minimind"),
        ),
    ] = "hf",
    out: Annotated[
        Path | None, Option("Directory of the exported model.", metavar="DIR", default_text="exports/RUN-FORMAT")
    ] = None,
    dtype: Annotated[
        str | None,
        Option(
            "Type of the weights; hf: f32, f16, bf16; gguf: f32, f16, q8_0; minimind: f32, f16.", default_text="f32"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model for transformers, llama.cpp or MiniMind's scripts. If transformers is installed, its
    logits from an export with --format hf are compared with the run's.

    Example: mm export runs/dpo-1 --format gguf --dtype q8_0 --out exports/dpo-1-gguf
    """
    from mmtrain.checkpoint import find
    from mmtrain.convert.export import MODELFILE
    from mmtrain.convert.export import export as export_model

    start = time.monotonic()
    name = find(run).run_dir.resolve().name
    directory = out or HOME / "exports" / f"{name}-{format}"
    exported = export_model(run, directory, format=format, dtype=dtype)
    if as_json:
        print_json(exported)
        return
    for check in exported.checks:
        result(check)
    num_bytes = size(exported.num_bytes)
    what = f"{exported.architecture}, {exported.num_params:,} parameters, {exported.dtype}, {num_bytes}"
    result(f"wrote {exported.out}: {what}, in {time.monotonic() - start:.1f} s")
    if format == "gguf":
        file = next(file for file in exported.files if file.endswith(".gguf"))
        modelfile = exported.out / MODELFILE
        next_command(f"llama-cli -m {exported.out / file}    or    ollama create {name} -f {modelfile}")
    elif format == "hf":
        upload = f"hf upload {name} {exported.out}"
        next_command(f"mm chat {exported.out}    or    {upload}    or    mm export {run} --format gguf")
