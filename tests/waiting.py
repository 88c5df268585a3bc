"""Waiting for an event, not for a time: a test goes on as soon as it has come, and fails only where it never comes."""

import time
from collections.abc import Callable

LONG_S = 300  # no test waits so long on any machine that still works


def wait_until(is_so: Callable[[], object]) -> None:
    """Return once `is_so()` is true."""
    end = time.monotonic() + LONG_S
    while not is_so():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)
