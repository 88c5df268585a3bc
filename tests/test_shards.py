import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import astuple
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from pack_data import CONTROL, make_old, write_rows

from mmdata.encode.encoder import RowEncoder
from mmdata.encode.rows import parse_row
from mmdata.encode.sequences import PairSequence, TokenSequence
from mmdata.errors import DatasetError
from mmdata.io.arrow import Ragged, ragged, read_arrow, take, write_arrow
from mmdata.io.files import info_of
from mmdata.io.lines import iter_lines
from mmdata.pack.options import PackOptions
from mmdata.pack.part import Part, PartPacker, PartSettings
from mmdata.pack.pipeline import PackResult, pack
from mmdata.shards import dataset as shards
from mmdata.shards import loader as loaders
from mmdata.shards.dataset import id_dtype, open_dataset, open_sources, position_dtype, sample_rows, source_rows
from mmdata.shards.pairs import make_loader
from mmdata.shards.verify import verify
from mmdata.tokenizer.tokenizer import Tokenizer

KINDS = ("document", "conversation", "pair")


@pytest.fixture
def dataset_dir(packed: dict[str, PackResult], tmp_path: Path) -> Path:
    """A copy of the conversations' dataset, to be damaged."""
    return Path(shutil.copytree(packed["conversation"].out, tmp_path / "copy"))


def first_shard(directory: Path) -> Path:
    return directory / open_dataset(directory).shards()[0].path


# --- Arrow files


def test_columns_come_back_as_they_were_written_over_several_record_batches(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(0, 9, 50)
    columns = {
        "list": ragged(draw.integers(0, 2**16, lengths.sum()).astype(np.uint16), lengths),
        "number": np.arange(50, dtype=np.uint32),
        "bytes": draw.integers(0, 256, (50, 8)).astype(np.uint8),
    }
    written = write_arrow(tmp_path / "a.arrow", columns, {"kind": "test"}, rows_per_batch=7)
    again = write_arrow(tmp_path / "b.arrow", columns, {"kind": "test"}, rows_per_batch=7)
    content = (tmp_path / "a.arrow").read_bytes()
    assert written == again == (len(content), hashlib.sha256(content).hexdigest())
    file = read_arrow(tmp_path / "a.arrow")
    assert file.metadata == {"mm.kind": "test"} and file.num_rows == 50 and len(file.batches) == 8
    assert np.array_equal(file.column("list").values, columns["list"].values)
    assert np.array_equal(file.column("list").offsets, columns["list"].offsets)
    assert np.array_equal(file.column("number"), columns["number"])
    assert np.array_equal(file.column("bytes"), columns["bytes"])
    assert file.batches[3]["list"].row(2).tolist() == columns["list"].row(23).tolist()


def test_views_lie_in_the_mapped_file_and_cannot_be_written(packed: dict[str, PackResult]) -> None:
    view = open_dataset(packed["conversation"].out).split("train").sample(512, 0)
    assert not view.ids.flags.owndata and not view.ids.flags.writeable
    mapped = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if ".arrow" in line
    ]
    address = view.ids.ctypes.data
    assert any(int(begin, 16) <= address < int(end, 16) for begin, end in mapped)


def test_another_programs_reader_can_read_a_shard(packed: dict[str, PackResult]) -> None:
    import pyarrow as pa

    split = open_dataset(packed["document"].out).split("train")
    table = pa.ipc.open_file(first_shard(packed["document"].out)).read_all()
    table.validate(full=True)
    assert table["ids"][0].as_py() == split.sample(512, 0).ids.tolist()
    assert table.schema.metadata[b"mm.kind"] == b"document" and not table.schema.field("ids").nullable


@pytest.mark.parametrize(("vocab_size", "dtype"), [(400, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_ids_take_two_bytes_while_the_vocabulary_fits(vocab_size: int, dtype: str) -> None:
    assert id_dtype(vocab_size) == dtype


@pytest.mark.parametrize(("bucket", "dtype"), [(2048, "uint16"), (65_535, "uint16"), (65_536, "uint32")])
def test_positions_take_two_bytes_while_the_bucket_fits(bucket: int, dtype: str) -> None:
    assert position_dtype(bucket) == dtype


def test_a_vocabulary_beyond_16_bits_is_kept_whole(tmp_path: Path) -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = [*CONTROL, *(f"filler{i}" for i in range(70_000)), *alphabet]  # all letters have ids beyond 65,535
    native = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)}, []))
    native.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    native.decoder = tokenizers.decoders.ByteLevel()
    native.add_special_tokens(list(CONTROL))
    (tmp_path / "tok").mkdir()
    native.save(str(tmp_path / "tok" / "tokenizer.json"))
    (tmp_path / "tok" / "tokenizer_config.json").write_text('{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}')
    path = write_rows(tmp_path / "rows.jsonl", "document", 20)
    pack([path], tmp_path / "out", PackOptions(tokenizer=tmp_path / "tok", max_len=256))
    assert verify(tmp_path / "out") == []
    dataset = open_dataset(tmp_path / "out")
    assert dataset.split("train").sample(256, 0).ids.dtype == np.uint32
    tokenizer = Tokenizer.load(tmp_path / "tok")
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    found = [tokenizer.decode(row["input_ids"], skip_control=True) for row in source_rows(dataset)]
    assert found == texts


# --- what a dataset says of its rows


@pytest.mark.parametrize("kind", KINDS)
def test_source_rows_are_what_the_encoder_gave_row_by_row(
    packed: dict[str, PackResult],
    tokenizer_dir: Path,
    kind: str,
) -> None:
    dataset = open_dataset(packed[kind].out)
    path = Path(dataset.inputs[0])
    lines = list(iter_lines(path))
    encoded = RowEncoder(Tokenizer.load(tokenizer_dir), max_len=640).encode(
        [parse_row(line.raw, kind) for line in lines]
    )
    assert not encoded.bad
    expected = []
    sequences = iter(encoded.sequences)
    for line, count in zip(lines, encoded.num_sequences.tolist(), strict=True):
        of_row = list(islice(sequences, count))
        record: dict[str, Any] = {"file": str(path), "line": line.number}
        s = of_row[0]
        if isinstance(s, PairSequence):
            record |= {"prompt_ids": s.prompt.tolist(), "chosen_ids": s.chosen.tolist()}
            record |= {"rejected_ids": s.rejected.tolist()}
            for side, reply, spans in (
                ("chosen", s.chosen, s.chosen_spans),
                ("rejected", s.rejected, s.rejected_spans),
            ):
                mask = np.zeros(len(reply), int)
                for begin, end in spans.tolist():
                    mask[begin:end] = 1
                record[f"{side}_mask"] = mask.tolist()
        else:
            record["input_ids"] = [i for s in of_row if isinstance(s, TokenSequence) for i in s.ids.tolist()]
            record["loss_mask"] = [m for s in of_row if isinstance(s, TokenSequence) for m in s.loss_mask.tolist()]
        expected.append(record)
    assert list(source_rows(dataset, "all")) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_val_rows_together_are_all_rows(packed: dict[str, PackResult], kind: str) -> None:
    dataset = open_dataset(packed[kind].out)
    train, val, both = ([row["line"] for row in source_rows(dataset, split)] for split in ("train", "val", "all"))
    assert sorted(train + val) == both == list(range(1, 301))
    assert train == sorted(train) and len(val) == packed[kind].val_rows > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_names_the_rows_it_is_made_of(packed: dict[str, PackResult], kind: str) -> None:
    dataset = open_dataset(packed[kind].out)
    split = dataset.split("train")
    by_line = {row["line"]: row for row in source_rows(dataset)}
    key = "chosen_ids" if kind == "pair" else "input_ids"
    seen = 0
    for number in range(split.num_samples()):
        for record in sample_rows(dataset, "train", number):
            whole = by_line[record["line"]][key]
            assert any(record[key] == whole[i : i + len(record[key])] for i in range(len(whole)))
            seen += len(record[key])
    assert seen == sum(len(row[key]) for row in source_rows(dataset, "train"))
    with pytest.raises(IndexError):
        sample_rows(dataset, "train", split.num_samples())


def test_provenance_finds_the_bytes_of_every_row(packed: dict[str, PackResult]) -> None:
    dataset = open_dataset(packed["document"].out)
    content = Path(dataset.inputs[0]).read_bytes()
    lines = content.splitlines()
    for part in dataset.parts:
        sources = open_sources(dataset, part.part)
        for i in range(part.kept):
            raw = lines[sources["line"][i] - 1]
            assert content[sources["offset"][i] :].startswith(raw)
            assert sources["sha"][i].tobytes() == hashlib.sha256(raw).digest()[:8]


def test_a_dataset_can_be_sent_to_another_process(packed: dict[str, PackResult]) -> None:
    dataset = open_dataset(packed["pair"].out)
    again = pickle.loads(pickle.dumps(dataset))
    assert again.digest == dataset.digest
    assert again.split("train").sample(512, 3).prompt.tolist() == dataset.split("train").sample(512, 3).prompt.tolist()


def test_more_shards_than_a_process_may_open_or_map_are_read(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "document", 90)
    pack([path], tmp_path / "out", PackOptions(tokenizer=tokenizer_dir, part_bytes=1))
    whole = open_dataset(tmp_path / "out")
    num_open = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    samples = list(whole.split("train").samples())
    assert len(samples) == whole.split("train").num_samples() > 80
    assert not num_open or len(os.listdir("/proc/self/fd")) == num_open
    expected = make_loader([whole], batch_tokens=2048, seed=1).batch(1)
    for module, name, most in ((shards, "MAX_MAPPED", 7), (loaders, "MAX_MAPPED", 7), (loaders, "AT_ONCE", 5)):
        monkeypatch.setattr(module, name, most)
    dataset = open_dataset(tmp_path / "out")
    loader = make_loader([dataset], batch_tokens=2048, seed=1)
    assert not dataset._files  # opened when needed, from the manifest's counts
    for ours, theirs in zip(loader.batch(1), expected, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(astuple(ours)[:3], astuple(theirs)[:3], strict=True))
    assert isinstance(loader, loaders.Loader) and len(loader._tables._ids) <= 7 == len(dataset._files)
    for ours, theirs in zip(dataset.split("train").samples(), samples, strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist() and len(dataset._files) <= 7


def test_parts_of_more_inputs_than_16_bits_count_name_their_input(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "document", 9)
    packed = pack([path], tmp_path / "out", PackOptions(tokenizer=tokenizer_dir))
    settings = PartSettings(tmp_path / "again", tokenizer_dir, open_dataset(packed.out).manifest)
    for number, dtype in ((2**16 - 1, "uint16"), (2**16, "uint32")):
        PartPacker(settings)(Part(0, number, path, 0, path.stat().st_size, 1, 1), lambda *_: None)
        file = read_arrow(tmp_path / "again" / "sources" / "part-00000.arrow").column("file")
        assert file.dtype == dtype and set(file.tolist()) == {number}


# --- damage


@pytest.mark.parametrize("kind", KINDS)
def test_an_undamaged_dataset_verifies(packed: dict[str, PackResult], kind: str) -> None:
    seen: list[tuple[int, int]] = []
    assert verify(packed[kind].out, progress=lambda done, total: seen.append((done, total))) == []
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize("where", ["shard", "sources", "tokenizer", "stats.json"])
def test_a_flipped_byte_anywhere_is_found_and_named(dataset_dir: Path, where: str) -> None:
    path = first_shard(dataset_dir) if where == "shard" else dataset_dir / where
    if path.is_dir():
        path = sorted(path.iterdir())[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    problems = verify(dataset_dir)
    assert [problem.shard for problem in problems] == [str(path.relative_to(dataset_dir))]
    assert "sha256" in problems[0].what


def test_a_truncated_shard_is_refused_on_opening(dataset_dir: Path) -> None:
    path = first_shard(dataset_dir)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=path.name):
        open_dataset(dataset_dir)
    assert [problem.shard for problem in verify(dataset_dir)] == [str(path.relative_to(dataset_dir))]


def test_a_shard_of_zeros_is_refused_on_opening(dataset_dir: Path) -> None:
    path = first_shard(dataset_dir)
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(DatasetError, match="its bytes have changed"):
        open_dataset(dataset_dir)


def test_a_missing_shard_is_refused_on_opening(dataset_dir: Path) -> None:
    first_shard(dataset_dir).unlink()
    with pytest.raises(DatasetError, match="missing"):
        open_dataset(dataset_dir)
    assert [problem.what for problem in verify(dataset_dir)] == ["is missing"]


def test_another_tokenizer_in_place_is_refused_on_opening(dataset_dir: Path) -> None:
    path = dataset_dir / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"tide", b"tied"))
    with pytest.raises(DatasetError, match=r"tokenizer\.json"):
        open_dataset(dataset_dir)


def test_a_shard_of_another_dataset_is_refused_on_opening(
    dataset_dir: Path,
    packed: dict[str, PackResult],
) -> None:
    path, other = first_shard(dataset_dir), first_shard(packed["pair"].out)
    shutil.copy(other, path)
    make_old(dataset_dir, lambda manifest: manifest["shards"][0].update(info_of(other)._asdict()))
    with pytest.raises(DatasetError, match="kind is pair"):
        open_dataset(dataset_dir)


@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"format": "other"}', b'{"format": "mm"}'])
def test_a_directory_without_our_manifest_is_no_dataset(dataset_dir: Path, content: bytes | None) -> None:
    path = dataset_dir / "manifest.json"
    path.write_bytes(content) if content else path.unlink()
    with pytest.raises(DatasetError):
        open_dataset(dataset_dir)


def test_a_later_format_is_refused(dataset_dir: Path) -> None:
    make_old(dataset_dir, lambda manifest: manifest.update(format_version=2))
    with pytest.raises(DatasetError, match="format 2"):
        open_dataset(dataset_dir)


def test_a_dataset_of_an_older_version_with_all_records_in_its_manifest_is_the_same(
    dataset_dir: Path, packed: dict[str, PackResult]
) -> None:
    new, lines = open_dataset(packed["conversation"].out), (dataset_dir / "parts.jsonl").read_text().splitlines()
    assert [json.loads(line)["part"] for line in lines] == [*range(len(lines))] and len(lines) == len(new.parts)
    assert not {"parts", "shards"} & json.loads((dataset_dir / "manifest.json").read_bytes()).keys()
    make_old(dataset_dir)
    old = open_dataset(dataset_dir)
    assert verify(dataset_dir) == [] and (old.digest, [*old.parts]) == (new.digest, [*new.parts])
    assert {file.path for file in new.parts.files} - {file.path for file in old.parts.files} == {"parts.jsonl"}
    assert old.shards() == new.shards() and [*source_rows(old)] == [*source_rows(new)]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "bytes, expected"),
        (lambda path: path.write_text(path.read_text().replace("train", "trail")), "sha256 is"),
    ],
)
def test_records_of_parts_that_are_not_those_of_the_manifest_are_refused(
    dataset_dir: Path, damage: Callable[[Path], Any], words: str
) -> None:
    damage(dataset_dir / "parts.jsonl")
    for read in (open_dataset, verify):
        with pytest.raises(DatasetError, match=rf"parts\.jsonl .*{words}"):
            read(dataset_dir)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('"path":"train', '"path":"../train', "is not inside the dataset"),
        ("sources/part-00000", "sources/part-00001", "not named as a file of this part"),
        ('"split":"train"', '"split":"trial"', "split trial"),
        ('"kept":', '"kept":-', "part 0: kept: expected"),
        ('{"part":0', '{"part":5', "part 0: it is of part 5"),
        ('{"part"', "{part", "part 0: "),
    ],
)
def test_a_record_of_a_part_that_cannot_be_is_refused_though_its_hash_is_right(
    dataset_dir: Path, before: str, after: str, words: str
) -> None:
    path = dataset_dir / "parts.jsonl"
    path.write_text(path.read_text().replace(before, after, 1))
    manifest = json.loads((dataset_dir / "manifest.json").read_bytes())
    del manifest["record_sha256"]
    next(file for file in manifest["files"] if file["path"] == path.name).update(info_of(path)._asdict())
    (dataset_dir / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match=words):
        open_dataset(dataset_dir)


def test_a_file_the_manifest_does_not_name_is_found(dataset_dir: Path) -> None:
    (dataset_dir / "train" / "stray.arrow").write_bytes(b"stray")
    assert [str(problem) for problem in verify(dataset_dir)] == ["train/stray.arrow is not in the manifest"]


@pytest.mark.parametrize("key", ["rows", "kept", "tokens", "tokens_in", "loss_tokens", "sequences", "samples"])
def test_a_total_that_is_no_sum_is_found(dataset_dir: Path, key: str) -> None:
    make_old(dataset_dir, lambda manifest: manifest["totals"].update({key: manifest["totals"][key] + 1}))
    assert any(key in problem.what for problem in verify(dataset_dir))


def rewrite_shard(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Writes the first shard anew with other values, and the manifest's hashes to match: a writer that was wrong."""
    path = first_shard(directory)
    file = read_arrow(path)
    columns = {name: file.column(name) for name in file.batches[0]}
    columns = {
        name: column._replace(values=column.values.copy()) if isinstance(column, Ragged) else column.copy()
        for name, column in columns.items()
    }
    change(columns)
    path.unlink()
    metadata = {key.removeprefix("mm."): value for key, value in file.metadata.items()}
    written = write_arrow(path, columns, metadata, 1000)
    make_old(directory, lambda manifest: manifest["shards"][0].update(written._asdict()))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda columns: columns["ids"].values.__setitem__(5, 400), "token 400 in ids is outside"),
        (lambda columns: columns["doc_len"].values.__setitem__(0, 1), "doc_len does not sum"),
        (lambda columns: columns["span"].values.__setitem__(1, 9999), "spans are out of place"),
        (lambda columns: columns["span"].values.__setitem__(0, 9999), "spans are out of place"),
        (lambda columns: columns["n_loss"].__setitem__(0, 1), "n_loss"),
    ],
)
def test_values_that_cannot_be_are_found_even_with_right_hashes(
    dataset_dir: Path, change: Callable[[dict[str, Any]], None], what: str
) -> None:
    rewrite_shard(dataset_dir, change)
    assert any(what in problem.what for problem in verify(dataset_dir))


def test_a_sequence_that_stands_twice_is_found_even_with_right_hashes(dataset_dir: Path) -> None:
    def double(columns: dict[str, Any]) -> None:
        columns["doc"].values[0] = columns["doc"].values[1]

    rewrite_shard(dataset_dir, double)
    assert any("twice" in problem.what for problem in verify(dataset_dir))


def test_rows_taken_from_list_columns_are_those_rows() -> None:
    columns = [
        ragged(np.arange(8, dtype=np.uint16), np.array([3, 0, 4, 1])),
        ragged(np.arange(9, 11), np.array([2, 0])),
    ]
    rows = [np.array([2, 1, 0, 2]), np.array([1, 0])]
    taken = take(columns, rows)
    expected = [column.row(i).tolist() for column, own in zip(columns, rows, strict=True) for i in own.tolist()]
    assert [taken.row(i).tolist() for i in range(len(taken.offsets) - 1)] == expected
