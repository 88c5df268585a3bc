"""Commands that write files, with a disk that fails at one write after another, and killed at random places: each ends with an
error by name or by the kill, and the same command, run again, writes what an undisturbed one does."""

import errno
import os
import random
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import warm
from command_line import Ran, Run, fine, refused
from damage import SEED
from test_failing_disks import CODES, failing_at, numbers

IS_THOROUGH = "FAULTS_SEED" in os.environ  # make faults
KILLS, FAILURES = (8, 16) if IS_THOROUGH else (2, 4)
# What is written -> the command that writes it, where RUN is a trained run.
COMMANDS = {
    "chosen": "select data/sft_512.jsonl --where 'characters > 20' --sample 90% --shuffle --out OUT/rows.jsonl --rest OUT/rest.jsonl",
    "table": "select data/sft_512.jsonl --dedup exact --out OUT/rows.parquet",
    "tokenizer": "tokenizer train data/sft_512.jsonl --vocab-size 320 --out OUT/tokenizer",
    "longer": "tokenizer extend data/tokenizer --add '<|new|>' --out OUT/longer",
    "page": "stats data/sft_512.jsonl --html OUT/page.html --workers 1",
    "hf": "export RUN --format hf --out OUT/hf",
    "gguf": "export RUN --format gguf --out OUT/gguf",
}
# Counts Python's calls and returns, and is killed at the one of the given number; prints how many there were.
KILLED = """
import os, signal, sys
die_at, events = int(sys.argv.pop(1)), 0

def count(*_):
    global events
    events += 1
    if events == die_at:
        os.kill(os.getpid(), signal.SIGKILL)

import cli
sys.setprofile(count)
try:
    cli.main()
except SystemExit as ended:
    sys.setprofile(None)
    if ended.code:
        raise
print(events)
"""


def written(out: Path) -> dict[str, bytes]:
    """The files under a directory. Of pages only that they are there: they say when they were made. What a kill left of a
    file is removed by the next process that writes there."""
    return {
        str(path.relative_to(out)): b"" if path.suffix == ".html" else path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.suffix not in (".lock", ".partial")
    }


def is_complete(ran: Ran, out: Path, expected: dict[str, bytes]) -> bool:
    """The command wrote what was expected, or found it there and refused to write it again."""
    assert ran.code == 0 or "is not empty" in refused(ran).err, ran.err
    return written(out) == expected


@pytest.fixture
def line(request: pytest.FixtureRequest, home: Path, runs: Path) -> str:
    (home / "OUT").mkdir()
    return COMMANDS[request.param].replace("RUN", shlex.quote(str(runs / "sft")))


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS, indirect=True)
def test_a_failing_disk(line: str, home: Path, mm: Run) -> None:
    out = home / "OUT"
    with failing_at(-1, 0) as count:
        fine(mm(line))
    expected = written(out)
    ways = (*CODES, errno.ENOENT)  # the last: the directory vanishes
    for number in numbers(count[0], FAILURES):
        for code in ways if IS_THOROUGH else [random.Random(f"{SEED} {number}").choice(ways)]:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            with failing_at(number, code, out) as done:
                ended = mm(line)
            if ended.code or done[0] <= number:
                refused(ended)
            out.mkdir(exist_ok=True)
            assert is_complete(mm(line), out, expected), (number, code, f"FAULTS_SEED={SEED}")


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS, indirect=True)
def test_killed_again_and_again(line: str, home: Path, mm: Run) -> None:
    out, draw = home / "OUT", random.Random(SEED)
    fine(mm(line))
    expected = written(out)

    def run(die_at: int) -> tuple[Ran, str]:
        command = [*warm.command(), "-c", KILLED, str(die_at), *shlex.split(line)]
        ran = subprocess.run(command, cwd=home, capture_output=True, text=True, env=dict(os.environ))
        return Ran(ran.returncode, ran.stdout, ran.stderr), ran.stdout.strip().rpartition("\n")[2]

    shutil.rmtree(out)
    out.mkdir()
    ended, num_events = run(0)
    assert is_complete(ended, out, expected)
    for _ in range(KILLS):
        shutil.rmtree(out)
        out.mkdir()
        assert run(draw.randint(1, int(num_events)))[0].code in (0, -signal.SIGKILL)
        assert is_complete(mm(line), out, expected), f"FAULTS_SEED={SEED}"
