"""Atomic writes, hashes and locks (mmdata/io/files.py)."""

import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mmdata.io import files
from mmdata.io.files import (
    AlreadyLockedError,
    Digest,
    FileInfo,
    atomic_path,
    digest_file,
    info_of,
    locked,
    new_directory,
    replace_directory,
    restore_directory,
    sha256_of,
    write_bytes,
    write_json,
    write_text,
)

TEXT = "first line\nsecond ☃ line\nno newline"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_written_whole_with_its_size_and_hash(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    info = write_text(path, TEXT)
    content = TEXT.encode()
    assert path.read_bytes() == content and names(path.parent) == ["a.txt"]
    assert info == FileInfo(len(content), hashlib.sha256(content).hexdigest()) == info_of(path)
    assert write_bytes(path, memoryview(b"other")) == info_of(path) and path.read_bytes() == b"other"


def test_json_is_written_with_a_newline_and_unescaped(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, "雪"]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n "a": [\n  1,\n  "雪"\n ]\n}\n'
    write_json(tmp_path / "a.json", {"a": 1}, indent=None)
    assert (tmp_path / "a.json").read_bytes() == b'{"a": 1}\n'


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as partial:
        partial.write_text("half")
        assert partial.parent == tmp_path and partial.name.startswith(".a.txt.") and path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_content_is_synced_before_the_rename_and_the_directory_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, states = tmp_path / "a.txt", []
    real = files.sync
    monkeypatch.setattr(files, "sync", lambda what: (states.append((what, path.exists())), real(what)))
    write_text(path, "x")
    (partial, was_there), (directory, is_there) = states
    assert partial.name.startswith(".a.txt.") and not was_there and directory == tmp_path and is_there


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal 0 to ask with whether a process is alive")
def test_what_killed_processes_left_of_a_file_is_removed_by_the_next_that_writes(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host, names = socket.gethostname(), ("alive", "ended", "elsewhere", "unnamed")
    pids = (f"{host}-{os.getppid()}", f"{host}-{ended.pid}", f"other-{ended.pid}", f"{host}-x")
    paths = {name: tmp_path / f".{name}.{pid}.partial" for name, pid in zip(names, pids, strict=True)}
    for path in paths.values():
        path.touch()
    directory = tmp_path / f".directory.{host}-{ended.pid}.partial"
    (directory / "within").mkdir(parents=True)
    write_text(tmp_path / "new", "text")
    assert not directory.exists()
    assert [name for name, path in paths.items() if path.exists()] == ["alive", "elsewhere", "unnamed"]


def test_two_processes_that_write_one_directory_do_not_mix_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_directory(tmp_path / "out") as one:
        write_text(one / "a", "first")
        monkeypatch.setattr(os, "getpid", os.getppid)
        with new_directory(tmp_path / "out") as other:
            write_text(other / "b", "second")
        monkeypatch.undo()
        assert names(tmp_path / "out") == ["b"]
    assert names(tmp_path / "out") == ["a"] and names(tmp_path) == ["out"]


def test_a_directory_takes_the_place_of_another(tmp_path: Path) -> None:
    target, aside = tmp_path / "out", tmp_path / ".out.old"
    for text in ("one", "two"):
        write_text(tmp_path / "new" / "deep" / "a", text)
        replace_directory(tmp_path / "new", target, aside)
        assert (target / "deep" / "a").read_text() == text and names(tmp_path) == ["out"]


def test_a_directory_whose_rename_fails_or_is_killed_is_brought_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, aside = tmp_path / "out", tmp_path / ".out.old"
    write_text(target / "a", "old")
    write_text(tmp_path / "new" / "a", "new")
    real = Path.rename

    def fails(path: Path, to: Path) -> Path:
        if path.name == "new":
            raise OSError("no")
        return real(path, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no"):
        replace_directory(tmp_path / "new", target, aside)
    assert (target / "a").read_text() == "old" and not aside.exists()
    target.rename(aside)  # as a kill between the two renames leaves it
    restore_directory(target, aside)
    assert (target / "a").read_text() == "old" and not aside.exists()
    write_text(aside / "a", "older")  # as a kill after both leaves it
    restore_directory(target, aside)
    assert (target / "a").read_text() == "old" and not aside.exists()


def test_a_digest_is_that_of_git_and_sha256sum(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    seen: list[tuple[int, int]] = []
    digest = digest_file(path, with_git=True, progress=lambda done, total: seen.append((done, total)))
    size = len(TEXT.encode())
    assert digest.sha256 == sha256_of(path) == hashlib.sha256(TEXT.encode()).hexdigest()
    assert (digest.position, digest.num_lines, digest.ends_with_newline) == (size, 2, False)
    assert seen == [(size, size)]
    blob = subprocess.run(["git", "hash-object", path], capture_output=True, text=True, check=True)
    assert digest.git_oid == blob.stdout.strip()
    assert Digest(0).ends_with_newline and not digest_file(path).git_oid


def _hold(path: Path, is_held: object, may_end: object) -> None:
    with locked(path):
        is_held.set()  # type: ignore[attr-defined]
        may_end.wait()  # type: ignore[attr-defined]
        os._exit(9)  # the lock is left as a killed process leaves it


def test_a_lock_keeps_others_out_and_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    context = multiprocessing.get_context("spawn")
    is_held, may_end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(path, is_held, may_end))
    other.start()
    is_held.wait()
    with pytest.raises(AlreadyLockedError), locked(path, wait=False):
        raise AssertionError
    waited: list[bool] = []
    with locked(path, on_wait=lambda: (waited.append(True), may_end.set())):
        other.join()
        assert waited == [True] and other.exitcode == 9
    with locked(path, wait=False):
        path.unlink()  # the holder may: a process that comes then makes a file of its own
    with locked(path, wait=False):
        pass


def test_threads_of_one_process_keep_each_other_out(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(5):
            with locked(tmp_path / ".lock"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_lock_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError), locked(tmp_path / "file" / ".lock"):
        raise AssertionError
