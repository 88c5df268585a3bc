"""Inputs and datasets at URLs, through fsspec's file and memory filesystems."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from command_line import Run, fine, refused
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from pack_data import write_rows

from mmdata.errors import DatasetError, InputError, UsageError
from mmdata.io import remote
from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack
from mmdata.shards.dataset import open_dataset
from mmdata.shards.manifest import every_file, read_manifest
from mmdata.shards.verify import verify


@pytest.fixture
def bucket() -> Iterator[str]:
    yield "memory://bucket"
    fsspec.filesystem("memory").store.clear()


@pytest.mark.usefixtures("forked_workers")
def test_an_input_at_a_url_packs_to_the_same_digest(tmp_path: Path, tokenizer_dir: Path, bucket: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "conversation", 80)
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/rows.jsonl", path.read_bytes())
    memory.pipe("/bucket/rows.jsonl.gz", gzip.compress(path.read_bytes()))
    options = {"tokenizer": tokenizer_dir, "max_len": 256, "part_bytes": 4000}
    here = pack([path], tmp_path / "here", PackOptions(**options))
    there = pack([f"{bucket}/rows.jsonl"], tmp_path / "there", PackOptions(**options))
    files = pack([f"file://{path}"], tmp_path / "files", PackOptions(workers=2, **options))
    zipped = pack([f"{bucket}/rows.jsonl.gz"], tmp_path / "zipped", PackOptions(**options | {"part_bytes": 10**6}))
    assert here.digest == there.digest == files.digest and zipped.kept == 80
    assert read_manifest(there.out).inputs[0].path == f"{bucket}/rows.jsonl"
    assert pack([f"{bucket}/rows.jsonl"], tmp_path / "there", PackOptions(**options)).up_to_date


def test_a_dataset_is_sent_whole_its_manifest_last_and_only_once(
    tmp_path: Path, tokenizer_dir: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "document", 40)
    out = pack([path], tmp_path / "out", PackOptions(tokenizer=tokenizer_dir, max_len=256, part_bytes=4000)).out
    memory, every = fsspec.filesystem("memory"), every_file(out)
    order: list[str] = []
    real = type(memory).put_file
    monkeypatch.setattr(
        type(memory), "put_file", lambda self, a, b, **more: (order.append(b), real(self, a, b, **more))[1]
    )
    assert remote.send(out, every, f"{bucket}/ds") > 0 and order[-1].endswith("manifest.json")
    assert remote.send(out, every, f"{bucket}/ds") == 0
    memory.get("/bucket/ds", str(tmp_path / "back"), recursive=True)
    assert verify(tmp_path / "back") == []
    memory.pipe(f"/bucket/ds/{open_dataset(out).shards()[0].path}", b"damaged")
    assert remote.send(out, every, f"{bucket}/ds") == open_dataset(out).shards()[0].bytes
    monkeypatch.setattr(type(memory), "put_file", lambda self, a, b, **more: memory.pipe(b, b"less"))
    with pytest.raises(DatasetError, match="other bytes"):
        remote.send(out, every, f"{bucket}/elsewhere")


class Counted(AbstractFileSystem):
    """A bucket of one file that counts what is read of it. Like an S3 client it raises errors of its own."""

    protocol = "counted"
    cachable = False
    content = b""
    num_read = 0
    is_refused = False

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        if Counted.is_refused:
            raise LookupError("no credentials")
        if not path.endswith(("rows.jsonl", "rows.jsonl.gz")):
            raise FileNotFoundError(path)
        return {"name": path, "size": len(Counted.content), "type": "file", "ETag": "1"}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        raise AssertionError(f"{path} was created")

    def pipe_file(self, path: str, value: bytes, *_: Any, **__: Any) -> None:
        raise FileNotFoundError("the bucket does not exist")

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        class File(AbstractBufferedFile):
            def _fetch_range(self, start: int, end: int) -> bytes:
                Counted.num_read += len(Counted.content[start:end])
                return Counted.content[start:end]

        self.info(path)
        return File(self, path, mode, size=len(Counted.content), **options)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> str:
    fsspec.register_implementation("counted", Counted, clobber=True)
    for name in ("content", "num_read", "is_refused"):
        monkeypatch.setattr(Counted, name, getattr(Counted, name))
    return "counted://bucket/rows.jsonl"


@pytest.fixture
def small_requests(monkeypatch: pytest.MonkeyPatch) -> int:
    """Requests of at most 1 kB; returned is what ten openings take, by which a file's format is recognized."""
    for place in ("mmdata.io.remote.READ_BYTES", "mmdata.io.remote.FIRST_BYTES", "mmdata.io.streams.BUFFER_BYTES"):
        monkeypatch.setattr(place, 2**10)
    return 10 * 2**16


def test_requests_begin_small_and_grow(counted: str) -> None:
    Counted.content = b"x" * 2**23
    with remote.RemoteFile(counted).open() as file:
        assert file.peek(10) and Counted.num_read == remote.FIRST_BYTES == 2**18
        assert len(file.read()) == 2**23 == Counted.num_read
        file.seek(5)
        assert file.read(10) == b"x" * 10 and Counted.num_read == 2**23 + 2**18


def test_an_input_is_read_no_more_than_to_be_hashed_and_packed(
    tmp_path: Path, tokenizer_dir: Path, counted: str, small_requests: int
) -> None:
    Counted.content = write_rows(tmp_path / "rows.jsonl", "document", 3000).read_bytes()
    pack([counted], tmp_path / "out", PackOptions(tokenizer=tokenizer_dir, max_len=256, part_bytes=200_000))
    assert 2 * len(Counted.content) <= Counted.num_read < 2.1 * len(Counted.content) + small_requests


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_an_input_is_read_once_where_the_disk_has_room_for_a_copy(
    home: Path, mm: Run, counted: str, small_requests: int, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rows = write_rows(home / "rows.jsonl", "document", 3000).read_bytes()
    Counted.content = gzip.compress(rows) if name.endswith("gz") else rows
    options = "--part-size 200000 --workers 1 --no-report"
    fine(mm(f"pack {counted.replace('rows.jsonl', name)} {options}"))
    assert Counted.num_read == len(Counted.content)
    fine(mm(f"pack rows.jsonl {options} --out here"))
    packed = read_manifest(home / "shards" / "rows")
    assert packed.dataset_digest == read_manifest(home / "here").dataset_digest
    assert packed.inputs[0].path == f"counted://bucket/{name}"
    Counted.num_read = 0
    monkeypatch.setattr("mmdata.pack.inputs.free_bytes", lambda _: 7 * len(Counted.content))
    fine(mm(f"pack {counted.replace('rows.jsonl', name)} {options} --max-len 128"))
    assert Counted.num_read > 2 * len(Counted.content)
    assert [path.name for path in (home / "shards").iterdir()] == ["rows"]


def test_a_storage_that_refuses_is_told_from_a_missing_file_and_nothing_is_created(
    home: Path, mm: Run, counted: str
) -> None:
    Counted.content = (home / "data/pretrain_hq.jsonl").read_bytes()
    assert "counted://bucket/none.jsonl: no such file" in refused(mm("pack counted://bucket/none.jsonl")).err
    refused(mm("pack http://127.0.0.1:9/a.jsonl"), "a.jsonl cannot be read: ", "127.0.0.1:9", "check the network")
    error = refused(mm("pack data/pretrain_hq.jsonl --out counted://mistyped/ds")).err
    assert "counted://mistyped/ds cannot be written: the bucket does not exist" in error
    assert not (home / "shards").exists()
    fine(mm(f"validate {counted}"))
    Counted.is_refused = True
    for command in ("pack", "validate"):
        assert f"{counted} cannot be read: no credentials" in refused(mm(f"{command} {counted}")).err
    for command in ("stats", "verify", "show", "select"):
        assert f"mm {command} reads files on this machine, not {counted}" in refused(mm(f"{command} {counted}")).err


def test_what_is_not_there_is_named(tmp_path: Path, tokenizer_dir: Path, bucket: str) -> None:
    with pytest.raises(InputError, match="memory://bucket/none"):
        pack([f"{bucket}/none.jsonl"], tmp_path / "out", PackOptions(tokenizer=tokenizer_dir))
    with pytest.raises(UsageError, match="nothing://x") as caught:
        pack(["nothing://x"], tmp_path / "out", PackOptions(tokenizer=tokenizer_dir))
    assert caught.value.fix
    assert (
        remote.bring_command("s3://b/ds", Path("shards/ds")) == "aws s3 sync s3://b/ds shards/ds && mm verify shards/ds"
    )
