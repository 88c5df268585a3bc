"""How fast and in how much memory data is measured: `python tests/bench/stats.py [--megabytes 1000] [--tokenizer DIR]`.

Makes its own jsonl file of seeded bilingual conversations outside the repository and deletes it; runs `mm stats FILE
--html` on it in a process of its own with two workers, and prints wall time, the peak memory of all its processes together (sum
of their PSS, sampled every 50 ms: a page that several share counts once), and for comparison one pass of json.loads.
With --like FILE the rows are those of conversations in FILEs, repeated with a number in front of each message. With
--columns it collects all columns of `rows` instead, or those that are named.
With --pack it packs the file instead, and prints how long the report takes beside the packing itself.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
ENGLISH = (  # noqa: SIM905
    "the of and to in is that it was for on are with as his they at be this from have or by one had not but what all were when "
    "we there can an your which their said if do will each about how up out them then she many some so these would other into "
    "has more her two like him see time could no make than first been its who now people my made over did down only way find"
).split()
CHINESE = "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"


def said(draw: random.Random, is_chinese: bool, words: int) -> str:
    if is_chinese:
        return (
            "，".join("".join(draw.choices(CHINESE, k=draw.randint(4, 12))) for _ in range(max(1, words // 4))) + "。"
        )
    return " ".join(draw.choices(ENGLISH, k=words)).capitalize() + "."


def write_rows(path: Path, num_bytes: int) -> int:
    """Conversations of about 600 bytes, three in four Chinese, one in fifty a repeat; gives their number."""
    draw = random.Random(0)
    number = written = 0
    last = b""
    with path.open("wb") as file:
        while written < num_bytes:
            if number % 50 == 49:
                line = last
            else:
                is_chinese = draw.random() < 0.75
                turns = draw.choice((1, 1, 1, 2))
                messages = [
                    {
                        "role": role,
                        "content": said(draw, is_chinese, draw.randint(5, 60 if role == "assistant" else 20)),
                    }
                    for role in ("user", "assistant") * turns
                ]
                line = json.dumps({"conversations": messages}, ensure_ascii=False).encode() + b"\n"
            last = line
            file.write(line)
            written += len(line)
            number += 1
    return number


def repeat_rows(path: Path, files: list[Path], num_bytes: int) -> int:
    """The conversations of files over and over, each message with the number of the repetition; gives their number."""
    known = [json.loads(line) for file in files for line in file.read_bytes().splitlines()]
    number = written = 0
    with path.open("wb") as file:
        while written < num_bytes:
            row, turn = known[number % len(known)], number // len(known)
            messages = [{**message, "content": f"{turn} {message['content']}"} for message in row["conversations"]]
            written += file.write(json.dumps({"conversations": messages}, ensure_ascii=False).encode() + b"\n")
            number += 1
    return number


COLLECT = """
import sys
from mmdata.stats.frames import rows
if __name__ == "__main__":
    frame = rows(sys.argv[1], tokenizer=sys.argv[2] or None, workers=int(sys.argv[3]))
    names = sys.argv[4:] or frame.collect_schema().names()
    found = frame.select(names).collect()
    print(found.shape, f"{found.estimated_size() / 1e6:.0f} MB", flush=True)
"""


def resident(pid: int) -> int:
    """Resident bytes of a process and those it started; a page that several share counts once (PSS)."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                total += each.memory_full_info().pss
    return total


def measured(command: list[str]) -> tuple[float, int, float]:
    """Wall seconds, peak resident bytes and CPU seconds of a command and its children."""
    before = os.times()
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0, command
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - start, peak, cpu


def packed(path: Path, tokenizer: Path, workers: int) -> str:
    """Packing and its report, timed."""
    sys.path.insert(0, str(ROOT))
    from mmdata.io.files import write_text
    from mmdata.pack import pipeline
    from mmdata.pack.options import PackOptions
    from mmdata.stats import stats
    from mmdata.stats.report import data

    start = time.monotonic()
    done = pipeline.pack([path], path.with_name("packed"), PackOptions(tokenizer=tokenizer, workers=workers))
    middle = time.monotonic()
    measured = stats.measure_dataset(done.out, is_quick=True)
    write_text(done.out / data.FILE, data.dataset_page([measured]))
    end = time.monotonic()
    return (
        f"packed in {middle - start:.1f} s, report {end - middle:.2f} s, {(end - middle) / (middle - start):.2%} of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--like", type=Path, nargs="+")
    parser.add_argument("--columns", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path, html = Path(scratch) / "rows.jsonl", Path(scratch) / "report.html"
        num_bytes = int(options.megabytes * 1e6)
        number = repeat_rows(path, options.like, num_bytes) if options.like else write_rows(path, num_bytes)
        size = path.stat().st_size / 1e6
        if options.pack:
            print(f"{size:.0f} MB, {number:,} rows: {packed(path, options.tokenizer, options.workers)}")
            return
        if options.columns is not None:
            program = Path(scratch) / "collect.py"
            program.write_text(COLLECT)
            arguments = [str(path), str(options.tokenizer or ""), str(options.workers), *options.columns]
            os.environ["PYTHONPATH"] = str(ROOT)
            wall, peak, cpu = measured([sys.executable, str(program), *arguments])
            print(f"{size:.0f} MB, {number:,} rows: columns in {wall:.1f} s, {cpu:.1f} s CPU, peak {peak / 1e6:.0f} MB")
            return
        start = time.monotonic()
        with path.open("rb") as file:
            for line in file:
                json.loads(line)
        bare = time.monotonic() - start
        command = [sys.executable, "-m", "cli", "stats", str(path), "--html", str(html), "--json"]
        command += ["--workers", str(options.workers)]
        command += ["--tokenizer", str(options.tokenizer)] if options.tokenizer else []
        wall, peak, cpu = measured(command)
        print(
            f"{size:.0f} MB, {number:,} rows, {options.workers} workers: {wall:.1f} s wall ({size / wall:.1f} MB/s), {cpu:.1f} s CPU, "
            f"peak {peak / 1e6:.0f} MB, report {html.stat().st_size / 1e6:.2f} MB; json.loads alone, one process: {bare:.1f} s"
        )


if __name__ == "__main__":
    main()
