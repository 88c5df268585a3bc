"""`mm report`: report on training runs on the terminal, as HTML, or as a page that is updated while they train."""

from pathlib import Path
from typing import Annotated

import typer

from mmdata.commands.options import RUNS_DIR, Html, Json, Lang
from mmdata.commands.terminal import next_command, print_json, print_sections, say, size
from mmdata.errors import CheckpointError, UsageError
from mmdata.options import Option


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN]...", help="Runs, drawn in the same plots. [default: the newest]"),
    ] = None,
    html: Html = None,
    follow: Annotated[
        bool, Option("Serve the report on 127.0.0.1 and update it while the run trains; Ctrl-C ends it.")
    ] = False,
    port: Annotated[int, Option("With --follow: port to listen on; 0: a free one.", least=0, most=65535)] = 8765,
    lang: Lang = "en",
    as_json: Json = False,
) -> None:
    """Report on runs, and on the runs they started from: curves, speed, events, settings and sampled answers.

    Example: mm report runs/sft-1 --html run.html    mm report runs/dpo-1 runs/dpo-2 --follow
    """
    from mmdata.io.files import write_text
    from mmtrain.log import history
    from mmtrain.log.report import run_page, sections_of, serve

    if follow and (html or as_json):
        raise UsageError("--follow serves the report and writes nothing", "leave --html and --json out, or --follow")
    paths = runs or [newest_run()]
    if follow:
        reader = history.RunReader()
        serve(
            lambda: run_page(history.figures(paths, reader), lang=lang, refresh_s=2),
            port,
            on_start=lambda url: say(f"look: {url}"),
        )
        return
    figures = history.figures(paths)
    if html:
        write_text(html, run_page(figures, lang=lang))
    if as_json:
        print_json(figures)
    else:
        print_sections(sections_of(figures["chains"]))
    if html:
        say(f"wrote {html} ({size(html.stat().st_size)})")
    elif not as_json:
        next_command(
            f"mm report {' '.join(map(str, paths))} --html run.html    or    mm report {' '.join(map(str, paths))} --follow"
        )


def newest_run() -> Path:
    """Return the run under runs/ whose run.json was written last. Raise CheckpointError if there is none."""
    runs = [(path.stat().st_mtime_ns, path.parent) for path in RUNS_DIR.glob("*/run.json")]
    if not runs:
        raise CheckpointError(f"no run under {RUNS_DIR}/", "`mm train` makes one, or name it: mm report RUN")
    return max(runs)[1]
