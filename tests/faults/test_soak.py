"""Training that saves, validates, draws samples and reports as often as it can: memory, open files and objects stay level."""

import gc
import os
from pathlib import Path

import psutil
import pytest
from train_data import Data
from train_runs import config_of

from mmdata.io.files import write_text
from mmtrain.log.history import figures
from mmtrain.log.report import run_page
from mmtrain.train.loop import train

STEPS = 4000 if "FAULTS_SEED" in os.environ else 200  # of `make faults` (about five minutes), and of `make test`


@pytest.mark.slow
def test_a_long_run_keeps_its_memory_and_files(data: Data, tmp_path: Path) -> None:
    process, seen = psutil.Process(), {}

    def watch(line: str) -> None:
        words = line.split()
        if words[0] == "step" and words[1].startswith((f"{STEPS // 4}/", f"{STEPS // 2}/", f"{STEPS}/")):
            write_text(tmp_path / "report.html", run_page(figures([tmp_path / "run"])))
            gc.collect()
            step = int(words[1].partition("/")[0])
            seen[step] = (process.memory_info().rss, process.num_fds(), len(gc.get_objects()))

    options = config_of(
        "sft", data, tmp_path / "run", model="tiny", steps=STEPS, save_every=5, val_every=5, keep_last=2
    )
    train(options, log=watch)
    (middle, files, objects), (end, files_at_end, objects_at_end) = seen[STEPS // 2], seen[STEPS]
    assert files_at_end == files and objects_at_end - objects < STEPS
    assert end - middle < 16 * 2**20
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) <= 3
