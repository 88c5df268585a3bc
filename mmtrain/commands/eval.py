"""`mm eval`: evaluate a model by its held-out loss, answers to questions, choices among answers, and tasks of
EleutherAI's lm-evaluation-harness."""

import tempfile
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdata.commands.options import Json, dataset_dir
from mmdata.commands.terminal import percent, print_json, progress, result, say, table
from mmdata.errors import CheckpointError, DatasetError, UsageError
from mmtrain.inference.settings import EvalOptions

if TYPE_CHECKING:
    from mmdata.tokenizer.tokenizer import Tokenizer
    from mmtrain.model.model import Model
    from mmtrain.records import RunRecord

MOST_MISTAKES = 3  # wrongly answered questions to print at most
Scores = dict[str, Any]  # what `mm eval --json` prints, or a part of it


def eval_(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run, checkpoint, .pth or Hugging Face directory.")],
    *,
    options: EvalOptions,
    as_json: Json = False,
) -> None:
    """Evaluate a model: held-out loss by dataset and bucket, pairs ranked right, questions answered, tasks of
    EleutherAI's harness.

    Example: mm eval runs/sft-1 --data shards/sft_512 --per-sequence rows.jsonl    mm eval runs/sft-1 --questions my.jsonl --lm-eval ceval-valid,cmmlu
    """
    from mmdata.encode.template import Template
    from mmtrain.convert.foreign import open_model
    from mmtrain.inference import exam

    if options.limit is not None and options.lm_eval is None:
        raise UsageError("--limit belongs to --lm-eval", "leave it out")
    start = time.monotonic()
    model, tokenizer = open_model(run)
    metadata = run_metadata(run)
    own = [Path(item.dir) for item in metadata.data if Path(item.dir).is_dir()]
    datasets = [dataset_dir(path) for path in options.data] or own
    if not datasets and not options.has_task:
        raise UsageError(f"{run} names no dataset that is here", f"mm eval {run} --data shards/NAME")
    values: Scores = {"model": str(run)}
    if options.data or options.per_sequence or options.noisiest or not options.has_task:
        values |= measured(model, tokenizer, datasets, options, as_json)
        values |= as_in_training(model, tokenizer, metadata, datasets)
    template = None if options.plain or metadata.stage == "pretrain" else Template(tokenizer)
    ask = partial(exam.ask, max_new_tokens=options.max_new_tokens)
    for name, path, read, answer in (
        ("questions", options.questions, exam.read_questions, ask),
        ("choices", options.choices, exam.read_choices, exam.choose),
    ):
        if path is not None:
            with progress(f"ask {path}", unit="items", quiet=as_json) as update:
                outcomes = answer(model, tokenizer, template, read(path), progress=update)
            values[name] = {"file": str(path), **exam.summary(outcomes), "outcomes": outcomes}
    if options.lm_eval:
        tasks = [task.strip() for task in options.lm_eval.split(",")]
        values["lm_eval"] = through_harness(run, tasks, template is not None, options.limit)
    values["seconds"] = round(time.monotonic() - start, 3)
    print_json(values) if as_json else print_scores(values)


def run_metadata(path: Path) -> "RunRecord":
    """Return the record in run.json for the path of a run or of a checkpoint in it; an empty record for the model of
    another program, which has no run.json."""
    from mmtrain.checkpoint import find
    from mmtrain.convert.foreign import is_foreign
    from mmtrain.records import RunRecord, read_run

    return RunRecord() if is_foreign(path) else read_run(find(path).run_dir)


def measured(
    model: "Model", tokenizer: "Tokenizer", datasets: list[Path], options: EvalOptions, as_json: bool
) -> Scores:
    """Return the held-out figures of the model on the packed datasets, by name, and write the file of --per-sequence.
    Raise DatasetError if the splits have no sequence."""
    from mmdata.shards.dataset import open_dataset
    from mmtrain.inference.score import Scored, figures, noisiest, score, write_scores

    scores: list[Scored] = []
    for path in datasets:
        dataset = open_dataset(path)
        for split in options.splits:
            with progress(f"eval {path} {split}", unit="samples", quiet=as_json) as update:
                scores += score(model, tokenizer, dataset, split, progress=update)
    if not scores:
        raise DatasetError(
            f"{', '.join(map(str, datasets))}: the {' and '.join(options.splits)} split is empty",
            "--split all takes every row, or pack with a larger --val-fraction",
        )
    values: Scores = {"splits": list(options.splits), "datasets": figures(scores)}
    if options.noisiest:
        values["noisiest"] = [one.record() for one in noisiest(scores, options.noisiest)]
    if options.per_sequence is not None:
        write_scores(options.per_sequence, scores)
        values["per_sequence"] = {"file": str(options.per_sequence), "lines": len(scores)}
    return values


def as_in_training(model: "Model", tokenizer: "Tokenizer", run: "RunRecord", datasets: list[Path]) -> Scores:
    """Return as "preference" the val figures of a dpo run that depend on its reference model, as in training: loss,
    accuracy (share of positive reward margins), reward_margin, pairs. Empty for other runs, or without the reference's
    logps."""
    from mmdata.shards.dataset import open_dataset
    from mmdata.shards.pairs import make_loader
    from mmtrain.inference.evaluate import evaluate
    from mmtrain.model.preference import Objective
    from mmtrain.train import reference

    if run.stage != "dpo" or not run.reference:
        return {}
    opened = [open_dataset(path) for path in datasets]
    if any(dataset.kind != "pair" for dataset in opened):
        return {}
    loader = make_loader(opened, split="val", batch_tokens=1, seed=0)
    try:
        logps = reference.load(Path(run.reference.path), {"data": loader.digest})
    except CheckpointError:
        return {}
    names = (each.name for each in fields(Objective))
    objective = Objective(**{name: run.settings[name].value for name in names if name in run.settings})
    figures = evaluate(model, loader, tokenizer, reference=logps.get("val"), objective=objective)
    shown = {name: figures[name] for name in ("loss", "accuracy", "reward_margin") if name in figures}
    return {"preference": {**shown, "pairs": loader.num_samples}} if shown else {}


def through_harness(run: Path, tasks: list[str], is_chat: bool, limit: int | None) -> Scores:
    """Run tasks of EleutherAI's harness and return their metrics by task and name. A model that is no Hugging Face
    directory is exported to a temporary one first. is_chat: apply the chat template. limit: questions per task."""
    from mmtrain.convert import harness
    from mmtrain.convert.export import export
    from mmtrain.convert.foreign import is_foreign

    if is_foreign(run) and run.is_dir():
        return harness.run(run, tasks, is_chat=is_chat, limit=limit)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "hf"
        export(run, directory, format="hf")
        return harness.run(directory, tasks, is_chat=is_chat, limit=limit)


def print_scores(values: Scores) -> None:
    """Print what `mm eval` measured: tables of losses, the noisiest rows, accuracy on questions, results of tasks."""
    for dataset, buckets in values.get("datasets", {}).items():
        is_pairs = "accuracy" in buckets["all"]
        columns = ["bucket", "sequences", "tokens", "loss", "bits/byte", "perplexity"]
        columns += ["higher logp", "margin"] if is_pairs else []
        rows = []
        for name, figures in buckets.items():
            row = [f"{name}", int(figures["sequences"]), int(figures["tokens"]), f"{figures['loss']:.4f}"]
            row += [f"{figures['bits_per_byte']:.4f}", f"{figures['perplexity']:.2f}"]
            rows.append(row + ([percent(figures["accuracy"], 1), f"{figures['margin']:z.2f}"] if is_pairs else []))
        table(f"{dataset} ({' and '.join(values['splits'])} split)", columns, rows)
    if found := values.get("preference"):
        result(
            f"val as in training, against the reference: loss {found['loss']:.4f}, reward accuracy "
            f"{percent(found['accuracy'], 1)}, margin {found['reward_margin']:+z.4f}, {found['pairs']:,} pairs"
        )
    least_likely = values.get("noisiest", ())
    rows = ((f"{row['file']} line {row['line']}", row["tokens"], f"{row['loss']:.3f}") for row in least_likely)
    table("least likely rows", ["row", "tokens", "nats a token"], rows)
    if written := values.get("per_sequence"):
        result(f"wrote {written['file']}: {written['lines']:,} lines, one a sequence")
    for name, what in (("questions", "answered word for word"), ("choices", "chosen right")):
        if name in values:
            print_answers(values[name], what)
    for task, figures in values.get("lm_eval", {}).items():
        result(f"{task}: {', '.join(f'{metric} {value:.4f}' for metric, value in figures.items())}")
    say(f"measured {values['model']} in {values['seconds']:.1f} s")


def print_answers(asked: Scores, what: str) -> None:
    """Print the accuracy on one file of questions to stdout, and the first MOST_MISTAKES wrong answers to stderr. what:
    what right answers are, such as "chosen right"."""
    per_byte = asked.get("accuracy_per_byte")
    more = f"; by log-probability a byte {percent(per_byte, 1)}" if per_byte is not None else ""
    result(f"{asked['file']}: {percent(asked['accuracy'], 1)} of {asked['asked']:,} questions {what}{more}")
    for outcome in [outcome for outcome in asked["outcomes"] if not outcome.is_right][:MOST_MISTAKES]:
        answer = " ".join(outcome.said.split()) or "nothing"
        say(f"  line {outcome.line}: {outcome.question[:60]!r} -> {answer[:60]!r}, expected {outcome.expected[:60]!r}")
