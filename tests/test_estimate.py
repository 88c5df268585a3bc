"""`mm pack --plan`: what it foresees against what packing then gives."""

import json
from pathlib import Path

import pytest
from pack_data import MAKERS, write_rows

from mmdata.errors import InputError
from mmdata.pack.estimate import estimate
from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_a_file_read_whole_is_foreseen_exactly(tmp_path: Path, tokenizer_dir: Path, kind: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", kind, 300)
    found = estimate([path], PackOptions(tokenizer=tokenizer_dir), max_lens=(32, 1024), batch_tokens=100)
    assert found.kind == kind and found.rows == 300 and found.read_bytes == found.bytes == path.stat().st_size
    for outlook in found.outlooks:
        out = tmp_path / str(outlook.max_len)
        result = pack([path], out, PackOptions(tokenizer=tokenizer_dir, max_len=outlook.max_len, val_fraction=0))
        assert (outlook.tokens, outlook.loss_tokens) == (result.tokens, result.loss_tokens)
        assert outlook.cut_tokens == sum(result.cut.values())
        assert outlook.rows_too_long == result.left_out.get("too long", 0)
        assert outlook.samples == sum(result.samples.values())
        assert outlook.padding == pytest.approx(1 - result.fill, abs=1e-9)
        written = sum(f.stat().st_size for d in ("train", "sources") for f in (out / d).rglob("*.arrow"))
        assert outlook.disk_bytes == pytest.approx(written, rel=0.25, abs=12_000)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".jsonl"] == ["rows.jsonl"]


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
    assert "steps an epoch" in said.out and "--dedup" not in said.err
    cli.app(["pack", str(path), "--plan", "--dedup", "exact", "--tokenizer", str(tokenizer_dir)], standalone_mode=False)
    assert "note: rows that --dedup" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
