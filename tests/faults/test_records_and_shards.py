"""Damaged records and shards: equal results, or one error that names the file."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from damage import SEED, attack, attack_record, refusal, torn
from pack_data import make_old, old_manifest

from mmdata.errors import DatasetError
from mmdata.hub.lockfile import LOCK_NAME, LockEntry, read_lock, write_entry
from mmdata.io.arrow import Ragged, read_arrow, write_arrow
from mmdata.io.files import info_of
from mmdata.shards.dataset import open_dataset, sample_rows, source_rows
from mmdata.shards.verify import verify
from mmdata.stats.stats import dataset_stats

if TYPE_CHECKING:
    from mmdata.pack.pipeline import PackResult

SHARES = [0.15, pytest.param(1.0, marks=pytest.mark.slow)]


@pytest.fixture
def small(packed: "dict[str, PackResult]", tmp_path: Path) -> Path:
    """A copy of the pairs' dataset."""
    return Path(shutil.copytree(packed["pair"].out, tmp_path / "copy"))


def read_everything(directory: Path) -> Any:
    """What is shown, counted and trained on of a dataset."""
    dataset = open_dataset(directory)
    rows = [row for _, row in zip(range(5), source_rows(dataset), strict=False)]
    figures = {**dataset_stats(dataset), "path": ""}
    return dataset.digest, rows, sample_rows(dataset, "train", 0), figures, dataset.split("val").totals, dataset.buckets


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("is_old", [False, True])
def test_a_damaged_manifest(small: Path, share: float, is_old: bool) -> None:
    if is_old:
        make_old(small)
    counts = attack_record(small / "manifest.json", lambda: read_everything(small), share)
    assert counts["refused"] > counts["other"]


@pytest.mark.parametrize("number", [8, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["train", "sources", "stats.json", "parts.jsonl", "tokenizer/tokenizer.json", ".verified.json"]
)
def test_damaged_files_of_a_dataset(small: Path, name: str, number: int) -> None:
    open_dataset(small)
    path = small / name
    path = path if path.is_file() else min(path.rglob("*.arrow"))
    contents = (("torn", one) for one in torn(path.read_bytes(), random.Random(SEED), number))
    attack(path, contents, lambda: read_everything(small), may_differ=False)


def test_another_datasets_sources_are_refused(packed: "dict[str, PackResult]", small: Path) -> None:
    shutil.copy(packed["document"].out / "sources/part-00000.arrow", small / "sources/part-00000.arrow")
    assert "sources/part-00000.arrow" in refusal(lambda: open_dataset(small))[1]


@pytest.mark.parametrize("share", SHARES)
def test_a_damaged_lock(tmp_path: Path, share: float) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    entry = LockEntry(3, "0" * 64, 1, True, 0, 0, "hf", "https://x", "a/b", "dataset", "main", "0", "a.jsonl", True)
    write_entry(tmp_path, "a.jsonl", entry)
    warnings: list[str] = []
    whole = read_lock(tmp_path, warnings)

    def use() -> Any:
        found: list[str] = []
        lock = read_lock(tmp_path, found)
        return whole if found else lock  # a lock that cannot be used is said to be so, and files are hashed

    attack_record(tmp_path / LOCK_NAME, use, share)


# --- files with the right hash that are not what a shard is


def crafted(directory: Path, change: Callable[[dict[str, Any]], Any], name: str = "train") -> None:
    """Rewrite the first shard (or file of sources) with other columns, and its hash in the manifest, as a stranger might."""
    manifest = old_manifest(directory)
    files = manifest["shards"] if name == "train" else manifest["files"]
    entry = next(file for file in files if file["path"].startswith(name))
    path = directory / entry["path"]
    file = read_arrow(path)
    columns = {key: file.column(key) for key in file.batches[0]}
    columns = {
        key: one._replace(values=one.values.copy(), offsets=one.offsets.copy())
        if isinstance(one, Ragged)
        else one.copy()
        for key, one in columns.items()
    }
    changed = change(columns) or columns
    metadata = {key.removeprefix("mm."): value for key, value in file.metadata.items()}
    path.unlink()
    entry.update(write_arrow(path, changed, metadata, 1000)._asdict())
    (directory / "manifest.json").write_text(json.dumps(manifest))


def put(name: str, at: int, value: int, part: str = "values") -> Callable[[dict[str, Any]], None]:
    """A change of one value, or of one offset, of a column."""

    def change(columns: dict[str, Any]) -> None:
        column = columns[name]
        (getattr(column, part) if isinstance(column, Ragged) else column)[at] = value

    return change


STRUCTURES = {
    "id beyond the vocabulary": (put("chosen", 0, 400), "is outside the vocabulary"),
    "span beyond the reply": (put("n_chosen", 0, 9999), "n_chosen"),
    "sequence beyond the part": (put("doc", 0, 2**31), "is beyond"),
    "missing column": (lambda columns: columns.pop("prompt") and None, "prompt is missing"),
    "other list type": (lambda columns: {**columns, "doc": columns["prompt"]}, "doc is of another type"),
    "floats": (lambda columns: {**columns, "doc": columns["doc"].astype("f4")}, "doc is of another type"),
    "signed ids": (lambda c: {**c, "prompt": c["prompt"]._replace(values=c["prompt"].values.astype("i2"))}, "another type"),
    "no rows": (lambda c: {k: Ragged(v.values[:0], v.offsets[:1]) if isinstance(v, Ragged) else v[:0] for k, v in c.items()}, "no rows"),
    "fewer rows": (lambda c: {k: Ragged(v.values[: v.offsets[2]], v.offsets[:3]) if isinstance(v, Ragged) else v[:2] for k, v in c.items()}, "samples"),
}  # fmt: skip


@pytest.mark.parametrize("case", STRUCTURES)
def test_a_crafted_shard_is_refused_on_opening(small: Path, case: str) -> None:
    change, words = STRUCTURES[case]
    crafted(small, change)
    with pytest.raises(DatasetError, match=words):
        open_dataset(small)
    assert any(words in problem.what for problem in verify(small))


def test_offsets_are_validated(small: Path) -> None:
    """Written byte by byte, since pyarrow's writer checks some of them."""
    manifest = old_manifest(small)
    shard = manifest["shards"][0]
    path = small / shard["path"]
    offsets = read_arrow(path).batches[0]["prompt"].offsets
    content, old = path.read_bytes(), offsets.tobytes()
    assert content.count(old) >= 1
    for at, value in ((3, -5), (3, 2**30), (len(offsets) - 1, 2**31 - 1), (0, 4), (2, int(offsets[1]) - 1)):
        changed = offsets.copy()
        changed[at] = value
        path.write_bytes(content.replace(old, changed.tobytes(), 1))
        manifest["shards"][0].update(info_of(path)._asdict())
        (small / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DatasetError, match=shard["path"]):
            open_dataset(small)


@pytest.mark.parametrize("number", [30, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_bytes_with_right_hashes(small: Path, number: int) -> None:
    """The structure is what is left to refuse: flips anywhere in the file, the manifest agreeing."""
    manifest = old_manifest(small)
    path = small / manifest["shards"][0]["path"]
    draw = random.Random(SEED)
    for content in torn(path.read_bytes(), draw, number):
        path.write_bytes(content)
        manifest["shards"][0].update(info_of(path)._asdict())
        (small / "manifest.json").write_text(json.dumps(manifest))
        try:
            refusal(lambda: read_everything(small))
        except BaseException as error:
            raise AssertionError(f"FAULTS_SEED={SEED}") from error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("file", 0, 9), "names input 9"),
        (put("first", 1, 2**31), "do not ascend"),
        (lambda columns: columns.pop("sha") is None or None, "sha is missing"),
    ],
)
def test_crafted_sources_are_refused(small: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    crafted(small, change, "sources")
    assert words in refusal(lambda: open_dataset(small))[1]
