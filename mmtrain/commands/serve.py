"""`mm serve`: serve a model through an HTTP interface that OpenAI clients understand, with a chat page."""

import re
from pathlib import Path
from typing import Annotated

import typer

from mmdata.commands.terminal import say
from mmdata.errors import UsageError
from mmtrain.commands.chat import newest_finished_run
from mmtrain.config import STAGE_KINDS
from mmtrain.inference.settings import ServeOptions


def serve(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]",
            help="Run, checkpoint, .pth or Hugging Face directory. [default: the newest finished run]",
        ),
    ] = None,
    *,
    options: ServeOptions,
) -> None:
    """Serve a run to OpenAI clients, with a chat page at /. Needs the packages of 'mm-toolkit[serve]'.

    Example: mm serve runs/dpo-1 --port 8000    mm serve --host 0.0.0.0 --api-key SECRET
    """
    run = run or newest_finished_run("serve", tuple(STAGE_KINDS)[::-1])
    say(f"loading {run}")  # before torch is, which takes seconds
    from mmdata.encode.template import Template
    from mmtrain.convert.foreign import open_model
    from mmtrain.inference.engine import Engine
    from mmtrain.inference.serve.app import LOOPBACK, Service, check_installed
    from mmtrain.inference.serve.app import serve as serve_forever
    from mmtrain.inference.serve.worker import Worker
    from mmtrain.log.history import sample_prompts

    check_installed()
    model, tokenizer = open_model(run)
    if options.api_key == "":
        raise UsageError("the API key is empty", "--api-key SECRET, or leave it out")
    if options.host not in LOOPBACK and options.api_key is None:
        say(f"warning: {options.host} can be reached from other machines, and no --api-key is asked for")
    for origin in options.origins:
        if not re.fullmatch(r"\*|https?://[^/\s]+", origin):
            raise UsageError(f"--cors {origin} is no origin", "--cors https://HOST, without a path; or --cors '*'")
    engine = Engine(model, tokenizer, max_rows=options.max_rows, window=options.window, remember=8)
    worker = Worker(engine, max_waiting=options.max_waiting)
    service = Service(options.name or run.resolve().name, Template(tokenizer), worker, options, sample_prompts(run))
    serve_forever(service, lambda url: say(f"{service.name}: chat at {url}/, OpenAI clients at {url}/v1; Ctrl-C ends"))
    say("stopped")
