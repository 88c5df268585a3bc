"""Shared by all tests: the repository's root is importable, and torch uses one thread so that workers do not fight."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """Keep torch, when a test has imported it, on one thread."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
