"""`mm run`: execute a recipe, the steps from raw data to an exported model, and report on it."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdata.commands.options import HOME, Json, Lang
from mmdata.commands.terminal import (
    in_time,
    next_command,
    print_json,
    print_sections,
    progress,
    same_command,
    say,
    size,
    table,
)
from mmdata.errors import UsageError
from mmdata.options import Option
from mmtrain.commands.project.runner import DONE

if TYPE_CHECKING:
    from mmtrain.commands.project.planning import StepPlan
    from mmtrain.commands.project.recipe import Recipe, Step
    from mmtrain.commands.project.runner import Runner

STEPS, RUN = "Steps", "Execution"  # groups of options in --help


def run(
    context: typer.Context,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="TOML file, or the name of a recipe of mm, such as minimind3.")
    ],
    dry_run: Annotated[
        bool, Option("Print what every step would take: time, download, disk and memory; execute nothing.", STEPS)
    ] = False,
    begin: Annotated[
        str | None, Option("Begin with this step; those before it are not looked at.", STEPS, "--from", metavar="STEP")
    ] = None,
    only: Annotated[str | None, Option("Execute this step only.", STEPS, metavar="STEP")] = None,
    changes: Annotated[
        list[str] | None,
        Option(
            "Change a value of the recipe, such as train.dpo.beta=0.2; may be repeated.", STEPS, "--set", "KEY=VALUE"
        ),
    ] = None,
    scale: Annotated[
        float,
        Option("Take this share of the rows of every packed file, in a directory of its own.", STEPS, above=0, most=1),
    ] = 1.0,
    nproc: Annotated[int, Option("Number of ranks (processes) of training steps.", RUN, least=1)] = 1,
    out: Annotated[
        Path | None,
        Option("Directory of the record and the report.", RUN, metavar="DIR", default_text="courses/RECIPE"),
    ] = None,
    lang: Lang = "en",
    as_json: Json = False,
) -> None:
    """Execute a recipe: plan, skip the steps that are done, resume one that was interrupted, evaluate after every
    training step, and write report.html.

    Example: mm run minimind3 --dry-run    mm run minimind2 --scale 0.01 --set train.dpo.beta=0.2
    """
    from mmtrain.commands.project.planning import Planner
    from mmtrain.commands.project.recipe import find_recipe, read_recipe
    from mmtrain.commands.project.runner import Runner

    if nproc > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--nproc starts ranks, and torchrun has started some", "leave --nproc out")
    course = read_recipe(find_recipe(recipe), context.find_root().command, changes or ())
    directory = out or HOME / "courses" / (course.name if scale == 1 else f"{course.name}-{scale:g}")
    runner = Runner(course, HOME if scale == 1 else directory, directory, nproc, context.find_root().default_map or {})
    steps = selected(course, begin, only)
    if runner.rank == 0 and (dry_run or not as_json):
        plans = []
        with progress("plan", unit="steps", quiet=as_json) as update:
            for plan in Planner(runner, scale).plans(steps):
                plans.append(plan)
                update(len(plans), sum(step.name == step.base for step in steps))
        print_json(plans) if as_json else print_plans(plans, course)
    if dry_run:
        next_command(same_command("--dry-run", "--json"))
        return
    execute(runner, steps, scale=scale, lang=lang, is_printed=not as_json)
    if runner.rank == 0 and as_json:
        from mmdata.io.records import plain

        print_json(plain(runner.record))


def selected(recipe: "Recipe", begin: str | None, only: str | None) -> "list[Step]":
    """Return the steps to execute: all, those from `begin` on, or `only` one, with what is done after it. Raise
    UsageError if the recipe has no such step."""
    names = list(dict.fromkeys(step.base for step in recipe.steps))
    if wrong := next((name for name in (begin, only) if name and name not in names), None):
        raise UsageError(f"the recipe {recipe.name} has no step {wrong}", f"its steps are {', '.join(names)}")
    kept = [only] if only else names[names.index(begin) :] if begin else names
    return [step for step in recipe.steps if step.base in kept]


def execute(
    runner: "Runner", steps: "list[Step]", *, scale: float = 1.0, lang: str = "en", is_printed: bool = True
) -> None:
    """Execute steps of a recipe and write the report, also of one that failed or was interrupted. is_printed: print its
    tables too. Raise typer.Exit with the exit code of a step that failed."""
    from mmdata.io.files import alone, write_text
    from mmtrain.commands.project.page import course_page, course_sections

    if runner.rank:
        raise typer.Exit(runner.run(steps))
    with alone(runner.out, "mm run"):
        code = 130
        try:
            if scale < 1:
                steps = scaled(runner, steps, scale)
            code = runner.run(steps)
        finally:
            report = runner.out / "report.html"
            write_text(report, course_page(runner, lang))
            if is_printed:
                print_sections(course_sections(runner))
            say(f"look: {report}")
            if code:
                next_command(same_command())  # goes on with the step that did not end
    if code:
        raise typer.Exit(code)


def scaled(runner: "Runner", steps: "list[Step]", scale: float) -> "list[Step]":
    """Fetch in the current directory, then fill the directory of a scaled recipe: samples of the files to be packed, and
    links to whatever else the steps read. Return the other steps."""
    from mmtrain.commands.project.planning import sample_rows
    from mmtrain.commands.project.recipe import DATA_DIR

    here, there = HOME, runner.root
    runner.root = here
    if code := runner.run([step for step in steps if step.command == ("fetch",)]):
        raise typer.Exit(code)
    runner.root = there
    others = [step for step in steps if step.command != ("fetch",)]
    made = {place for step in runner.recipe.steps for place in step.outputs}
    packed = {str(file) for step in others if step.command == ("pack",) for file in step.values["files"]}
    for text in sorted({text for step in others for text in step.inputs} | {str(DATA_DIR / "tokenizer")}):
        source, target = here / text, there / text
        if Path(text).is_absolute() or text in made or not source.exists() or target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if text in packed:
            sample_rows(source, target, share=scale)
        else:
            target.symlink_to(os.path.relpath(source, target.parent), target_is_directory=source.is_dir())
    return others


def print_plans(plans: "list[StepPlan]", recipe: "Recipe") -> None:
    """Print what each step will take, and the sums, with the free disk space."""

    def text(value: float | None, form: Any = size) -> str:
        return "" if value is None else form(value)

    columns = ("step", "state", "time", "download", "disk", "memory", "")
    rows = [
        (
            o.step,
            o.state,
            text(o.seconds, in_time),
            text(o.download_bytes),
            text(o.disk_bytes),
            text(o.memory_bytes),
            o.note,
        )
        for o in plans
    ]
    table(recipe.title, columns, rows)
    say(in_all(plans, recipe.price_per_hour))


def in_all(plans: "list[StepPlan]", price_per_hour: float) -> str:
    """Return the sums of what the steps will take and the free disk space, in words. They are lower bounds if the time of
    a step is not known, as that of a download; the line names these steps."""
    seconds, disk = (sum(getattr(o, name) or 0 for o in plans) for name in ("seconds", "disk_bytes"))
    unknown = [o.step for o in plans if o.state != DONE and o.seconds is None and o.download_bytes != 0]
    time = in_time(seconds) + (f", price {seconds / 3600 * price_per_hour:,.2f}" if price_per_hour else "")
    known = [text for figure, text in ((seconds, time), (disk, f"{size(disk)} of disk")) if figure or not unknown]
    free = shutil.disk_usage(".").free
    warning = "warning: the disk is too small: " if disk > free else ""
    more = f"; the time of {', '.join(unknown)} is not known" if unknown else ""
    bound = "at least " * bool(unknown)
    return f"{warning}in all {bound + ', '.join(known) if known else 'not known'}{more}; {size(free)} are free"
