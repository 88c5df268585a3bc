"""Training that saves, validates and reports as often as it can, beside a server: memory, open files and objects stay level.

SOAK_MINUTES sets how long it takes, 5 in `make faults`; with -s of pytest it prints a line of figures at each report."""

import ctypes
import gc
import json
import os
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from serving import served
from test_serve import HELLO, ask
from train_data import Data
from train_runs import config_of

from mmdata.io.files import write_text
from mmtrain.convert.foreign import open_model
from mmtrain.inference.engine import Engine
from mmtrain.log.history import figures
from mmtrain.log.report import run_page
from mmtrain.train.loop import train
from mmtrain.train.run import STOP_FILE

MINUTES = float(os.environ.get("SOAK_MINUTES", 5 * ("FAULTS_SEED" in os.environ)))
STEPS = 2_000_000 if MINUTES else 200
REPORTS = 40 if MINUTES else 8


@pytest.mark.slow
def test_a_long_run_keeps_its_memory_and_files(data: Data, tmp_path: Path) -> None:
    process, begun, run = psutil.Process(), time.monotonic(), tmp_path / "run"
    seen: list[tuple[int, int, int]] = []
    libc = ctypes.CDLL(None)
    settings = {"model": "tiny", "save_every": 5, "val_every": 5, "log_every": 5, "keep_last": 2}

    def chat(url: str) -> None:
        body = {"model": "runs-a", "messages": HELLO, "max_tokens": 16}
        assert ask(url, body)[1]["choices"]
        content, kind = json.dumps({**body, "stream": True}).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/chat/completions", content, kind)) as response:
            assert response.readline()  # and leaves

    def watch(line: str) -> None:
        words = line.split()
        if words[0] != "step" or "/" not in words[1]:
            return
        step, seconds = int(words[1].partition("/")[0]), time.monotonic() - begun
        share = seconds / (60 * MINUTES) if MINUTES else step / STEPS
        if step % 25 == 0:
            chat(old)
        is_saved = any((run / "checkpoints").glob("step-*"))
        if is_saved and share * REPORTS >= len(seen) + 1 <= REPORTS:
            with served(Engine(*open_model(run), remember=8)) as newest:
                chat(newest)
            write_text(tmp_path / "report.html", run_page(figures([run])))
            gc.collect()
            if hasattr(libc, "malloc_trim"):
                libc.malloc_trim(0)  # what was freed and is only kept
            seen.append((process.memory_info().rss, process.num_fds(), len(gc.get_objects())))
            print(f"step {step:7d} | {seconds:6.0f} s | {seen[-1][0] / 2**20:6.1f} MiB | {seen[-1][1:]}", flush=True)
        if MINUTES and share >= 1 and len(seen) == REPORTS:
            (run / STOP_FILE).touch()

    train(config_of("sft", data, tmp_path / "first", model="tiny", steps=5))
    with served(Engine(*open_model(tmp_path / "first"), remember=8)) as old:
        train(config_of("sft", data, run, **settings, steps=STEPS), log=watch)
    middle, end = seen[REPORTS // 2 - 1], seen[-1]
    assert len(seen) == REPORTS and abs(end[1] - middle[1]) <= 4  # connections that just end
    assert end[2] - middle[2] < 2000 and end[0] - middle[0] < 16 * 2**20
    assert len(list((run / "checkpoints").glob("step-*"))) <= 3
