from collections.abc import Callable
from pathlib import Path

import pytest
from pack_data import write_rows

from mmdata.errors import DatasetError, InputError, TokenizerError
from mmdata.pack import part as parts
from mmdata.pack import repair
from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack
from mmdata.shards.verify import verify


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = write_rows(tmp_path / "rows.jsonl", "document", 120)
    path.write_text(path.read_text() + "not json\n")
    return path


@pytest.fixture
def dataset(tmp_path: Path, tokenizer_dir: Path, rows: Path) -> Path:
    options = {"tokenizer": tokenizer_dir, "max_len": 256, "part_bytes": 8000, "val_fraction": 0.1}
    return pack([rows], tmp_path / "out", PackOptions(**options)).out


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file() and not p.name.startswith(".")
    }


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize(
    "pattern", ["train/b0256/part-00001.arrow", "sources/part-00000.arrow", "rejected/*", "stats.json"]
)
def test_damaged_files_are_rebuilt_to_the_same_bytes(
    tmp_path: Path, dataset: Path, pattern: str, damage: Callable[[Path], None]
) -> None:
    before = tree(dataset)
    path = next(iter(dataset.glob(pattern)))
    damage(path)
    assert [problem.shard for problem in verify(dataset)] == [str(path.relative_to(dataset))]
    assert repair.repair(dataset) == [str(path.relative_to(dataset))]
    assert tree(dataset) == before and verify(dataset) == [] and repair.repair(dataset) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "rows.jsonl"]


def test_only_damaged_parts_are_packed_again(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = parts.PartPacker.__call__
    monkeypatch.setattr(
        parts.PartPacker, "__call__", lambda self, part, tick: (seen.append(part.number), real(self, part, tick))[1]
    )
    for shard in dataset.glob("*/*/part-00002.arrow"):
        flip(shard)
    repair.repair(dataset)
    assert seen == [2] and verify(dataset) == []


@pytest.mark.parametrize("change", ["changed", "missing"])
def test_inputs_that_are_not_the_same_are_named_and_nothing_is_touched(dataset: Path, rows: Path, change: str) -> None:
    flip(next(dataset.glob("train/*/*.arrow")))
    before = tree(dataset)
    if change == "changed":
        rows.write_text(rows.read_text().replace("tide", "edit"))
    else:
        rows.unlink()
    with pytest.raises(InputError, match=r"rows\.jsonl") as caught:
        repair.repair(dataset)
    assert caught.value.fix and tree(dataset) == before


def test_a_swapped_tokenizer_is_put_back_from_the_one_named(tmp_path: Path, dataset: Path, tokenizer_dir: Path) -> None:
    before = tree(dataset)
    flip(dataset / "tokenizer" / "tokenizer.json")
    flip(next(dataset.glob("train/*/*.arrow")))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json") as caught:
        repair.repair(dataset)
    assert "--tokenizer DIR" in caught.value.fix
    repair.repair(dataset, tokenizer_dir=tokenizer_dir)
    assert tree(dataset) == before


def test_other_bytes_from_the_same_inputs_are_refused(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(next(dataset.glob("train/*/*.arrow")))
    before = tree(dataset)
    monkeypatch.setattr(parts.dataset, "TOKENS_PER_BATCH", 512)
    with pytest.raises(DatasetError, match="other bytes"):
        repair.repair(dataset)
    assert tree(dataset) == before
