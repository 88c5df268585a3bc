"""Commands that write files, with a disk that fails at one write after another, and killed or terminated at random places: each ends
with an error by name or by the signal, no part of a file has the file's name, and the same command, run again, writes what an
undisturbed one does."""

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

from mmdata.io import files

IS_THOROUGH = "FAULTS_SEED" in os.environ  # make faults
KILLS, FAILURES = (8, 16) if IS_THOROUGH else (2, 4)
# What is written -> the command that writes it, where RUN is a trained run.
COMMANDS = {
    "chosen": "select data/sft_512.jsonl --where 'characters > 20' --sample 90% --shuffle --out OUT/rows.jsonl --rest OUT/rest.jsonl",
    "table": "select data/sft_512.jsonl --dedup exact --out OUT/rows.parquet",
    "tokenizer": "tokenizer train data/sft_512.jsonl --vocab-size 320 --out OUT/tokenizer",
    "longer": "tokenizer extend data/tokenizer --add '<|new|>' --out OUT/longer",
    "shards": "pack data/sft_512.jsonl --tokenizer data/tokenizer --max-len 128 --workers 1 --no-report --out OUT/packed",
    "page": "stats data/sft_512.jsonl --html OUT/page.html --workers 1",
    "report": "report RUN --html OUT/page.html",
    "losses": "eval RUN --per-sequence OUT/losses.jsonl --noisiest 3",
    "hf": "export RUN --format hf --out OUT/hf",
    "gguf": "export RUN --format gguf --out OUT/gguf",
}
# Counts Python's calls and returns, and at the one of the given number sends itself a signal; prints how many there were.
SIGNALLED = """
import os, sys
number, at, events = int(sys.argv.pop(1)), int(sys.argv.pop(1)), 0

def count(*_):
    global events
    events += 1
    if events == at:
        os.kill(os.getpid(), number)

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
    """The files under a directory, without hidden ones. Of pages only that they are there: they say when they were made."""
    return {
        str(name): b"" if name.suffix == ".html" else (out / name).read_bytes()
        for name in (path.relative_to(out) for path in out.rglob("*") if path.is_file())
        if not any(part.startswith(".") for part in name.parts)
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
    fine(mm(line))  # also writes what is written once, such as the verified hashes of its inputs
    shutil.rmtree(out)
    out.mkdir()
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
def test_killed_and_terminated_again_and_again(line: str, home: Path, mm: Run) -> None:
    out, draw = home / "OUT", random.Random(SEED)
    fine(mm(line))
    expected = written(out)

    def run(number: int, at: int) -> tuple[Ran, str]:
        shutil.rmtree(out)
        out.mkdir()
        command = [*warm.command(), "-c", SIGNALLED, str(int(number)), str(at), *shlex.split(line)]
        ran = subprocess.run(command, cwd=home, capture_output=True, text=True, env=dict(os.environ))
        return Ran(ran.returncode, ran.stdout, ran.stderr), ran.stdout.strip().rpartition("\n")[2]

    ended, num_events = run(signal.SIGKILL, 0)
    assert is_complete(ended, out, expected)
    for sign in (signal.SIGKILL, signal.SIGTERM) * KILLS:
        at = draw.randint(1, int(num_events))
        where = f"{sign.name} at {at} of {num_events}, FAULTS_SEED={SEED}"
        ended, _ = run(sign, at)
        assert ended.code in ((0, -sign) if sign == signal.SIGKILL else (0, 130)), (where, ended.err)
        assert "Traceback" not in ended.err, (where, ended.err)
        there = written(out)
        assert all(expected.get(name) == content for name, content in there.items()), (where, sorted(there))
        assert sign == signal.SIGKILL or not list(out.rglob("*.partial")), where
        files._remove_partials.cache_clear()  # as in a new process
        assert is_complete(mm(line), out, expected), where
        assert not list(out.rglob("*.partial")), where
