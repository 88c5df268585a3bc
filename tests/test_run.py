"""`mm run`: recipes are read as the command line is, steps that are done are skipped, interrupted ones are resumed, and the
result is that of an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import Run, fine, refused
from pages import cards
from recipe_runs import TINY, in_process, inside
from waiting import wait_until

import cli
from mmdata.errors import MMError
from mmdata.hub import transfer
from mmdata.io import files
from mmdata.stats.report.page import Note, Phrase
from mmtrain.commands.project import runner
from mmtrain.commands.project.page import course_sections
from mmtrain.commands.project.planning import StepPlan, sample_rows
from mmtrain.commands.project.recipe import RECIPES, find_recipe, read_recipe
from mmtrain.commands.project.run import in_all
from mmtrain.records import StepRecord, newest_state

GROUP = typer.main.get_command(cli.app)
STAGES = ("train.pretrain", "train.sft", "train.dpo")


@pytest.fixture
def tiny(home: Path) -> Path:
    """A user's directory with a recipe of a few steps."""
    (home / "tiny.toml").write_text(TINY, encoding="utf-8")
    return home


def weights(root: Path) -> str:
    """Hash of the weights that the last stage ends with."""
    state = newest_state(root / "runs" / "dpo")
    assert state
    return state.weights_sha256


def words_of(done: list[Sequence[str]], *commands: str) -> list[str]:
    """Run directory or first argument of each step of these commands that was executed."""
    return [argv[argv.index("--out") + 1] if "--out" in argv else argv[1] for argv in done if argv[0] in commands]


# --- recipes


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_of_mm_are_read(path: Path) -> None:
    recipe = read_recipe(find_recipe(path.stem), GROUP)
    runs = [step for step in recipe.steps if step.command == ("train",)]
    assert runs and recipe.questions and recipe.title
    for before, after in pairwise(runs):
        assert after.values["init"] == before.values["out"]
    made = {place for step in recipe.steps for place in step.places}
    assert {str(run.values["data"]) for run in runs} <= made


def test_the_tutorials_course_is_its_commands() -> None:
    steps = [" ".join(step.argv) for step in read_recipe(find_recipe("minimind2"), GROUP).steps]
    assert "pack data/sft_1024.jsonl data/dpo_v1.jsonl --tokenizer data/tokenizer --max-len 1024" in steps
    assert "train sft --out runs/sft_2048 --init runs/sft_1024 --data shards/sft_2048" in steps
    assert [step.split()[0] for step in steps[-4:]] == ["train", "eval", "chat", "export"]
    assert sum(step.startswith("eval ") for step in steps) == 5


@pytest.mark.parametrize(
    ("text", "change", "words"),
    [
        ("[pakc]\n", "", ("'pakc' is unknown", "did you mean pack?")),
        ("[train.dpo]\nbta = 1\n", "", ("[train.dpo]: 'bta' is unknown", "did you mean beta?")),
        ("[tokenizer.trian]\n", "", ("'tokenizer.trian' is unknown", "use one of")),
        ("[train.dpo]\nbeta = -1\n", "", ("[train.dpo]: --beta -1.0 must be greater than 0",)),
        ("[train.dpo]\nsteps = 'many'\n", "", ("[train.dpo]", "--steps")),
        ("[train.dpo]\nreference_free = 3\n", "", ("reference_free = 3 must be true or false",)),
        ("[train.first]\n", "", ("[train.first]", "pretrain|sft|dpo")),
        ("[pack]\n", "", ("[pack] names no files",)),
        ("[pack]\nfiles = [{a = 1}]\n", "", ("files is an option, not a table",)),
        ("pack = 3\n", "", ("pack is a command, so a table",)),
        ("questions = 3\n", "", ("questions has another type",)),
        ("[train\n", "", ("recipe.toml: ",)),
        ("[train.dpo]\n", "train.pdo.beta=1", ("'pdo' is unknown", "did you mean dpo?")),
        ("[train.dpo]\n", "beta", ("--set beta is not TABLE.KEY=VALUE",)),
        ("[train.dpo]\n", "train.dpo.beat=1", ("'beat' is unknown", "did you mean beta?")),
    ],
)
def test_mistakes_in_a_recipe_are_named(text: str, change: str, words: Sequence[str], tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MMError) as caught:
        read_recipe(path, GROUP, [change] if change else [])
    for word in words:
        assert word in f"{caught.value.message}\n{caught.value.fix}"


def test_values_are_changed_and_flags_switched(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[train.dpo]\ndata = ["a:0.5", "b:0.5"]\nshare_prompt = false\nno-report = true\n', encoding="utf-8"
    )
    changes = ["train.dpo.beta=0.2", "train.dpo.loss=ipo", "train.dpo.max-skipped=3", 'questions=["a"]']
    step, *after = read_recipe(path, GROUP, changes).steps
    assert " ".join(step.argv) == (
        "train dpo --out runs/dpo --data a:0.5 --data b:0.5 --no-share-prompt --no-report --beta 0.2 --loss ipo "
        "--max-skipped 3"
    )
    assert {"a", "shards/a", "b:0.5"} <= {*step.inputs} and "runs/dpo" not in step.inputs
    assert [each.name for each in after] == ["train.dpo/eval", "train.dpo/answers"] and after[1].stdin == "a\n"


def test_a_share_of_the_rows_is_taken_evenly(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(1000)))
    for share, number in ((0.01, 10), (0.25, 250), (1.0, 1000), (0.0001, 1)):
        sample_rows(source, tmp_path / "out.jsonl", share=share)
        rows = (tmp_path / "out.jsonl").read_text().splitlines()
        assert abs(len(rows) - number) <= 1 and len({*rows}) == len(rows)


# --- plans


def test_a_plan_without_network_names_it_and_is_a_lower_bound(
    tiny: Path, mm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = in_process(monkeypatch)
    monkeypatch.setattr(transfer, "BRIEFLY", replace(transfer.BRIEFLY, sleep=lambda _: None))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    text = TINY.replace("[pack]", '[fetch]\nnames = ["sft_1024"]\n\n[pack]')
    (tiny / "tiny.toml").write_text(text, encoding="utf-8")
    shown = fine(mm("run tiny.toml --dry-run --only fetch"))
    assert [argv[0] for argv in done] == ["fetch"]
    assert "127.0.0.1:9 cannot be reached" in shown.out
    assert "in all not known; the time of fetch is not known" in shown.err


@pytest.mark.parametrize(
    ("plans", "words"),
    [
        (
            [StepPlan("pack", seconds=60, disk_bytes=1000), StepPlan("fetch", download_bytes=0)],
            "in all 60 s, 1.0 kB of disk; ",
        ),
        (
            [StepPlan("pack", seconds=60), StepPlan("a"), StepPlan("b", "done")],
            "in all at least 60 s; the time of a is not",
        ),
        (
            [StepPlan("fetch", download_bytes=9, disk_bytes=9)],
            "in all at least 9 B of disk; the time of fetch is not known; ",
        ),
        ([StepPlan("b", "done")], "in all 0 s, 0 B of disk; "),
    ],
)
def test_sums_of_a_plan_count_what_is_known(plans: list[StepPlan], words: str) -> None:
    assert words in in_all(plans, 0.0)
    assert ("price" in in_all(plans, 3600.0)) == ("60 s" in words or "done" in plans[0].state)


def test_the_report_names_stages_that_could_not_be_evaluated(tiny: Path) -> None:
    course = read_recipe(tiny / "tiny.toml", GROUP)
    tried = runner.Runner(course, tiny, tiny / "courses/tiny")
    tried.record.steps["train.sft/eval"] = StepRecord(key="", argv=[], begun=0.0, status=runner.FAILED)
    blocks = [block for section in course_sections(tried) for block in section.blocks]
    notes = [each.text for each in blocks if isinstance(each, Note)]
    assert [note.values for note in notes if isinstance(note, Phrase)] == [{"stages": "train.sft"}]


# --- execution


def test_another_node_says_what_it_waits_for_and_goes_on_after_a_failed_evaluation(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    course = read_recipe(tiny / "tiny.toml", GROUP)
    step = next(each for each in course.steps if each.name == "train.sft/eval")
    first, other = (runner.Runner(course, tiny, tiny / "courses/tiny", rank=rank) for rank in (0, 1))

    def fail(_: float) -> None:
        first.record.steps[step.name] = StepRecord(key="", status=runner.FAILED)
        first.write()

    monkeypatch.setattr(runner.time, "sleep", fail)
    assert other.run([step]) == 0
    assert "train.sft/eval: rank 0 does it; every machine must see its record" in capsys.readouterr().err


def test_a_step_is_done_once_and_again_when_its_input_changes(
    tiny: Path, mm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = in_process(monkeypatch)
    text = TINY.partition("[train.pretrain]")[0].replace(', "data/sft_512.jsonl", "data/dpo.jsonl"', "")
    (tiny / "tiny.toml").write_text(text, encoding="utf-8")
    record = json.loads(fine(mm("run tiny.toml --json")).out)
    assert [step["status"] for step in record["steps"].values()] == ["done"] and len(done) == 1
    assert '"steps"' in fine(mm("run tiny.toml --json")).out and len(done) == 1
    assert cards((tiny / "courses/tiny/report.html").read_text(encoding="utf-8"))["steps"] == "1 / 1"
    with (tiny / "data/pretrain_hq.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    shown = fine(mm("run tiny.toml"))
    assert len(done) == 3 and "--plan" in done[1] and "pack  to do" in " ".join(shown.out.split(" "))
    (tiny / "data/pretrain_hq.jsonl").write_text("no row\n")
    failed = mm("run tiny.toml")
    assert failed.code == 1 and "error: " in failed.err and "next: mm run tiny.toml" in failed.err
    assert json.loads((tiny / "courses/tiny/course.json").read_text())["steps"]["pack"]["status"] == "failed"


@pytest.mark.slow
def test_done_steps_are_skipped_and_changes_redo_what_depends_on_them(
    tiny: Path, mm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = in_process(monkeypatch)
    record = json.loads(fine(mm("run tiny.toml --json")).out)
    assert [name for name in record["steps"] if "/" not in name] == ["pack", *STAGES]
    assert {step["status"] for step in record["steps"].values()} == {"done"}
    html = (tiny / "courses/tiny/report.html").read_text(encoding="utf-8")
    assert cards(html)["steps"] == "10 / 10" and "one and two?" in html and "train.sft" in html
    first = weights(tiny)

    done.clear()
    fine(mm("run tiny.toml"))
    assert not done  # nothing is executed, not even a plan
    shutil.rmtree(tiny / "shards/sft_512")
    fine(mm("run tiny.toml --json"))
    assert words_of(done, "pack", "train") == ["data/pretrain_hq.jsonl"]  # the same digest: no training

    done.clear()
    shown = fine(mm("run tiny.toml --set train.dpo.beta=0.5 --only train.dpo --lang zh --json"))
    trained = [argv for argv in done if argv[0] == "train"]
    assert words_of(trained, "train") == ["runs/dpo"] and "is kept as runs/dpo.1" in shown.err
    assert weights(tiny) != first and (tiny / "runs/dpo.1/run.json").exists()
    assert 'lang="zh-CN"' in (tiny / "courses/tiny/report.html").read_text(encoding="utf-8")
    refused(mm("run tiny.toml --only train.rlhf"), "no step train.rlhf", "train.dpo")
    refused(mm("run tinny"), "tinny: no such recipe", "minimind3")
    (tiny / "courses/tiny/course.json").unlink()
    refused(mm("run tiny.toml --from train.dpo"), "runs/dpo holds a run that this recipe did not make")


@pytest.mark.slow
def test_the_plan_names_time_disk_and_memory_before_and_a_share_of_the_rows_is_tried(
    tiny: Path, mm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    plan = {each["step"]: each for each in json.loads(fine(mm("run tiny.toml --dry-run --json")).out)}
    assert plan["pack"]["seconds"] > 0 and plan["pack"]["disk_bytes"] > 0
    for stage in STAGES:  # nothing is packed yet: measured on a sample
        assert plan[stage]["seconds"] > 0 and plan[stage]["memory_bytes"] > 1e6 and "k tokens" in plan[stage]["note"]
    assert not (tiny / "shards").exists() and not (tiny / "courses").exists()
    fine(mm("run tiny.toml --scale 0.5"))
    assert len((tiny / "courses/tiny-0.5/data/sft_512.jsonl").read_text().splitlines()) == 120
    assert (tiny / "courses/tiny-0.5/runs/dpo/run.json").exists() and not (tiny / "runs").exists()


class KilledError(BaseException):
    """Ends everything at once, as SIGKILL does: no command catches it."""


def kill_at(event: int | None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Raise KilledError at the event of this number; events are files moved into place. Returns the list of their names."""
    seen: list[str] = []
    move = files.move_into_place

    def counted(source: Path, target: Path) -> None:
        seen.append(target.name)
        if event is not None and len(seen) >= event:
            raise KilledError
        move(source, target)

    monkeypatch.setattr(files, "move_into_place", counted)
    return seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that a killed run left open
def test_killed_at_ten_moments_and_run_again_the_weights_are_the_same(
    tiny: Path, mm: Run, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = (4, 12, 25, 4, 5, 6, 4, 7, 5, 6)  # files written before each: packing first, then checkpoints
    done = in_process(monkeypatch)
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(tiny, whole, dirs_exist_ok=True)
    with inside(whole), monkeypatch.context() as counting:
        seen = kill_at(None, counting)
        fine(mm("run tiny.toml --json"))
    assert len(seen) > sum(kills[:3])
    for kill in kills:
        with monkeypatch.context() as counting, pytest.raises(KilledError):
            kill_at(kill, counting)
            mm("run tiny.toml --json")
    fine(mm("run tiny.toml"))
    assert weights(tiny) == weights(whole)
    assert any("--resume" in argv for argv in done)


@pytest.mark.slow
def test_an_mm_run_that_is_killed_leaves_no_process_behind(tiny: Path) -> None:
    """With real processes: `mm run` gets SIGKILL while a step trains, and the clock is set; the next one ends that step and goes
    on with it."""
    text = (
        TINY.replace("steps = 4\n", "steps = 400\n").partition("[train.sft]")[0].replace(' "data/sft_512.jsonl",', "")
    )
    (tiny / "tiny.toml").write_text(text, encoding="utf-8")
    command = [sys.executable, str(runner.PROGRAM), "run", "tiny.toml", "--set", "questions=[]"]
    course = tiny / "courses/tiny/course.json"

    def step() -> dict[str, Any]:
        return json.loads(course.read_text())["steps"].get("train.pretrain", {}) if course.exists() else {}

    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_until(lambda: any(tiny.glob("runs/pretrain/checkpoints/step-*")))
    process.kill()
    process.wait()
    (pid, _), key = step()["process"], step()["key"]
    os.kill(pid, 0)  # the step is still there
    record = json.loads(course.read_text())
    del record["record_sha256"]
    record["steps"]["train.pretrain"]["process"][1] += 3600
    course.write_text(json.dumps(record))
    again = subprocess.run([*command, "--only", "train.pretrain"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "ending it" in again.stderr and "--resume" in again.stderr
    assert step()["status"] == "done" and step()["attempts"] == 2 and step()["key"] == key
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_under_torchrun_training_steps_use_every_rank(tiny: Path) -> None:
    (tiny / "tiny.toml").write_text(TINY.partition("[train.dpo]")[0], encoding="utf-8")
    words = ["--nproc-per-node", "2", str(runner.PROGRAM), "run", "tiny.toml", "--set", "questions=[]"]
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    environment = {**os.environ, "PYTHONPATH": str(runner.PROGRAM.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for stage in ("pretrain", "sft"):
        assert json.loads((tiny / "runs" / stage / "run.json").read_text())["world_size"] == 2
    steps = json.loads((tiny / "courses/tiny/course.json").read_text())["steps"]
    assert {step["status"] for step in steps.values()} == {"done"}


@pytest.mark.slow
def test_signals_reach_the_step_and_end_the_recipe(tmp_path: Path) -> None:
    started = threading.Event()

    def stop(pid: int) -> None:
        started.set()
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        runner.launch(["demo", "--corpus", "data", "--minutes", "60"], tmp_path, on_start=stop)
    assert started.is_set() and not (tmp_path / "data/tokenizer").exists()
    ended = runner.launch(["--version"], tmp_path, is_captured=True)
    assert ended.code == 0 and ended.out.startswith("mm ")
    assert runner.launch(["pack", "none.jsonl"], tmp_path, is_quiet=True).code == 1
