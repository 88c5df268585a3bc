import contextlib
import errno
import gzip
import json
import lzma
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pack_data import pack_with, write_rows
from properties import examples
from waiting import LONG_S, wait_until

from mmdata.encode.rows import parse_row, row_hash
from mmdata.errors import DatasetError, DiskError, InputError, MMError, TokenizerError, UsageError
from mmdata.io import lines
from mmdata.io.lines import iter_lines
from mmdata.io.workers import Tick, run_jobs
from mmdata.pack import inputs
from mmdata.pack import part as parts
from mmdata.pack.options import PackOptions
from mmdata.pack.packing import Packing
from mmdata.pack.packing import pack as real_pack
from mmdata.pack.pipeline import PackResult, pack
from mmdata.shards.dataset import open_dataset, source_rows
from mmdata.shards.verify import verify

KINDS = ("document", "conversation", "pair")
BAD_LINES = ['{"text": "cut', "[1, 2]", '{"text": ""}', '{"text": 3}', '{"number": 1}']


@pytest.fixture
def pack_to(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., PackResult]:
    """Packs into tmp_path / "out" with this session's tokenizer and lengths up to 256."""

    def run(*inputs: Path, out: str = "out", **options: Any) -> PackResult:
        return pack_with(inputs, tmp_path / out, **{"tokenizer": tokenizer_dir, "max_len": 256} | options)

    return run


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory; not what `verify` leaves there, as another test may have done."""
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file() and not path.name.startswith(".verified"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- nothing is lost


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_and_token_is_packed_or_counted(packed: dict[str, PackResult], kind: str) -> None:
    result = packed[kind]
    assert result.rows == result.kept + sum(result.left_out.values()) == 300
    assert result.tokens_in == result.tokens + sum(result.cut.values())
    dataset = open_dataset(result.out)
    found = sum(len(v) for row in source_rows(dataset) for key, v in row.items() if key.endswith("ids"))
    assert found == result.tokens == sum(dataset.split(name).totals.tokens for name in ("train", "val"))


def test_rows_left_out_are_kept_aside_with_file_line_offset_reason_and_text(
    tmp_path: Path, pack_to: Callable[..., PackResult]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "document", 60)
    lines = path.read_bytes().splitlines()
    for i, bad in enumerate(BAD_LINES):
        lines.insert(10 * i + 3, bad.encode())
    lines.insert(20, b'{"text": "\xff\xfe"}')
    path.write_bytes(b"\n".join(lines) + b"\n")
    result = pack_to(path, part_bytes=3000)
    assert (result.rows, result.kept) == (66, 60) and sum(result.left_out.values()) == 6
    records = [
        json.loads(line)
        for file in sorted((tmp_path / "out" / "rejected").iterdir())
        for line in file.read_text().splitlines()
    ]
    content = path.read_bytes()
    assert [record["raw"] for record in records if "raw_base64" not in record] == BAD_LINES
    assert sum("raw_base64" in record for record in records) == 1
    for record in records:
        assert record["file"] == str(path) and lines[record["line"] - 1] == content[record["offset"] :].split(b"\n")[0]
        assert result.left_out[record["reason"]] > 0
    assert verify(tmp_path / "out") == []


def test_long_documents_become_fragments_and_lose_no_token(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "compass " * 1000}) + "\n")
    result = pack_to(path, val_fraction=0)
    assert result.tokens == result.tokens_in > 1000 and result.cut == {} and max(result.samples) == 256


def test_long_conversations_are_cut_at_a_turn_and_counted(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    messages = [{"role": role, "content": "anchor " * 40} for role in ("user", "assistant") * 5]
    path = tmp_path / "long.jsonl"
    endless = [{"role": "user", "content": "anchor " * 900}, {"role": "assistant", "content": "no"}]
    path.write_text("".join(json.dumps({"conversations": m}) + "\n" for m in (messages, endless)))
    result = pack_to(path, val_fraction=0)
    assert result.kept == 1 and result.left_out == {"too long": 1}
    assert result.tokens_in == result.tokens + sum(result.cut.values()) and sum(result.cut.values()) > 0


def test_pairs_that_do_not_fit_are_left_out_and_counted(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", "pair", 50)
    result = pack_to(path, max_len=40)
    assert 0 < result.kept < 50 and result.left_out == {"too long": 50 - result.kept}


@pytest.mark.parametrize("damage", ["lost", "twice"])
def test_a_dataset_that_does_not_balance_is_not_published(
    tmp_path: Path, pack_to: Callable[..., PackResult], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    def damaged(lengths: np.ndarray, buckets: tuple[int, ...]) -> Packing:
        packs = real_pack(lengths, buckets)
        members, ends = packs.members.copy(), packs.ends.copy()
        if damage == "lost" and len(members):
            members, ends = members[:-1], np.append(ends[:-1], ends[-1] - 1)
        elif len(members):
            members[0] = members[1]
        return Packing(packs.buckets, members, ends)

    monkeypatch.setattr(parts, "pack", damaged)
    path = write_rows(tmp_path / "rows.jsonl", "document", 60)
    with pytest.raises(DatasetError, match="proof"):
        pack_to(path, val_fraction=0)
    assert names(tmp_path) == ["rows.jsonl"]


def test_tokens_that_change_on_the_way_to_disk_are_noticed(
    tmp_path: Path, pack_to: Callable[..., PackResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = parts.write_arrow

    def damaged(path: Path, columns: dict[str, Any], *rest: Any) -> Any:
        if "ids" in columns:
            columns["ids"].values[[3, 4]] = columns["ids"].values[[4, 3]]
        return real(path, columns, *rest)

    monkeypatch.setattr(parts, "write_arrow", damaged)
    with pytest.raises(DatasetError, match="other tokens"):
        pack_to(write_rows(tmp_path / "rows.jsonl", "document", 30))
    assert names(tmp_path) == ["rows.jsonl"]


# --- the same bytes


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path: Path, packed: dict[str, PackResult], tokenizer_dir: Path, kind: str
) -> None:
    path = Path(open_dataset(packed[kind].out).inputs[0])
    for workers in (2, 3) if kind == "conversation" else (2,):
        again = pack(
            [path],
            tmp_path / str(workers),
            PackOptions(tokenizer=tokenizer_dir, max_len=640, val_fraction=0.1, part_bytes=20_000, workers=workers),
        )
        assert len(open_dataset(again.out).parts) > 2
        assert again.digest == packed[kind].digest
        assert tree(again.out) == tree(packed[kind].out)


def test_the_digest_is_of_the_tokens_and_not_of_names_or_file_bytes(
    tmp_path: Path, pack_to: Callable[..., PackResult]
) -> None:
    plain = write_rows(tmp_path / "a.jsonl", "conversation", 40)
    (tmp_path / "other").mkdir()
    spaced = tmp_path / "other" / "b.jsonl"
    spaced.write_text(
        "".join(json.dumps(json.loads(line), indent=None) + " \r\n" for line in plain.read_text().splitlines())
    )
    zipped = tmp_path / "c.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    digests = [pack_to(path, out=f"out{i}").digest for i, path in enumerate((plain, spaced, zipped))]
    assert digests[0] == digests[1] == digests[2]
    lines = plain.read_text().splitlines()
    plain.write_text("\n".join(lines[:-1]) + "\n")
    assert pack_to(plain, out="less").digest != digests[0]


@pytest.mark.parametrize(
    ("form", "compress", "name"),
    [
        ("jsonl", gzip.compress, "gz"),
        ("jsonl", zstandard.compress, "zst"),
        ("jsonl", lzma.compress, "xz"),
        ("json", gzip.compress, "gz"),
        ("csv", zstandard.compress, "zst"),
    ],
)
def test_a_compressed_file_is_cut_into_the_parts_of_its_text(
    tmp_path: Path,
    pack_to: Callable[..., PackResult],
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    compress: Any,
    name: str,
) -> None:
    plain = write_rows(tmp_path / f"a.{form}", "conversation", 90)
    if form == "json":
        plain.write_text("[\n" + ",\n ".join(plain.read_text().splitlines()) + "\n]\n")
    if form == "csv":
        plain.write_text("text,other\n" + "".join(f'"row {i},\nof ""a"" few {"words " * i}",\n' for i in range(90)))
    packed = tmp_path / f"a.{form}.{name}"
    packed.write_bytes(compress(plain.read_bytes()))
    opened: list[Any] = []
    real = lines.open_stream
    monkeypatch.setattr(lines, "open_stream", lambda *a: (opened.append(1), real(*a))[1])
    whole, cut = (pack_to(path, out=f"of-{path.name}", part_bytes=3000) for path in (plain, packed))
    assert cut.digest == whole.digest and cut.kept == 90
    records = [*open_dataset(tmp_path / f"of-{packed.name}").parts]
    assert records == [*open_dataset(tmp_path / f"of-{plain.name}").parts] and len(records) > 5
    opened.clear()
    pack_to(packed, out="again", part_bytes=3000)
    # For the kind, the format, rows that are not lines, and once for all parts: it is decompressed once a process.
    assert len(opened) == 3 + (form != "jsonl")
    parts = inputs.plan([packed], 3000)[1]
    some = parts[3]
    assert list(iter_lines(packed, some.begin, some.end, first_number=some.first_line)) == [
        line for line in iter_lines(plain) if some.begin <= line.offset < some.end
    ]
    rows = [list(iter_lines(packed, each.begin, each.end, first_number=each.first_line)) for each in reversed(parts)]
    assert [line for each in reversed(rows) for line in each] == list(iter_lines(plain))


@given(data=st.data())
@examples(60)
def test_parts_hold_every_line_once_with_its_number(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = data.draw(
        st.lists(st.sampled_from([b"a", b"\n", b"bcdef", b"\r\n", b"{}" * 9]), max_size=60).map(b"".join)
    )
    path = tmp_path_factory.mktemp("parts") / "lines.jsonl"
    path.write_bytes(content + b"x")
    _, found = inputs.plan([path], data.draw(st.integers(1, 50)))
    assert found[0].begin == 0 and found[-1].end == len(content) + 1
    lines = [line for part in found for line in iter_lines(path, part.begin, part.end, first_number=part.first_line)]
    assert lines == list(iter_lines(path))
    assert sum(part.num_bytes for part in found) == len(content) + 1


def test_part_boundaries_do_not_depend_on_how_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "document", 100)
    whole = inputs.plan([path], 1000)
    monkeypatch.setattr(inputs, "READ_BYTES", 7)
    assert inputs.plan([path], 1000) == whole


def test_several_inputs_become_one_dataset_in_their_order(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    paths = [write_rows(tmp_path / f"{i}.jsonl", "document", 20, seed=i) for i in range(3)]
    pack_to(*paths)
    found = [(row["file"], row["line"]) for row in source_rows(open_dataset(tmp_path / "out"))]
    assert found == [(str(path), line) for path in paths for line in range(1, 21)]


# --- val


def test_equal_rows_never_stand_on_both_sides(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "conversation", 80)
    lines = path.read_text().splitlines()
    spaced = [json.dumps(dict(reversed(json.loads(line).items())), indent=None) for line in lines]
    path.write_text("\n".join([*lines, *spaced, *lines]) + "\n")
    pack_to(path, val_fraction=0.3, part_bytes=2000)
    dataset = open_dataset(tmp_path / "out")
    raw = path.read_bytes().splitlines()
    sides = {
        name: {row_hash(parse_row(raw[row["line"] - 1])) for row in source_rows(dataset, name)}
        for name in ("train", "val")
    }
    assert sides["train"] and sides["val"] and not sides["train"] & sides["val"]


def test_val_is_about_the_share_asked_for(packed: dict[str, PackResult]) -> None:
    assert 50 < sum(result.val_rows for result in packed.values()) < 130  # 90 expected of 900


def test_without_a_val_fraction_all_rows_are_for_training(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    result = pack_to(write_rows(tmp_path / "rows.jsonl", "pair", 30), val_fraction=0)
    assert result.val_rows == 0 and open_dataset(result.out).split("val").num_samples() == 0


# --- again


def test_packing_again_does_nothing(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "document", 30)
    first = pack_to(path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("[!.]*")}
    again = pack_to(path, workers=2)
    assert not first.up_to_date and again.up_to_date and again.digest == first.digest
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("[!.]*")}


@pytest.mark.parametrize("change", ["input", "argument", "damage"])
def test_packing_again_replaces_what_is_not_the_same(
    tmp_path: Path, pack_to: Callable[..., PackResult], change: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "document", 30)
    pack_to(path)
    if change == "input":
        write_rows(path, "document", 31)
    elif change == "damage":
        next((tmp_path / "out" / "train").rglob("*.arrow")).write_bytes(b"")
    assert not pack_to(path, **{"val_fraction": 0.5} if change == "argument" else {}).up_to_date
    assert verify(tmp_path / "out") == [] and names(tmp_path) == ["out", "rows.jsonl"]


# --- nothing half-written


@pytest.fixture
def existing(tmp_path: Path, pack_to: Callable[..., PackResult]) -> Callable[[], bool]:
    """An earlier dataset at "out"; the function says whether it is untouched, and nothing but finished parts beside it."""
    write_rows(tmp_path / "old.jsonl", "pair", 10)
    pack_to(tmp_path / "old.jsonl")
    (tmp_path / "old.jsonl").unlink()
    before = tree(tmp_path / "out")
    return lambda: tree(tmp_path / "out") == before and set(names(tmp_path)) <= {"new.jsonl", "out", ".out.packing"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pack_leaves_what_was_there(
    tmp_path: Path, pack_to: Callable[..., PackResult], existing: Callable[[], bool], error: type[BaseException]
) -> None:
    path = write_rows(tmp_path / "new.jsonl", "document", 60)

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise error

    with pytest.raises(error):
        pack_to(path, part_bytes=1000, progress=interrupt)
    assert existing()


def test_a_full_disk_is_said_and_leaves_what_was_there(
    tmp_path: Path,
    pack_to: Callable[..., PackResult],
    existing: Callable[[], bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parts, "write_arrow", full)
    with pytest.raises(DiskError, match="full") as caught:
        pack_to(write_rows(tmp_path / "new.jsonl", "document", 10))
    assert caught.value.fix and existing()


def test_an_input_that_changes_while_it_is_packed_is_noticed(
    tmp_path: Path, pack_to: Callable[..., PackResult]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "document", 30)
    with pytest.raises(InputError, match="changed"):
        pack_to(path, progress=lambda done, total: os.utime(path, ns=(1, done)))
    assert names(tmp_path) == ["rows.jsonl"]


def test_too_little_disk_is_said_before_anything_is_written(
    tmp_path: Path, pack_to: Callable[..., PackResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(DiskError, match="needs about"):
        pack_to(write_rows(tmp_path / "rows.jsonl", "document", 10))
    assert names(tmp_path) == ["rows.jsonl"]


def test_ctrl_c_ends_the_workers_and_keeps_what_is_done(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_rows(tmp_path / "new.jsonl", "document", 300)
    code = (  # once something is done, the pack waits for the end of its standard input, which never comes
        "import sys; from pathlib import Path\n"
        "from mmdata.pack.options import PackOptions; from mmdata.pack.pipeline import pack\n"
        "if __name__ == '__main__':\n"
        "    options = PackOptions(tokenizer=Path(sys.argv[3]), part_bytes=2000, workers=2)\n"
        "    pack([Path(sys.argv[1])], Path(sys.argv[2]), options,\n"
        "         progress=lambda done, total: done and (print(done, flush=True), sys.stdin.read()))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(script), str(path), str(tmp_path / "out"), str(tokenizer_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        start_new_session=True,
    )
    assert process.stdout
    assert process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=LONG_S) != 0  # before `communicate`, which would end the standard input
    _, errors = process.communicate(timeout=LONG_S)
    assert b"KeyboardInterrupt" in errors
    assert set(names(tmp_path)) <= {".out.packing", "new.jsonl", "script.py"}
    wait_until(lambda: not group_exists(process.pid))  # no worker is left


def group_exists(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


# --- what is refused


def test_a_directory_that_is_no_dataset_is_never_replaced(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "document", 10)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(DatasetError, match="not a packed dataset"):
        pack_to(path)
    assert names(tmp_path / "out") == ["thesis.txt"]
    with pytest.raises(DatasetError, match="is a file"):
        pack_to(path, out="rows.jsonl")


def test_an_empty_directory_is_used(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    (tmp_path / "out").mkdir()
    pack_to(write_rows(tmp_path / "rows.jsonl", "document", 10))
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("content", "match"),
    [("", "empty"), ("\n \n", "empty"), ("no json\n" * 5, "not json"), ('{"text": ""}\n', "empty content")],
)
def test_a_file_with_nothing_to_pack_is_refused(
    tmp_path: Path, pack_to: Callable[..., PackResult], content: str, match: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(InputError, match=match) as caught:
        pack_to(tmp_path / "rows.jsonl")
    assert "rows.jsonl" in caught.value.message and caught.value.fix and names(tmp_path) == ["rows.jsonl"]


def test_an_input_whose_rows_are_all_left_out_is_refused(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "pair", 10)
    with pytest.raises(InputError, match="too long"):
        pack_to(path, max_len=8)
    assert names(tmp_path) == [".out.packing", "rows.jsonl"]


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("workers", [1, 2])
def test_on_bad_fail_names_the_first_bad_line_whatever_the_workers(
    tmp_path: Path, pack_to: Callable[..., PackResult], workers: int
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "document", 200)
    lines = path.read_text().splitlines()
    lines[77] = lines[140] = lines[199] = "not json"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"rows\.jsonl line 78: not json") as caught:
        pack_to(path, on_bad="fail", part_bytes=4000, workers=workers)
    assert "quarantine" in caught.value.fix and "out" not in names(tmp_path)


def test_too_many_bad_rows_are_refused_by_budget(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "document", 1000)
    with path.open("a") as file:
        file.write('{"text": 1}\n' * 101)
    with pytest.raises(InputError, match="101 of 1,101 rows"):
        pack_to(path)
    assert pack_to(path, max_bad="0.1").left_out == {"wrong types": 101}
    with pytest.raises(InputError, match="wrong types"):
        pack_to(path, max_bad="50%,wrong types=1%")


def test_a_few_bad_rows_of_a_small_file_are_no_ground_to_refuse_it(
    tmp_path: Path, pack_to: Callable[..., PackResult]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "document", 10)
    with path.open("a") as file:
        file.write("\n".join(BAD_LINES) + "\n")
    assert pack_to(path).kept == 10
    with pytest.raises(InputError, match="5 of 15"):
        pack_to(path, max_bad="0")


def test_inputs_of_different_kinds_are_refused(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    paths = [write_rows(tmp_path / f"{kind}.jsonl", kind, 10) for kind in ("document", "pair")]
    with pytest.raises(InputError, match="pair rows"):
        pack_to(*paths)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tokenizer": Path("nowhere")}, TokenizerError),
        ({"on_bad": "ignore"}, UsageError),
        ({"val_fraction": 1.0}, UsageError),
        ({"max_len": 1}, UsageError),
        ({"val_fraction": math.nan}, UsageError),
        ({"max_bad": "much"}, UsageError),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    tmp_path: Path, pack_to: Callable[..., PackResult], options: dict[str, Any], error: type[MMError]
) -> None:
    with pytest.raises(error) as caught:
        pack_to(write_rows(tmp_path / "rows.jsonl", "document", 10), **options)
    assert caught.value.fix and names(tmp_path) == ["rows.jsonl"]


def test_missing_inputs_are_named(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl"):
        pack_to(tmp_path / "none.jsonl")
    with pytest.raises(UsageError):
        pack_to()


def test_a_damaged_compressed_file_is_named(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    content = gzip.compress(write_rows(tmp_path / "rows.jsonl", "document", 500).read_bytes())
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cut\.jsonl\.gz"):
        pack_to(path)
    assert names(tmp_path) == ["cut.jsonl.gz", "rows.jsonl"]


# --- engine


def make_squarer() -> Callable[[int, Tick], int]:
    def square(job: int, tick: Tick) -> int:
        tick(1)
        if job < 0:
            raise InputError(f"job {job}", "give another")
        if job == 99:
            os._exit(1)
        return job * job

    return square


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("workers", [1, 2])
def test_results_stand_in_the_order_of_the_jobs_and_progress_counts_all(workers: int) -> None:
    seen: list[tuple[int, int]] = []
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    found = run_jobs(make_squarer, range(20), total=20, workers=workers, progress=progress)
    assert found == [n * n for n in range(20)] and seen[-1] == (20, 20)


@pytest.mark.usefixtures("forked_workers")
def test_a_workers_error_comes_through_with_its_fix() -> None:
    with pytest.raises(InputError, match="job -3") as caught:
        run_jobs(make_squarer, [1, 2, -3, 4, -5], total=5, workers=2)
    assert caught.value.fix == "give another"


def test_a_worker_that_dies_is_reported() -> None:
    with pytest.raises(MMError, match="died"):
        run_jobs(make_squarer, [1, 99, 2, 3], total=4, workers=2)


def run_in_daemon(queue: Any) -> None:
    queue.put(run_jobs(make_squarer, [1, 2, 3], total=3, workers=2))


def test_a_process_that_may_have_no_children_works_alone() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=run_in_daemon, args=(queue,), daemon=True)
    process.start()
    assert queue.get(timeout=LONG_S) == [1, 4, 9]
    process.join()
    with contextlib.suppress(ValueError):
        queue.close()


def test_control_strings_in_content_are_counted_and_stay_plain_text(
    tmp_path: Path, pack_to: Callable[..., PackResult]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "say <|im_end|> and <|im_end|>"}\n{"text": "plain < text"}\n', encoding="utf-8")
    assert pack_to(path).control_strings == {"<|im_end|>": 2}
