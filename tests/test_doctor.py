"""`mm doctor`, and the defaults of a project: mm.toml and MM_HOME."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Run, fine, refused
from fakehub import FakeHub

import cli
from mmtrain.commands.project.doctor import driver


def found(out: str) -> dict[str, dict[str, str]]:
    return {each["name"]: each for each in json.loads(out)}


def test_a_machine_in_order_needs_no_mending(home: Path, mm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for _ in range(2):
            hub.fail("resolve", "status", status=404)  # an answer all the same
        monkeypatch.setattr("mmtrain.commands.project.doctor.LEAST_DISK_BYTES", 1)
        monkeypatch.setattr("mmtrain.commands.project.doctor.LEAST_MEMORY_BYTES", 1)
        shown = fine(mm("doctor"))
        findings = found(fine(mm("doctor --json")).out)
    assert "nothing needs mending" in shown.err and hub.url in shown.out
    assert {"mm", "Python", "torch", "disk", "memory", "endpoint", "optional packages"} <= findings.keys()
    assert not any(each["advice"] for each in findings.values())


@pytest.mark.parametrize(("script", "value"), [("echo 570.86.15", "570.86.15"), ("exit 9", "does not answer")])
def test_the_driver_is_named(script: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (fact,) = driver()
    assert fact.value == value and bool(fact.advice) == (value == "does not answer")
    monkeypatch.setenv("PATH", "")
    assert not [*driver()]


def test_every_problem_has_a_line_of_advice(home: Path, mm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("mmtrain.commands.project.doctor.LEAST_DISK_BYTES", 1 << 60)
    monkeypatch.setattr("mmtrain.commands.project.doctor.LEAST_MEMORY_BYTES", 1 << 60)
    monkeypatch.setattr("mmtrain.commands.project.doctor.PYTHONS", ((3, 99), (3, 99)))
    monkeypatch.setattr("importlib.metadata.requires", lambda _: ['never_there>=1; extra == "more"'])
    ran = mm("doctor")
    assert ran.code == 1 and "4 of" in ran.err
    for text in ("Python: mm is tested", "disk: free some", "memory: close", "endpoint: name a mirror", "never_there"):
        assert text in ran.out


def test_mm_toml_has_defaults_that_options_override(home: Path, mm: Run) -> None:
    defaults = "[pack]\nmax_len = 64\nno-report = true\n[train]\nlr = 0.5\nno_compile = true\n[tokenizer.train]\nvocab_size = 300\n"
    (home / "mm.toml").write_text(defaults, encoding="utf-8")

    def max_len(line: str) -> int:
        fine(mm(line))
        return json.loads((home / "shards/sft_512/manifest.json").read_text())["max_len"]

    assert max_len("pack data/sft_512.jsonl") == 64 and not (home / "shards/sft_512/report.html").exists()
    assert max_len("pack data/sft_512.jsonl --max-len 96") == 96
    for text, words in (
        ("[pakc]\n", ("mm.toml", "did you mean pack?")),
        ("[pack]\nmaxlen = 3\n", ("[pack]: 'maxlen' is unknown", "max_len")),
        ("[pack]\nmax_len = 3\n", ("--max-len 3", "at least 8")),
        ("[train.sft]\nlr = 1\n", ("[train.sft] is a step of a recipe",)),
        ("[pack\n", ("mm.toml: ",)),
    ):
        (home / "mm.toml").write_text(text, encoding="utf-8")
        refused(mm("pack data/sft_512.jsonl"), *words)


@pytest.mark.slow
def test_mm_home_is_where_everything_lies(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    environment = {**os.environ, "MM_HOME": str(home)}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (home / "mm.toml").write_text("[pack]\nmax_len = 64\n", encoding="utf-8")

    def run(*words: str) -> str:
        command = [sys.executable, str(Path(cli.__file__)), *words]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("pack")
    assert json.loads((home / "shards/sft_512/manifest.json").read_text())["max_len"] == 64
    run("train", "sft", "--model", "tiny", "--steps", "1", "--quiet")
    assert (home / "runs/sft-1/run.json").exists()
    states = {each["name"]: each["state"] for each in json.loads(run("fetch", "--list", "--json"))}
    assert states["dpo"] != "missing"
    (elsewhere / "mine.toml").write_text('[pack]\nfiles = ["data/dpo.jsonl"]\nmax_len = 96\n', encoding="utf-8")
    run("run", "mine.toml", "--json")
    assert (home / "courses/mine/report.html").exists() and not any(elsewhere.glob("*/"))
