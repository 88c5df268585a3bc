"""`mm pack --plan` and the options chosen from the data: what they foresee against what packing then gives."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import Run, fine
from pack_data import MAKERS, write_rows

from mmdata.errors import InputError
from mmdata.pack.estimate import Survey, estimate, max_len_for, survey, val_fraction_for
from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_a_file_read_whole_is_foreseen_exactly(tmp_path: Path, tokenizer_dir: Path, kind: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", kind, 300)
    found = estimate(
        [path], PackOptions(tokenizer=tokenizer_dir), max_lens=(32, 1024), batch_tokens=lambda epoch, _: 100
    )
    assert found.kind == kind and found.rows == 300 and found.read_bytes == found.bytes == path.stat().st_size
    for outlook in found.outlooks:
        out = tmp_path / str(outlook.max_len)
        options = PackOptions(tokenizer=tokenizer_dir, max_len=outlook.max_len, val_fraction=0, max_bad="1")
        result = pack([path], out, options)
        assert (outlook.tokens, outlook.loss_tokens) == (result.tokens, result.loss_tokens)
        assert outlook.cut_tokens == sum(result.cut.values())
        assert outlook.rows_too_long == result.left_out.get("too long", 0)
        assert outlook.samples == sum(result.samples.values())
        assert outlook.padding == pytest.approx(1 - result.fill, abs=1e-9)
        written = sum(f.stat().st_size for d in ("train", "sources") for f in (out / d).rglob("*.arrow"))
        assert outlook.disk_bytes == pytest.approx(written, rel=0.25, abs=12_000)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".jsonl"] == ["rows.jsonl"]


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_a_condition_is_foreseen(tmp_path: Path, tokenizer_dir: Path, kind: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", kind, 200)
    where = "not duplicate and tokens > 30 and characters < avg(characters)"
    options = PackOptions(tokenizer=tokenizer_dir, max_len=512, where=where, max_bad="1")
    found = estimate([path], options, max_lens=[512])
    packed = pack([path], tmp_path / "packed", options)
    assert found.rows_not_selected == packed.left_out["not selected"] > 0 and found.rows == 200
    assert (found.outlooks[0].tokens, found.outlooks[0].loss_tokens) == (packed.tokens, packed.loss_tokens)
    assert survey([path], options).rows == 200 - found.rows_not_selected


def test_a_sample_foresees_the_whole(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmdata.pack.estimate.LEAST_BYTES", 30_000)
    monkeypatch.setattr("mmdata.pack.estimate.BLOCK_BYTES", 2_000)
    path = write_rows(tmp_path / "rows.jsonl", "conversation", 3000)
    with path.open("a") as file:
        file.write("not json\n" * 300)
    found = estimate([path], PackOptions(tokenizer=tokenizer_dir), max_lens=(64,))
    assert found.read_bytes < 0.1 * found.bytes
    result = pack(
        [path], tmp_path / "out", PackOptions(tokenizer=tokenizer_dir, max_len=64, val_fraction=0, max_bad="1")
    )
    assert found.outlooks[0].tokens == pytest.approx(result.tokens, rel=0.1)
    assert found.outlooks[0].steps_per_epoch is None


def test_what_cannot_be_planned_is_an_error(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("nonsense\n")
    with pytest.raises(InputError):
        estimate([tmp_path / "bad.jsonl"], PackOptions(tokenizer=tokenizer_dir))


def test_the_command_says_it_and_writes_nothing(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    import cli

    path = write_rows(tmp_path / "rows.jsonl", "document", 50)
    before = sorted(tmp_path.iterdir())
    cli.app(["pack", str(path), "--plan", "--json", "--tokenizer", str(tokenizer_dir)], standalone_mode=False)
    (found,) = json.loads(capsys.readouterr().out)
    assert [outlook["max_len"] for outlook in found["outlooks"]] == [512, 1024, 2048]
    assert all(outlook["steps_per_epoch"] >= 1 for outlook in found["outlooks"])
    cli.app(["pack", str(path), "--plan", "--tokenizer", str(tokenizer_dir)], standalone_mode=False)
    said = capsys.readouterr()
    assert "steps" in said.out and "--dedup" not in said.err
    cli.app(["pack", str(path), "--plan", "--dedup", "exact", "--tokenizer", str(tokenizer_dir)], standalone_mode=False)
    assert "note: rows that --dedup and" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_the_survey_counts_what_packing_keeps_whole(tmp_path: Path, tokenizer_dir: Path, kind: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", kind, 300)
    found = survey([path], PackOptions(tokenizer=tokenizer_dir))
    assert found.rows == 300 and len(found.lengths) >= 300
    whole = pack([path], tmp_path / "whole", PackOptions(tokenizer=tokenizer_dir, max_len=4096, val_fraction=0))
    if kind != "pair":  # of a pair only the longer side counts
        assert int(found.lengths.sum()) == whole.tokens
    enough = found.quantile(0.9)
    assert (found.lengths <= enough).mean() >= 0.9 and (found.lengths <= enough - 64).mean() < 0.9
    assert found.kept(4096) == 1 and found.kept(1) == 0 < found.kept(enough)


def test_max_len_and_val_fraction_follow_from_the_data() -> None:
    def of(*lengths: int) -> Survey:
        return Survey(len(lengths), np.sort(np.array(lengths)), np.ones(len(lengths)))

    assert max_len_for(of(*[100] * 1000, 512)) == 512
    assert max_len_for(of(*[100] * 1100, 513)) == 512  # 0.5 % of the tokens may be cut
    assert max_len_for(of(*[100] * 1000, 600)) == 1024
    assert max_len_for(of(*[100] * 10, 9000)) == max_len_for(of(*[1500] * 9)) == 2048
    assert max_len_for(of()) == 512
    counts = (0, 10, 150, 1000, 3000, 4999, 5000, 10**7)
    assert [val_fraction_for(count) for count in counts] == [0.2, 0.2, 0.2, 0.05, 0.02, 0.02, 0.01, 0.01]


def test_pack_says_what_it_chose_and_what_was_too_long(home: Path, mm: Run) -> None:
    path = home / "data/sft_512.jsonl"
    turn = {"role": "assistant", "content": "one and two " * 700}
    row = json.dumps({"conversations": [{"role": "user", "content": "Count."}, turn]})
    path.write_text(path.read_text() + f"{row}\n" * 60)
    packed = fine(mm("pack data/sft_512.jsonl"))
    assert "--max-len 2048: " in packed.err and "--val-fraction 0.167: about 50 of 300 rows" in packed.err
    packed = fine(mm("pack data/sft_512.jsonl --max-len 1024 --val-fraction 0.01"))
    (line,) = (line for line in packed.err.splitlines() if "too long" in line)
    assert "20.0% of the rows do not fit --max-len 1024; --max-len " in line and line.endswith("would keep 99%")
    enough = line.split()[-4]
    packed = fine(mm(f"pack data/sft_512.jsonl --max-len {enough}"))
    assert "kept 300 of 300 rows" in packed.out and "too long" not in packed.err
