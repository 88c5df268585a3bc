"""The first hour of a new user: every recipe runs from its first step to its last, on a hub of loopback that has small files
under the real names; and what a command says comes next, or helps, does.
"""

import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import Ran, Run, fine, refused
from fakehub import FakeHub
from recipe_runs import in_process
from train_data import Data

import cli
from mmdata.commands.terminal import next_command, without_option


@pytest.mark.slow
@pytest.mark.parametrize("recipes", [["minimind2", "lora"], ["minimind3"], ["zero"]], ids=str)
def test_a_recipe_runs_to_its_end(
    recipes: list[str], hub: FakeHub, tmp_path: Path, mm: Run, narrow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands, with narrow models under the models' names."""
    monkeypatch.chdir(tmp_path)
    in_process(monkeypatch)
    for recipe in recipes:
        plan = json.loads(fine(mm(f"run {recipe} --dry-run --json")).out)
        assert plan[0]["download_bytes"] > 1000 and not plan[0]["note"]
        record = json.loads(fine(mm(f"run {recipe} --json")).out)["steps"]
        assert {step["status"] for step in record.values()} == {"done"}, record
        page = (tmp_path / "courses" / recipe / "report.html").read_text(encoding="utf-8")
        assert "你是谁？" in page
    stages = ["dpo", "pretrain", "sft"] if "minimind3" in recipes else ["pretrain", "sft"]
    course = ["dpo", "identity", "medical", "pretrain", "sft_1024", "sft_2048", "sft_512"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == (course if "lora" in recipes else stages)
    assert (tmp_path / "data" / "dpo_v1.jsonl").exists() == ("lora" in recipes)
    assert (tmp_path / "exports/dpo-hf/model.safetensors").exists() == ("zero" not in recipes)


def test_a_file_that_is_not_there_is_answered_with_the_one_of_nearly_its_name(home: Path, mm: Run) -> None:
    (home / "data/dpo.jsonl").rename(home / "data/dpo_v1.jsonl")
    refused(mm("pack data/dpo.jsonl --max-len 1024"), "data/dpo.jsonl: no such file", "there is data/dpo_v1.jsonl\n")


# --- hints

ENDLESS = ("--follow", "mm demo", "mm serve")  # hints that are not followed here: they go on for long
MOST = {"show": 2, "chat": 3}  # times that a command is followed which always names another
QUICK = {
    "chat": " --max-new-tokens 2",
    "train": " --steps 1 --no-samples --no-report",
    "pack": " --no-report",
}  # where nothing else is given


def hints(ran: Ran, line: str) -> list[str]:
    """The commands that a command printed after "next: " or "fix: ". An option alone is one to give to the same command."""
    found = []
    for text in re.findall(r"^(?:next|fix): (.*)$", ran.err, re.MULTILINE):
        for piece in re.split(r" {4}(?:or|then) {4}", text):
            if piece.startswith("--"):
                words = without_option(shlex.split(line), piece.split()[0])
                found.append(f"{shlex.join(words)} {piece}")
            elif piece.startswith("mm "):
                found.append(piece.removeprefix("mm "))
    return found


def walk(mm: Run, line: str, seen: set[str], *, is_hint: bool = False) -> None:
    """Run a command, then each that it hints at, in the state in which it was printed. What was hinted at ends well."""
    ran = mm(line)
    if is_hint:
        fine(ran)
    for command in hints(ran, line):
        name = command.split()[0]
        if command in seen or any(word in f"mm {command}" for word in ENDLESS):
            continue
        seen.add(command)
        if sum(other.split()[0] == name for other in seen) <= MOST.get(name, 99):
            assert not re.search(r"\b(FILE|RUN|DIR|NAME|STAGE|TEXT)\b", command), command
            quick = "" if " --steps" in command else QUICK.get(name, "")
            walk(mm, command + quick, seen, is_hint=True)


def test_what_comes_next_does(home: Path, hub: FakeHub, mm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    seen: set[str] = set()
    shutil.rmtree(home / "data/tokenizer")
    walk(mm, "validate data/pretrain_hq.jsonl", seen)
    assert {"fetch --tokenizer minimind-3", "pack data/pretrain_hq.jsonl"} < seen
    assert {"train pretrain --data shards/pretrain_hq", "chat runs/pretrain-1"} < seen
    assert not any(command.startswith("train sft") for command in seen)  # nothing is packed for it yet
    walk(mm, "pack --plan data/dpo.jsonl data/sft_512.jsonl --max-len 512", seen)
    assert {"pack data/dpo.jsonl data/sft_512.jsonl --max-len 512", "train sft --data shards/sft_512"} < seen
    assert {"train dpo", "chat runs/sft-1", "chat runs/dpo-1"} < seen
    walk(mm, "train pretrain --plan --steps 1 --model tiny --json --out elsewhere/one", seen)
    assert {"train pretrain --steps 1 --model tiny --out elsewhere/one", "train sft --init elsewhere/one"} < seen
    for line in ("show shards/sft_512", "report", "stats shards/dpo", "tokenizer train --vocab-size 300"):
        walk(mm, line, seen)
    walk(mm, "tokenizer extend data/tokenizer --add <new> --out data/tokenizer-more", seen)
    for line in ("fetch dpo sft_512 --out more", "fetch --dry-run"):
        hub.fail("resolve", "status", status=404, name="sft_512")
        walk(mm, line, seen)
    for shard in ("1/2", "2/2"):
        ran = fine(mm(f"pack data/sft_512.jsonl --out shards/both --shard {shard}"))
    assert hints(ran, "") == ["pack data/sft_512.jsonl --out shards/both --finish"]
    fine(mm(*hints(ran, "")))


@pytest.mark.parametrize(
    ("line", "helps"),
    [
        ("train sft", "pack data/sft_512.jsonl"),  # nothing is packed yet
        ("train pretrain --data data/pretrain_hq.jsonl", "pack data/pretrain_hq.jsonl"),  # rows, not packed yet
        ("train sft --data data/sft_512.jsonl", "train sft --data shards/sft_512"),  # rows, packed
        ("train pretrain --data shards/sft_512", "train sft --data shards/sft_512"),
        ("train sft --model runs/sft-1", "train sft --init runs/sft-1"),  # weights in place of a shape
        ("train dpo --resume --out runs/sft-1", "train sft --out runs/sft-1 --resume"),
    ],
)
def test_what_helps_does(line: str, helps: str, home: Path, runs: Path, data: Data, mm: Run, narrow: None) -> None:
    if "shards" in f"{line} {helps}" or "runs" in line:
        shutil.copytree(data.sft, home / "shards/sft_512")
    if "runs" in line:
        shutil.copytree(runs / "sft", home / "runs/sft-1")
    refused = mm(line)
    assert refused.code and hints(refused, line)[0] == helps
    fine(mm(helps + (QUICK["train"] if helps.startswith("train") and "--resume" not in helps else "")))


def test_a_bare_name_is_looked_up_under_shards(home: Path, runs: Path, data: Data, mm: Run) -> None:
    shutil.copytree(data.sft, home / "shards/sft_512")
    shutil.copytree(runs / "sft", home / "runs/sft-1")
    fine(mm("eval runs/sft-1 --data sft_512"))
    fine(mm("train sft --data sft_512 --plan"))
    refused(mm("train sft --data none"), "none: no such dataset", "there is shards/sft_512\n")


@pytest.mark.parametrize(
    ("stage", "name"), [("sft", "sft-9"), ("pretrain", "sft_1"), ("dpo", "sft-1x"), ("sft", "SFT-1")]
)
def test_a_mistyped_run_is_refused(stage: str, name: str, home: Path, runs: Path, mm: Run) -> None:
    shutil.copytree(runs / "sft", home / "runs/sft-1")
    refused(mm(f"train {stage} --resume --out runs/{name}"), f"runs/{name}: no such run", "there is runs/sft-1;")
    assert not (home / "runs" / name).exists()


# --- help


def examples(group: Any) -> Iterator[str]:
    """The example commands in the help of every command."""
    for command in group.commands.values():
        if hasattr(command, "commands"):
            yield from examples(command)
        else:
            text = " ".join(command.loaded.epilog.removeprefix("Example: ").split("\n"))
            yield from (example.removeprefix("mm ") for example in text.split("    "))


ELSEWHERE = (
    "serve",
    "demo",
    "--scale",
    "import",
    "--follow",
    "--lm-eval",
    "--from 6000",
    "doctor",
)  # long, of files that are not here, or of the network


@pytest.mark.slow
def test_the_examples_in_help_run(
    home: Path, hub: FakeHub, runs: Path, data: Data, mm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of `mm --help`, except that the tokenizer that some compare is trained first."""
    for stage, dataset in (("pretrain", "pretrain_hq"), ("sft", "sft_512"), ("dpo", "dpo")):
        shutil.copytree(runs / stage, home / f"runs/{stage}-1")
        shutil.copytree(getattr(data, stage), home / f"shards/{dataset}")
    for name in ("old", "new"):
        shutil.copy(home / "data/sft_512.jsonl", home / f"{name}.jsonl")
    every = list(examples(typer.main.get_command(cli.app)))
    assert len(every) > 25 and all(not example.startswith("mm") for example in every)
    for example in sorted(every, key=lambda example: not example.startswith("tokenizer train")):
        if not any(word in example for word in ELSEWHERE):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
            ran = mm(example + (" --out more" if example.startswith("fetch") else ""))  # other files are here already
            assert ran.code == 0, f"mm {example}\n{ran.err}"


def test_mm_has_a_version_completion_and_short_flags(home: Path, mm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"mm \d+\.\d+\S*\n", fine(mm("--version")).out)
    assert fine(mm("-h")).out == fine(mm("--help")).out and "-V, --version" in fine(mm("-h")).out
    monkeypatch.setenv("COLUMNS", "80")
    shown = fine(mm("--help")).out
    for summary in (text for summaries in cli.COMMANDS.values() for text in summaries.values()):
        assert summary in shown  # not cut
    assert "{pretrain|sft|dpo}" in fine(mm("train -h")).out
    assert fine(mm("pack data/sft_512.jsonl -q")).err == ""
    loud = fine(mm("validate data/sft_512.jsonl -v")).err
    assert re.search(r"^took \d+ s and \d+\.\d [MG]B of memory$", loud, re.MULTILINE)
    broken = mm("validate none.jsonl -v")
    assert broken.code and "Traceback" in broken.err and "error: none.jsonl: no such file" in broken.err
    refused(mm("validate none.jsonl -q"), "none.jsonl: no such file")
    monkeypatch.setenv("_MM_COMPLETE", "complete_bash")
    for words, expected in (("mm pa", ["pack"]), ("mm train sft --optimizer ", ["adamw", "muon"])):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
        assert mm("").out.split() == expected


def test_next_names_the_program_by_its_path_where_the_shell_does_not_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "bin" / "mm"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.chdir(tmp_path)
    for path, name in ((tmp_path, "bin/mm"), (program.parent, "mm")):
        monkeypatch.setenv("PATH", str(path))
        next_command("mm chat a    or    mm show b")
        assert capsys.readouterr().err == f"next: {name} chat a    or    {name} show b\n"
