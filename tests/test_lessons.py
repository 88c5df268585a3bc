"""The lessons of docs/learn: the figures that they call exact hold, and every command runs, in order, on a small demo."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import Build

from mmdata.demo.corpus import CONTROL_TOKENS, VOCAB_SIZE
from mmtrain.shapes import shape_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = {page.stem[2:]: page for page in sorted((ROOT / "docs" / "learn").glob("*.md"))}
SHORTER = {r"--steps \d+": "--steps 3", r"--epochs \d+": "--epochs 1", r"--limit-bytes \d+": "--limit-bytes 100000"}


def adapters(rank: int) -> int:
    """Parameters of adapters beside all matrices of the demo's blocks: rank x (inputs + outputs) of each."""
    shape = shape_of("demo", VOCAB_SIZE)
    width, inner, keys = shape.hidden_size, shape.ffn_size, shape.num_kv_heads * shape.head_size
    matrices = [(width, width), (width, keys), (width, keys), (width, width), *3 * [(width, inner)]]
    return shape.num_layers * sum(rank * (inputs + outputs) for inputs, outputs in matrices)


def exact() -> list[tuple[str, str]]:
    """Lesson, and a figure that stands in it."""
    shape = shape_of("demo", VOCAB_SIZE)
    width, inner, heads, keys = shape.hidden_size, shape.ffn_size, shape.head_size, shape.num_kv_heads * shape.head_size
    attention = shape.num_layers * width * (2 * width + 2 * keys)
    feed_forward = shape.num_layers * 3 * width * inner
    norms = shape.num_layers * 2 * (width + heads) + width
    assert VOCAB_SIZE * width + attention + feed_forward + norms == shape.num_params
    return [
        ("tokens", f"{len(CONTROL_TOKENS)} control tokens"),
        ("tokens", f"{VOCAB_SIZE - 256 - len(CONTROL_TOKENS):,} merges: together {VOCAB_SIZE:,}"),
        ("tokens", f"{VOCAB_SIZE:,} × {width} = {VOCAB_SIZE * width:,} of {shape.num_params:,} parameters"),
        ("loss", f"ln V = ln {VOCAB_SIZE:,} = {math.log(VOCAB_SIZE):.3f}"),
        ("loss", f"ln 6,400 = {math.log(shape_of('minimind2', 6400).vocab_size):.3f}"),
        ("loss", f"ln 2 = {math.log(2):.3f}"),
        *(("pretraining", f"{count:,} |") for count in (VOCAB_SIZE * width, attention, feed_forward, norms)),
        ("pretraining", f"| | | {shape.num_params:,} |"),
        ("pretraining", f"compute-optimal for this size are {20 * shape.num_params:,}"),
        ("instruction-tuning", f"adapters of rank 8: {adapters(8):,} parameters"),
        ("preferences", f"ln 2 = {math.log(2):.4f}"),
    ]


@pytest.mark.parametrize(("lesson", "figure"), exact())
def test_figures_that_follow_from_sizes_are_right(lesson: str, figure: str) -> None:
    assert figure in re.sub(r"\s+", " ", PAGES[lesson].read_text(encoding="utf-8"))


def test_lessons_are_short_and_each_leads_to_the_next() -> None:
    pages = sorted(PAGES.values())
    assert [page.name[0] for page in pages] == list("12345678")
    for page, following in pairwise(pages):
        assert f"]({following.name})" in page.read_text(encoding="utf-8")
    assert max(len(page.read_text(encoding="utf-8").splitlines()) for page in pages) <= 165


# --- the commands


def shell(commands: str, directory: Path) -> str:
    """Run lines of a shell, of which each must succeed; return what they print. mm and python are those of this test."""
    names = directory / "names"
    names.mkdir(exist_ok=True)
    for name, words in (("mm", "-m cli"), ("python", "")):
        (names / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (names / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{names}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    ran = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", commands],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"{commands}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout + ran.stderr


@pytest.fixture
def demo(built_once: Build, tmp_path: Path) -> Path:
    """A copy of a small demo run."""
    made = built_once("small_demo", lambda out: shell("mm demo --minutes 0.45", out))
    return Path(shutil.copytree(made / "demo", tmp_path / "demo"))


@pytest.mark.slow
@pytest.mark.parametrize("lesson", PAGES)
def test_every_command_of_a_lesson_runs(lesson: str, demo: Path) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGES[lesson].read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    printed = ""
    for block in blocks:
        for pattern, instead in SHORTER.items():
            block = re.sub(pattern, instead, block)
        printed += shell(block, demo)
    check = CHECKS.get(lesson)
    if check:
        check(printed, demo)


def first_loss_is_that_of_a_guess(printed: str, demo: Path) -> None:
    """New weights begin a little above ln V, and the loss by hand is the mean over its lines."""
    first = json.loads((demo / "runs/pretrain_hq/metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert 0 < first["loss"] - math.log(VOCAB_SIZE) < 0.3
    losses = [float(loss) for loss in re.findall(r"-ln p +([\d.]+)", printed)]
    found = re.search(r"^loss: ([\d.]+), perplexity ([\d.]+)", printed, re.M)
    assert found
    assert float(found[1]) == pytest.approx(sum(losses) / len(losses), abs=2e-3)
    assert float(found[2]) == pytest.approx(math.exp(float(found[1])), rel=5e-3)


def packed_rows_do_not_see_each_other(printed: str, demo: Path) -> None:
    alone, joined = re.findall(r"alone or \w+, largest difference: ([\d.]+)", printed)
    assert float(alone) < 1e-4 < float(joined)


def loss_by_hand_is_that_of_mm_eval(printed: str, demo: Path) -> None:
    measured = re.search(r"against the reference: loss ([\d.]+)", printed)
    by_hand = re.search(r"mean loss ([\d.]+)", printed)
    assert measured and by_hand
    assert float(by_hand[1]) == pytest.approx(float(measured[1]), abs=2e-4)
    assert "warning: nothing will happen" in printed


CHECKS = {
    "packing": packed_rows_do_not_see_each_other,
    "loss": first_loss_is_that_of_a_guess,
    "preferences": loss_by_hand_is_that_of_mm_eval,
}
