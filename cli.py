"""The command `mm`: registers the commands of mmdata and mmtrain, and turns errors into two lines and an exit code.

The commands are registered by name and summary alone; the module of a command is imported only when it is called.
"""

import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from mmdata.commands.options import DATA_DIR, HOME, SETTINGS, add_lazily, check_arguments
from mmdata.commands.terminal import fail, replace_unknown_characters, result, say, take_arguments_as_utf8
from mmdata.errors import MMError, of_system

COMMANDS = {
    "mmdata.commands": {
        "fetch": "Fetch data files and tokenizers, resumed and verified.",
        "validate": "Report the kind of rows and those that cannot be used.",
        "pack": "Pack jsonl files into tokenized shards.",
        "verify": "Check packed datasets, and repair them.",
        "select": "Choose rows by conditions on their columns.",
        "show": "Show samples decoded, as the model sees them.",
        "stats": "Describe data: lengths, languages, repeats, samples.",
    },
    "mmtrain.commands": {
        "train": "Train one stage: pretrain, sft or dpo.",
        "report": "Report on runs: curves, speed, settings, answers.",
        "eval": "Evaluate a model: held-out loss, questions, lm-eval.",
        "export": "Write a model for transformers, llama.cpp or MiniMind.",
        "import": "Make a run from another program's model.",
        "chat": "Talk with a trained model.",
        "serve": "Serve a model to OpenAI clients, with a chat page.",
        "demo": "Train and score a small model from scratch in minutes.",
    },
    "mmtrain.commands.project": {
        "run": "Execute a recipe: from raw data to an exported model.",
        "lineage": "Show what a model or dataset was made from.",
        "doctor": "Check this machine and say what to mend.",
    },
}
MODULES = {"import": "import_", "verify": "validate"}  # of commands whose module has another name
TOKENIZER_COMMANDS = {
    "train": "Train a tokenizer on the text of jsonl files.",
    "eval": "Compare tokenizers on the same text.",
    "compare": "Show how two tokenizers split the same text.",
    "check": "Check what training relies on.",
    "show": "Show a text coloured by token, or the vocabulary.",
    "extend": "Add a few tokens after the last id.",
}
MAIN_SETTINGS: dict[str, Any] = {**SETTINGS, "add_completion": True}
app = typer.Typer(
    name="mm",
    help="From raw jsonl to a chatting, aligned small language model.\n\n"
    "Fetch data, pack it into shards, train pretrain -> sft -> dpo, chat. New here? Try: mm demo",
    no_args_is_help=True,
    **MAIN_SETTINGS,
)
tokenizers = typer.Typer(
    help="Train, measure, check and extend tokenizers.",
    epilog="Example: mm tokenizer train data/sft_512.jsonl    mm tokenizer check data/tokenizer",
    no_args_is_help=True,
    **SETTINGS,
)


def show_version(is_asked: bool) -> None:
    """Print the version and end, for --version."""
    if is_asked:
        result(f"mm {version('mm-toolkit')}")
        raise typer.Exit


@app.callback(help=app.info.help)
def root(
    _: Annotated[bool, typer.Option("--version", "-V", help="Print the version.", callback=show_version)] = False,
) -> None:
    """Declare the options of `mm` itself."""


for package, summaries in COMMANDS.items():
    for name, summary in summaries.items():
        add_lazily(app, f"{package}.{MODULES.get(name, name)}", name, summary)
for name, summary in TOKENIZER_COMMANDS.items():
    add_lazily(tokenizers, "mmdata.commands.tokenizer", name, summary)
app.add_typer(tokenizers, name="tokenizer")


def main() -> None:
    """Run the command in `sys.argv` and exit with its code: that of an `MMError`, or of an `OSError` that `of_system`
    recognizes, both printed to stderr as an error and a fix; 130 for Ctrl-C and SIGTERM; 0 when the reader of stdout
    has gone (`mm show DIR | head`). Any other exception is raised with its traceback."""
    signal.signal(signal.SIGTERM, interrupt)
    take_arguments_as_utf8()
    replace_unknown_characters()
    try:
        check_arguments(sys.argv[1:])
        code = app(standalone_mode=True, prog_name="mm", default_map=project_defaults())
    except MMError as error:
        code = fail(error)
    except KeyboardInterrupt:
        say("interrupted")
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if (described := of_system(error)) is None:
            raise
        code = fail(described)
    except MemoryError:
        code = fail(MMError("there is not enough memory", "end other programs, or use smaller files or fewer workers"))
    sys.exit(code)


def project_defaults() -> dict[str, Any]:
    """Return the defaults of options that mm.toml, in the current directory or in MM_HOME, has for commands."""
    path = next((path for path in (Path("mm.toml"), HOME / "mm.toml") if path.is_file()), None)
    defaults: dict[str, Any] = {}
    if path:
        from mmtrain.commands.project.recipe import read_defaults

        defaults = read_defaults(path, typer.main.get_command(app))
    if HOME.parts:
        defaults["fetch"] = {"out": str(DATA_DIR), **defaults.get("fetch", {})}
    return defaults


def interrupt(_number: int, _frame: object) -> None:
    """Handle SIGTERM as Ctrl-C, so that the running command cleans up."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
