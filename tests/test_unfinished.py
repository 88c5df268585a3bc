"""Packs that are killed, interrupted, shared out or run by other engines: always one digest, and nothing done twice."""

import contextlib
import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pack_data import CONTROL, pack_with, write_rows
from waiting import LONG_S

from mmdata.errors import DatasetError, DiskError, InputError, MMError, UsageError
from mmdata.io import remote, workers
from mmdata.pack import inputs, pipeline, staging
from mmdata.pack import part as parts
from mmdata.pack.pipeline import PackResult
from mmdata.pack.repair import repair
from mmdata.shards.dataset import open_dataset, source_rows
from mmdata.shards.manifest import every_file
from mmdata.shards.verify import verify
from mmdata.stats import stats
from mmdata.tokenizer.tokenizer import CHATML, train_bpe

ROOT = Path(__file__).parent.parent
PART_BYTES = 4000
OPTIONS: dict[str, Any] = {"max_len": 256, "part_bytes": PART_BYTES, "val_fraction": 0.1}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the current directory, named without it, so that its packs have the same bytes in any directory."""
    monkeypatch.chdir(tmp_path)
    return write_rows(Path("rows.jsonl"), "conversation", 200)


@pytest.fixture
def pack_to(tmp_path: Path, tokenizer_dir: Path, rows: Path) -> Callable[..., PackResult]:
    """Packs the rows into tmp_path / "out" in about ten parts."""

    def run(*, out: str = "out", **options: Any) -> PackResult:
        return pack_with([rows], tmp_path / out, **{"tokenizer": tokenizer_dir} | OPTIONS | options)

    return run


@pytest.fixture
def undisturbed(built_once: Callable[..., Path], tokenizer_dir: Path) -> dict[str, bytes]:
    """The bytes a pack gives that nothing happens to."""

    def build(root: Path) -> None:
        with contextlib.chdir(root):
            path = write_rows(Path("rows.jsonl"), "conversation", 200)
            pack_with([path], root / "out", tokenizer=tokenizer_dir, **OPTIONS)

    return tree(built_once("undisturbed", build) / "out")


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def interrupt_at(share: float, error: type[BaseException] = KeyboardInterrupt) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done > share * total:
            raise error

    return progress


@pytest.fixture
def packed_parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the parts that are packed from now on."""
    found: list[int] = []
    real = parts.PartPacker.__call__

    def count(self: parts.PartPacker, part: parts.Part, tick: Any) -> Any:
        found.append(part.number)
        return real(self, part, tick)

    monkeypatch.setattr(parts.PartPacker, "__call__", count)
    return found


def leave_half(pack_to: Callable[..., PackResult], **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        pack_to(progress=interrupt_at(0.5), **options)


# --- going on


def test_an_interrupted_pack_goes_on_at_the_first_unfinished_part(
    tmp_path: Path, pack_to: Callable[..., PackResult], undisturbed: dict[str, bytes], packed_parts: list[int]
) -> None:
    notes: list[str] = []
    leave_half(pack_to, note=notes.append)
    half = len(packed_parts) - 1  # the last was not finished
    assert half > 1 and "kept" in notes[-1]
    pack_to(note=notes.append)
    assert packed_parts[half + 1 :] == list(range(half, len(packed_parts) - 1)) and f"{half} of " in notes[-1]
    assert tree(tmp_path / "out") == undisturbed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "rows.jsonl"]


def test_progress_of_a_resumed_pack_begins_where_it_was(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    leave_half(pack_to)
    seen: list[tuple[int, int]] = []
    pack_to(progress=lambda done, total: seen.append((done, total)))
    size = (tmp_path / "rows.jsonl").stat().st_size
    assert seen[0][0] > 0.3 * size and seen[-1] == (size, size)


def test_a_finished_part_whose_file_is_damaged_is_packed_again(
    tmp_path: Path, pack_to: Callable[..., PackResult], undisturbed: dict[str, bytes]
) -> None:
    leave_half(pack_to)
    shard = next((tmp_path / ".out.packing" / "dataset" / "train").rglob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    pack_to()
    assert tree(tmp_path / "out") == undisturbed


def test_records_of_parts_are_appended_and_only_one_that_was_cut_off_or_edited_is_lost(
    tmp_path: Path, pack_to: Callable[..., PackResult], undisturbed: dict[str, bytes], packed_parts: list[int]
) -> None:
    leave_half(pack_to)
    (records,) = (tmp_path / ".out.packing" / "done").iterdir()
    lines = [line for line in records.read_bytes().split(b"\n") if line]
    half = len(lines)
    assert half == len(packed_parts) - 1 > 3
    lines[1] = lines[1].replace(b'"rows":', b'"rows":1')
    records.write_bytes(b"\n".join(lines)[:-9])
    staging.Staging(tmp_path / "out").record(parts.PartResult(half), records.stem)
    assert staging.Staging(tmp_path / "out").recorded() == {*range(half - 1), half}
    staging.Staging(tmp_path / "out").forget([0, half])
    assert staging.Staging(tmp_path / "out").recorded() == set(range(1, half - 1))
    packed_parts.clear()
    pack_to()
    assert packed_parts[:3] == [0, 1, half - 1] and tree(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("change", ["input", "tokenizer", "argument", "length", "version"])
def test_what_has_changed_is_named_and_the_pack_begun_anew(
    tmp_path: Path,
    rows: Path,
    pack_to: Callable[..., PackResult],
    packed_parts: list[int],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    leave_half(pack_to)
    packed_parts.clear()
    options: dict[str, Any] = {}
    if change == "input":
        write_rows(rows, "conversation", 201)
        named = "rows.jsonl has changed"
    elif change == "tokenizer":
        train_bpe(
            ["other words"], vocab_size=300, control_tokens=CONTROL, chat_template=CHATML, out_dir=tmp_path / "other"
        )
        options, named = {"tokenizer": tmp_path / "other"}, "the tokenizer is another one"
    elif change == "argument":
        options, named = {"val_fraction": 0.2}, "--val-fraction was 0.1, now 0.2"
    elif change == "length":
        options, named = {"max_len": 128}, "max-len was 256, now 128"
    else:
        monkeypatch.setattr(staging, "version", lambda name: "99")
        named = "version of pyarrow was"
    notes: list[str] = []
    pack_to(note=notes.append, **options)
    assert named in notes[0] and "begun anew" in notes[0] and packed_parts[0] == 0


def test_limits_for_bad_rows_may_change_without_packing_again(
    pack_to: Callable[..., PackResult], packed_parts: list[int]
) -> None:
    leave_half(pack_to, max_bad="0.01", on_bad="fail")
    done = len(packed_parts) - 1
    pack_to(max_bad="0.5", on_bad="quarantine")
    assert packed_parts[done + 1] == done


def test_a_full_disk_keeps_the_finished_parts(
    tmp_path: Path,
    pack_to: Callable[..., PackResult],
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, room = parts.write_arrow, [8]

    def fill(*arguments: Any) -> dict[str, Any]:
        room[0] -= 1
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(parts, "write_arrow", fill)
    notes: list[str] = []
    with pytest.raises(DiskError, match="full"):
        pack_to(note=notes.append)
    assert "the same command goes on" in notes[-1]
    pack_to()
    assert tree(tmp_path / "out") == undisturbed


def test_an_unusable_input_leaves_nothing_if_nothing_was_done(
    tmp_path: Path, rows: Path, pack_to: Callable[..., PackResult]
) -> None:
    rows.write_text("not json\n" + rows.read_text())
    with pytest.raises(InputError):
        pack_to(on_bad="fail")
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_finished_parts_and_rejected_rows_outlive_bad_rows(
    tmp_path: Path, rows: Path, pack_to: Callable[..., PackResult], packed_parts: list[int]
) -> None:
    rows.write_text("not json\n" + rows.read_text())
    notes: list[str] = []
    with pytest.raises(InputError):
        pack_to(max_bad="0", note=notes.append)
    staged = tmp_path / ".out.packing" / "dataset"
    assert f"kept in {staged}" in notes[-1] and (staged / "rejected" / "part-00000.jsonl").exists()
    packed_parts.clear()
    assert pack_to(max_bad="0.1").kept == 200 and not packed_parts


def test_an_input_that_is_gone_for_a_moment_keeps_the_finished_parts(
    rows: Path, pack_to: Callable[..., PackResult], packed_parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = parts.iter_lines

    def lacking(path: Path, begin: int = 0, *arguments: Any, **more: Any) -> Any:
        if begin > 2 * PART_BYTES:
            raise InputError(f"{path}: stale file handle")
        return real(path, begin, *arguments, **more)

    monkeypatch.setattr(parts, "iter_lines", lacking)
    with pytest.raises(InputError, match="stale"):
        pack_to()
    monkeypatch.setattr(parts, "iter_lines", real)
    done, _ = len(packed_parts) - 1, packed_parts.clear()
    assert pack_to().kept == 200 and packed_parts[0] == done > 1


def test_files_of_other_nodes_are_looked_at_before_publishing(
    tmp_path: Path,
    pack_to: Callable[..., PackResult],
    undisturbed: dict[str, bytes],
    packed_parts: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, staged = parts.PartPacker._pack, tmp_path / ".out.packing" / "dataset"

    def elsewhere(self: parts.PartPacker, part: parts.Part, tick: Any) -> Any:
        """Part 1 is written to a disk of its node, part 2 arrives with other bytes."""
        result = real(self, part, tick)
        result.host = f"node-{part.number}"
        files = [staged / file.path for file in result.all_files]
        if part.number == 1:
            files[0].unlink()
        if part.number == 2:
            files[0].write_bytes(bytes(files[0].stat().st_size))
        return result

    monkeypatch.setattr(parts.PartPacker, "_pack", elsewhere)
    with pytest.raises(
        DatasetError, match=r"files of 2 of .* nothing is published.*missing .packed on node-1.*node-2"
    ) as e:
        pack_to()
    assert "share" in e.value.fix and not (tmp_path / "out").exists()
    monkeypatch.setattr(parts.PartPacker, "_pack", real)
    packed_parts.clear()
    pack_to()
    assert packed_parts == [1, 2] and tree(tmp_path / "out") == undisturbed


# --- killed

# Counts Python's calls and returns in its main thread, and is killed at the one of the number it is given: a different place
# each time, and the same on a machine of any speed. Without a number it waits, once something is done, for the end of its
# standard input.
PACK = """
import os, signal, sys
from pathlib import Path
from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack

def count(*_):
    global events
    events += 1
    if events == die_at:
        os.kill(os.getpid(), signal.SIGKILL)

def hold(done, total):
    if done and not die_at:
        print(done, flush=True)
        sys.stdin.read()

if __name__ == "__main__":
    rows, out, tokenizer = map(Path, sys.argv[1:4])
    workers, die_at, events = int(sys.argv[4]), int(sys.argv[5]), 0
    options = PackOptions(tokenizer=tokenizer, max_len=256, part_bytes=4000, val_fraction=0.1, workers=workers)
    sys.setprofile(count)
    pack([rows], out, options, progress=hold)
    sys.setprofile(None)
    print(events)
"""


def start(tmp_path: Path, tokenizer_dir: Path, workers: int, die_at: int = 0) -> subprocess.Popen[str]:
    (tmp_path / "script.py").write_text(PACK)
    command = [sys.executable, str(tmp_path / "script.py"), *map(str, (tmp_path / "rows.jsonl", tmp_path / "out"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, str(tokenizer_dir), str(workers), str(die_at)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize(
    ("kills", "workers"), [(2, 1), pytest.param(8, 2, marks=pytest.mark.slow, id="8 kills, two workers")]
)
def test_a_pack_killed_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, tokenizer_dir: Path, undisturbed: dict[str, bytes], pack_to: Any, kills: int, workers: int
) -> None:
    draw, killed, num_events, die_at = random.Random(kills), 0, 0, 10**9
    while killed < kills:
        with start(tmp_path, tokenizer_dir, workers, die_at) as process:
            written = process.communicate(timeout=LONG_S)[0]
        if process.returncode == 0:  # it was done first, as the first one is, to count its events
            num_events = max(num_events, int(written))
            shutil.rmtree(tmp_path / "out")
        else:
            assert process.returncode == -signal.SIGKILL
            killed += 1
        die_at = draw.randint(1, num_events)
    pack_to()
    assert tree(tmp_path / "out") == undisturbed
    assert not list(tmp_path.glob(".out*"))


def test_two_packs_into_one_place_are_kept_apart_and_a_dead_ones_lock_is_taken_over(
    tmp_path: Path, tokenizer_dir: Path, pack_to: Callable[..., PackResult], undisturbed: dict[str, bytes]
) -> None:
    process = start(tmp_path, tokenizer_dir, 1)
    assert process.stdout
    assert process.stdout.readline()  # from now on it waits
    try:
        with pytest.raises(DatasetError, match=rf"process {process.pid} on {socket.gethostname()}"):
            pack_to()
        with pytest.raises(DatasetError, match=rf"process {process.pid} "):
            pack_to(shard="1/2")
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / ".out.lock").exists()
    pack_to()
    assert tree(tmp_path / "out") == undisturbed and not (tmp_path / ".out.lock").exists()


def test_a_lock_of_another_host_is_not_taken_over(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    lock = tmp_path / ".out.lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    with pytest.raises(DatasetError, match="process 7 on elsewhere") as caught:
        pack_to()
    assert f"rm {lock}" in caught.value.fix
    lock.unlink()
    assert pack_to().kept == 200


# --- other engines


@pytest.mark.parametrize("count", [2, 3])
def test_shards_of_a_pack_finish_as_one(
    tmp_path: Path, pack_to: Callable[..., PackResult], undisturbed: dict[str, bytes], count: int
) -> None:
    left = [pack_to(shard=f"{number}/{count}").parts_left for number in range(count, 0, -1)]
    assert left == sorted(left, reverse=True) and left[-1] == 0 and not (tmp_path / "out").exists()
    result = pack_to(finish=True)
    assert result.parts_left is None and result.kept == 200
    assert tree(tmp_path / "out") == undisturbed and not list(tmp_path.glob(".out*"))


@pytest.mark.slow
def test_shards_as_processes_beside_each_other_are_finished_as_one(
    tmp_path: Path, rows: Path, tokenizer_dir: Path, undisturbed: dict[str, bytes]
) -> None:
    arguments = [rows.name, "--out", "out", "--tokenizer", str(tokenizer_dir), "--max-len", "256", "--no-report"]
    arguments += ["--val-fraction", "0.1", "--part-size", str(PART_BYTES), "--workers", "1"]
    mm = [sys.executable, str(ROOT / "cli.py"), "pack", *arguments]
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, timeout=LONG_S)
    shards = [subprocess.Popen([*mm, "--shard", f"{number}/3"], cwd=tmp_path) for number in (1, 2)]
    assert [process.wait(LONG_S) for process in shards] == [0, 0]
    early = run([*mm, "--finish"])
    assert early.returncode and "those of --shard 3/3" in early.stderr and not (tmp_path / "out").exists()
    run([*mm, "--shard", "3/3"], check=True)
    run([*mm, "--finish"], check=True)
    packed = tree(tmp_path / "out")
    assert {name for name in undisturbed if name.endswith(".arrow") and packed[name] != undisturbed[name]} == set()
    assert verify(tmp_path / "out") == []


def test_shards_read_each_input_once_and_read_it_again_when_it_has_changed(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write_rows(tmp_path / f"{number}.jsonl", "document", 20 + number) for number in range(4)]
    read: list[str] = []
    real = inputs.scan
    monkeypatch.setattr(inputs, "scan", lambda file, *more: [read.append(Path(file.name).stem)] and real(file, *more))
    options: dict[str, Any] = {"tokenizer": tokenizer_dir, "max_len": 256, "part_bytes": PART_BYTES}
    whole = pack_with(files, tmp_path / "whole", **options)
    assert read == ["0", "1", "2", "3"]
    for share, order in (("2/3", ["1", "2", "0", "3"]), ("1/3", []), ("3/3", [])):
        read.clear()
        pack_with(files, tmp_path / "out", shard=share, **options)
        assert read == order
    assert pack_with(files, tmp_path / "out", finish=True, **options).digest == whole.digest and not read
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    pack_with(files, tmp_path / "new", shard="1/2", **options)
    files[2].write_text(files[2].read_text() + '{"text": "more"}\n')
    read.clear()
    with pytest.raises(DatasetError, match=r"2.jsonl has changed"):
        pack_with(files, tmp_path / "new", shard="2/2", **options)
    assert read == ["2"]


def test_the_workers_hash_large_inputs_and_files_and_send_them(
    tmp_path: Path, pack_to: Callable[..., PackResult], undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a job that runs in any process."""
    jobs: list[tuple[str, int]] = []

    def elsewhere(make: Any, todo: Any, *, total: int, **more: Any) -> list[Any]:
        make, todo = pickle.loads(pickle.dumps((make, todo)))
        if make.func is partial:
            jobs.append((make.args[0].__name__, len(todo)))
        return workers.run_jobs(make, todo, total=total, **more)

    for module in (workers, staging):
        monkeypatch.setattr(module, "LARGE_BYTES", 0)
    monkeypatch.setattr(remote, "SEND_BYTES", 1000)
    monkeypatch.setattr(pipeline, "run_with", lambda options: elsewhere)
    seen: list[tuple[int, int]] = []
    pack_to(shard="1/2", progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (seen[0][1], (tmp_path / "rows.jsonl").stat().st_size), "hashed in one go, and said"
    pack_to()
    assert tree(tmp_path / "out") == undisturbed
    files = every_file(tmp_path / "out")
    remote.send(tmp_path / "out", files, f"file://{tmp_path}/sent", run=elsewhere)
    assert tree(tmp_path / "sent") == undisturbed
    parts = [("_cut", 1), ("_cut", 1), ("_differences", 9)]
    assert jobs[:-1] == parts and jobs[-1][0] == "_send" and jobs[-1][1] > 20


def test_a_directory_has_a_bounded_number_of_files_and_older_datasets_more(
    tmp_path: Path, rows: Path, pack_to: Callable[..., PackResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows.write_text(rows.read_text() + "not json\n")
    flat = pack_to(out="flat")
    monkeypatch.setattr("mmdata.shards.manifest.PARTS_A_DIRECTORY", 4)
    leave_half(pack_to)
    assert pack_to().digest == flat.digest
    out = tmp_path / "out"
    assert sorted(path.name for path in (out / "sources").iterdir() if path.is_dir()) == ["001", "002", "003", "004"]
    folders = {path for path in out.rglob("*") if path.is_dir()} - {out, out / "tokenizer"}
    assert max(len([path for path in folder.iterdir() if path.is_file()]) for folder in folders) == 4
    by_name = [
        {Path(name).name: content for name, content in tree(d / "sources").items()} for d in (out, tmp_path / "flat")
    ]
    assert by_name[0] == by_name[1] and len(by_name[0]) == 17
    both = [open_dataset(directory) for directory in (out, tmp_path / "flat")]
    assert list(source_rows(both[0])) == list(source_rows(both[1])) and verify(out) == verify(tmp_path / "flat") == []
    assert stats._rejected(both[0]) == stats._rejected(both[1]) and stats._rejected(both[0])["not json"]
    assert stats._sources(both[0], []) == stats._sources(both[1], [])
    (out / "sources" / "004" / "part-00016.arrow").unlink()
    assert repair(out) == ["sources/004/part-00016.arrow"]


def test_more_parts_than_a_manifest_can_hold_are_refused_with_a_size_that_fits(
    tmp_path: Path, pack_to: Callable[..., PackResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MOST_PARTS", 8)
    with pytest.raises(UsageError, match="17 parts: more than 8") as caught:
        pack_to()
    assert not list(tmp_path.glob("*out*"))
    pack_to(part_bytes=int(caught.value.fix.split()[-1]))


def test_a_missing_shard_is_named_and_the_others_are_kept(
    tmp_path: Path, pack_to: Callable[..., PackResult], undisturbed: dict[str, bytes]
) -> None:
    pack_to(shard="2/3")
    with pytest.raises(DatasetError, match=r"11 of 17 parts .* not packed yet: those of --shard 1/3, 3/3$"):
        pack_to(finish=True)
    pack_to(shard="2/2")
    with pytest.raises(DatasetError, match=r"6 of 17 parts .* not packed yet: parts 0, 2, 6, 8"):
        pack_to(finish=True)
    pack_to(shard="1/2")
    notes: list[str] = []
    pack_to(shard="18/20", note=notes.append)
    assert notes == ["shard 18/20 has nothing to pack: 17 parts of --part-size in all"]
    pack_to(finish=True)
    assert tree(tmp_path / "out") == undisturbed


def test_a_shard_with_other_arguments_is_refused(tmp_path: Path, pack_to: Callable[..., PackResult]) -> None:
    pack_to(shard="1/2")
    with pytest.raises(DatasetError, match=r"--val-fraction was 0\.1, now 0\.3"):
        pack_to(shard="2/2", val_fraction=0.3)
    with pytest.raises(UsageError, match="--shard"):
        pack_to(shard="3/2")


def test_finish_with_other_arguments_is_refused_and_deletes_nothing(
    tmp_path: Path, pack_to: Callable[..., PackResult], undisturbed: dict[str, bytes]
) -> None:
    pack_to(shard="1/2")
    pack_to(shard="2/2")
    with pytest.raises(DatasetError, match=r"--val-fraction was 0\.1, now 0\.3"):
        pack_to(finish=True, val_fraction=0.3)
    pack_to(finish=True)
    assert tree(tmp_path / "out") == undisturbed


def test_ray_is_asked_for_by_name_and_its_absence_names_the_extra(
    pack_to: Callable[..., PackResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError) as caught:
        pack_to(engine="ray")
    assert "mm-toolkit[ray]" in caught.value.fix
    with pytest.raises(UsageError, match="--engine"):
        pack_to(engine="spark")
    with pytest.raises(UsageError, match="--ray-address"):
        pack_to(ray_address="auto")


def test_the_reason_of_a_failed_connection_to_ray_is_said(
    pack_to: Callable[..., PackResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    class AuthenticationError(Exception): ...

    def init(**_: Any) -> None:
        raise AuthenticationError("the cluster wants a token")

    exceptions = SimpleNamespace(RayError=AuthenticationError)
    ray = SimpleNamespace(is_initialized=lambda: False, init=init, exceptions=exceptions)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = "127.0.0.1:{1}".format(*server.getsockname())
        with pytest.raises(MMError, match=f"cannot connect to ray at {address}: the cluster wants a token"):
            pack_to(engine="ray", ray_address=address)
    with pytest.raises(MMError, match=f"cannot connect to ray at {address}: .*refused"):  # ray is not asked
        pack_to(engine="ray", ray_address=address)


RAY = """
import sys
import time
from pathlib import Path
from mmdata.errors import InputError
from mmdata.pack.options import PackOptions
from mmdata.io.workers import run_jobs
from mmdata.pack.pipeline import pack

def wait_until_it_was_seen(path, tick):
    tick(5)
    while not path.exists():
        tick(0)
        time.sleep(0.01)
    return path.name

def make():
    return wait_until_it_was_seen

if __name__ == "__main__":
    rows, out, tokenizer, bad = map(Path, sys.argv[1:5])
    options = {"tokenizer": tokenizer, "max_len": 256, "part_bytes": 4000, "val_fraction": 0.1, "engine": "ray"}
    if sys.argv[5:]:
        import os
        from ray.cluster_utils import Cluster
        here = os.getcwd()
        os.chdir(sys.argv[5])
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        other = cluster.add_node(num_cpus=1)
        os.chdir(here)
        options["ray_address"] = cluster.address
        def lose(done, total):
            if 0 < done < total and other in cluster.worker_nodes:
                cluster.remove_node(other, allow_graceful=False)
        pack([rows], out, PackOptions(**options), progress=lose)
        cluster.shutdown()
        sys.exit(other in cluster.worker_nodes)
    pack([rows], out, PackOptions(workers=2, **options))
    seen = []
    def see(done, total):
        seen.append(done)
        if done == 5:
            out.with_name("seen").touch()
    from script import make
    assert run_jobs(make, [out.with_name("seen")], total=9, engine="ray", progress=see) == ["seen"]
    assert seen == sorted(seen) and seen[-1] == 5, seen
    try:
        pack([bad], out.with_name("bad"), PackOptions(workers=2, on_bad="fail", **options))
    except InputError as error:
        print(error.message, "|", error.fix)
"""


@pytest.mark.slow
def test_ray_packs_the_same_bytes_and_a_tasks_error_is_its_own(
    tmp_path: Path, rows: Path, tokenizer_dir: Path, undisturbed: dict[str, bytes]
) -> None:
    pytest.importorskip("ray")
    (tmp_path / "script.py").write_text(RAY)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(rows.read_text() + "not json\n")
    command = [sys.executable, "script.py", *map(str, (rows, tmp_path / "out", tokenizer_dir, bad))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 0, done.stderr
    assert f"{bad} line 201: not json" in done.stdout and "quarantine" in done.stdout
    assert tree(tmp_path / "out") == undisturbed and verify(tmp_path / "out") == []


@pytest.mark.slow
def test_two_nodes_of_ray_started_elsewhere_pack_relative_paths_and_one_may_die(
    tmp_path: Path, rows: Path, tokenizer_dir: Path, undisturbed: dict[str, bytes]
) -> None:
    pytest.importorskip("ray")
    (tmp_path / "script.py").write_text(RAY)
    (tmp_path / "elsewhere").mkdir()
    relative = os.path.relpath(tokenizer_dir, tmp_path)
    command = [sys.executable, "script.py", rows.name, "out", relative, "none", "elsewhere"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 0, done.stderr
    packed = tree(tmp_path / "out")
    assert {name for name in undisturbed if name.endswith(".arrow") and packed[name] != undisturbed[name]} == set()
    assert verify(tmp_path / "out") == []


NODES = """
import os, socket, sys
from dataclasses import replace
from pathlib import Path
from mmdata.errors import MMError
from mmdata.pack import pipeline, staging
from mmdata.pack.options import PackOptions

class NodePacker(staging.RecordingPacker):
    def __init__(self, settings, out, share):
        if os.environ.get("NODE") == "own disk":
            out = out.with_name("disk") / out.name
            settings = replace(settings, dir=staging.Staging(out).dataset)
            socket.gethostname = lambda: "node-2"
        super().__init__(settings, out, share)

    def __call__(self, part, tick):
        if os.environ.get("NODE") == "no input":
            part = replace(part, path=part.path.with_name("absent.jsonl"))
        return super().__call__(part, tick)

def main(rows, out, tokenizer, kind):
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1, env_vars={"NODE": kind})
    pipeline.RecordingPacker = NodePacker
    options = {"tokenizer": Path(tokenizer), "max_len": 256, "part_bytes": 4000, "val_fraction": 0.1}
    try:
        pipeline.pack([Path(rows)], Path(out), PackOptions(engine="ray", ray_address=cluster.address, **options))
    except MMError as error:
        print(type(error).__name__, error.message, "|", error.fix)
    cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (
            "own disk",
            r"DatasetError .* lacks files of \d+ of 17 parts.* is missing .packed on node-2.* all nodes share",
        ),
        ("no input", r"InputError .*absent.jsonl.*\(on node "),
    ],
)
def test_a_node_of_ray_that_lacks_the_output_or_the_input_is_named_and_nothing_is_published(
    kind: str, error: str, tmp_path: Path, rows: Path, tokenizer_dir: Path, undisturbed: dict[str, bytes],
    pack_to: Callable[..., PackResult], packed_parts: list[int],
) -> None:  # fmt: skip
    pytest.importorskip("ray")
    (tmp_path / "nodes.py").write_text(NODES)
    arguments = [str(rows), str(tmp_path / "out"), str(tokenizer_dir), kind]
    command = [sys.executable, "-c", "import nodes, sys; nodes.main(*sys.argv[1:])", *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 0 and re.search(error, done.stdout), done
    assert not (tmp_path / "out").exists()
    packed_parts.clear()
    pack_to()
    assert tree(tmp_path / "out") == undisturbed
    assert len(packed_parts) < 17 or kind == "no input", "what the first node had done is kept; an error may come first"
