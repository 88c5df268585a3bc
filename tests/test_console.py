"""What a run prints while it works: phases that take long, the live line of a terminal, and lines that fit 80 columns."""

import io
import math
import os
import signal
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmdata.commands.terminal import fitting
from mmtrain.distributed import StopSignals
from mmtrain.log import console, metrics
from mmtrain.log.console import Console, bar, duration
from mmtrain.shapes import MODEL_SHAPES
from mmtrain.train.preflight import Needs, too_long


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_phase_that_takes_long_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SOON_S", 0.0)
    monkeypatch.setattr(console, "AGAIN_S", 0.0)
    said: list[str] = []
    has_come = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if "1 of 4" in text or "about" in text:
            has_come.set()

    with Console(say).phase("reference logps", "pairs") as update:
        update(1, 4)
        assert has_come.wait(60)
    assert any(text.startswith("reference logps: 1 of 4 pairs, 0s, 0s left") for text in said)
    has_come.clear()
    with Console(say).phase("forecast", seconds=90.0):
        assert has_come.wait(60)
    assert said[-1].startswith("forecast: 0s of about 1m30s")
    num_said = len(said)
    monkeypatch.setattr(console, "SOON_S", 1e6)
    with Console(say).phase("short") as update:
        update(1, 2)
    with Console(None).phase("quiet"):
        pass
    assert len(said) == num_said and threading.active_count() == 1 + sum(
        thread.name != "phase" for thread in threading.enumerate()[1:]
    )


def test_the_live_line_is_drawn_over_and_gives_way_to_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(console, "DRAW_S", 0.0)
    monkeypatch.setenv("COLUMNS", "40")
    out = Console(console.print_line, is_live=True)
    out.live(lambda: "step 1 " + "=" * 60)
    out.live(lambda: "step 2")
    out.say("a line of more than forty characters is wrapped between words")
    assert terminal.getvalue() == (
        f"step 1 {'=' * 32}\r\033[2Kstep 2\r\033[2Ka line of more than forty characters is\n  wrapped between words\n"
    )
    out.live(lambda: "step 3")
    out.close()
    assert terminal.getvalue().endswith("step 3\r\033[2K")
    Console(None, is_live=True).live(lambda: "never")
    Console(console.print_line).live(lambda: "never")
    assert "never" not in terminal.getvalue()


NEEDS = Needs(
    shape=MODEL_SHAPES["minimind2-small"],
    num_params=10**8,
    tokens_per_epoch=10**9,
    num_steps=10**6,
    run_tokens=10**10,
    optimal_tokens=0,
    batch_tokens=65_536,
    micro_tokens=131_072,
    parts={"weights": 123_400_000_000},
    free_bytes=10**12,
    seconds=400_000.0,
    tokens_per_s=987_654.0,
    disk_bytes=10**12,
    free_disk_bytes=10**13,
    largest_micro_tokens=8192,
)
RECORD: dict[str, Any] = {"step": 2_000, "loss": 10.123, "lr": 1e-4, "grad_norm": 123.45, "tokens_per_s": 999_900.0}
PAIRS = {"loss": 0.69314, "accuracy": 0.62, "reward_margin": -12.345, "chosen_drift": -1.0}


@pytest.mark.parametrize("of_pairs", [{}, PAIRS])
@pytest.mark.parametrize("num_skipped", [0, 12])
def test_lines_of_steps_and_validations_fit_80_columns(of_pairs: dict[str, float], num_skipped: int) -> None:
    said: list[str] = []
    log = metrics.MetricsLog(None, num_steps=4_000, first_step=0, log_every=1, console=Console(said.append))
    log.step({**RECORD, **of_pairs, "skipped": num_skipped})
    of_pairs = of_pairs and {**of_pairs, "guard_loss": 1.234}
    figures = {"loss": 10.123, "bits_per_byte": 1.2345, **of_pairs, "loss/one": 3.0, "loss/two": 2.0}
    log.val({"step": 2_000} | {f"val_{name}": value for name, value in figures.items()}, 1_234)
    assert [line for line in said if len(line) > 80] == []
    loss = figures["loss"]
    assert said[0].startswith(f"step 2000/4000 | loss {loss:.3f} | ") and " | eta " in said[0]
    assert said[1].startswith(f"step 2000/4000 val | loss {loss:.4g} ")
    assert said[1].endswith(f"1,234 {'pairs' if of_pairs else 'rows'}")
    assert said[2:] == ["  one: val loss 3", "  two: val loss 2"]


def test_steps_are_printed_by_time_as_well_as_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    log = metrics.MetricsLog(None, num_steps=99, first_step=0, log_every=10, console=Console(said.append))
    for step in (1, 2, 3, 10):
        monkeypatch.setattr(metrics, "LINE_S", 0.0 if step == 3 else math.inf)
        log.step({**RECORD, "step": step, "skipped": 0})
    assert [line.split()[1] for line in said] == ["1/99", "3/99", "10/99"]


def test_ctrl_c_is_answered_at_once_and_the_next_one_ends() -> None:
    answers: list[str] = []
    with StopSignals(lambda: answers.append("stopping")) as stop:
        assert not stop.is_set
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set and answers == ["stopping"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert answers == ["stopping"]


def test_bars_and_durations() -> None:
    assert [bar(share) for share in (0.0, 0.5, 1.0)] == ["[          ]", "[=====     ]", "[==========]"]
    assert [duration(seconds) for seconds in (0.4, 67, 7500)] == ["0s", "1m07s", "2h05m"]


def test_a_run_too_long_for_the_machine_is_told_with_a_smaller_choice() -> None:
    source = SimpleNamespace(source=None, step=0)
    plan: Any = SimpleNamespace(num_steps=1000, start=source, shape=replace(MODEL_SHAPES["minimind2-small"]))
    needs = replace(NEEDS, num_params=25_829_888, seconds=19 * 3600.0)
    cpu = torch.device("cpu")
    assert too_long(plan, needs, cpu) == (
        "warning: 25.8M parameters on this CPU take 19h00m; --model tiny: 22m10s, or --steps 26: 30m00s"
    )
    assert too_long(plan, needs, torch.device("cuda")) == too_long(plan, replace(needs, seconds=7000.0), cpu) == ""
    source.source, source.step = "a run", 100
    assert too_long(plan, needs, cpu).endswith("take 19h00m; --steps 123: 30m00s")


def test_needs_count_what_comes_before_the_steps_and_fit_80_columns() -> None:
    needs = replace(NEEDS, reference_s=3000.0, forecast_s=50.0)
    assert [line for line in needs.lines() if len(line) > 80] == []
    assert "reference logps 50m00s, forecast 50s" in needs.lines()[0]
    assert needs.probe_tokens() == pytest.approx(0.03 * 400_000 * 987_654 * 0.6)


def test_words_of_progress_give_way_where_they_do_not_fit() -> None:
    words = "14.9% of 35.2 MB, 35 s left, 9,896 rows, 857.1 kB/s"
    assert fitting(words, 5) == "14.9% of 35.2 MB" and fitting(words, len(words)) == words
    assert fitting(words, 38) == "14.9% of 35.2 MB, 35 s left"
    assert fitting(words, 39) == "14.9% of 35.2 MB, 35 s left, 9,896 rows"
