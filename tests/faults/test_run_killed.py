"""`mm run` of the demo's recipe, killed and terminated at random moments with real processes and run again: the weights of every
stage are those of an undisturbed run. `make faults` takes the whole recipe and ten moments."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from damage import SEED
from waiting import wait_until

from mmtrain.commands.project import runner
from mmtrain.commands.project.recipe import RECIPES
from mmtrain.records import newest_state

IS_THOROUGH = "FAULTS_SEED" in os.environ
KILLS = 10 if IS_THOROUGH else 3
SCALE = ["--set", f"demo.minutes={0.45 if IS_THOROUGH else 0.045}", "--set", "questions=[]"]


def recipe(path: Path) -> list[str]:
    """The words of `mm run` for the demo's recipe, or for its first stage alone."""
    text = (RECIPES / "demo.toml").read_text(encoding="utf-8")
    if not IS_THOROUGH:
        text = "".join(
            table
            for table in re.split(r"^(?=\[)", text, flags=re.MULTILINE)
            if not re.match(r"\[\w+\.(sft|dpo)", table)
        )
    path.write_text(text, encoding="utf-8")
    return [sys.executable, str(runner.PROGRAM), "run", path.name, *SCALE]


def weights(root: Path) -> dict[str, str]:
    """Hash of the weights that each stage ends with."""
    states = {path.name: newest_state(path) for path in (root / "runs").iterdir()}
    return {name: state.weights_sha256 for name, state in states.items() if state}


@pytest.mark.slow
def test_the_demo_killed_at_random_moments_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    for root in (whole, killed):
        root.mkdir()
        command = recipe(root / "demo.toml")
    begun = time.monotonic()
    undisturbed = subprocess.run(command, cwd=whole, capture_output=True, text=True, check=False)
    assert undisturbed.returncode == 0, undisturbed.stderr
    took, draw, ends = time.monotonic() - begun, random.Random(SEED), []
    for _ in range(KILLS):
        end = time.monotonic() + draw.uniform(0, 2 * took / KILLS)
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=killed, stderr=file, stdout=file, start_new_session=True)
        wait_until(lambda end=end, process=process: time.monotonic() >= end or process.poll() is not None)
        how = draw.choice(("kill", "kill with its step", "terminate"))
        if process.poll() is None and how == "kill with its step":
            os.killpg(process.pid, signal.SIGKILL)
        elif process.poll() is None:
            process.send_signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
        process.wait()
        ends.append((how, process.returncode))
        assert "Traceback" not in log.read_text(), f"{ends} (FAULTS_SEED={SEED})"
    ended = subprocess.run(command, cwd=killed, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    print(f"{took:.0f} s undisturbed; {ends}; weights {weights(killed)}")
    assert weights(killed) == weights(whole), f"{ends} (FAULTS_SEED={SEED})"
    assert len(weights(whole)) == (4 if IS_THOROUGH else 1)
    assert any(code for _, code in ends)
