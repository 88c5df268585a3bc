"""A disk that fails, is full or read-only, or no more file descriptors, at one write after another: the command ends with an error
by name, what was there before is whole, and the next run gives what an undisturbed one does."""

import errno
import os
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from damage import SEED, refusal
from pack_data import pack_with, write_rows

from mmdata.shards.dataset import open_dataset

CODES = (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EROFS)


@contextmanager
def failing_at(number: int, code: int, gone: Path | None = None) -> Iterator[list[int]]:
    """Let the write of this number, from 0, to a regular place fail with an error code, for ENOENT since the directory `gone`
    vanishes before it; yields a list with the count of writes. Opening for writing, writing at a place, fsync, renaming and
    creating directories count."""
    count = [0]
    patched = pytest.MonkeyPatch()

    def guarded(call: Callable[..., Any], is_write: Callable[..., bool]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            if is_write(*arguments, **named):
                count[0] += 1
                if count[0] - 1 == number and code == errno.ENOENT and gone:
                    shutil.rmtree(gone, ignore_errors=True)
                elif count[0] - 1 == number:
                    raise OSError(code, os.strerror(code), str(arguments[0]))
            return call(*arguments, **named)

        return run

    def opens_to_write(path: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
        return bool(set(mode) & set("wxa+"))

    patched.setattr(pathlib.Path, "open", guarded(pathlib.Path.open, opens_to_write))
    patched.setattr(pathlib.Path, "write_bytes", guarded(pathlib.Path.write_bytes, lambda *_, **__: True))
    patched.setattr(pathlib.Path, "replace", guarded(pathlib.Path.replace, lambda *_: True))
    patched.setattr(pathlib.Path, "rename", guarded(pathlib.Path.rename, lambda *_: True))
    patched.setattr(pathlib.Path, "mkdir", guarded(pathlib.Path.mkdir, lambda *_, **__: True))
    patched.setattr(os, "open", guarded(os.open, lambda _, flags, *__, **___: bool(flags & (os.O_WRONLY | os.O_RDWR))))
    patched.setattr(os, "pwrite", guarded(os.pwrite, lambda *_: True))
    patched.setattr(os, "fsync", guarded(os.fsync, lambda *_: True))
    try:
        yield count
    finally:
        patched.undo()


def numbers(total: int, most: int) -> list[int]:
    """All numbers below `total`, or `most` random ones of them."""
    return list(range(total)) if total <= most else sorted(random.Random(SEED).sample(range(total), most))


@pytest.mark.parametrize("most", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_packing_with_a_failing_disk(tmp_path: Path, tokenizer_dir: Path, most: int) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "conversation", 20)
    arguments = {"tokenizer": tokenizer_dir, "part_bytes": 2000}
    with failing_at(-1, 0) as count:
        expected = pack_with([rows], tmp_path / "whole", **arguments).digest
    out = tmp_path / "out"
    for number in numbers(count[0], most):
        for code in (*CODES, errno.ENOENT) if most > 10 else (CODES[0], errno.ENOENT):
            with failing_at(number, code, tmp_path / ".out.packing") as done:
                _, message = refusal(lambda: pack_with([rows], out, **arguments))
            assert message or done[0] <= number or open_dataset(out).digest == expected, (number, code)
            assert not out.exists() or open_dataset(out).digest == expected
            assert pack_with([rows], out, **arguments).digest == expected, (number, code, f"FAULTS_SEED={SEED}")
            shutil.rmtree(out)


@pytest.mark.parametrize("most", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_saving_with_a_failing_disk(tmp_path: Path, most: int) -> None:
    from mmtrain import checkpoint
    from mmtrain.model.model import Model
    from mmtrain.records import TrainedOn
    from mmtrain.shapes import ModelConfig
    from mmtrain.train.optim import make

    model = Model(ModelConfig(20, 16, 1, 2, 1, 16))
    optimizer = make(model, "adamw", lr=0.01, weight_decay=0.1)

    def save(step: int) -> Path:
        return checkpoint.save(
            tmp_path, model, optimizer, step=step, settings={"stage": "sft"}, data=TrainedOn(), keep_last=1
        )

    save(1)
    with failing_at(-1, 0) as count:
        save(2)
    for number in numbers(count[0], most):
        for code in CODES if most > 10 else CODES[:1]:
            step = checkpoint.find(tmp_path).step
            with failing_at(number, code):
                assert refusal(partial(save, step + 1))[1], (number, code)
            assert checkpoint.find(tmp_path).step in (step, step + 1)
            save(step + 1)
            assert checkpoint.find(tmp_path).step == step + 1
