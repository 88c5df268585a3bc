"""The command `mm`: registers the commands of mmdata and mmtrain, and turns errors into two lines and an exit code."""

import errno
import os
import signal
import sys

import typer

from mmdata.commands import tokenizer
from mmdata.commands.fetch import fetch
from mmdata.commands.options import add
from mmdata.commands.pack import pack
from mmdata.commands.show import show
from mmdata.commands.stats import stats
from mmdata.commands.terminal import fail, say
from mmdata.commands.validate import validate
from mmdata.commands.verify import verify
from mmdata.errors import DiskError, InputError, MMError
from mmtrain.commands.chat import chat
from mmtrain.commands.demo import demo
from mmtrain.commands.eval import eval_
from mmtrain.commands.export import export
from mmtrain.commands.import_ import import_
from mmtrain.commands.report import report
from mmtrain.commands.serve import serve
from mmtrain.commands.train import train
from mmtrain.config import HEADINGS

SETTINGS = {
    "no_args_is_help": True,
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,  # rich would take as long to import as everything else together
    "context_settings": {"help_option_names": ["--help", "-h"]},
}
app = typer.Typer(
    name="mm",
    help="From raw jsonl to a chatting, aligned small language model.\n\n"
    "Fetch data, pack it into shards, train pretrain -> sft -> dpo, chat. New here? Try: mm demo",
    **SETTINGS,
)
tokenizers = typer.Typer(
    help="Train tokenizers, and check whether one is good, complete, and fits a model.",
    epilog="Example: mm tokenizer train data/sft_512.jsonl    mm tokenizer check data/tokenizer",
    **SETTINGS,
)
for function in (fetch, validate, pack, verify, show, stats):
    add(app, function)
app.add_typer(tokenizers, name="tokenizer")
add(app, train, HEADINGS)
for function in (report, eval_, export, import_, chat, serve, demo):
    add(app, function)
for function in (
    *(tokenizer.train, tokenizer.eval_, tokenizer.compare),
    *(tokenizer.check, tokenizer.show, tokenizer.extend),
):
    add(tokenizers, function)


def main() -> None:
    """Run `mm`; every error a user can cause becomes one error line, one fix line and an exit code."""
    signal.signal(signal.SIGTERM, interrupt)
    try:
        code = app(standalone_mode=True)
    except MMError as error:
        code = fail(error)
    except KeyboardInterrupt:
        say("interrupted")
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if (described := describe(error)) is None:
            raise
        code = fail(described)
    sys.exit(code)


def interrupt(_number: int, _frame: object) -> None:
    """End like Ctrl-C, so that what is running cleans up."""
    raise KeyboardInterrupt


def describe(error: OSError) -> MMError | None:
    """An error of the file system that the user can mend, with what helps; None for any other."""
    name = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(f"the disk is full while writing {name}", "free some space (`df -h .`) and run it again")
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return InputError(f"{name}: {error.strerror}", f"check the path and its permissions (`ls -ld {name}`)")
    return None


if __name__ == "__main__":
    main()
