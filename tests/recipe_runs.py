"""Executes the steps of recipes in the test's own process, as `mm run` does in processes of their own; and a tiny recipe."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import cli
from mmtrain.commands.project import runner

TINY = """
questions = ["one and two?", "two and two?"]
price_per_hour = 2.0

[pack]
files = ["data/pretrain_hq.jsonl", "data/sft_512.jsonl", "data/dpo.jsonl"]
max_len = 128
val_fraction = 0.1
no_report = true

[train.pretrain]
model = "tiny"
data = "shards/pretrain_hq"
steps = 4
batch_tokens = 512
save_every = 1
val_every = 2

[train.sft]
data = "sft_512"
steps = 3
batch_tokens = 512
save_every = 1
no_samples = true

[train.dpo]
data = "shards/dpo"
steps = 2
batch_tokens = 512
save_every = 1
"""


def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Let recipes execute their steps in this process; return the list to which the words of each are appended."""
    done: list[Sequence[str]] = []

    def launch(
        argv: Sequence[str],
        directory: Path,
        *,
        stdin: str = "",
        is_captured: bool = False,
        is_quiet: bool = False,
        **_: Any,
    ) -> Any:
        done.append(list(argv))
        written, ignored = io.StringIO(), io.StringIO()
        with monkeypatch.context() as patched, inside(directory):
            patched.setattr(sys, "argv", ["mm", *argv])
            patched.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            errors = contextlib.redirect_stderr(ignored if is_quiet else sys.stderr)
            with errors, contextlib.redirect_stdout(written if is_captured else sys.stderr):
                try:
                    cli.main()
                except SystemExit as ended:
                    return runner.Ended(int(ended.code or 0), written.getvalue(), ignored.getvalue())

    monkeypatch.setattr(runner, "launch", launch)
    return done


@contextlib.contextmanager
def inside(directory: Path) -> Iterator[None]:
    """With this directory as the current one."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)
