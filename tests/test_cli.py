"""What a person at the terminal meets: every command end to end on small data, and every mistake answered in two lines."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from command_line import Run, fine, refused
from recipe_runs import in_process

import cli
from mmdata.demo import corpus as demo
from mmtrain.commands.demo import print_demo
from mmtrain.commands.train import newest_dataset, resume_command


def test_the_literal_commands_lead_from_jsonl_to_an_answer(home: Path, mm: Run) -> None:
    """`mm pack --max-len 1024`, `mm train …` without further arguments find what the one before made."""
    packed = fine(mm("pack --max-len 1024"))
    assert packed.out.count("kept ") == 3 and "next: mm train" in packed.err
    fine(mm("verify shards/pretrain_hq shards/sft_512 shards/dpo"))
    assert "\nnext: mm train sft    or    mm chat" in fine(mm("train pretrain --model tiny --steps 3 --quiet")).err
    fine(mm("train sft --steps 2 --quiet"))
    fine(mm("train sft --steps 2 --quiet"))
    assert json.loads((home / "runs/sft-2/run.json").read_text())["init"]["dir"].endswith(
        "runs/sft-1/checkpoints/step-2"
    )
    ran = fine(mm("train dpo --steps 2 --json --quiet"))
    assert json.loads(ran.out)["final_step"] == 2
    answer = json.loads(fine(mm("chat --prompt 'one and two?' --max-new-tokens 5 --json")).out)
    assert answer["prompt"] == "one and two?" and isinstance(answer["answer"], str)
    assert fine(mm("chat runs/sft-1 --prompt hello --max-new-tokens 3")).out.endswith("\n")


def test_the_data_that_pack_names_is_what_train_takes(home: Path, mm: Run) -> None:
    shutil.copy(home / "data/pretrain_hq.jsonl", home / "data/more.jsonl")
    assert "next: mm train pretrain --data shards/pretrain_hq\n" in fine(mm("pack")).err
    assert newest_dataset("pretrain") == Path("shards/pretrain_hq")
    assert "next: mm train pretrain --data shards/more\n" in fine(mm("pack data/more.jsonl --max-len 256")).err
    assert newest_dataset("pretrain") == Path("shards/more")


def test_packing_again_has_nothing_to_do(home: Path, mm: Run) -> None:
    fine(mm("pack data/sft_512.jsonl"))
    before = (home / "shards/sft_512/manifest.json").read_bytes()
    assert "up to date" in fine(mm("pack data/sft_512.jsonl")).out
    assert (home / "shards/sft_512/manifest.json").read_bytes() == before


def test_standard_input_is_packed_and_kept(home: Path, mm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (home / "data/sft_512.jsonl").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    refused(mm("pack -"), "--out")
    fine(mm("pack - --out shards/piped"))
    assert (home / "shards/piped.jsonl").read_bytes() == content
    assert json.loads((home / "shards/piped/manifest.json").read_text())["inputs"][0]["path"] == "shards/piped.jsonl"


def test_show_gives_programs_every_row_in_source_order(home: Path, mm: Run) -> None:
    fine(mm("pack"))
    for name in ("pretrain_hq", "sft_512", "dpo"):
        rows = [json.loads(line) for line in fine(mm(f"show shards/{name} --split all --json")).out.splitlines()]
        assert [row["line"] for row in rows] == list(range(1, 241))
        for row in rows:
            for ids, mask in (
                ("input_ids", "loss_mask"),
                ("chosen_ids", "chosen_mask"),
                ("rejected_ids", "rejected_mask"),
            ):
                if ids in row:
                    assert len(row[ids]) == len(row[mask])
                    assert set(row[mask]) <= {0, 1}


def test_show_marks_the_trained_tokens(home: Path, mm: Run) -> None:
    fine(mm("pack"))
    shown = fine(mm("show shards/sft_512 --index 0")).out
    assert "assistant\n⟦" in shown and "<|im_end|>\n⟧" in shown
    first = json.loads((home / "data/sft_512.jsonl").read_text().splitlines()[0])
    preview = fine(mm("show data/sft_512.jsonl --ids")).out
    assert f"⟦{first['conversations'][1]['content']}<|im_end|>\n⟧" in preview and "input_ids: " in preview


def test_stats_agree_between_terminal_and_json(home: Path, mm: Run) -> None:
    fine(mm("pack data/sft_512.jsonl"))
    figures = json.loads(fine(mm("stats shards/sft_512 --json")).out)["shards/sft_512"]
    printed = fine(mm("stats shards/sft_512")).out
    for key in ("rows", "tokens", "loss_tokens"):
        assert f"{figures[key]:,}" in printed
    raw = json.loads(fine(mm("stats data/sft_512.jsonl --json")).out)["data/sft_512.jsonl"]
    assert (raw["rows"], raw["tokens"]) == (figures["rows"], figures["tokens_in"])


def test_validate_counts_every_bad_row_with_its_line(home: Path, mm: Run) -> None:
    path = home / "data/sft_512.jsonl"
    path.write_bytes(path.read_bytes() + b'{"conversations": []}\nnot json\n\xff\xfe\n')
    found = json.loads(fine(mm("validate data/sft_512.jsonl --json")).out)[0]
    assert found["reasons"] == {"no messages": 1, "not json": 1, "bad UTF-8": 1}
    assert [found["places"][reason][0]["line"] for reason in ("no messages", "not json", "bad UTF-8")] == [
        241,
        242,
        243,
    ]
    printed = fine(mm("validate data/sft_512.jsonl"))
    assert "no messages" in printed.out and "241" in printed.out
    refused(mm("validate data/sft_512.jsonl --on-bad fail"), "sft_512.jsonl line 241")
    refused(mm("pack data/sft_512.jsonl --on-bad fail"), "sft_512.jsonl line 241")
    packed = fine(mm("pack data/sft_512.jsonl"))
    assert "left out 3" in packed.out
    assert len((home / "shards/sft_512/rejected/part-00000.jsonl").read_text().splitlines()) == 3
    refused(mm("pack data/sft_512.jsonl --max-bad 1%"), "1.00%")
    refused(mm("pack data/sft_512.jsonl --max-bad 'not json=0'"), "not json")
    refused(mm("validate data/sft_512.jsonl --max-bad 5%,no-such=1%"), "no-such")


def left_behind(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "shards").glob("*")) if (home / "shards").exists() else []


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"this is not jsonl\n" * 9, "not json"),
        (b'{"other": 1}\n' * 9, "unknown fields"),
    ],
    ids=["empty", "blank", "not jsonl", "no known field"],
)
def test_a_file_without_rows_is_refused_and_nothing_is_left(home: Path, mm: Run, content: bytes, word: str) -> None:
    (home / "data/bad.jsonl").write_bytes(content)
    for command in ("pack", "validate", "stats"):
        refused(mm(f"{command} data/bad.jsonl"), "bad.jsonl", word)
    assert left_behind(home) == []


def test_missing_inputs_are_named(home: Path, mm: Run) -> None:
    refused(mm("pack data/none.jsonl"), "data/none.jsonl")
    refused(mm("pack data/sft_512.jsonl --tokenizer nowhere"), "nowhere")
    refused(mm("verify shards/none"), "shards/none")
    refused(mm("stats shards"), "shards")
    refused(mm("show data/sft_512.jsonl --index 9999"), "9999")
    refused(mm("chat"), "runs")
    refused(mm("chat data"), "data")
    refused(mm("train sft"), "shards")
    refused(mm("train nonsense"), "nonsense")
    shutil.rmtree(home / "data/tokenizer")
    refused(mm("pack data/sft_512.jsonl"), "tokenizer")
    shutil.rmtree(home / "data")
    refused(mm("pack"), "data")
    refused(mm("validate"), "data")


def test_a_stage_refuses_what_does_not_fit_it(home: Path, mm: Run) -> None:
    fine(mm("pack"))
    refused(mm("train pretrain --model tiny --data shards/dpo"), "mm train dpo")
    refused(mm("train pretrain --model nonsense"), "nonsense")
    refused(mm("train pretrain --model tiny --resume"), "resume")
    fine(mm("train pretrain --model tiny --steps 1 --quiet"))
    refused(mm("train pretrain --model tiny --steps 1 --out runs/pretrain-1"), "--resume")
    refused(mm("train sft --init runs/pretrain-1 --model tiny"), "--model")


def test_a_damaged_shard_is_named(home: Path, mm: Run) -> None:
    fine(mm("pack data/sft_512.jsonl"))
    shard = next((home / "shards/sft_512/train").rglob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    ran = refused(mm("verify shards/sft_512"), str(shard.relative_to(home / "shards/sft_512")))
    assert ran.code == 1
    shard.write_bytes(content[:-100])
    refused(mm("stats shards/sft_512"), shard.name)
    refused(mm("train sft --model tiny --data shards/sft_512"), shard.name)


def test_a_directory_that_is_no_dataset_is_never_replaced(home: Path, mm: Run) -> None:
    (home / "precious").mkdir()
    (home / "precious/thesis.txt").write_text("mine")
    refused(mm("pack data/sft_512.jsonl --out precious"), "precious")
    assert (home / "precious/thesis.txt").read_text() == "mine"


def test_one_bad_file_does_not_stop_the_others(home: Path, mm: Run) -> None:
    (home / "data/a.jsonl").write_text(
        '{"conversations": [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]}\n'
    )
    ran = refused(mm("pack"), "a.jsonl")
    assert left_behind(home) == ["dpo", "pretrain_hq", "sft_512"] and ran.out.count("wrote ") == 3


def test_every_command_has_an_example_in_its_help(mm: Run) -> None:
    import typer

    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert {"fetch", "validate", "pack", "show", "verify", "stats", "train", "chat", "demo"} <= set(commands)
    names = [*commands, *(f"{group} {name}" for group in commands for name in getattr(commands[group], "commands", ()))]
    for name in names:
        shown = fine(mm(f"{name} --help")).out
        assert f"Example: mm {name}" in shown, name


@pytest.mark.parametrize("num_each", [2, pytest.param(demo.NUM_EACH, marks=pytest.mark.slow)])
def test_the_demo_goes_through_all_stages_and_scores_each(
    num_each: int, home: Path, mm: Run, narrow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too short to learn anything; that it learns is measured by `mm demo` itself. With all questions if slow tests run."""
    monkeypatch.setattr(demo, "NUM_EACH", num_each)
    texts = demo.tokenizer_texts
    monkeypatch.setattr(demo, "tokenizer_texts", lambda splits: texts(splits)[::30])
    in_process(monkeypatch)
    refused(mm("demo --out data --minutes 0.01"), "data")
    (home / "d/runs/old").mkdir(parents=True)
    (home / "d/demo.json").touch()  # an earlier demo, which is replaced
    as_json = num_each == 2
    shown = fine(mm(f"demo --out d --minutes 0.01{' --json' if as_json else ''}")).out
    figures = json.loads((home / "d/demo.json").read_text(encoding="utf-8"))
    assert json.loads(shown) == figures if as_json else "dpo" in shown
    assert [stage["stage"] for stage in figures["stages"]] == ["pretrain_hq", "sft_512", "sft_1024", "dpo"]
    assert all(0 <= stage["exact"] <= 1 and stage["by_subject"] for stage in figures["stages"])
    assert len(figures["stages"][-1]["transcript"]) == 5 and figures["questions"] == 2 * len(demo.SUBJECTS) * num_each
    fine(mm("verify d/shards/sft_512 d/shards/dpo"))
    assert fine(mm("chat d/runs/dpo --prompt hello --max-new-tokens 2")).out
    assert not (home / "d/runs/old").exists()


@pytest.mark.usefixtures("forked_workers")
def test_an_input_that_stands_in_another_is_warned_of(home: Path, mm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (home / "data" / "sft_512.jsonl").read_text().splitlines()
    (home / "data" / "part.jsonl").write_text("\n".join(lines[:20]) + "\n")
    done = fine(mm("pack data/part.jsonl data/sft_512.jsonl --no-report --max-len 128"))
    assert "rows of data/part.jsonl stand in data/sft_512.jsonl too" in done.err
    once = "mm pack --no-report --max-len 128 data/part.jsonl data/sft_512.jsonl --out shards/NAME --dedup exact"
    assert done.err.split("take them once: ")[1].splitlines()[0] == once
    done = fine(mm("pack data/part.jsonl data/sft_512.jsonl --no-report --out shards/once --dedup exact"))
    assert "warning" not in done.err and "duplicate" in done.out
    monkeypatch.setattr("mmdata.commands.pack.MOST_COMPARED", 19)
    assert "rows are too many to compare" in fine(mm("pack data/part.jsonl data/sft_512.jsonl --no-report")).err


def test_a_short_demo_says_why_a_figure_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = {
        "stage": "sft",
        "exact": 0.5,
        "sentences": 1.0,
        "preference_accuracy": 0.5,
        "minutes": 0.1,
        "transcript": [],
    }
    for more, is_said in (({}, True), ({"bits_per_byte": 1.0}, False)):
        print_demo({"questions": 2, "minutes": 0.1, "stages": [stage | more]}, tmp_path)
        assert ("-: in so short a demo no row" in capsys.readouterr().out) == is_said


def test_a_share_of_very_few_rows_is_worded(home: Path, mm: Run) -> None:
    line = (home / "data" / "sft_512.jsonl").read_text().splitlines()[0]
    (home / "two.jsonl").write_text(f"{line}\n{line}\n")
    assert "perhaps none of 2 rows are held out" in mm("pack two.jsonl --plan").err


def test_an_interrupted_run_is_resumed_with_its_options_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = "mm train sft --init runs/a --out runs/b --device cpu --max-skipped 3 --resume"
    monkeypatch.setattr(sys, "argv", argv.split())
    assert resume_command(Path("runs/b")) == "mm train sft --device cpu --max-skipped 3 --out runs/b --resume"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resume_command(Path("runs/b")).endswith("--out runs/b --nproc 2 --resume")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of torchrun
    assert "--nproc" not in resume_command(Path("runs/b"))


def test_a_dataset_of_shards_that_is_not_published_says_what_publishes_it(home: Path, mm: Run) -> None:
    early = refused(mm("pack data/sft_512.jsonl --finish"), "no --shard has packed one here", "that they share")
    assert "goes on from there" not in early.err
    fine(mm("pack data/sft_512.jsonl --shard 1/2 --part-size 2000"))
    early = refused(mm("pack data/sft_512.jsonl --finish --part-size 2000"), "not packed yet: those of --shard 2/2")
    assert "parts are done and kept in" in early.err and "goes on from there" not in early.err
    for line in ("train sft --data shards/sft_512", "train sft --data sft_512"):
        refused(mm(line), "shards/sft_512 is not published yet", "--finish")
    for line in ("show shards/sft_512", "stats shards/sft_512", "lineage shards/sft_512"):
        refused(mm(line), "shards/sft_512 is not published yet", "--finish")
    refused(mm("train sft"), "the packing of sft_512 has not ended")


def test_shards_of_a_pack_and_weights_by_the_command_line(home: Path, mm: Run) -> None:
    path = "data/sft_512.jsonl --out shards/several --no-report"
    assert "parts of others are left" in fine(mm(f"pack {path} --shard 1/2")).out
    fine(mm(f"pack {path} --shard 2/2"))
    fine(mm(f"pack {path} --finish"))
    assert mm(f"pack {path} --shard two").code == 2
    assert "every shard is as packed" in fine(mm("verify shards/several --repair")).out
