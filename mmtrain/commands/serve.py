"""`mm serve`: serve a model through an HTTP interface that OpenAI clients understand, with a chat page."""

import re
from pathlib import Path
from typing import Annotated

import typer

from mmdata.commands.options import RUNS_DIR
from mmdata.commands.terminal import say
from mmdata.errors import CheckpointError, UsageError
from mmdata.options import Option


def serve(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]",
            help="Run, checkpoint, .pth or Hugging Face directory. [default: the newest finished run]",
        ),
    ] = None,
    host: Annotated[str, Option("Address to listen on; 0.0.0.0: every address of this machine.")] = "127.0.0.1",
    port: Annotated[int, Option("Port to listen on; 0: a free one.", least=0, most=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="MM_API_KEY", help="Key that clients must send.", show_default=False)
    ] = None,
    cors: Annotated[
        list[str] | None,
        Option(
            "Origin of a web page that may use the interface, such as https://example.org; may be repeated; *: all.",
            metavar="ORIGIN",
        ),
    ] = None,
    name: Annotated[str | None, Option("Model name that clients see.", default_text="the run's")] = None,
    window: Annotated[int, Option("Largest number of tokens of a conversation and its answer.", least=16)] = 2048,
    max_tokens: Annotated[
        int | None, Option("Longest answer in tokens.", least=1, default_text="what the window has room for")
    ] = None,
    max_rows: Annotated[int, Option("Largest number of answers generated at once.", least=1)] = 16,
    max_waiting: Annotated[int, Option("Largest number of waiting requests; further ones are refused.", least=1)] = 64,
    max_body: Annotated[int, Option("Largest request body in bytes.", least=1024)] = 2**20,
    timeout: Annotated[float, Option("Longest time that one request may take, in seconds.", least=1)] = 600,
) -> None:
    """Serve a run to OpenAI clients, with a chat page at /. Needs the packages of 'mm-toolkit[serve]'.

    Example: mm serve runs/dpo-1 --port 8000    mm serve --host 0.0.0.0 --api-key SECRET
    """
    from mmdata.encode.template import Template
    from mmtrain.checkpoint import find_run
    from mmtrain.config import STAGE_KINDS
    from mmtrain.convert.foreign import open_model
    from mmtrain.inference.engine import Engine
    from mmtrain.inference.serve.app import LOOPBACK, Service, check_installed
    from mmtrain.inference.serve.app import serve as serve_forever
    from mmtrain.inference.serve.worker import Worker

    check_installed()
    run = run or find_run(RUNS_DIR, tuple(STAGE_KINDS)[::-1])
    if run is None:
        raise CheckpointError(
            f"no finished run under {RUNS_DIR}/", "`mm demo` trains one in minutes, or name one: mm serve RUN"
        )
    model, tokenizer = open_model(run)
    if api_key == "":
        raise UsageError("the API key is empty", "--api-key SECRET, or leave it out")
    if host not in LOOPBACK and api_key is None:
        say(f"warning: {host} can be reached from other machines, and no --api-key is asked for")
    for origin in cors or ():
        if not re.fullmatch(r"\*|https?://[^/\s]+", origin):
            raise UsageError(f"--cors {origin} is no origin", "--cors https://HOST, without a path; or --cors '*'")
    worker = Worker(Engine(model, tokenizer, max_rows=max_rows, window=window, remember=8), max_waiting=max_waiting)
    service = Service(
        name or run.resolve().name,
        Template(tokenizer),
        worker,
        api_key=api_key,
        origins=cors or (),
        host=host,
        max_body_bytes=max_body,
        max_tokens=max_tokens,
        timeout_s=timeout,
    )
    serve_forever(
        service, port, ready=lambda url: say(f"{service.name}: chat at {url}/, OpenAI clients at {url}/v1; Ctrl-C ends")
    )
    say("stopped")
