"""`mm train`: train one stage (pretrain, sft or dpo), in one process or several."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdata.commands.options import DATA_DIR, RUNS_DIR, SHARDS_DIR, Json, dataset_dir, pack_command
from mmdata.commands.terminal import next_command, print_json, result, same_command, say, without_option
from mmdata.errors import CheckpointError, DatasetError, MMError, UsageError
from mmdata.options import Option
from mmtrain.commands.other_flags import OTHER_FLAGS
from mmtrain.config import DATA, HARDWARE, HEADINGS, PREFERENCES, STAGE_KINDS, TrainOptions
from mmtrain.shapes import TOKENS_PER_PARAM

if TYPE_CHECKING:
    from mmtrain.train.loop import TrainResult
    from mmtrain.train.preflight import Needs

__all__ = ["HEADINGS", "OTHER_FLAGS", "train"]  # HEADINGS: the groups of options in --help, in this order
SHOWN_FIGURES = ("loss", "bits_per_byte", "accuracy", "reward_margin", "chosen_nll", "guard_loss")


def train(
    stage: Annotated[str, typer.Argument(metavar="|".join(STAGE_KINDS), help="The stage to train.")],
    *,
    data: Annotated[
        list[str] | None,
        Option(
            "Packed dataset; may be repeated, with WEIGHT as its share of the tokens.",
            DATA,
            metavar="DIR[:WEIGHT]",
            default_text="the newest that fits the stage",
        ),
    ] = None,
    out: Annotated[
        Path | None, Option("Directory of the new run.", DATA, metavar="RUN", default_text="runs/STAGE-N")
    ] = None,
    settings: Annotated[dict[str, Any], TrainOptions],
    reference_free: Annotated[bool, Option("dpo: train without a reference model.", PREFERENCES)] = False,
    nproc: Annotated[int, Option("Number of ranks (processes) to start on this machine.", HARDWARE, least=1)] = 1,
    plan: Annotated[
        bool, Option("Print the memory, time and disk space that the run would take; train nothing.", HARDWARE)
    ] = False,
    as_json: Json = False,
) -> None:
    """Train one stage: pretrain, sft or dpo. For several processes give --nproc, or start it with torchrun.

    Example: mm train sft --data shards/sft_512 --epochs 2 --lr 1e-4
    """
    check_flags(stage, settings, reference_free=reference_free)
    if nproc > 1:
        if not (settings["quiet"] or as_json):
            say(f"starting {nproc} ranks")
        from mmtrain.distributed import launch

        raise typer.Exit(launch(nproc, [sys.executable, "-m", "cli", *without_option(sys.argv[1:], "--nproc")]))
    from mmtrain.distributed import rank
    from mmtrain.train.loop import train as train_stage
    from mmtrain.train.run import needs_of

    if settings["reference"] or reference_free:
        settings["reference"] = "none" if reference_free else str(Path(settings["reference"]))
    paths, weights = weighted(data or [])
    resume = settings["resume"]
    options = TrainOptions(
        stage=stage,
        data=paths or (() if resume else (newest_dataset(stage),)),  # a resumed run records its datasets
        out=out or next_run(stage, resume),
        weights=weights,
        runs_dir=RUNS_DIR,
        **settings,
    )
    if plan:
        needs = needs_of(options)
        if rank() == 0:
            print_json(needs.as_json()) if as_json else print_needs(needs)
            next_command(same_command("--plan", "--json"))
        return
    trained = train_stage(options)
    if rank() == 0:
        print_json(trained) if as_json else print_trained(trained)


def check_flags(stage: str, settings: dict[str, Any], *, reference_free: bool) -> None:
    """Raise UsageError if the stage is unknown, --reference contradicts another option, or --model names weights."""
    if stage not in STAGE_KINDS:
        raise UsageError(f"stage {stage!r} is unknown", "mm train pretrain, mm train sft or mm train dpo")
    if reference_free and settings["reference"]:
        raise UsageError("--reference and --reference-free contradict each other", "leave one of them out")
    if (model := settings["model"]) and Path(model).exists():
        problem = f"--model {model}: a model's shape is expected, not its weights"
        raise UsageError(problem, f"mm train {stage} --init {model}")


def newest_dataset(stage: str) -> Path:
    """Return the dataset under shards/ that was packed last, of those with the kind of rows that the stage trains on.
    Raise DatasetError, which names the files to pack, if there is none."""
    datasets = datasets_for(stage)
    if not datasets:
        kinds = {path: kind for path in sorted(DATA_DIR.glob("*.jsonl")) if (kind := kind_of(path))}
        files = [path for path, kind in kinds.items() if kind == STAGE_KINDS[stage]]
        fix = (
            pack_command(files)
            if files
            else "bring rows of this kind (`mm fetch --list`), or name a dataset: --data DIR"
        )
        begun = [path.name[1:].removesuffix(".packing") for path in sorted(SHARDS_DIR.glob(".*.packing"))]
        more = f"; the packing of {', '.join(begun)} has not ended (mm pack … --finish)" if begun else ""
        raise DatasetError(f"no packed {STAGE_KINDS[stage]} dataset under {SHARDS_DIR}/{more}", fix)
    return datasets[-1]


def datasets_for(stage: str) -> list[Path]:
    """Return the datasets under shards/ with the kind of rows that the stage trains on, the one packed last at the end.
    Those that cannot be read are skipped; named with --data they are refused with the reason."""
    from mmdata.io.files import read_bytes

    datasets = []
    for manifest in SHARDS_DIR.glob("*/manifest.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            if json.loads(read_bytes(manifest))["kind"] == STAGE_KINDS[stage]:
                datasets.append((manifest.stat().st_mtime_ns, manifest.parent))
    return [path for _, path in sorted(datasets)]


def kind_of(path: Path) -> str:
    """Return the kind of rows in a jsonl file; empty if it cannot be told."""
    from mmdata.encode.rows import find_kind

    with suppress(MMError, OSError):
        return find_kind(path)
    return ""


def weighted(data: list[str]) -> tuple[tuple[Path, ...], tuple[float, ...] | None]:
    """Parse the `--data DIR[:WEIGHT]` options; return the datasets, and their weights or None if none has a weight.
    Raise UsageError if only some have a weight, a weight is not positive and finite, or a dataset is a URL."""
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
        paths.append(dataset_dir(Path(url)))
        weights += [] if weight is None else [weight]
    if weights and len(weights) != len(paths):
        raise UsageError("some --data have a weight and some have none", "--data A:0.7 --data B:0.3")
    return tuple(paths), tuple(weights) or None


def print_needs(needs: "Needs") -> None:
    """Print what a run would take: its size in tokens and steps, the memory by part, and the time and disk space."""
    result(needs.shape.text)
    result(
        f"{needs.num_params:,} parameters; {needs.num_steps:,} steps of {needs.batch_tokens:,} tokens, "
        f"{needs.tokens_per_epoch:,} tokens an epoch"
    )
    if needs.optimal_tokens:
        result(
            f"trains on {needs.run_tokens:,} tokens; compute-optimal for this size are {needs.optimal_tokens:,} "
            f"({TOKENS_PER_PARAM} per parameter, Hoffmann et al. 2022), more make it better at the same size"
        )
    for name, size_bytes in needs.parts.items():
        result(f"  {name:<26} {size_bytes / 1e6:>10,.0f} MB")
    fits = f"; --micro-tokens {needs.largest_micro_tokens:,} would still fit"
    result(f"  {'memory at its highest':<26} {needs.peak_bytes / 1e6:>10,.0f} MB{fits}")
    for line in needs.lines():
        result(line)


def print_trained(trained: "TrainResult") -> None:
    """Print the final loss and held-out figures of a run, and the command that usually follows."""
    figures = [f"train loss {trained.train_loss:.3f} (last step)"] if trained.train_loss is not None else []
    figures += [f"val {name} {value:.4g}" for name, value in trained.val.items() if name in SHOWN_FIGURES]
    skipped = f", {trained.num_skipped} steps skipped" if trained.num_skipped else ""
    state = "interrupted" if trained.is_interrupted else "finished"
    result(
        f"{state} {trained.run_dir} at step {trained.final_step:,} of {trained.num_steps:,} in {trained.seconds:.1f} s"
        f"{skipped}"
    )
    result(", ".join(figures))
    if trained.early_stop:
        result(f"ended early: {trained.early_stop}")
    if (trained.run_dir / "report.html").exists():
        say(f"look: {trained.run_dir / 'report.html'}")
    if trained.is_interrupted:
        next_command(resume_command(trained.run_dir))
        return
    following = {"pretrain": "sft", "sft": "dpo"}.get(trained.stage, "")
    is_found = trained.run_dir.resolve().parent == RUNS_DIR.resolve()
    train_on = f"mm train {following}{'' if is_found else f' --init {trained.run_dir}'}"
    commands = [f"mm chat {trained.run_dir}", *([train_on] if following and datasets_for(following) else [])]
    next_command("    or    ".join(commands[::-1] if trained.stage == "pretrain" else commands))


def resume_command(run_dir: Path) -> str:
    """Return the command that resumes the run which this one trained, with its options and its number of ranks."""
    is_own_launch = "LOCAL_WORLD_SIZE" not in os.environ  # which torchrun sets
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if is_own_launch else 1
    nproc = f" --nproc {ranks}" if ranks > 1 else ""
    return same_command("--init", "--resize-embeddings", "--out", "--resume", add=f"--out {run_dir}{nproc} --resume")


def next_run(stage: str, resume: bool) -> Path:
    """Return the directory runs/STAGE-N for a run: with N one above the highest number there, or with `resume` the
    highest. Raise CheckpointError if `resume` and the stage has no run under runs/."""
    numbers = [
        int(path.name.rpartition("-")[2])
        for path in RUNS_DIR.glob(f"{stage}-*")
        if path.name.rpartition("-")[2].isdecimal()
    ]
    if resume and not numbers:
        raise CheckpointError(
            f"no {stage} run under {RUNS_DIR}/ to resume", f"mm train {stage}, or name one: --out RUN"
        )
    return RUNS_DIR / f"{stage}-{max(numbers, default=0) + (not resume)}"
