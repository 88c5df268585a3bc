"""The command `mm`: parse, call, print. What a command needs is imported where it is used, so that `mm --help` stays instant."""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdata.commands.terminal import (
    DATA_DIR,
    RUNS_DIR,
    SHARDS_DIR,
    PackWatch,
    fail,
    fetch_plan_values,
    fetch_progress,
    next_command,
    plain,
    print_cleaned,
    print_demo,
    print_estimate,
    print_fetch_plan,
    print_fetched,
    print_json,
    print_measured,
    print_overview,
    print_packed,
    print_scores,
    print_sections,
    print_validation,
    progress,
    result,
    say,
    show_dataset,
    show_file,
    size,
)

if TYPE_CHECKING:
    from mmdata.demo import Question
    from mmdata.pack.options import PackOptions
    from mmdata.tokenizer.tokenizer import Tokenizer
    from mmtrain.commands.talk import Speaker
    from mmtrain.model.model import Model
    from mmtrain.train.loop import TrainResult
    from mmtrain.train.preflight import Needs

app = typer.Typer(
    name="mm",
    help="From raw jsonl to a chatting, aligned small language model.\n\n"
    "fetch data, pack it into shards, train pretrain -> sft -> dpo, chat. New here? Try: mm demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON, for programs.")]


# --- data -----------------------------------------------------------------------------------------------------------

Jsonl = Annotated[list[Path], typer.Argument(metavar="FILE...", help="jsonl files (also .gz and .zst).")]
TokenizerDir = Annotated[
    Path | None, typer.Option("--tokenizer", metavar="DIR", help="Tokenizer directory. [default: data/tokenizer]")
]


def data_files(files: list[Path] | None) -> list[Path]:
    """The files named, else all of data/*.jsonl."""
    from mmdata.errors import InputError

    found = files or sorted(DATA_DIR.glob("*.jsonl"))
    if not found:
        raise InputError(f"no FILE given and no {DATA_DIR}/*.jsonl here", "`mm fetch` brings data, or name your files")
    for path in found:
        if not path.is_file() and str(path) != "-":
            raise InputError(f"{path}: no such file", f"`ls {path.parent}` shows what is there")
    return found


def tokenizer_dir(given: Path | None) -> Path:
    """The tokenizer named, else data/tokenizer when it exists."""
    from mmdata.errors import TokenizerError

    if given is None and not (DATA_DIR / "tokenizer").is_dir():
        raise TokenizerError(
            f"no tokenizer given and no {DATA_DIR}/tokenizer here",
            "`mm fetch --tokenizer minimind-3` brings one, or name a directory: --tokenizer DIR",
        )
    return given or DATA_DIR / "tokenizer"


@app.command(epilog="Example: mm fetch    mm fetch pretrain_hq sft_512 dpo --connections 4    mm fetch --list")
def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Known names, file names, globs. [default: what one needs to begin]"),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A set of files and their tokenizer: seed, zero, full.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every file of the dataset's main branch.")] = False,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="NAME", help="minimind-3, minimind-2 or minimind-2-seed, into DIR/tokenizer.")
    ] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="Show the known files and which are here; asks nobody.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the files go.")] = DATA_DIR,
    revision: Annotated[
        str | None, typer.Option(help="A commit, tag or branch instead of the locked or known one.")
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Move from the locked commit to the newest.")] = False,
    source: Annotated[str, typer.Option(metavar="hf|modelscope|DIR|URL", help="Where to fetch from.")] = "hf",
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="A mirror of the source. [default: $HF_ENDPOINT]")
    ] = None,
    connections: Annotated[
        int, typer.Option(min=1, max=32, help="Connections a file; 4 helps where each is slow.")
    ] = 1,
    verify: Annotated[bool, typer.Option("--verify", help="Hash what is here again; without NAME, all of it.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are not ours.")] = False,
    clean: Annotated[bool, typer.Option("--clean", help="Remove unfinished downloads and stop.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before more than 1 GB.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    as_json: Json = False,
) -> None:
    """Bring data and tokenizers, whole and verified, resuming whatever an earlier run began."""
    from mmdata.hub import fetch as work
    from mmdata.hub import plan as planning

    if listing or clean:
        print_overview(work.overview(out), as_json) if listing else print_cleaned(*work.clean(out), as_json)
        return
    os.environ.setdefault(
        "HF_HUB_DISABLE_TELEMETRY", "1"
    )  # else the hub's client asks it about the terminal's programs
    default = {"hf": "HF_ENDPOINT", "modelscope": "MODELSCOPE_ENDPOINT"}.get(source, "")
    options = planning.FetchOptions(
        out, source, endpoint or os.environ.get(default) or None, revision, update, verify, force, connections
    )
    mute = quiet or as_json
    with progress("check", quiet=mute) as checking:
        to_do = planning.plan(
            tuple(names or ()),
            options=options,
            preset=preset,
            everything=everything,
            tokenizer=tokenizer,
            checking=(lambda name, done, total: checking(done, total)) if checking else None,
        )
    if not mute:
        print_fetch_plan(to_do)
    if dry_run:
        if as_json:
            print_json(fetch_plan_values(to_do))
        failures = [fail(item.error) for item in to_do.items if item.error]
        raise typer.Exit(failures[0] if failures else 0)
    if not mute and not yes and not agrees_to(to_do.get_bytes):
        say("nothing fetched")
        return
    start = time.monotonic()
    with fetch_progress(quiet=mute) as watch:
        outcomes = work.fetch(
            to_do, watch=watch, on_wait=None if mute else lambda name: say(f"{name}: another process is fetching it")
        )
    seconds = time.monotonic() - start
    if as_json:
        values = [{**plain(o), "error": o.error and o.error.message} for o in outcomes]
        print_json({**fetch_plan_values(to_do), "files": values, "seconds": seconds})
    elif not quiet:
        print_fetched(outcomes, out, seconds)
    failures = [fail(outcome.error) for outcome in outcomes if outcome.error]
    if failures:
        raise typer.Exit(failures[0])


def agrees_to(num_bytes: int) -> bool:
    """Whether to go on: asks on a terminal, before more than 1 GB."""
    if num_bytes <= 1_000_000_000 or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    return typer.confirm(f"download {size(num_bytes)}?", default=True, err=True)


@app.command(epilog="Example: mm validate data/sft_512.jsonl")
def validate(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help="jsonl files; - reads stdin. [default: data/*.jsonl]"),
    ] = None,
    on_bad: Annotated[
        str, typer.Option(help="quarantine: count bad rows and go on; fail: stop at the first.")
    ] = "quarantine",
    max_bad: Annotated[
        str | None, typer.Option(help="Largest share of bad rows, also of one reason: '1%,not json=0'. [default: 5%]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find what kind of rows a file holds and every row that cannot be used, by reason."""
    from mmdata.encode.rows import REASONS, BadRow, Line, check_budget
    from mmdata.encode.validate import validate as validate_file
    from mmdata.errors import InputError, MMError, UsageError
    from mmdata.pack.options import parse_budget

    if on_bad not in ("quarantine", "fail"):
        raise UsageError(f"--on-bad {on_bad} is unknown", "use quarantine or fail")
    limit, limits = parse_budget(max_bad)
    found, failures = [], []
    for path in data_files(files):

        def stop(line: Line, bad: BadRow, path: Path = path) -> None:
            raise InputError(f"{path} line {line.number}: {bad}", f"{REASONS[bad.reason]}; --on-bad quarantine goes on")

        try:
            with progress(f"validate {path}", quiet=as_json) as update:
                checked = validate_file(path, on_bad=stop if on_bad == "fail" else None, progress=update)
            found.append(checked)
            if not as_json:
                print_validation(checked)
            check_budget(checked.reasons, checked.num_rows, limit, limits)
        except MMError as error:
            failures.append(fail(error))
    if as_json:
        print_json(found)
    if failures:
        raise typer.Exit(failures[0])
    next_command(f"mm pack {' '.join(map(str, files))}" if files else "mm pack")


@app.command(epilog="Example: mm pack data/sft_512.jsonl --max-len 512 --tokenizer data/tokenizer")
def pack(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE]...", help="jsonl files (also .gz, .zst); - reads stdin. [default: data/*.jsonl]"
        ),
    ] = None,
    tokenizer: TokenizerDir = None,
    max_len: Annotated[
        int, typer.Option(help="Longest sequence in tokens; buckets are 512, 1024, 2048 up to it.")
    ] = 1024,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|URL",
            help="One dataset of all FILEs; packed under shards/ and sent, if a URL. [default: shards/<file>, each]",
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes. [default: one a core]")] = None,
    val_fraction: Annotated[
        float, typer.Option(help="Share of rows held out for validation, chosen by content.")
    ] = 0.01,
    on_bad: Annotated[
        str, typer.Option(help="quarantine: set bad rows aside and count them; fail: stop at the first.")
    ] = "quarantine",
    max_bad: Annotated[
        str | None, typer.Option(help="Largest share of bad rows, also of one reason: '1%,not json=0'. [default: 5%]")
    ] = None,
    train_on: Annotated[
        str, typer.Option(help="assistant: every answer; last: the last one; all: every token.")
    ] = "assistant",
    era: Annotated[str, typer.Option(help="MiniMind template quirks: auto, seed, 2 or 3.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the one random choice: which empty think blocks stay.")] = 0,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Do not write report.html beside the manifest.")
    ] = False,
    dedup: Annotated[
        str | None,
        typer.Option(
            help="Leave repeated rows out, the first stays: exact, or near ('mm-toolkit[dedup]').", metavar="exact|near"
        ),
    ] = None,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Leave rows out that overlap with this file's texts, say a benchmark's; repeatable."
        ),
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="auto: the fastest exact one; tokenizers; fastokens (pip install 'mm-toolkit[fast]').")
    ] = "auto",
    engine: Annotated[
        str, typer.Option(help="local: processes here; ray: a cluster (pip install 'mm-toolkit[ray]').")
    ] = "local",
    ray_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Ray cluster; auto finds it. [default: one started here]")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Pack only this share, on a shared filesystem; then --finish.")
    ] = None,
    finish: Annotated[bool, typer.Option("--finish", help="Publish what all shards packed.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Read about 1 % and say time, disk, tokens and padding; write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Validate and pack jsonl into tokenized Arrow shards with length buckets."""
    from mmdata.errors import MMError
    from mmdata.io import remote
    from mmdata.pack import pipeline
    from mmdata.pack.options import PackOptions

    place = (SHARDS_DIR / remote.file_at(out).name if remote.is_url(out) else Path(out)) if out else None
    named = [remote.file_at(file) for file in files or ()]
    options = PackOptions(
        tokenizer=tokenizer_dir(tokenizer),
        max_len=max_len,
        workers=workers or os.cpu_count() or 1,
        val_fraction=val_fraction,
        on_bad=on_bad,
        max_bad=max_bad,
        train_on=train_on,
        era=era,
        seed=seed,
        dedup=dedup,
        exclude=tuple(exclude or ()),
        encoder=encoder,
        engine=engine,
        ray_address=ray_address,
        shard=shard,
        finish=finish,
    )
    if plan:
        if dedup or exclude:
            say("note: rows that --dedup and --exclude would leave out are counted here: only packing finds them")
        plan_packs(data_files(named), bool(out), options, as_json)
        return
    found = [kept_stdin(place) if str(path) == "-" else path for path in data_files(named)]
    jobs = [(found, place)] if place else [([path], SHARDS_DIR / stem(path)) for path in found]
    results, failures = [], []
    for inputs, directory in jobs:
        try:
            watched = PackWatch(f"pack {directory}", quiet=as_json)
            with watched.progress() as update:
                packed = pipeline.pack(inputs, directory, options, progress=update, watch=watched.watch, note=say)
        except MMError as error:
            if len(jobs) == 1:
                raise
            failures.append(fail(error))  # one file does not stop the rest
        else:
            results.append(packed)
            if not as_json:
                print_packed(packed)
            if not no_report and packed.parts_left is None:
                write_report(packed.out, is_new=not packed.up_to_date)
    if out and remote.is_url(out) and results[0].parts_left is None:
        send(results[0].out, out, quiet=as_json)
    if as_json:
        print_json(results)
    warn_of_contained([packed.out for packed in results if packed.parts_left is None and len(found) > 1])
    if results and results[-1].parts_left is None:
        next_command(f"mm train {stage_of(results[-1].kind)} --data {results[-1].out}")
    elif results:
        next_command("the other shards, then the same command with --finish in place of --shard")
    if failures:
        raise typer.Exit(failures[0])


def warn_of_contained(datasets: list[Path]) -> None:
    """Say which inputs stand in another one: trained on together, their rows would count twice."""
    from mmdata.shards.dataset import open_dataset
    from mmdata.shards.overlap import find_contained

    for pair in find_contained([open_dataset(path) for path in datasets]):
        say(
            f"warning: {pair.rows:,} of {pair.of:,} rows of {pair.inner} stand in {pair.outer} too; to train on both, take "
            f"them once: mm pack {pair.inner} {pair.outer} --out {SHARDS_DIR}/NAME --dedup exact"
        )


def send(directory: Path, url: str, *, quiet: bool) -> None:
    """Copy a packed dataset to a URL, checked."""
    from mmdata.io import remote
    from mmdata.shards.dataset import read_manifest

    with progress(f"send {directory}", quiet=quiet) as update:
        sent = remote.send(directory, read_manifest(directory), url, progress=update)
    say(f"{url} holds {directory}: {size(sent)} sent, every file read back and hashed")
    say(f"to train on it elsewhere: {remote.bring_command(url, directory)}")


def plan_packs(files: list[Path], as_one: bool, options: "PackOptions", as_json: bool) -> None:
    """What packing would give, for each dataset that it would write."""
    from mmdata.pack.estimate import estimate
    from mmdata.pack.pipeline import common_kind
    from mmtrain.config import stage_defaults

    found = []
    for inputs in [files] if as_one else [[path] for path in files]:
        batch_tokens = stage_defaults(stage_of(common_kind(inputs)))["batch_tokens"]
        found.append(estimate(inputs, options, batch_tokens=batch_tokens))
        if not as_json:
            print_estimate(found[-1])
    if as_json:
        print_json(found)
    next_command("mm pack with the --max-len you choose")


def write_report(directory: Path, *, is_new: bool) -> None:
    """The dataset's page beside its manifest, from its counts and a sample; what keeps it from being made is said, no more."""
    from mmdata.errors import MMError
    from mmdata.io.files import write_text
    from mmdata.stats import stats
    from mmdata.stats.report import data

    path = directory / data.FILE
    if path.exists() and not is_new:
        return
    try:
        write_text(path, data.dataset_page([stats.measure_dataset(directory, is_quick=True)]))
    except (MMError, OSError) as error:
        say(f"note: no {path}: {error}")
    else:
        say(f"look: {path}")


def kept_stdin(out: Path | None) -> Path:
    """Standard input as a file beside the dataset, where its rows' provenance can point to."""
    import shutil

    from mmdata.errors import UsageError

    if out is None:
        raise UsageError("packing standard input needs a name for the dataset", "mm pack - --out shards/NAME")
    path = out.with_name(f"{out.name}.jsonl")
    beside = path.with_name(f".{path.name}.writing")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    say(f"standard input is kept as {path}: the dataset's rows refer to it")
    return path


def stem(path: Path) -> str:
    """A file's name without .jsonl, .gz and .zst: its dataset's name."""
    return path.name.split(".jsonl")[0].split(".json")[0]


def stage_of(kind: str) -> str:
    """The stage that trains on a row kind."""
    return next(stage for stage, its_kind in KIND_OF_STAGE.items() if its_kind == kind)


@app.command(epilog="Example: mm verify shards/sft_512")
def verify(
    datasets: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Packed datasets.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="First rebuild damaged files from the inputs, to the same bytes.")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --repair: where a damaged tokenizer copy came from.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="With --repair: processes. [default: one a core]")] = None,
    as_json: Json = False,
) -> None:
    """Re-hash every shard and check manifest, counts and token ranges; with --repair rebuild what is damaged."""
    from mmdata.errors import UsageError
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
    found = {}
    for path in datasets:
        with progress(f"verify {path}", quiet=as_json) as update:
            found[str(path)] = verify_dataset(path, progress=update)
    if as_json:
        print_json({path: {"ok": not problems, "problems": problems} for path, problems in found.items()})
    for path, problems in found.items():
        for problem in problems:
            say(f"error: {Path(path) / problem.shard}: {problem.what}")
        if not as_json and not problems:
            result(f"{path}: every shard is as packed")
    if any(found.values()):
        bad = " ".join(path for path, problems in found.items() if problems)
        say(f"fix: mm verify {bad} --repair" if not repair else "fix: pack it again from its inputs (`mm pack`)")
        raise typer.Exit(1)


@app.command(epilog="Example: mm show shards/sft_512 --index 3    mm show shards/dpo --split all --json")
def show(
    path: Annotated[
        Path, typer.Argument(metavar="DIR|FILE", help="A packed dataset, or a jsonl file to see as it would be packed.")
    ],
    index: Annotated[
        int | None, typer.Option(help="Which sample (a pack or a pair), or which row of a file. [default: 0]")
    ] = None,
    split: Annotated[str, typer.Option(help="train, val or all.")] = "train",
    ids: Annotated[bool, typer.Option("--ids", help="Show the token ids too.")] = False,
    tokenizer: TokenizerDir = None,
    max_len: Annotated[int, typer.Option(help="For a file: longest sequence in tokens.")] = 1024,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON line a source row, in source order: ids and loss mask.")
    ] = False,
) -> None:
    """Show a sample as the model sees it: decoded, trained tokens in green."""
    from mmdata.errors import UsageError

    if split not in ("train", "val", "all"):
        raise UsageError(f"--split {split} is unknown", "use train, val or all")
    if path.is_dir():
        show_dataset(path, index, split, ids, as_json)
    else:
        show_file(path, index or 0, tokenizer_dir(tokenizer), max_len, ids, as_json)


@app.command(epilog="Example: mm stats shards/sft_512 --html stats.html    mm stats old.jsonl --compare new.jsonl")
def stats(
    paths: Annotated[list[Path], typer.Argument(metavar="DIR|FILE...", help="Packed datasets or jsonl files.")],
    tokenizer: TokenizerDir = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the report: one HTML file that needs nothing else."),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="DIR|FILE", help="Another dataset, put beside the one named.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Tokenize every row of a jsonl file, not a sample of a large one.")
    ] = False,
    losses: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What `mm eval --per-sequence` wrote: shows rows of high loss.")
    ] = None,
    lang: Annotated[str, typer.Option(help="Of the HTML report: en or zh.")] = "en",
    workers: Annotated[int | None, typer.Option(help="Processes. [default: one a core]")] = None,
    as_json: Json = False,
) -> None:
    """Everything there is to know about data: counts, lengths, languages, repeats, vocabulary, samples; as a page too."""
    from mmdata.errors import UsageError
    from mmdata.io.files import write_text
    from mmdata.stats import stats as figures
    from mmdata.stats.report.compare import compare_page, differences
    from mmdata.stats.report.data import dataset_page

    check_lang(lang)
    if compare and len(paths) != 1:
        raise UsageError(
            f"--compare puts two datasets side by side, {len(paths)} are named", "mm stats ONE --compare OTHER"
        )
    if exact and not any(path.is_file() for path in [*paths, *filter(None, [compare])]):
        raise UsageError("--exact is for jsonl files; a packed dataset's figures are exact", "leave --exact out")
    losses_of = figures.read_losses(losses) if losses else None
    directory = tokenizer or (DATA_DIR / "tokenizer" if (DATA_DIR / "tokenizer").is_dir() else None)
    measured = []
    for path in [*paths, *([compare] if compare else [])]:
        with progress(f"read {path}", quiet=as_json) as update:
            options = {"workers": workers or os.cpu_count() or 1, "losses": losses_of, "progress": update}
            if path.is_dir():
                measured.append(figures.measure_dataset(path, **options))
            else:
                measured.append(figures.measure_file(path, directory, is_exact=exact, **options))
    together = figures.contained(measured)
    found: dict[str, Any] = {str(one.path): one.figures for one in measured}
    if compare:
        found["differences"] = differences(measured[0].figures, measured[1].figures)
    if together:
        found["warnings"] = together
    if html:
        made = (
            compare_page(*measured, lang=lang, others=together)
            if compare
            else dataset_page(measured, lang=lang, others=together)
        )
        write_text(html, made)
    if as_json:
        print_json(found)
    else:
        print_measured(measured, together, is_comparison=compare is not None)
    if html:
        say(f"wrote {html} ({size(html.stat().st_size)})")
    elif not as_json:
        next_command(
            f"mm stats {' '.join(map(str, paths))}{f' --compare {compare}' if compare else ''} --html stats.html"
        )


def check_lang(lang: str) -> None:
    """Refuse a language no report is written in."""
    from mmdata.errors import UsageError
    from mmdata.stats.report.page import LANGS

    if lang not in LANGS:
        raise UsageError(f"--lang {lang} is unknown", f"use {' or '.join(LANGS)}")


# --- tokenizers -----------------------------------------------------------------------------------------------------

tokenizers = typer.Typer(
    help="Train tokenizers, and tell whether one is good, whole, and fits a model.",
    epilog="Example: mm tokenizer train data/sft_512.jsonl    mm tokenizer check data/tokenizer",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(tokenizers, name="tokenizer")

TokenizerDirs = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Tokenizer directories.")]
TextFiles = Annotated[
    list[Path] | None,
    typer.Option("--data", metavar="FILE", help="jsonl whose text is measured; repeat it. [default: data/*.jsonl]"),
]
Seed = Annotated[int, typer.Option(help="Which texts are drawn where not all are.")]


def text_files(files: list[Path] | None) -> list[Path]:
    """As `data_files`, for commands that read a file more than once."""
    from mmdata.errors import UsageError

    found = data_files(files)
    if any(str(path) == "-" for path in found):
        raise UsageError("standard input can be read only once", "write it to a file first")
    return found


def weights_of(given: list[str] | None) -> dict[str, float]:
    """Weights by name from words such as assistant=2."""
    from mmdata.errors import UsageError

    found = {}
    for item in given or ():
        name, equals, amount = item.rpartition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            equals = ""
        if not equals:
            raise UsageError(
                f"--weight {item!r} is not NAME=NUMBER", "--weight assistant=2 --weight data/dpo.jsonl=0.5"
            )
    return found


@tokenizers.command(
    "train", epilog="Example: mm tokenizer train data/pretrain_hq.jsonl data/sft_512.jsonl --vocab-size 6400"
)
def tokenizer_train(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help="jsonl files of any row kind. [default: data/*.jsonl]"),
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Tokens in all, control and reserved ones included.")] = 6400,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where it goes. [default: data/tokenizer-VOCAB_SIZE]")
    ] = None,
    algorithm: Annotated[str, typer.Option(help="bpe or unigram, both over bytes.")] = "bpe",
    special: Annotated[
        list[str] | None, typer.Option("--special", metavar="TOKEN", help="A further control token; repeat it.")
    ] = None,
    template: Annotated[
        str, typer.Option(help="chatml, minimind2 or minimind3: the chat template and its control tokens.")
    ] = "minimind3",
    pattern: Annotated[
        str, typer.Option(help="digits: digits and newlines stand alone; gpt2: cut as MiniMind's tokenizers do.")
    ] = "digits",
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight",
            metavar="NAME=W",
            help="How often texts of a FILE, field (user, assistant …) or language (Chinese, English …) count.",
        ),
    ] = None,
    limit_bytes: Annotated[
        int, typer.Option(help="Text to draw at most, evenly over files and languages; memory is 12 times as much.")
    ] = 100_000_000,
    seed: Seed = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Train a tokenizer on the text of jsonl files: the same files and seed give the same tokenizer."""
    from mmdata.commands.terminal_tokenizer import phases, print_trained
    from mmdata.tokenizer.toolkit.train import TokenizerOptions, train_to

    directory = out or DATA_DIR / f"tokenizer-{vocab_size}"
    options = TokenizerOptions(
        vocab_size,
        algorithm=algorithm,
        template=template,
        special=tuple(special or ()),
        pattern=pattern,
        limit_bytes=limit_bytes,
        weights=weights_of(weight),
        seed=seed,
    )
    with phases(quiet=quiet or as_json) as phase:
        trained = train_to(text_files(files), directory, options, phase=phase)
    if as_json:
        print_json(trained)
    else:
        print_trained(trained)
    next_command(f"mm tokenizer eval {directory}    or    mm pack --tokenizer {directory}")


@tokenizers.command(
    "eval", epilog="Example: mm tokenizer eval data/tokenizer data/tokenizer-6400 --data data/sft_512.jsonl"
)
def tokenizer_eval(
    directories: TokenizerDirs,
    data: TextFiles = None,
    limit_bytes: Annotated[
        int, typer.Option(help="Text to measure at most, drawn evenly over files and languages.")
    ] = 10_000_000,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of one training step, to tell steps per epoch.")] = 65_536,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the figures as one HTML page too.")
    ] = None,
    lang: Annotated[str, typer.Option(help="Of the HTML page: en or zh.")] = "en",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Tokenizers side by side on the same text: compression, what is used, exactness, speed, what it means for a model."""
    from mmdata.commands.terminal_tokenizer import print_evaluated
    from mmdata.io.files import write_text
    from mmdata.stats.report.tokenizer import eval_page
    from mmdata.tokenizer.tokenizer import Tokenizer
    from mmdata.tokenizer.toolkit.evaluate import Shape, evaluate
    from mmdata.tokenizer.toolkit.sample import draw
    from mmtrain.config import MODEL_SHAPES

    check_lang(lang)
    loaded = [Tokenizer.load(directory) for directory in directories]
    shapes = {
        name: Shape(shape.hidden_size, shape.num_params - shape.vocab_size * shape.hidden_size, shape.vocab_size)
        for name, shape in MODEL_SHAPES.items()
        if shape.vocab_size
    }
    with progress("read", quiet=as_json) as reading:
        corpus = draw(text_files(data), limit_bytes=positive(limit_bytes, "--limit-bytes"), seed=seed, progress=reading)
    with progress("encode", quiet=as_json) as update:
        steps = positive(batch_tokens, "--batch-tokens")
        figures = evaluate(loaded, corpus, shapes=shapes, step_tokens=steps, progress=update)
    if html:
        write_text(html, eval_page(figures, lang=lang))
        say(f"report: {html}")
    if as_json:
        print_json(figures)
        return
    print_evaluated(figures)
    next_command(f"mm tokenizer check {directories[0]}")


def positive(value: int, option: str) -> int:
    """The value; UsageError when it is not greater than 0."""
    from mmdata.errors import UsageError

    if value <= 0:
        raise UsageError(f"{option} {value} must be greater than 0", f"leave {option} out for the default")
    return value


@tokenizers.command(
    "compare", epilog="Example: mm tokenizer compare data/tokenizer data/tokenizer-6400 --data data/sft_512.jsonl"
)
def tokenizer_compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="The tokenizer a model was trained with.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The tokenizer data was packed with.")],
    data: TextFiles = None,
    limit_bytes: Annotated[int, typer.Option(help="Text to compare on at most.")] = 2_000_000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """How two tokenizers split the same text, and whether a model trained with A may read shards packed with B."""
    from mmdata.commands.terminal_tokenizer import print_compared
    from mmdata.tokenizer.tokenizer import Tokenizer
    from mmdata.tokenizer.toolkit.compare import compare
    from mmdata.tokenizer.toolkit.sample import draw

    loaded = Tokenizer.load(a), Tokenizer.load(b)
    with progress("read", quiet=as_json) as update:
        corpus = draw(text_files(data), limit_bytes=positive(limit_bytes, "--limit-bytes"), seed=seed, progress=update)
    found = compare(*loaded, corpus)
    if as_json:
        print_json(found)
    else:
        print_compared(found)


@tokenizers.command("check", epilog="Example: mm tokenizer check data/tokenizer --model minimind3")
def tokenizer_check(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A tokenizer's directory.")],
    model: Annotated[
        str | None, typer.Option(help="A model shape whose vocabulary it must fit: minimind2, minimind3 …")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check all that training relies on: ids, special tokens, the template, exact decoding. Exit code 1 on an error."""
    from mmdata.commands.terminal_tokenizer import print_findings
    from mmdata.errors import UsageError
    from mmdata.tokenizer.toolkit.check import check
    from mmtrain.config import MODEL_SHAPES

    if model is not None and model not in MODEL_SHAPES:
        raise UsageError(f"--model {model} is unknown", f"use one of {', '.join(MODEL_SHAPES)}")
    findings = check(directory, vocab_size=(MODEL_SHAPES[model].vocab_size or None) if model else None)
    if as_json:
        print_json(findings)
    else:
        print_findings(directory, findings)
    errors = [finding for finding in findings if finding.level == "error"]
    for finding in errors:
        say(f"error: {directory}: {finding.check}: {finding.found}")
        say(f"fix: {finding.fix}")
    if errors:
        raise typer.Exit(1)


@tokenizers.command(
    "show",
    epilog="Example: mm tokenizer show data/tokenizer '你好, world'    mm tokenizer show data/tokenizer --from 6000",
)
def tokenizer_show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A tokenizer's directory.")],
    text: Annotated[
        str | None,
        typer.Argument(metavar="[TEXT]", help="Text to split; - reads stdin. [default: show the vocabulary]"),
    ] = None,
    control: Annotated[bool, typer.Option("--control", help="Control strings in TEXT become control tokens.")] = False,
    begin: Annotated[int, typer.Option("--from", help="Without TEXT: the first id to show.")] = 0,
    count: Annotated[int, typer.Option(help="Without TEXT: how many ids.")] = 100,
    find: Annotated[str | None, typer.Option(help="Without TEXT: only tokens that hold this.")] = None,
    as_json: Json = False,
) -> None:
    """A text coloured by token, with ids; or the vocabulary, its bytes as characters where they form any."""
    from mmdata.commands.terminal_tokenizer import print_split, print_vocabulary
    from mmdata.errors import UsageError
    from mmdata.tokenizer.tokenizer import Tokenizer
    from mmdata.tokenizer.vocabulary import list_tokens, split_text

    loaded = Tokenizer.load(directory)
    if text is None and control:
        raise UsageError("--control needs TEXT", f"mm tokenizer show {directory} TEXT --control")
    if text is not None and (find is not None or begin):
        raise UsageError("--from and --find show the vocabulary, TEXT a text", "leave one of them out")
    shown = sys.stdin.read() if text == "-" else text
    entries = list_tokens(loaded, begin, count, find) if shown is None else split_text(loaded, shown, control=control)
    if as_json:
        print_json(entries)
    elif shown is None:
        print_vocabulary(entries, loaded.vocab_size)
    else:
        print_split(entries)


@tokenizers.command(
    "extend",
    epilog="Example: mm tokenizer extend data/tokenizer --add '<think>' --add '</think>' --out data/tokenizer-more",
)
def tokenizer_extend(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The tokenizer to extend; it stays as it is.")],
    add: Annotated[list[str], typer.Option("--add", metavar="TOKEN", help="A token to add; repeat it.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the extended one goes.")],
    control: Annotated[
        bool, typer.Option("--control", help="Only templates may write them: text never becomes them.")
    ] = False,
    reserved: Annotated[
        bool,
        typer.Option("--reserved", help="Take the places of reserved tokens (<|buffer1|> …): no model becomes larger."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Add a few tokens after the last id; every id keeps its meaning."""
    from mmdata.tokenizer.toolkit.extend import extend

    ids = extend(directory, add, out, is_control=control, reserved=reserved)
    if as_json:
        print_json({"out": out, "ids": ids})
    else:
        result(f"wrote {out}: " + ", ".join(f"{token} is {id:,}" for token, id in ids.items()))
    next_command(f"mm pack FILE --tokenizer {out}    and    mm train STAGE --init RUN --resize-embeddings mean")


# --- training ---------------------------------------------------------------------------------------------------------

KIND_OF_STAGE = {"pretrain": "document", "sft": "conversation", "dpo": "pair"}


def newest_dataset(stage: str) -> Path:
    """The dataset under shards/ of the stage's kind that was packed last."""
    from mmdata.errors import DatasetError

    kind = KIND_OF_STAGE[stage]
    found = []
    for manifest in SHARDS_DIR.glob("*/manifest.json"):
        try:
            if json.loads(manifest.read_bytes())["kind"] == kind:
                found.append((manifest.stat().st_mtime_ns, manifest.parent))
        except (ValueError, KeyError, TypeError):
            continue  # not ours, or damaged: `--data` names it and then it is refused with the reason
    if not found:
        raise DatasetError(
            f"no packed {kind} dataset under {SHARDS_DIR}/", "`mm pack` makes one, or name it: --data DIR"
        )
    return max(found)[1]


@app.command(epilog="Example: mm train sft --data shards/sft_512 --epochs 2 --lr 1e-4")
def train(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="pretrain, sft or dpo.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="DIR[:WEIGHT]",
            help="Packed dataset; repeat it for several, each with its share of the tokens. [default: newest]",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Shape of a new model: minimind2, minimind2-small, minimind3, demo, tiny.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Run or checkpoint to start from. [default: newest that fits]")
    ] = None,
    resize_embeddings: Annotated[
        str | None,
        typer.Option(help="mean or subtoken: grow --init's embedding to the data's extended tokenizer."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Directory of the new run. [default: runs/STAGE-N]")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="MiniMind's own settings for the stage: minimind2 or minimind3.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="Train adapters of this rank; the weights stay as they are.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw, or for pretrain muon: fewer steps to the same loss.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    beta2: Annotated[float | None, typer.Option(help="AdamW's decay of squared gradients.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of one step, over all ranks.")] = None,
    micro_tokens: Annotated[int | None, typer.Option(help="Tokens one rank runs at once.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, wsd or constant.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of steps to warm up.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay of the matrices.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm.")] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="dpo: sigmoid, sigmoid_norm, robust, hinge, ipo, simpo or orpo. [default: sigmoid]"),
    ] = None,
    beta: Annotated[float | None, typer.Option(help="dpo: how strongly the reference holds.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="dpo: share of pairs held to be the wrong way.")] = None,
    gamma: Annotated[float | None, typer.Option(help="dpo: simpo's target margin.")] = None,
    sft_weight: Annotated[float | None, typer.Option(help="dpo: weight of the chosen reply's NLL in the loss.")] = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="RUN", help="dpo: the reference. [default: the weights it starts from]")
    ] = None,
    reference_free: Annotated[bool, typer.Option("--reference-free", help="dpo: no reference at all.")] = False,
    share_prompt: Annotated[
        bool | None,
        typer.Option(
            "--share-prompt/--no-share-prompt",
            help="dpo: compute a pair's prompt once. [default: where that is faster]",
        ),
    ] = None,
    guard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="dpo: packed text whose val split shows what is forgotten.")
    ] = None,
    ema: Annotated[
        float | None, typer.Option(metavar="DECAY", help="Keep a running average of the weights, such as 0.999.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(metavar="N", help="End after N validations without a better val loss.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and order.")] = None,
    val_every: Annotated[int | None, typer.Option(help="Steps between validations; 0: only at the end.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    keep_last: Annotated[int | None, typer.Option(help="Checkpoints to keep.")] = None,
    max_skipped: Annotated[int | None, typer.Option(help="Non-finite steps in a row that end the run.")] = None,
    log_every: Annotated[int, typer.Option(help="Steps between console lines.")] = 10,
    log: Annotated[
        list[str] | None,
        typer.Option("--log", help="Also to tensorboard, wandb, swanlab or trackio; repeat it for several."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    no_compile: Annotated[bool, typer.Option("--no-compile", help="CUDA: run the blocks uncompiled.")] = False,
    checkpoint_activations: Annotated[
        bool,
        typer.Option(
            "--checkpoint-activations", help="A third more time for about a tenth of the activations' memory."
        ),
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what the run would take (memory, time, disk), and end.")
    ] = False,
    nproc: Annotated[int, typer.Option(help="Start this many ranks on this machine.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    other_data: Annotated[
        bool, typer.Option("--other-data", help="With --resume: go on although the data has changed.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No step lines.")] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Do not keep RUN/report.html.")] = False,
    no_samples: Annotated[
        bool, typer.Option("--no-samples", help="Do not let the model answer fixed prompts at validations.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train one stage: pretrain, sft or dpo. Works under torchrun as it is."""
    from mmdata.errors import UsageError

    if stage not in KIND_OF_STAGE:
        raise UsageError(f"stage {stage!r} is unknown", "mm train pretrain, mm train sft or mm train dpo")
    if reference and reference_free:
        raise UsageError("--reference and --reference-free contradict each other", "leave one of them out")
    if nproc > 1:
        from mmtrain.distributed import launch

        raise typer.Exit(launch(nproc, [sys.executable, "-m", "cli", *without_option(sys.argv[1:], "--nproc")]))
    from mmtrain.config import TrainOptions
    from mmtrain.distributed import rank
    from mmtrain.train.loop import train as train_stage
    from mmtrain.train.run import needs_of

    paths, weights = weighted(data or [])
    values: dict[str, Any] = {
        "weights": weights,
        "preset": preset,
        "model": model,
        "init": init,
        "resize_embeddings": resize_embeddings,
        "steps": steps,
        "epochs": epochs,
        "lora": lora,
        "optimizer": optimizer,
        "lr": lr,
        "beta2": beta2,
        "batch_tokens": batch_tokens,
        "micro_tokens": micro_tokens,
        "schedule": schedule,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "clip": clip,
        "loss": loss,
        "beta": beta,
        "label_smoothing": label_smoothing,
        "gamma": gamma,
        "sft_weight": sft_weight,
        "reference": "none" if reference_free else str(reference) if reference else None,
        "share_prompt": share_prompt,
        "guard": str(guard) if guard else None,
        "ema": ema,
        "patience": patience,
        "seed": seed,
        "val_every": val_every,
        "save_every": save_every,
        "keep_last": keep_last,
        "max_skipped": max_skipped,
        "log_every": log_every,
        "trackers": tuple(log or ()),
        "device": device,
        "compile": not no_compile,
        "checkpoint_activations": checkpoint_activations,
        "resume": resume,
        "other_data": other_data,
        "quiet": quiet,
        "report": not no_report,
        "samples": not no_samples,
        "runs_dir": RUNS_DIR,
    }
    config = TrainOptions(
        stage,
        paths or (() if resume else (newest_dataset(stage),)),  # a resumed run knows its own
        out or next_run(stage, resume),
        **{name: value for name, value in values.items() if value is not None},
    )
    if plan:
        needs = needs_of(config)
        if rank() == 0:
            print_json(needs.as_json()) if as_json else print_needs(needs)
            next_command(f"mm train {stage}")
        return
    trained = train_stage(config)
    if rank() == 0:
        print_trained(trained, as_json)


def weighted(data: list[str]) -> tuple[tuple[Path, ...], tuple[float, ...] | None]:
    """Datasets and their weights, DIR:WEIGHT each; None without weights."""
    from mmdata.errors import UsageError
    from mmdata.io import remote

    paths, weights = [], []
    for text in data:
        name, colon, number = text.rpartition(":")
        weight = None
        if colon and not Path(text).exists():
            with suppress(ValueError):
                weight = float(number)
            if weight is not None and not 0 < weight < float("inf"):
                raise UsageError(f"--data {text}: the weight must be greater than 0", f"--data {name}:0.5")
        if remote.is_url(url := text if weight is None else name):
            local = SHARDS_DIR / remote.file_at(url).name
            raise UsageError(f"--data {url}: training maps local files", remote.bring_command(url, local))
        paths.append(Path(url))
        weights += [] if weight is None else [weight]
    if weights and len(weights) != len(paths):
        raise UsageError("some --data have a weight and some have none", "--data A:0.7 --data B:0.3")
    return tuple(paths), tuple(weights) or None


def print_needs(needs: "Needs") -> None:
    """What a run will take, part by part."""
    result(
        f"{needs.num_params:,} parameters, {needs.tokens_per_epoch:,} tokens an epoch, {needs.num_steps:,} steps of "
        f"{needs.batch_tokens:,} tokens, {needs.micro_tokens:,} at once"
    )
    for name, size_bytes in needs.parts.items():
        result(f"  {name:<26} {size_bytes / 1e6:>10,.0f} MB")
    fits = f"; --micro-tokens {needs.largest_micro_tokens:,} would still fit"
    result(f"  {'memory at its highest':<26} {needs.peak_bytes / 1e6:>10,.0f} MB{fits}")
    result(needs.line())


def print_trained(trained: "TrainResult", as_json: bool) -> None:
    """What a run came to, and what is usually done next."""
    if as_json:
        print_json(trained)
        return
    figures = [f"loss {trained.train_loss:.3f}"] if trained.train_loss is not None else []
    shown = ("loss", "bits_per_byte", "accuracy", "reward_margin", "chosen_nll", "guard_loss")
    figures += [f"val {name} {value:.4g}" for name, value in trained.val.items() if name in shown]
    skipped = f", {trained.num_skipped} steps skipped" if trained.num_skipped else ""
    state = "interrupted" if trained.is_interrupted else "finished"
    result(
        f"{state} {trained.run_dir} at step {trained.final_step:,} of {trained.num_steps:,} in {trained.seconds:.1f} s"
        f"{skipped}: {', '.join(figures)}{f' (ended early: {trained.early_stop})' if trained.early_stop else ''}"
    )
    if (trained.run_dir / "report.html").exists():
        say(f"look: {trained.run_dir / 'report.html'}")
    if trained.is_interrupted:
        next_command(f"mm train {trained.stage} --out {trained.run_dir} --resume")
    elif trained.stage == "pretrain":
        next_command("mm train sft")
    else:
        next_command(f"mm chat {trained.run_dir}" + ("    or    mm train dpo" if trained.stage == "sft" else ""))


def without_option(arguments: list[str], name: str) -> list[str]:
    """Command-line arguments less one option and its value, written as two words or as one."""
    kept = []
    words = iter(arguments)
    for word in words:
        if word == name:
            next(words, None)
        elif not word.startswith(f"{name}="):
            kept.append(word)
    return kept


def next_run(stage: str, resume: bool) -> Path:
    """A directory for a new run, runs/STAGE-N; with `resume` the one that was begun last."""
    from mmdata.errors import CheckpointError

    begun = [
        int(path.name.rpartition("-")[2])
        for path in RUNS_DIR.glob(f"{stage}-*")
        if path.name.rpartition("-")[2].isdigit()
    ]
    if resume and not begun:
        raise CheckpointError(
            f"no {stage} run under {RUNS_DIR}/ to resume", f"mm train {stage}, or name one: --out RUN"
        )
    return RUNS_DIR / f"{stage}-{max(begun, default=0) + (not resume)}"


@app.command(epilog="Example: mm report runs/sft-1 --html run.html    mm report runs/dpo-1 runs/dpo-2 --follow")
def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="Runs, laid over each other. [default: the newest]")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML file.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Serve it on 127.0.0.1, fresh as the run trains; Ctrl-C ends it.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --follow: where; 0: any free one.")] = 8765,
    lang: Annotated[str, typer.Option(help="Of the HTML report: en or zh.")] = "en",
    as_json: Json = False,
) -> None:
    """What happened in a run and those it goes back to: curves, speed, events, settings, what the model says."""
    from mmdata.errors import UsageError
    from mmdata.io.files import write_text
    from mmtrain.log import history
    from mmtrain.log.report import run_page, sections_of, serve

    check_lang(lang)
    if follow and (html or as_json):
        raise UsageError("--follow serves the report and writes nothing", "leave --html and --json out, or --follow")
    found = runs or [newest_run()]
    if follow:
        reader = history.RunReader()
        serve(
            lambda: run_page(history.figures(found, reader), lang=lang, refresh_s=2),
            port,
            on_start=lambda url: say(f"look: {url}"),
        )
        return
    figures = history.figures(found)
    if html:
        write_text(html, run_page(figures, lang=lang))
    if as_json:
        print_json(figures)
    else:
        print_sections(sections_of(figures["chains"]))
    if html:
        say(f"wrote {html} ({size(html.stat().st_size)})")
    elif not as_json:
        next_command(f"mm report {' '.join(map(str, found))} --html run.html    or    --follow")


def newest_run() -> Path:
    """The run under runs/ that wrote last."""
    from mmdata.errors import CheckpointError

    found = [(path.stat().st_mtime_ns, path.parent) for path in RUNS_DIR.glob("*/run.json")]
    if not found:
        raise CheckpointError(f"no run under {RUNS_DIR}/", "`mm train` makes one, or name it: mm report RUN")
    return max(found)[1]


# --- measuring a model ------------------------------------------------------------------------------------------------


@app.command(
    "eval",
    epilog="Example: mm eval runs/sft-1 --data shards/sft_512 --per-sequence rows.jsonl    "
    "mm eval runs/sft-1 --questions my.jsonl --lm-eval ceval-valid,cmmlu",
)
def eval_(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run, checkpoint, .pth or Hugging Face directory.")],
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="DIR", help="Packed dataset; repeat it for several. [default: the run's own]"),
    ] = None,
    split: Annotated[str, typer.Option(help="val, train or all.")] = "val",
    per_sequence: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one JSON line a sequence: file, line, tokens, nll.")
    ] = None,
    noisiest: Annotated[int, typer.Option(min=0, help="Show so many rows the model finds least likely.")] = 0,
    questions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="jsonl of question and answer, compared word for word.")
    ] = None,
    choices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="jsonl of question, choices and answer: the likeliest counts.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Ask without the chat template. [default: for pretrain runs]")
    ] = False,
    lm_eval: Annotated[
        str | None, typer.Option(metavar="TASKS", help="EleutherAI's harness: ceval-valid, cmmlu, arc_easy, ...")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --lm-eval: so many questions a task.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="With --questions: longest answer.")] = 64,
    as_json: Json = False,
) -> None:
    """Measure a model: held-out loss by dataset and bucket, pairs ranked, questions answered, the harness's tasks."""
    from mmdata.encode.template import Template
    from mmdata.errors import UsageError
    from mmtrain.convert.foreign import open_model
    from mmtrain.inference import exam

    if split not in ("train", "val", "all"):
        raise UsageError(f"--split {split} is unknown", "use train, val or all")
    if limit is not None and lm_eval is None:
        raise UsageError("--limit belongs to --lm-eval", "leave it out")
    start = time.monotonic()
    model, tokenizer = open_model(run)
    facts = run_facts(run)
    datasets = data or [Path(item["dir"]) for item in facts.get("data", []) if Path(item["dir"]).is_dir()]
    if not datasets and not (questions or choices or lm_eval):
        raise UsageError(f"{run} names no dataset that is here", f"mm eval {run} --data shards/NAME")
    found: dict[str, Any] = {"model": str(run)}
    splits = ("train", "val") if split == "all" else (split,)
    if data or not (questions or choices or lm_eval) or per_sequence or noisiest:
        found |= measured(model, tokenizer, datasets, splits, per_sequence, noisiest, as_json)
    template = None if plain or facts.get("stage") == "pretrain" else Template(tokenizer)
    for name, path in (("questions", questions), ("choices", choices)):
        if path is not None:
            items = exam.read_questions(path) if name == "questions" else exam.read_choices(path)
            with progress(f"ask {path}", unit="items", quiet=as_json) as update:
                if name == "questions":
                    outcomes = exam.ask(
                        model, tokenizer, template, items, max_new_tokens=max_new_tokens, progress=update
                    )
                else:
                    outcomes = exam.choose(model, tokenizer, template, items, progress=update)
            found[name] = {"file": str(path), **exam.summary(outcomes), "outcomes": outcomes}
    if lm_eval:
        found["lm_eval"] = through_harness(
            run, [task.strip() for task in lm_eval.split(",")], template is not None, limit
        )
    found["seconds"] = round(time.monotonic() - start, 3)
    if as_json:
        print_json(found)
    else:
        print_scores(found)


def run_facts(path: Path) -> dict[str, Any]:
    """The run.json of a run or of a checkpoint in one; empty for another program's model."""
    from mmtrain.checkpoint import find, read_run
    from mmtrain.convert.foreign import is_foreign

    return {} if is_foreign(path) else read_run(find(path).run_dir)


def measured(
    model: "Model",
    tokenizer: "Tokenizer",
    datasets: list[Path],
    splits: tuple[str, ...],
    per_sequence: Path | None,
    noisiest: int,
    as_json: bool,
) -> dict[str, Any]:
    """Figures of every sequence of the datasets' splits; the lines and the noisiest rows where asked for."""
    from mmdata.errors import DatasetError
    from mmdata.shards.dataset import open_dataset
    from mmtrain.inference import score as measure

    scored: list[measure.Scored] = []
    for path in datasets:
        dataset = open_dataset(path)
        for split in splits:
            with progress(f"eval {path} {split}", unit="samples", quiet=as_json) as update:
                scored += measure.score(model, tokenizer, dataset, split, progress=update)
    if not scored:
        raise DatasetError(
            f"{', '.join(map(str, datasets))}: the {' and '.join(splits)} split is empty",
            "--split all takes every row, or pack with a larger --val-fraction",
        )
    if per_sequence is not None:
        lines = "".join(json.dumps(one.record(), ensure_ascii=False) + "\n" for one in scored)
        beside = per_sequence.with_name(f".{per_sequence.name}.partial")
        per_sequence.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(lines, encoding="utf-8")
        beside.replace(per_sequence)
    found: dict[str, Any] = {"splits": list(splits), "datasets": measure.figures(scored)}
    if noisiest:
        found["noisiest"] = [one.record() for one in measure.noisiest(scored, noisiest)]
    if per_sequence is not None:
        found["per_sequence"] = {"file": str(per_sequence), "lines": len(scored)}
    return found


def through_harness(run: Path, tasks: list[str], is_chat: bool, limit: int | None) -> dict[str, Any]:
    """Export a run to a directory of its own for as long as EleutherAI's harness needs it."""
    import tempfile

    from mmtrain.convert import harness
    from mmtrain.convert.export import export as export_model
    from mmtrain.convert.foreign import is_foreign

    with tempfile.TemporaryDirectory() as temporary:
        directory = run if is_foreign(run) and run.is_dir() else Path(temporary) / "hf"
        if directory != run:
            export_model(run, directory, format="hf")
        return harness.run(directory, tasks, is_chat=is_chat, limit=limit)


# --- to and from other programs -------------------------------------------------------------------------------------------


@app.command(epilog="Example: mm export runs/dpo-1 --format gguf --dtype q8_0 --out exports/dpo-1-gguf")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run or checkpoint.")],
    format: Annotated[str, typer.Option(help="hf (transformers), gguf (llama.cpp) or minimind (its .pth).")] = "hf",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where it goes. [default: exports/RUN-FORMAT]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="hf: f32, f16, bf16; gguf: f32, f16, q8_0; minimind: f32, f16. [default: f32]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model for other programs: transformers, llama.cpp or MiniMind's scripts; logits are compared on the spot."""
    from mmtrain.checkpoint import find
    from mmtrain.convert.export import export as export_model

    start = time.monotonic()
    made = export_model(
        run, out or Path("exports") / f"{find(run).run_dir.resolve().name}-{format}", format=format, dtype=dtype
    )
    if as_json:
        print_json(made)
        return
    for check in made.checks:
        result(check)
    what = f"{made.architecture}, {made.num_params:,} parameters, {made.dtype}, {size(made.num_bytes)}"
    result(f"wrote {made.out}: {what}, in {time.monotonic() - start:.1f} s")
    if format == "gguf":
        file = next(file for file in made.files if file.endswith(".gguf"))
        say(f"next: llama-cli -m {made.out / file}    (llama.cpp's own program)")
    elif format == "hf":
        next_command(f"mm chat {made.out}    or    mm import {made.out}")


@app.command("import", epilog="Example: mm import out/full_sft_768.pth --tokenizer model --out runs/full_sft_768")
def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="MiniMind's .pth, or a Hugging Face directory.")],
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Directory of the new run. [default: runs/NAME]")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Its tokenizer, where none stands beside it.")
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option(min=1, help="Query heads, which a .pth does not tell. [default: MiniMind's 8]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a run of a model trained elsewhere: MiniMind of every era, Llama, Qwen3; chat, eval and --init take it."""
    from mmtrain.convert.foreign import import_model

    start = time.monotonic()
    made = import_model(path, out or RUNS_DIR / path.resolve().stem, tokenizer_dir=tokenizer, num_heads=num_heads)
    if as_json:
        print_json(made)
        return
    shape = made.shape
    say(
        f"{path}: {made.origin}; {shape.num_layers} layers, width {shape.hidden_size}, {shape.num_heads} query and "
        f"{shape.num_kv_heads} key heads; tokenizer {made.tokenizer_dir}"
    )
    result(
        f"wrote {made.run_dir}: {made.num_params:,} parameters, every value as it was, in {time.monotonic() - start:.1f} s"
    )
    next_command(f"mm chat {made.run_dir}    or    mm train sft --init {made.run_dir}")


# --- talking to a model -----------------------------------------------------------------------------------------------


@app.command(
    epilog="Example: mm chat runs/dpo-1 --prompt 'What is 3 + 4?'    mm chat --compare runs/pretrain-1 runs/sft-1 runs/dpo-1"
)
def chat(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Run, checkpoint, .pth or Hugging Face directory; several with --compare. [default: the newest run]",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this once and end.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Let several models answer, side by side.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    think: Annotated[
        bool | None, typer.Option("--think/--no-think", help="With or without thinking, if the template knows it.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Go on with the text, without chat template. [default: for pretrain runs]")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that reach this probability.")] = 0.9,
    top_k: Annotated[int, typer.Option(help="Draw from this many likeliest tokens; 0: all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Draw from tokens this probable beside the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens already there less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End an answer at this text; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    window: Annotated[
        int, typer.Option(min=2, help="Tokens of conversation and answer; oldest turns leave it.")
    ] = 2048,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answers.")] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="DIR", help="For a .pth with no tokenizer beside it.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Answers as JSON, one a line; with --prompt or a pipe.")
    ] = False,
) -> None:
    """Talk with a trained model; answers stream, history is kept. Lines of a pipe are one conversation."""
    from mmdata.errors import UsageError
    from mmtrain.commands.talk import Session, piped_lines, typed_lines
    from mmtrain.inference.sampling import Sampling

    is_typed = prompt is None and sys.stdin.isatty()
    if as_json and is_typed:
        raise UsageError("--json needs --prompt or lines on standard input", "mm chat --prompt TEXT --json")
    if compare and len(runs or ()) < 2:
        raise UsageError("--compare needs two models or more", "mm chat --compare RUN_A RUN_B")
    if not compare and len(runs or ()) > 1:
        raise UsageError("several models are for --compare", "mm chat --compare RUN_A RUN_B, or name one")
    options = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    speakers = [speaker(path, tokenizer, plain, window) for path in runs or [newest_finished_run()]]
    session = Session(speakers, options, system, think, as_json)
    if prompt is not None:
        session.ask(prompt)
        return
    if is_typed:
        say(f"{' and '.join(s.name for s in speakers)}: ask anything; /help shows the commands, Ctrl-D ends")
    session.run(typed_lines() if is_typed else piped_lines(), is_lenient=is_typed)


def newest_finished_run() -> Path:
    """The newest finished run under runs/."""
    from mmdata.errors import CheckpointError
    from mmtrain.checkpoint import find_run

    run = find_run(RUNS_DIR, (*KIND_OF_STAGE, "imported"))
    if run is None:
        raise CheckpointError(
            f"no finished run under {RUNS_DIR}/", "`mm demo` trains one in minutes, or name one: mm chat RUN"
        )
    return run


def speaker(path: Path, tokenizer_dir: Path | None, is_plain: bool, window: int) -> "Speaker":
    """A model to talk with."""
    from mmdata.encode.template import Template
    from mmtrain.commands.talk import Speaker
    from mmtrain.convert.foreign import open_model
    from mmtrain.inference.chat import Chat

    model, tokenizer = open_model(path, tokenizer_dir=tokenizer_dir)
    is_plain = is_plain or run_facts(path).get("stage") == "pretrain"
    return Speaker(str(path), Chat(model, tokenizer, None if is_plain else Template(tokenizer), window=window))


@app.command(epilog="Example: mm serve runs/dpo-1 --port 8000    mm serve --host 0.0.0.0 --api-key SECRET")
def serve(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Run or checkpoint. [default: the newest finished run]")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: every one of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="MM_API_KEY", help="Ask clients for this key.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name for clients. [default: the run's]")] = None,
    window: Annotated[int, typer.Option(min=16, help="Tokens of a conversation and its answer.")] = 2048,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer. [default: what the window has room for]")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Answers written at once.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="Answers that may wait; more are turned away.")] = 64,
    max_body: Annotated[int, typer.Option(min=1024, help="Largest request, in bytes.")] = 2**20,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds one request may take.")] = 600,
) -> None:
    """Serve a run to OpenAI clients, with a chat page at /. Needs mm[serve]."""
    from mmdata.encode.template import Template
    from mmdata.errors import UsageError
    from mmtrain.inference.engine import Engine
    from mmtrain.inference.serve.app import LOOPBACK, Service, check_installed
    from mmtrain.inference.serve.app import serve as serve_forever
    from mmtrain.inference.serve.worker import Worker

    check_installed()
    run, model, tokenizer = loaded(run, "mm serve RUN")
    if api_key == "":
        raise UsageError("the API key is empty", "--api-key SECRET, or leave it out")
    if host not in LOOPBACK and api_key is None:
        say(f"warning: {host} can be reached from other machines, and no --api-key is asked for")
    worker = Worker(Engine(model, tokenizer, max_rows=max_rows, window=window, remember=8), max_waiting=max_waiting)
    service = Service(
        name or run.resolve().name,
        Template(tokenizer),
        worker,
        api_key=api_key,
        host=host,
        max_body_bytes=max_body,
        max_tokens=max_tokens,
        timeout_s=timeout,
    )
    serve_forever(
        service, port, ready=lambda url: say(f"{service.name}: chat at {url}/, OpenAI clients at {url}/v1; Ctrl-C ends")
    )
    say("stopped")


def loaded(run: Path | None, command: str) -> tuple[Path, Any, Any]:
    """The run named, else the newest finished one, with its model and tokenizer."""
    from mmdata.errors import CheckpointError
    from mmdata.tokenizer.tokenizer import Tokenizer
    from mmtrain.checkpoint import find, find_run, load_model

    run = run or find_run(RUNS_DIR, tuple(KIND_OF_STAGE)[::-1])
    if run is None:
        raise CheckpointError(
            f"no finished run under {RUNS_DIR}/", f"`mm demo` trains one in minutes, or name one: {command}"
        )
    return run, load_model(run)[0].eval(), Tokenizer.load(find(run).run_dir / "tokenizer")


# --- the demo -------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: mm demo --out demo --minutes 2")
def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where everything goes; an earlier demo there is replaced.")
    ] = Path("demo"),
    minutes: Annotated[
        float | None,
        typer.Option(help="Training time on two present-day cores; rows scale with it. [default: 2.6]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the corpus, the weights and the order.")] = 0,
    as_json: Json = False,
) -> None:
    """Make a small bilingual corpus, train a model on it from nothing, and score it on questions it has never seen."""
    from mmdata import demo as recipe
    from mmdata.errors import UsageError

    if minutes is not None and not 0 < minutes <= 60:
        raise UsageError(f"--minutes {minutes:g} must be more than 0 and at most 60", "--minutes 2")
    start = time.monotonic()
    clear_demo(out)
    figures = run_demo(out, minutes or recipe.MINUTES, seed)
    figures["minutes"] = (time.monotonic() - start) / 60
    (out / "demo.json").write_text(
        json.dumps(figures, ensure_ascii=False, indent=1, default=plain) + "\n", encoding="utf-8"
    )
    if as_json:
        print_json(figures)
    else:
        print_demo(figures, out)
    run = out / "runs" / recipe.STAGES[-1].file
    if not as_json and sys.stdin.isatty() and sys.stdout.isatty():
        chat([run], temperature=0.0)
    next_command(f"mm chat {run}    or    mm show {out / 'shards' / 'sft_512'}")


def clear_demo(out: Path) -> None:
    """Empty a demo's directory; UsageError when something else stands there."""
    import shutil

    from mmdata.errors import UsageError

    if out.exists() and not (out / "demo.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty and no demo of ours", "choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "demo.json").write_text("{}\n", encoding="utf-8")  # ours from now on, should it be interrupted


def run_demo(out: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Write the corpus, train the tokenizer, pack, then train and score stage after stage; gives all figures."""
    from mmdata import demo as recipe
    from mmdata.pack.options import PackOptions
    from mmdata.pack.pipeline import pack as pack_files
    from mmdata.tokenizer.tokenizer import CHATML, train_bpe
    from mmtrain.config import TrainOptions
    from mmtrain.train.loop import train as train_stage

    say("writing the corpus, training its tokenizer, packing")
    corpus = recipe.write_corpus(out / "data", seed=seed, minutes=minutes)
    tokenizer = out / "data" / "tokenizer"
    train_bpe(
        corpus.tokenizer_texts,
        vocab_size=recipe.VOCAB_SIZE,
        control_tokens=recipe.CONTROL_TOKENS,
        chat_template=CHATML,
        out_dir=tokenizer,
    )
    stages = recipe.scaled(minutes)
    for stage in stages:
        shards = out / "shards" / stage.file
        print_packed(
            pack_files([corpus.files[stage.file]], shards, PackOptions(tokenizer=tokenizer, max_len=stage.max_len)), say
        )
    pack_files(
        [corpus.pairs_path],
        out / "shards" / "held_out_pairs",
        PackOptions(tokenizer=tokenizer, max_len=512, val_fraction=0),
    )
    figures: dict[str, Any] = {"questions": len(corpus.questions), "stages": []}
    init: Path | None = None
    for stage in stages:
        begun = time.monotonic()
        config = TrainOptions(
            stage=stage.stage,
            data=(out / "shards" / stage.file,),
            out=out / "runs" / stage.file,
            model=None if init else recipe.MODEL,
            init=init,
            epochs=1.0,
            lr=stage.lr,
            batch_tokens=stage.batch_tokens,
            schedule=stage.schedule,
            warmup=stage.warmup,
            beta=stage.beta,  # type: ignore[arg-type]  # None: the default
            seed=seed,
            val_every=0,
            save_every=10**9,
            log_every=400 if stage.stage != "dpo" else 20,
            device="cpu",
        )
        trained = train_stage(config, log=say)
        init = trained.run_dir
        scored = score_demo(init, corpus.questions, out / "shards" / "held_out_pairs")
        spent = (time.monotonic() - begun) / 60
        figures["stages"].append({"stage": stage.file, **trained.val, **scored, "minutes": spent})
        say(f"{stage.file}: {100 * scored['exact']:.1f}% of held-out questions answered exactly")
    return figures


def score_demo(run: Path, asked: "list[Question]", pairs: Path) -> dict[str, Any]:
    """Ask a run the held-out questions and rank the held-out pairs; greedy answers, pairs by their log-probabilities."""
    from mmdata import demo as recipe
    from mmdata.encode.template import Message, Template
    from mmdata.shards.dataset import open_dataset
    from mmdata.shards.pairs import PairLoader
    from mmdata.tokenizer.tokenizer import Tokenizer
    from mmtrain.checkpoint import load_model
    from mmtrain.inference.chat import answer_batch
    from mmtrain.inference.evaluate import evaluate

    tokenizer = Tokenizer.load(run / "tokenizer")
    model = load_model(run)[0].eval()
    conversations = [[Message(m["role"], m["content"]) for m in question.messages] for question in asked]
    answers = answer_batch(model, tokenizer, Template(tokenizer), conversations, max_new_tokens=48)
    score = recipe.score(asked, answers)
    ranked = evaluate(model, PairLoader([open_dataset(pairs)], batch_tokens=2**14, seed=0), tokenizer)
    transcript = []
    for question in recipe.showcase(asked):
        said = answers[asked.index(question)].strip()
        record = {"messages": question.messages, "answer": said, "expected": question.whole}
        transcript.append({**record, "is_exact": recipe.is_exact(question, said)})
    return {
        "exact": score.exact,
        "sentences": score.sentences,
        "by_subject": score.by_subject,
        "preference_accuracy": ranked["accuracy"],
        "transcript": transcript,
    }


# --- the entry ------------------------------------------------------------------------------------------------------


def interrupt(_number: int, _frame: object) -> None:
    """End what is running as Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> None:
    """Run `mm`; every error a user can cause becomes one error line, one fix line and an exit code."""
    from mmdata.errors import DiskError, InputError, MMError

    signal.signal(signal.SIGTERM, interrupt)  # ends like Ctrl-C: cleaned up
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
        import errno

        name = error.filename or "a file"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            code = fail(
                DiskError(f"the disk is full while writing {name}", "free some space (`df -h .`) and run it again")
            )
        elif isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
            code = fail(
                InputError(f"{name}: {error.strerror}", f"check the path and its permissions (`ls -ld {name}`)")
            )
        else:
            raise
    sys.exit(code)


if __name__ == "__main__":
    main()
