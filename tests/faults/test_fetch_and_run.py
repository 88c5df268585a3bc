"""`mm fetch` and `mm run` with a disk that fails, is full, read-only or gone at one write after another: an error by name, and the same
command, run again, ends as an undisturbed one does."""

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command_line import Run, fine
from damage import SEED
from recipe_runs import TINY, in_process
from test_failing_disks import CODES, failing_at, numbers

from mmdata.shards.dataset import open_dataset
from mmtrain.records import newest_state

if TYPE_CHECKING:
    from fakehub import FakeHub

IS_THOROUGH = "FAULTS_SEED" in os.environ
GONE = errno.ENOENT  # the directory vanishes


def check(line: str, mm: Run, out: Path, outcome: Callable[[], object], most: int) -> None:
    """Let writes of a command fail, a random one of the ways each; and after each run it again."""
    with failing_at(-1, 0) as count:
        fine(mm(line))
    expected = outcome()
    for number in numbers(count[0], most):
        code = random.Random(f"{SEED} {number}").choice((*CODES, GONE))
        shutil.rmtree(out, ignore_errors=True)
        with failing_at(number, code, out):
            ended = mm(line)
        if ended.code:  # of several files, each that failed has its error
            assert "error: " in ended.err and "fix: " in ended.err and "Traceback" not in ended.err, ended.err
        assert ended.code or code == GONE or outcome() == expected, (number, code, f"FAULTS_SEED={SEED}")
        again = mm(line)
        assert again.code == 0, (number, code, f"FAULTS_SEED={SEED}", ended.err, again.err)
        assert outcome() == expected, (number, code, f"FAULTS_SEED={SEED}", ended.err)


@pytest.mark.parametrize("most", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_fetching(home: Path, hub: "FakeHub", mm: Run, most: int) -> None:
    out = home / "OUT"

    def outcome() -> dict[str, bytes]:
        found = [path for path in out.rglob("[!.]*") if path.is_file()]
        data = [path for path in found if path.suffixes in ([".json"], [".jsonl"])]  # no journal: --clean removes them
        return {str(path.relative_to(out)): path.read_bytes() for path in data}

    check("fetch dpo --tokenizer minimind-3 --out OUT", mm, out, outcome, most)


@pytest.mark.slow
def test_running(home: Path, mm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    (home / "tiny.toml").write_text(TINY, encoding="utf-8")
    out = home / "OUT"

    def outcome() -> dict[str, str]:
        states = {run.name: newest_state(run) for run in (out / "runs").iterdir()}
        weights = {name: state.weights_sha256 for name, state in states.items() if state}
        return weights | {p.parent.name: open_dataset(p.parent).digest for p in out.glob("shards/*/manifest.json")}

    check("run tiny.toml --scale 0.5 --out OUT", mm, out, outcome, 30 if IS_THOROUGH else 4)
