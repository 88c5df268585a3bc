"""Which files of a dataset are known to hold the bytes the manifest names: hashed once, then known by inode, time and size.

The stamps lie in the dataset as `.verified.json`. Copied or touched files are hashed again (about 1 GB/s a thread); where
the dataset cannot be written to, every time. They make checking cheap, not safe from someone who means harm.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmdata.io.files import locked, sha256_of, write_json

STAMPS_NAME = ".verified.json"
LOCK_NAME = ".verified.lock"
MAX_THREADS = 4  # hashing lets go of Python's lock; more readers than this hardly help a disk
Progress = Callable[[int, int], None]


def check(
    directory: Path, entries: Sequence[Mapping[str, Any]], progress: Progress | None = None
) -> Iterator[tuple[str, str]]:
    """(path, sha256 found) of every file whose bytes are not those of its entry {path, bytes, sha256}.

    Only files without a stamp of their present state are read. Processes that ask at the same time wait for the first.
    """
    with _only_one(directory):
        known = _read(directory)
        todo = [entry for entry in entries if known.get(entry["path"]) != _stamp(directory / entry["path"], entry)]
        total, done = sum(entry["bytes"] for entry in todo), 0
        wrong: list[tuple[str, str]] = []
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            stamps = [_stamp(directory / entry["path"], entry) for entry in todo]  # before reading: a write then shows
            digests = pool.map(lambda entry: sha256_of(directory / entry["path"]), todo)
            for entry, stamp, digest in zip(todo, stamps, digests, strict=True):
                if digest == entry["sha256"]:
                    known[entry["path"]] = stamp
                else:
                    wrong.append((entry["path"], digest))
                done += entry["bytes"]
                if progress:
                    progress(done, total)
        if todo:
            _write(directory, known)
    yield from wrong


def stamp_all(directory: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Notes that all of these files were just found as their entries say."""
    _write(directory, {entry["path"]: _stamp(directory / entry["path"], entry) for entry in entries})


def _stamp(path: Path, entry: Mapping[str, Any]) -> list[Any]:
    stat = path.stat()
    return [stat.st_ino, stat.st_mtime_ns, stat.st_size, entry["sha256"]]


def _read(directory: Path) -> dict[str, list[Any]]:
    """Stamps by path; none where they cannot be read: they are then made again."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((directory / STAMPS_NAME).read_bytes())
        if isinstance(found, dict):
            return found
    return {}


def _write(directory: Path, stamps: Mapping[str, list[Any]]) -> None:
    with contextlib.suppress(OSError):  # a read-only dataset is hashed each time instead
        write_json(directory / STAMPS_NAME, stamps, indent=0)


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # read-only: nothing is written, so nothing collides
            stack.enter_context(locked(directory / LOCK_NAME))
        yield
