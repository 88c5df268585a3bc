"""`mm import`: make a run from a model that another program trained."""

import time
from pathlib import Path
from typing import Annotated

import typer

from mmdata.commands.options import RUNS_DIR, Json
from mmdata.commands.terminal import next_command, print_json, result, say
from mmdata.options import Option


def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="MiniMind's .pth, or a Hugging Face directory.")],
    out: Annotated[Path | None, Option("Directory of the new run.", metavar="RUN", default_text="runs/NAME")] = None,
    tokenizer: Annotated[
        Path | None, Option("Tokenizer directory, if mm finds none next to the model.", metavar="DIR")
    ] = None,
    num_heads: Annotated[
        int | None,
        Option("Number of query heads, which a .pth file does not record.", least=1, default_text="MiniMind's 8"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a run from a MiniMind, Llama, SmolLM, Qwen2/3 or Mistral model, for `mm chat`, `mm eval` and `mm train --init`.

    Example: mm import out/full_sft_768.pth --tokenizer model --out runs/full_sft_768
    """
    from mmtrain.convert.foreign import import_model

    start = time.monotonic()
    imported = import_model(path, out or RUNS_DIR / path.resolve().stem, tokenizer_dir=tokenizer, num_heads=num_heads)
    if as_json:
        print_json(imported)
        return
    shape, seconds = imported.shape, time.monotonic() - start
    say(f"{path}: {imported.origin}; {shape.text}; tokenizer {imported.tokenizer_dir}")
    result(f"wrote {imported.run_dir}: {imported.num_params:,} parameters, every value as it was, in {seconds:.1f} s")
    next_command(f"mm chat {imported.run_dir}    or    mm train sft --init {imported.run_dir}")
