"""The run report: written while runs train, agreeing with JSON and terminal, served, and never a burden to the run."""

import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from html import unescape
from pathlib import Path

import pytest
import warm
from command_line import Run, fine, refused
from pages import HOSTILE, cards, parsed
from train_runs import make_run, resumption
from waiting import LONG_S

from mmdata.stats.report.page import Translation
from mmtrain.log import history, report, reporter
from mmtrain.model.stages import STAGES


@pytest.fixture
def trained(home: Path, mm: Run) -> Path:
    """A pretrain, an sft and a dpo run on small data."""
    fine(mm("pack --no-report"))
    fine(mm("train pretrain --model tiny --steps 6 --val-every 3 --save-every 2 --quiet"))
    fine(mm("train sft --steps 3 --quiet"))
    fine(mm("train dpo --steps 2 --quiet"))
    return home


def test_runs_keep_a_report_that_agrees_with_json_and_terminal(trained: Path, mm: Run) -> None:
    for name in ("pretrain-1", "sft-1", "dpo-1"):
        assert len((trained / "runs" / name / "report.html").read_bytes()) < 2_000_000
    (runs,) = json.loads(fine(mm("report runs/dpo-1 --json --html run.html")).out)["chains"]
    assert [run["stage"] for run in runs] == ["pretrain", "sft", "dpo"]
    html = Path("run.html").read_text(encoding="utf-8")
    printed = fine(mm("report")).out  # the newest
    shown = cards(html)
    for label, value, _ in report.glance(runs[-1]):
        assert shown[label] == value
        assert re.search(rf"^{label} +{re.escape(value)}(?!\S)", printed, re.M), (label, printed)
    lines = (trained / "runs/dpo-1/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines if '"loss"' in line]
    assert runs[-1]["tokens"] == sum(step["tokens"] for step in steps)
    assert runs[0]["events"][0] == {"step": 2, "event": "save", "note": ""} | {
        key: runs[0]["events"][0][key] for key in ("tokens", "hours")
    }
    texts, asked = ((trained / f"data/{name}.jsonl").read_text(encoding="utf-8") for name in ("pretrain_hq", "dpo"))
    assert all(s["prompt"] in texts for s in runs[0]["samples"]) and runs[0]["samples"]
    assert all(f'"{s["prompt"]}"' in asked for s in runs[2]["samples"]) and runs[2]["samples"]
    settings = runs[0]["settings"]
    assert settings["steps"] == {"value": 6, "from": "flag"} and unescape(html).count("flag") >= 2
    assert 'lang="zh-CN"' in report.run_page({"chains": [runs]}, lang="zh")


def test_report_and_samples_can_be_left_away(home: Path, mm: Run) -> None:
    fine(mm("pack data/pretrain_hq.jsonl --no-report"))
    fine(mm("train pretrain --model tiny --steps 2 --quiet --no-report --no-samples"))
    run = home / "runs/pretrain-1"
    assert not (run / "report.html").exists() and not (run / "samples.jsonl").exists()
    facts = json.loads((run / "run.json").read_text())
    assert "matmul_flops" not in facts
    fine(mm("train pretrain --model tiny --steps 2 --quiet"))
    losses = [
        [
            record["loss"]
            for record in history.read_records(home / f"runs/pretrain-{n}/metrics.jsonl", history.Metrics)
            if "loss" in record
        ]
        for n in (1, 2)
    ]
    assert losses[0] == losses[1]  # to the last bit: what the model says touches nothing
    assert json.loads((home / "runs/pretrain-2/run.json").read_text())["matmul_flops"] > 1e7


def test_a_resumed_run_says_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    for step in (2, 4, 6):
        history.append(path, [history.Sample(step, "a", "\u2028\n")])
    with path.open("a") as file:
        file.write('{"step": 8, "pro')
    history.cut_after(path, 4)
    assert [one.step for one in history.read_records(path, history.Sample)] == [2, 4]


def test_reports_take_their_share_of_time_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(reporter.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(reporter, "sample_answers", lambda *_: clock.__setitem__(0, clock[0] + 2.0) or [])
    make_run(tmp_path / "run", 5)
    kept = reporter.Reporter(tmp_path / "run", first_step=5, with_report=False, prompts=["Hello"])
    spent = 0.0
    for step in range(1, 101):
        clock[0] += 10.0  # of training
        before = clock[0]
        kept.validated(step, None, None, "sft", is_last=False)  # type: ignore[arg-type]
        spent += clock[0] - before
        assert spent <= max(2.0, 0.01 * clock[0])
    assert spent >= 8.0
    before = clock[0]
    kept.validated(101, None, None, "sft", is_last=True)  # type: ignore[arg-type]
    assert clock[0] == before + 2.0


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_and_answers_are_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run"
    make_run(
        path,
        6,
        device_name=text,
        resumed=[resumption(3, text)],
        data=[{"dir": text, "digest": text}],
        versions={text: text},
    )
    history.append(path / "samples.jsonl", [history.Sample(4, text, text)])
    figures = history.figures([path])
    html = report.run_page(figures)
    plain = parsed(report.run_page(json.loads(json.dumps(figures).replace(json.dumps(text)[1:-1], "plain"))))
    assert [tag for tag, _ in parsed(html).tags] == [tag for tag, _ in plain.tags]


def test_every_kind_of_event_is_marked_and_explained(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 900, resumed=[resumption(300, "CPU")])
    with (tmp_path / "run/events.jsonl").open("w") as file:
        for step in range(1, 901):
            file.write(json.dumps({"step": step, "event": "save", "note": ""}) + "\n")
        file.write(json.dumps({"step": 500, "event": "halved", "note": "512 tokens"}) + "\n")
    html = report.run_page(history.figures([tmp_path / "run"]))
    specs = [json.loads(script) for script in parsed(html).scripts if script.startswith('{"kind"')]
    assert len(specs) >= 4
    for spec in specs:
        by_kind: dict[str, list[int]] = {}
        for mark in spec["marks"]:
            by_kind.setdefault(mark["said"], []).append(mark["x"]["step"])
        saves = by_kind.pop("save")
        assert by_kind == {"skip": [8], "resume": [300], "halved": [500]}
        assert saves == list(range(15, 901, 15)) and len(saves) == report.MOST_MARKS
        assert {mark["kind"] for mark in spec["marks"] if mark["said"] == "save"} == {"tick"}
    assert "↻ resume · ✕ skip · ½ halved · ticks at the foot: saves" in html
    assert "900 saves, 60 of them shown" in html
    make_run(tmp_path / "other", 30)
    both = report.run_page(history.figures([tmp_path / "run", tmp_path / "other"]))
    spec = next(json.loads(script) for script in parsed(both).scripts if script.startswith('{"kind"'))
    assert {mark["color"] for mark in spec["marks"]} == {0, 1} and len(both.encode()) < 2_000_000


def test_curves_of_two_runs_are_parted_and_changed_settings_come_first(tmp_path: Path) -> None:
    make_run(tmp_path / "base", 20, stage="pretrain")
    make_run(tmp_path / "next", 10, stage="sft", init=str(tmp_path / "base"))
    html = report.run_page(history.figures([tmp_path / "next"]))
    loss = json.loads(next(script for script in parsed(html).scripts if script.startswith('{"kind"')))["series"][0]
    gap = loss["y"].index(None)
    assert loss["y"].count(None) == 1
    for places in loss["x"].values():
        assert len(places) == len(loss["y"]) and places == sorted(places)
        assert places[gap - 1] < places[gap] < places[gap + 1]
    make_run(tmp_path / "after", 10, stage="sft", init=str(tmp_path / "next"))
    html = report.run_page(history.figures([tmp_path / "after"]))
    loss = json.loads(next(script for script in parsed(html).scripts if script.startswith('{"kind"')))["series"][0]
    assert loss["y"].count(None) == 2
    make_run(tmp_path / "one", 10)
    (runs,) = history.figures([tmp_path / "one"])["chains"]
    of_dpo = {"beta": {"value": 0.0, "from": "default"}, "guard": {"value": "", "from": "default"}}
    assert runs[-1]["stage"] != "dpo"  # whose settings are not shown for another stage
    runs[-1]["settings"] |= {"clip": {"value": 1.0, "from": "default"}, **of_dpo}
    (section,) = (section for section in report.sections_of([runs]) if section.id == "settings")
    changed, rest = section.blocks
    assert [row[0] for row in changed.rows] == ["lr"] and [row[0] for row in rest.blocks[0].rows] == ["clip"]


def test_a_stage_of_new_weights_is_told_from_one_that_goes_on(tmp_path: Path) -> None:
    make_run(tmp_path / "base", 4, stage="pretrain")
    make_run(tmp_path / "next", 4, stage="sft", init=str(tmp_path / "base"))
    make_run(tmp_path / "alone", 4, stage="sft")
    pages = [report.run_page(history.figures([tmp_path / name])) for name in ("base", "next", "alone")]
    assert ["alone began with new weights" in html for html in pages] == [False, False, True]


def test_several_runs_lie_over_each_other(tmp_path: Path) -> None:
    for name, number in (("loss", 30), ("b", 20)):
        make_run(tmp_path / name, number, fill=0.9, matmul_flops=1e9)
    html = report.run_page(history.figures([tmp_path / "loss", tmp_path / "b"]), lang="zh")
    specs = [json.loads(script) for script in parsed(html).scripts if script.startswith('{"kind"')]
    assert {series["name"] for series in specs[0]["series"]} == {"loss: 训练", "loss: 验证", "b: 训练", "b: 验证"}
    assert len(html.encode()) < 2_000_000


def test_follow_serves_fresh_pages_to_this_machine_alone(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 5)
    code = (
        "import sys\nfrom pathlib import Path\nfrom mmtrain.log import history, report\n"
        "make = lambda: report.run_page(history.figures([Path(sys.argv[1])]), refresh_s=1)\n"
        "report.serve(make, 0, on_start=lambda url: print(url, flush=True))\n"
    )
    server = subprocess.Popen([*warm.command(), "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(LONG_S, server.kill)
    timer.start()
    try:
        assert server.stdout
        url = server.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        first = urllib.request.urlopen(url).read().decode()
        assert 'data-refresh="1"' in first and "connect-src 'self'" in first and cards(first)["step"] == "5"
        with (tmp_path / "run/metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 6, "loss": 1.0, "tokens": 10, "tokens_per_s": 5.0}) + "\n")
        assert cards(urllib.request.urlopen(url).read().decode())["step"] == "6"
        for wrong in (f"{url}run.json", urllib.request.Request(url, headers={"Host": "example.org:80"})):
            with pytest.raises(urllib.error.HTTPError) as refusal:
                urllib.request.urlopen(wrong)
            assert refusal.value.code == 404
            refusal.value.close()
        (tmp_path / "run/run.json").unlink()
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(url)
        assert refusal.value.code == 503
        refusal.value.close()
    finally:
        timer.cancel()
        server.kill()
        server.wait()
        server.stdout.close()  # type: ignore[union-attr]


def test_mistakes_are_answered(home: Path, mm: Run) -> None:
    refused(mm("report"), "no run under runs")
    refused(mm("report runs/nothing"), "run.json")
    make_run(home / "runs/a-1", 3)
    refused(mm("report runs/a-1 --lang fr"), "fr")
    refused(mm("report runs/a-1 --follow --json"), "--follow")


def test_report_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import mmtrain.log.report, mmtrain.log.history"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_every_stage_has_a_name_in_chinese() -> None:
    assert all(Translation("zh")(stage) != stage for stage in STAGES)
