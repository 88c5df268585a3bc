"""Rows left out for what other rows or files say: the first stays, whoever packs; counted and listed by reason."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pack_data import MAKERS, pack_with, words, write_rows

from mmdata.errors import InputError, UsageError
from mmdata.pack import repair
from mmdata.pack.filter import dedup
from mmdata.pack.filter.grams import gram_hashes, num_units
from mmdata.pack.pipeline import PackResult
from mmdata.shards.dataset import open_dataset, source_rows
from mmdata.shards.verify import verify


@pytest.fixture
def pack_to(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., PackResult]:
    def run(*inputs: Path, out: str = "out", **options: Any) -> PackResult:
        defaults = {"tokenizer": tokenizer_dir, "max_len": 256, "part_bytes": 5000, "val_fraction": 0.1}
        return pack_with(inputs, tmp_path / out, **defaults | options)

    return run


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def rejected(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for p in sorted(directory.glob("rejected/*")) for x in p.read_text().splitlines()]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return path


# --- shingles


def test_grams_do_not_depend_on_what_else_is_hashed_with_them() -> None:
    texts = ["one two three four", "", "海上的灯塔", "a", "ONE  two\nthree, four", "!?"]
    together, ends = gram_hashes(texts, 3)
    for i, text in enumerate(texts):
        alone, _ = gram_hashes([text], 3)
        assert together[ends[i] : ends[i + 1]].tolist() == alone.tolist()
    assert np.diff(ends).tolist() == [2, 0, 3, 1, 3, 1]  # the comma is a unit of its own


def test_case_width_and_spaces_are_no_matter_and_order_and_signs_are() -> None:
    first, *rest = (gram_hashes([t], 3)[0].tolist() for t in ("One two three", "ｏｎｅ two\n\tTHREE", "two one three"))
    assert first == rest[0] != rest[1]
    assert gram_hashes(["1 + 1 = 2"], 5)[0].tolist() != gram_hashes(["1 - 1 = 2"], 5)[0].tolist()
    assert num_units("don't 海上 x2") == 6


def test_bands_find_near_texts_as_often_as_their_similarity_says() -> None:
    draw = random.Random(1)
    found = {0.9: 0, 0.5: 0}
    for similarity, share in ((0.9, 0.95), (0.5, 0.667)):  # of |A| = |B| units shared in the middle: s = k / (2 - k)
        for _ in range(200):
            common = [str(draw.random()) for _ in range(int(300 * share))]
            sides = [" ".join([*common, *(str(draw.random()) for _ in range(300 - len(common)))]) for _ in range(2)]
            bands = dedup.band_hashes(sides)
            found[similarity] += bool((bands[0] == bands[1]).any())
    assert found[0.9] > 190 and found[0.5] < 50  # expected: 200 and 12


# --- duplicates


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("workers", [1, 2])
def test_of_equal_rows_the_first_stays_whoever_packs(
    tmp_path: Path, pack_to: Callable[..., PackResult], workers: int
) -> None:
    a = write_rows(tmp_path / "a.jsonl", "conversation", 60)
    lines = a.read_text().splitlines()
    b = tmp_path / "b.jsonl"  # ten of a's rows, spaced otherwise, and one of its own twice
    spaced = [json.dumps(dict(json.loads(line)), indent=None, separators=(" , ", " : ")) for line in lines[20:30]]
    own = write_rows(tmp_path / "own.jsonl", "conversation", 1, seed=99).read_text().strip()
    b.write_text("\n".join([*spaced, own, own]) + "\n")
    result = pack_to(a, b, dedup="exact", workers=workers)
    assert result.left_out == {"duplicate": 11} and result.kept == 61
    kept = [(Path(row["file"]).name, row["line"]) for row in source_rows(open_dataset(result.out))]
    assert kept == [("a.jsonl", n) for n in range(1, 61)] + [("b.jsonl", 11)]
    assert rejected(result.out)[0]["detail"] == f"as {a} line 21" and verify(result.out) == []
    assert open_dataset(result.out).manifest.arguments.dedup == "exact"


def test_shards_slices_and_kills_leave_out_the_same_rows(
    tmp_path: Path, pack_to: Callable[..., PackResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "conversation", 90)
    path.write_text(path.read_text() + path.read_text())
    whole = pack_to(path, dedup="near")
    assert sum(whole.left_out.values()) >= 90 and whole.left_out["duplicate"] >= 90
    monkeypatch.setattr(dedup, "SLICE_ROWS", 20)
    opened: Counter[Path] = Counter()
    real = np.load
    monkeypatch.setattr(np, "load", lambda path, **more: (opened.update([path]), real(path, **more))[1])
    pack_to(path, dedup="near", out="sliced")
    assert max(count for path, count in opened.items() if path.name.endswith(".keys.npy")) == 1
    assert max(opened.values()) == dedup.BANDS, "once a band, not once a slice"

    def interrupt(done: int, total: int) -> None:
        if done > total * 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_to(path, dedup="near", out="killed", progress=interrupt)
    pack_to(path, dedup="near", out="killed")
    for number in (2, 1):
        pack_to(path, dedup="near", out="shards", shard=f"{number}/2")
    pack_to(path, dedup="near", out="shards", finish=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "killed") == tree(tmp_path / "shards")
    assert tree(tmp_path / "out") == tree(tmp_path / "sliced")


def test_near_duplicates_are_left_out_and_others_stay(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    draw = random.Random(4)
    texts = [" ".join(str(draw.randrange(10**6)) for _ in range(60)) for _ in range(20)]
    near = [text.replace(text.split()[30], "changed") + " end" for text in texts[:5]]
    half = [" ".join(text.split()[:30] + [str(draw.random()) for _ in range(30)]) for text in texts[5:10]]
    path = write(tmp_path / "rows.jsonl", [*texts, *near, *half, texts[0]])
    result = pack_to(path, dedup="near", max_len=2048)
    assert result.left_out == {"duplicate": 1, "near duplicate": 5}
    assert [r["line"] for r in rejected(result.out)] == [21, 22, 23, 24, 25, 31]
    assert rejected(result.out)[2]["detail"].endswith("line 3")


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_row_can_be_screened_and_repaired(
    tmp_path: Path, pack_to: Callable[..., PackResult], kind: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", kind, 40)
    path.write_text(path.read_text() * 2)
    result = pack_to(path, dedup="exact", max_len=1024)
    assert result.left_out.get("duplicate", 0) >= 40
    before = tree(result.out)
    next(result.out.glob("train/*/*.arrow")).unlink()
    repair.repair(result.out)
    assert {name: content for name, content in tree(result.out).items() if name in before} == before


# --- excluded files


def test_rows_that_overlap_with_an_excluded_file_are_left_out(
    tmp_path: Path, pack_to: Callable[..., PackResult]
) -> None:
    draw = random.Random(2)
    texts = [" ".join(str(draw.randrange(10**6)) for _ in range(40)) for _ in range(10)]
    question = " ".join(texts[3].split()[10:30])
    chinese = "下面哪一项不是海上航行时使用的灯塔信号装置"
    rows = [*texts, f"请回答：{chinese}？选项如下", "港口 " * 30, " ".join(question.split()[:9]) + " and other words"]
    path = write(tmp_path / "rows.jsonl", rows)
    exclude = tmp_path / "benchmark.jsonl"
    exclude.write_text(json.dumps({"question": question, "answer": "B"}) + "\n" + f"plain text {chinese}\n" + "short\n")
    result = pack_to(path, exclude=[exclude], max_len=1024)
    assert result.left_out == {"overlaps an excluded text": 2} and result.kept == 11
    found = rejected(result.out)
    assert [r["line"] for r in found] == [4, 11] and f"{exclude} line 1" in found[0]["detail"]
    (entry,) = open_dataset(result.out).manifest.arguments.exclude
    assert entry.n == 8 and entry.share == 0.5 and len(entry.sha256) == 64


def test_a_tenth_of_a_text_is_no_overlap_and_half_is() -> None:
    draw = random.Random(3)
    units = [str(draw.randrange(10**6)) for _ in range(107)]  # a hundred 8-grams
    path = Path("unused")
    excluded = dedup.Excluded([])
    grams, _ = gram_hashes([" ".join(units)], 8)
    excluded._grams, excluded._texts = np.unique(grams), np.zeros(len(grams), np.int64)
    excluded._num_grams, excluded._places = np.array([len(grams)]), [f"{path} line 1"]
    shares = {n: excluded.overlaps([" ".join(units[: n + 7])]) for n in (10, 49, 50, 100)}
    assert shares[10] == shares[49] == {} and "50%" in shares[50][0] and "100%" in shares[100][0]


def test_what_cannot_be_is_refused(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "document", 10)
    with pytest.raises(UsageError, match="--dedup"):
        pack_to(path, dedup="fuzzy")
    with pytest.raises(InputError, match="nowhere"):
        pack_to(path, exclude=[tmp_path / "nowhere"])


def test_words_of_the_test_data_are_not_near_by_chance() -> None:
    draw = random.Random(0)
    bands = dedup.band_hashes([words(draw, 60) for _ in range(100)])
    assert all(len(np.unique(column)) > 90 for column in bands.T)
