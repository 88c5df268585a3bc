"""Clocks that jump and readers that leave: neither changes a result, nor ends in a traceback."""

import os
import random
import re
import shlex
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import warm
from damage import SEED
from train_data import Data
from train_runs import at_step, config_of, interrupt

from mmtrain.log.history import figures
from mmtrain.log.report import run_page
from mmtrain.records import newest_state
from mmtrain.train.loop import train

COMMANDS = (
    "show data/sft_512.jsonl --tokenizer data/tokenizer",
    "validate data/sft_512.jsonl",
    "fetch --list --json",
    "stats data/sft_512.jsonl",
    "pack data/sft_512.jsonl --tokenizer data/tokenizer --max-len 128 --workers 1 --no-report",
    "tokenizer check data/tokenizer",
    "doctor",
)


# Where the clock that may jump is read: times that are only recorded or shown, and one wait, of at most 300 s.
WALL_CLOCK = {
    "mmdata/hub/sources.py",
    "mmtrain/commands/project/runner.py",
    "mmtrain/convert/foreign.py",
    "mmtrain/inference/serve/app.py",
    "mmtrain/train/run.py",
}


def test_durations_and_deadlines_are_of_clocks_that_do_not_jump() -> None:
    root = Path(__file__).resolve().parents[2]
    paths = [path for room in ("mmdata", "mmtrain") for path in (root / room).rglob("*.py")]
    found = {path for path in paths if re.search(r"\btime\.time\(|\bcreate_time\(\) [-=<>]", path.read_text())}
    assert {str(path.relative_to(root)) for path in found} == WALL_CLOCK


@pytest.mark.slow
def test_a_run_under_a_clock_that_jumps_is_the_same(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config_of("sft", data, tmp_path / "plain", model="tiny")
    train(options, log=lambda _: None)
    draw = random.Random(SEED)
    monkeypatch.setattr(time, "time", lambda: draw.uniform(0, 4e9))
    jumping = replace(options, out=tmp_path / "jumping")
    with pytest.raises(KeyboardInterrupt):
        train(jumping, log=at_step(5, interrupt))
    train(replace(jumping, resume=True), log=lambda _: None)
    assert run_page(figures([jumping.out]))
    plain, jumped = newest_state(options.out), newest_state(jumping.out)
    assert plain and jumped and jumped.weights_sha256 == plain.weights_sha256


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_a_closed_pipe_ends_a_command_quietly(line: str, home: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*warm.command(), "-c", "import cli; cli.main()", *shlex.split(line)]
    ended = subprocess.run(command, cwd=home, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert ended.returncode in (0, 1) and not {"Traceback", "BrokenPipeError", "error:"} & {*ended.stderr.split()}, (
        ended.stderr
    )
