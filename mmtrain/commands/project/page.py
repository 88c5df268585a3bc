"""What a recipe did, as sections of a report: its time, the evaluation of every stage, and the same questions answered
after every stage."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmtrain.commands.project.recipe import Recipe
from mmtrain.commands.project.runner import FAILED, Runner, parsed_output

MEASURES = {  # of `mm eval` on packed data, and how its table calls them
    "loss": "loss",
    "bits_per_byte": "bits/byte",
    "perplexity": "perplexity",
    "accuracy": "higher logp",
    "margin": "margin",
}


def course_page(runner: Runner, lang: str) -> str:
    """Return the HTML page about the steps of a recipe that were executed, with the curves of its runs."""
    from mmdata.stats.report import page
    from mmtrain.log import history
    from mmtrain.log.report import AXES, sections_of

    sections = list(course_sections(runner))
    runs = [runner.root / step.outputs[0] for step in runner.recipe.steps if step.command == ("train",)]
    if runs := [run for run in runs if (run / "run.json").exists()]:
        sections += [each for each in sections_of(history.figures(runs)["chains"]) if each.id in ("curves", "lineage")]
    title, subtitle = page.as_name(runner.recipe.title), page.as_name(runner.out)
    return page.render(title, subtitle, sections, lang, axes=AXES)


def course_sections(runner: Runner) -> Iterator[Any]:
    """Yield the sections that the terminal prints too: time and costs, evaluations, answers."""
    from mmdata.stats.report.page import Cards, Column, Note, Section, Table, as_name, duration, phrase, size

    recipe, records = runner.recipe, runner.record.steps
    known = [(step, records[step.name]) for step in recipe.steps if step.name in records]
    seconds = sum(record.seconds for _, record in known)
    stages = [step for step in recipe.steps if step.command == ("train",)]
    cards = [
        ("steps", f"{sum(record.status == 'done' for _, record in known)} / {len(recipe.steps)}", ""),
        ("time", duration(seconds / 3600), ""),
        ("disk", size(sum(record.bytes for _, record in known)), ""),
    ]
    if recipe.price_per_hour:
        cards.append(("price", f"{seconds / 3600 * recipe.price_per_hour:,.2f}", ""))
    columns = [
        Column("step", "code"),
        Column("status", "word"),
        Column("begun after", "hours"),
        Column("time", "hours"),
    ]
    columns += [Column("share of the time", "bar"), Column("disk", "bytes"), Column("attempts", "count")]
    first = min((record.begun for _, record in known), default=0.0)
    rows = [
        (
            step.name,
            record.status,
            (record.begun - first) / 3600,
            record.seconds / 3600,
            record.seconds / max(seconds, 1e-9),
            record.bytes or None,
            record.attempts,
        )
        for step, record in known
    ]
    yield Section("time", "Time and costs", [Cards(cards), Table(columns, rows)])
    blocks: list[Any] = []
    if evaluated := list(_evaluations(recipe, records)):
        names = [name for name in MEASURES if any(name in figures for _, figures in evaluated)]
        names += [name for name in ("questions", "choices") if any(name in figures for _, figures in evaluated)]
        kinds = [Column("stage", "code"), Column("dataset", "code")]
        kinds += [Column(as_name(MEASURES.get(name, name)), "decimal4") for name in names]
        rows = [(stage, figures["dataset"], *(figures.get(name) for name in names)) for stage, figures in evaluated]
        blocks.append(Table(kinds, rows))
    if failed := [step.base for step, record in known if step.name.endswith("/eval") and record.status == FAILED]:
        text = "{stages}: not evaluated; most often the val split is empty, as of very little data"
        blocks.append(Note(phrase(text, stages=", ".join(failed)), in_terminal=True))
    if blocks:
        yield Section("evaluation", "Evaluation after every stage", blocks)
    answers = {step.base: _answers(records.get(f"{step.name}/answers")) for step in stages}
    answers = {stage: texts for stage, texts in answers.items() if texts}
    if answers:
        head = [Column("question"), *(Column(as_name(stage), "code") for stage in answers)]
        rows = [(question, *(texts.get(question) for texts in answers.values())) for question in recipe.questions]
        yield Section("answers", "The same questions after every stage", [Table(head, rows)])


def _evaluations(recipe: Recipe, records: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of a training step and its figures on a dataset, or of questions, as `mm eval` measured them."""
    for step in recipe.steps:
        if not step.name.endswith("/eval") or not (values := parsed_output(records.get(step.name))):
            continue
        asked = {name: values[name]["accuracy"] for name in ("questions", "choices") if name in values}
        datasets = {Path(path).name: buckets["all"] for path, buckets in values.get("datasets", {}).items()}
        for dataset, figures in (datasets or {"": {}}).items():
            yield step.base, {**figures, **asked, "dataset": dataset}


def _answers(record: Any) -> dict[str, str]:
    """Return the answer to each question, as `mm chat` gave it."""
    from mmtrain.log.report import one_line

    found = parsed_output(record) or []
    return {each["prompt"]: one_line(each["answer"]) for each in (found if isinstance(found, list) else [found])}
