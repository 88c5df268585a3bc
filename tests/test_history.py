"""What is told of runs, against plain sums over metrics.jsonl; files that a kill has torn; chains of runs."""

import json
import os
from pathlib import Path

import pytest
from train_runs import make_run

from mmdata.errors import CheckpointError
from mmtrain.log import history
from mmtrain.log.flops import peak_flops


def test_totals_and_curves_are_plain_sums(tmp_path: Path) -> None:
    records = make_run(tmp_path / "run", 23, matmul_flops=1e6, fill=0.5)
    run = history.run_figures(tmp_path / "run")
    seconds = [record["tokens"] / record["tokens_per_s"] for record in records]
    assert run["tokens"] == sum(record["tokens"] for record in records)
    assert run["trained_tokens"] == 50 * 23 and run["step"] == 23 and run["skipped"] == 1
    assert run["hours"] == pytest.approx(sum(seconds) / 3600)
    curves = run["curves"]
    assert curves["step"] == list(range(1, 24))
    assert curves["loss"] == pytest.approx([record["loss"] for record in records], rel=1e-5)
    assert curves["tokens"][-1] == run["tokens"] and curves["hours"][-1] == pytest.approx(run["hours"], rel=1e-5)
    assert curves["padded_per_s"] == pytest.approx([2 * record["tokens_per_s"] for record in records])
    flops = [6 * (800 * record["tokens"] + 200 * 50) for record in records]
    assert curves["mfu"] == pytest.approx([f / s / 1e6 for f, s in zip(flops, seconds, strict=True)], rel=1e-4)
    assert curves["gflops"] == pytest.approx([f / s / 1e9 for f, s in zip(flops, seconds, strict=True)], rel=1e-4)
    assert set(curves["memory_gb"]) == {1.0}
    assert [v["step"] for v in run["vals"]] == [5, 10, 15, 20]
    assert run["vals"][1]["tokens"] == sum(record["tokens"] for record in records[:10])
    assert run["last"]["best_val_step"] == 20
    assert [e["step"] for e in run["events"] if e["event"] == "skip"] == [8]
    json.dumps(run, allow_nan=False)


def test_the_usual_mfu_is_of_the_datasheets_peak_with_attention_and_without(tmp_path: Path) -> None:
    facts = {"device_name": "NVIDIA A100-SXM4-80GB", "precision": "bfloat16", "sequence_length": 64.0, "world_size": 2}
    records = make_run(tmp_path / "run", 9, **facts)
    curves = history.run_figures(tmp_path / "run")["curves"]
    rates = [record["tokens_per_s"] for record in records]
    weights = [6 * (800 + 200 * 50 / record["tokens"]) for record in records]
    attention = 12 * 1 * 20 * 64  # layers x width x length
    for name, more in (("mfu_peak", 0), ("mfu_attention", attention)):
        expected = [rate * (flops + more) / 624e12 for rate, flops in zip(rates, weights, strict=True)]
        assert curves[name] == pytest.approx(expected, rel=1e-4, abs=1e-15)
    assert "mfu" not in curves  # no rate was measured


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 NVL", "bfloat16", 835),
        ("NVIDIA H200", "bfloat16", 989),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA L4", "bfloat16", 121),
        ("Tesla T4", "float16", 65),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA GeForce RTX 4090 D", "bfloat16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("CPU", "float32", None),
    ],
)
def test_the_peak_of_a_card_is_its_datasheets(name: str, precision: str, tflops: float | None) -> None:
    assert peak_flops(name, precision) == (tflops and pytest.approx(1e12 * tflops))


def test_long_runs_are_thinned_to_means(tmp_path: Path) -> None:
    records = make_run(tmp_path / "run", 1000)
    curves = history.run_figures(tmp_path / "run")["curves"]
    assert len(curves["loss"]) == history.POINTS == len(curves["tokens"]) and curves["step"][-1] == 1000
    assert curves["loss"][0] == pytest.approx((records[0]["loss"] + records[1]["loss"]) / 2, rel=1e-4)
    assert curves["loss_low"][-1] <= curves["loss"][-1] <= curves["loss_high"][-1]
    sizes = [b - a for a, b in zip([0, *curves["step"]], curves["step"], strict=False)]
    mean = sum(size * loss for size, loss in zip(sizes, curves["loss"], strict=True)) / 1000
    assert mean == pytest.approx(sum(record["loss"] for record in records) / 1000, rel=1e-4)


def test_what_is_missing_or_not_finite_is_null(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 3)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "loss": None, "grad_norm": None, "tokens": 9, "tokens_per_s": 0}) + "\n")
        file.write('["step"]\n{"step": "x"}\nnot json\n{"step": 5, "lo')  # the last one torn
    run = history.run_figures(tmp_path / "run")
    assert run["step"] == 4 and run["curves"]["loss"][3] is None and run["curves"]["lr"][3] is None
    json.dumps(run, allow_nan=False)


@pytest.mark.parametrize("figures", ['"loss": %s' % ("9" * 400), '"loss": NaN', '"loss": 1, "tokens": 1e999'])
def test_figures_of_any_size_are_read(tmp_path: Path, figures: str) -> None:
    make_run(tmp_path / "run", 3)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 4, {figures}}}\n{{"step": {"9" * 400}, "loss": 1}}\n{{"step": -1, "loss": 1}}\n')
        file.write(f'{{"step": 4, {figures.replace("loss", "val_loss")}}}\n')
    run = history.run_figures(tmp_path / "run")
    assert run["step"] == 4 and run["curves"]["loss"][3] in (None, 1) and run["last"]["val_loss"] in (None, 1)
    json.dumps(run, allow_nan=False)


def test_a_log_reads_what_came_since(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 4)
    path = tmp_path / "run/metrics.jsonl"
    log = history.MetricsReader(path)
    log.update()
    assert log.steps.num_steps == 4
    lines = path.read_text()
    path.write_text(lines + '{"step": 5, "loss"')
    log.update()
    path.write_text(lines + '{"step": 5, "loss": 1.0}\n')
    log.update()
    log.update()
    assert log.steps.columns["step"].tolist() == [1, 2, 3, 4, 5]
    path.write_text("".join(lines.splitlines(keepends=True)[:2]))  # cut by a resume
    log.update()
    assert log.steps.columns["step"].tolist() == [1, 2]
    path.write_text("".join(f'{{"step": {step}, "loss": 9.0}}\n' for step in range(1, 30)))  # cut, and grown past it
    log.update()
    assert log.steps.columns["loss"].tolist() == [9.0] * 29


def test_a_chain_is_joined_where_each_run_began(tmp_path: Path) -> None:
    first = make_run(tmp_path / "pretrain-1", 20, stage="pretrain")
    second = make_run(tmp_path / "sft-1", 10, init=str(tmp_path / "pretrain-1/checkpoints/step-15"))
    make_run(tmp_path / "dpo-1", 5, stage="dpo", init="elsewhere/sft-1/checkpoints/step-10")  # moved: found beside it
    runs = history.chain(tmp_path / "dpo-1")
    assert [run["name"] for run in runs] == ["pretrain-1", "sft-1", "dpo-1"]
    before = sum(record["tokens"] for record in first[:15])
    assert runs[0]["step"] == 15 and runs[1]["offset"]["tokens"] == before
    assert runs[2]["offset"]["tokens"] == before + sum(record["tokens"] for record in second)
    assert runs[2]["offset"]["step"] == 25
    told = history.figures([tmp_path / "pretrain-1", tmp_path / "dpo-1", tmp_path / "sft-1"])
    assert [[run["name"] for run in found] for found in told["chains"]] == [["pretrain-1", "sft-1", "dpo-1"]]


def test_a_chain_ends_where_an_ancestor_is_gone_or_comes_again(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 3, init=str(tmp_path / "gone/checkpoints/step-3"))
    (run,) = history.chain(tmp_path / "a")
    assert run["missing"] == str(tmp_path / "gone")
    make_run(tmp_path / "b", 3, init=str(tmp_path / "b/checkpoints/step-3"))
    assert len(history.chain(tmp_path / "b")) == 1
    with pytest.raises(CheckpointError, match=r"run\.json"):
        history.figures([tmp_path / "nothing"])


def test_a_reader_reads_only_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "pretrain-1", 20, stage="pretrain")
    make_run(tmp_path / "sft-1", 10, init=str(tmp_path / "pretrain-1/checkpoints/step-15"))
    read: list[str] = []
    plain = history.run_figures
    monkeypatch.setattr(history, "run_figures", lambda path, **more: read.append(path.name) or plain(path, **more))
    reader = history.RunReader()
    first = history.figures([tmp_path / "sft-1"], reader)
    assert sorted(read) == ["pretrain-1", "sft-1"]
    assert history.figures([tmp_path / "sft-1"], reader) == first and len(read) == 2
    with (tmp_path / "sft-1/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 11, "loss": 1.0, "tokens": 10, "tokens_per_s": 5.0}) + "\n")
    (tmp_path / "sft-1/events.jsonl").write_text(json.dumps({"step": 11, "event": "save"}) + "\n")
    found = history.figures([tmp_path / "sft-1"], reader)
    assert read[2:] == ["sft-1"] and found == history.figures([tmp_path / "sft-1"])
    assert found["chains"][0][1]["step"] == 11 and len(found["chains"][0][1]["events"]) == 2


def test_an_event_between_two_logged_steps_stands_at_the_earlier_one(tmp_path: Path) -> None:
    records = make_run(tmp_path / "run", 3)
    with (tmp_path / "run/events.jsonl").open("w") as file:
        for step, what in ((0, "save"), (2, "save"), (4, "halved")):
            file.write(json.dumps({"step": step, "event": what}) + "\n")
    events = history.run_figures(tmp_path / "run")["events"]
    tokens = [0, sum(r["tokens"] for r in records[:2]), sum(r["tokens"] for r in records)]
    assert [(event["step"], event["tokens"]) for event in events] == list(zip((0, 2, 4), tokens, strict=True))


def test_the_prompts_of_a_run_are_those_of_its_sample_answers(tmp_path: Path) -> None:
    samples = [history.Sample(step, prompt, "…") for step in (2, 4) for prompt in ("2 + 3?", "你好")]
    history.append(tmp_path / history.SAMPLES, samples)
    for path in (tmp_path, tmp_path / "checkpoints/step-4"):
        assert history.sample_prompts(path) == ["2 + 3?", "你好"]
    assert history.sample_prompts(tmp_path / "model.pth") == []


def test_cutting_a_file_leaves_whole_lines(tmp_path: Path) -> None:
    """A last record without a newline is kept, and what is appended then begins a line of its own."""
    path = tmp_path / "events.jsonl"
    history.cut_after(path, 5)
    assert not path.exists()
    path.write_text(
        '{"step": 1, "event": "save"}\n["no record"]\n{"step": 7, "event": "save"}\n{"step": 2, "event": "save"}'
    )
    history.cut_after(path, 5)
    history.append(path, [history.Event(3, "halved", "512 tokens")])
    assert [(one.step, one.note) for one in history.read_records(path, history.Event)] == [
        (1, ""),
        (2, ""),
        (3, "512 tokens"),
    ]


def test_a_file_may_have_any_number_of_lines_but_none_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history.files, "MAX_WHOLE_BYTES", 1000)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 1.0, "other{step}": 1}}\n' for step in range(1, 101)))
    history.cut_after(path, 90)
    metrics = history.MetricsReader(path)
    metrics.update()
    assert metrics.steps.num_steps == 90 and metrics.steps.columns.keys() == {"step", "loss"}
    os.truncate(path, path.stat().st_size + 2 * history.MAX_LINE_BYTES)
    for read in (metrics.update, lambda: history.cut_after(path, 90)):
        with pytest.raises(OSError, match=r"a line of more than .*metrics\.jsonl"):
            read()
