"""`mm demo`: train a small model on a generated corpus, through all stages, and score it on held-out questions."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdata.commands.options import Json
from mmdata.commands.terminal import next_command, percent, plain, print_json, result, say, table
from mmdata.errors import UsageError
from mmdata.options import INT64, Option
from mmtrain.commands.chat import chat
from mmtrain.inference.settings import ChatSampling

if TYPE_CHECKING:
    from mmdata.demo.corpus import Question

DemoFigures = dict[str, Any]  # what `mm demo --json` prints, or a part of it


def demo(
    context: typer.Context,
    out: Annotated[Path, Option("Directory for everything; an earlier demo there is replaced.", metavar="DIR")] = Path(
        "demo"
    ),
    minutes: Annotated[
        float | None,
        Option(
            "Training time in minutes on two present-day CPU cores; determines the number of rows.",
            above=0,
            most=60,
            default_text="3.1",
        ),
    ] = None,
    seed: Annotated[int, Option("Seed of the corpus, the new weights and the order of the data.", **INT64)] = 0,
    corpus: Annotated[
        Path | None, Option("Only write the corpus and its tokenizer to this directory, for a recipe.", metavar="DIR")
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate a small bilingual corpus, train a model on it from scratch, and score it on held-out questions.

    Example: mm demo --out demo --minutes 2
    """
    from mmdata.demo import corpus as recipe
    from mmdata.io.files import write_text

    if corpus:
        write_data(corpus, minutes or recipe.MINUTES, seed)
        return
    start = time.monotonic()
    clear_demo(out)
    figures = run_demo(context.find_root().command, out, minutes or recipe.MINUTES, seed)
    figures["minutes"] = (time.monotonic() - start) / 60
    write_text(out / "demo.json", json.dumps(figures, ensure_ascii=False, indent=1, default=plain) + "\n")
    if as_json:
        print_json(figures)
    else:
        print_demo(figures, out)
    run = out / "runs" / figures["stages"][-1]["stage"]
    if not as_json and sys.stdin.isatty() and sys.stdout.isatty():
        chat([run], sampling=ChatSampling(temperature=0.0))
    next_command(f"mm chat {run}    or    mm show {out / 'shards' / 'sft_512'}")


def clear_demo(out: Path) -> None:
    """Create an empty directory `out`, or empty that of an earlier demo. Raise UsageError if `out` is a file, or a
    directory with files but without demo.json."""
    if out.exists() and not (out / "demo.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty and no demo of ours", "choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    # Marks the directory as a demo from the start, so that one that is interrupted can be replaced.
    (out / "demo.json").write_text("{}\n", encoding="utf-8")


def write_data(data: Path, minutes: float, seed: int) -> None:
    """Generate the corpus in a directory, and train its tokenizer there. minutes: training time on two present-day CPU
    cores, which determines the number of rows."""
    from mmdata.demo import corpus as corpus_of
    from mmdata.tokenizer.chat_template import CHATML
    from mmdata.tokenizer.tokenizer import train_bpe

    say("writing the corpus, training its tokenizer")
    corpus = corpus_of.write_corpus(data, seed=seed, minutes=minutes)
    train_bpe(
        corpus.tokenizer_texts,
        vocab_size=corpus_of.VOCAB_SIZE,
        control_tokens=corpus_of.CONTROL_TOKENS,
        chat_template=CHATML,
        out_dir=data / "tokenizer",
    )


def run_demo(group: Any, out: Path, minutes: float, seed: int) -> DemoFigures:
    """Execute the recipe demo.toml in the directory `out`, and score each stage on what is held out; return all figures.
    group: the commands of mm. minutes, seed: of the corpus; the seed is also that of new weights and of the order of the data."""
    from mmdata.demo import corpus
    from mmdata.pack.options import PackOptions
    from mmdata.pack.pipeline import pack
    from mmtrain.commands.project.recipe import find_recipe, read_recipe
    from mmtrain.commands.project.run import execute
    from mmtrain.commands.project.runner import Runner
    from mmtrain.records import read_run

    names = [step.name for step in read_recipe(find_recipe("demo"), group).steps if step.command == ("train",)]
    changes = [f"demo.minutes={minutes}", *(f"{name}.seed={seed}" for name in ("demo", *names))]
    recipe = read_recipe(find_recipe("demo"), group, changes)
    runner = Runner(recipe, out, out / "course")
    execute(runner, list(recipe.steps), is_printed=False)
    data, held_out = out / "data", out / "shards" / "held_out_pairs"
    options = PackOptions(tokenizer=data / "tokenizer", max_len=512, val_fraction=0)
    pack([data / "held_out" / "pairs.jsonl"], held_out, options)
    questions = corpus.read_questions(data)
    figures: DemoFigures = {"questions": len(questions), "stages": []}
    for name in names:
        run = out / "runs" / name.rpartition(".")[2]
        scores = score_demo(run, questions, held_out)
        val = (read_run(run).result or {}).get("val", {})
        spent = runner.record.steps[name].seconds / 60
        figures["stages"].append({"stage": run.name, **val, **scores, "minutes": spent})
        say(f"{run.name}: {100 * scores['exact']:.1f}% of held-out questions answered exactly")
    return figures


def score_demo(run: Path, questions: "list[Question]", pairs: Path) -> DemoFigures:
    """Score a run on the held-out questions and on the packed held-out pairs; return the figures by name: exact and
    sentences, shares (0 to 1) of the greedy answers that are right, and that are a whole sentence; by_subject, exact
    answers and questions of each subject; preference_accuracy, share of pairs whose chosen reply has the larger logp;
    transcript, five questions with answers."""
    from mmdata.demo import corpus as recipe
    from mmdata.encode.rows import Message
    from mmdata.encode.template import Template
    from mmdata.shards.dataset import open_dataset
    from mmdata.tokenizer.tokenizer import Tokenizer
    from mmtrain.checkpoint import load_model
    from mmtrain.inference.chat import answer_batch
    from mmtrain.inference.score import figures, score

    tokenizer = Tokenizer.load(run / "tokenizer")
    model = load_model(run)[0].eval()
    conversations = [[Message(m["role"], m["content"]) for m in question.messages] for question in questions]
    answers = answer_batch(model, tokenizer, Template(tokenizer), conversations, max_new_tokens=48)
    exam = recipe.score(questions, answers)
    [ranked] = figures(score(model, tokenizer, open_dataset(pairs), "train")).values()
    transcript = []
    for question in recipe.showcase(questions):
        answer = answers[questions.index(question)].strip()
        record = {"messages": question.messages, "answer": answer, "expected": question.whole}
        transcript.append({**record, "is_exact": recipe.is_exact(question, answer)})
    return {
        "exact": exam.exact,
        "sentences": exam.sentences,
        "by_subject": exam.by_subject,
        "preference_accuracy": ranked["all"]["accuracy"],
        "transcript": transcript,
    }


def print_demo(figures: DemoFigures, out: Path) -> None:
    """Print the scores of each stage, five answers of the last model, and what the directory `out` contains."""
    columns = ("stage", "val bits/byte", "exact answers", "whole sentences", "pairs ranked right", "minutes")
    rows = (
        (
            stage["stage"],
            f"{stage['bits_per_byte']:.3f}" if "bits_per_byte" in stage else "-",
            percent(stage["exact"], 1),
            percent(stage["sentences"], 1),
            percent(stage["preference_accuracy"], 1),
            f"{stage['minutes']:.1f}",
        )
        for stage in figures["stages"]
    )
    result()
    table(f"{figures['questions']} held-out questions, none of them trained on", columns, rows)
    if any("bits_per_byte" not in stage for stage in figures["stages"]):
        result("-: in so short a demo no row of this stage is held out; give more --minutes")
    result()
    for answered in figures["stages"][-1]["transcript"]:
        for message in answered["messages"]:
            result(f"{'you' if message['role'] == 'user' else ' mm'}: {message['content']}")
        expected = "" if answered["is_exact"] else f"    (expected: {answered['expected']})"
        result(f" mm: {answered['answer']}{expected}")
        result()
    result(f"made in {figures['minutes']:.1f} minutes, all under {out}:")
    result(
        "  data/ the corpus, its tokenizer and what is held out; shards/ packed; runs/ trained; demo.json these figures"
    )
    last = figures["stages"][-1]["stage"]
    pages = {"all": out / "course", "data": out / "shards" / "sft_512", "runs": out / "runs" / last}
    result("reports: " + ", ".join(f"{page / 'report.html'} ({name})" for name, page in pages.items()))
