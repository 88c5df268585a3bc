"""What a training run prints to stderr: lines, and on a terminal one live line below them that is drawn again and
again. Work of more than SOON_S seconds before and between steps is announced by a thread, which also shows how far it
is."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmdata.errors import cut_to, shown, wrapped
from mmdata.io.files import Progress

SOON_S, AGAIN_S = 1.5, 10.0  # seconds until the first line about a phase, and between the next ones
DRAW_S = 0.2  # seconds between drawings of the live line
BAR_WIDTH = 10


class Console:
    """The output of one rank. say: prints a line; None prints nothing, as on all ranks but the first. is_live: whether
    there is a terminal to draw a live line on."""

    def __init__(self, say: Callable[[str], None] | None, *, is_live: bool = False):
        self._say, self.is_live = say, is_live and say is not None
        self._drawn = 0.0  # time.monotonic() of the last drawing
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """Print a line, in place of the live line."""
        if self._say is not None:
            with self._lock:
                self._clear()
                self._say(text)

    def warn(self, text: str) -> None:
        """Print a line, also where the console is quiet."""
        print_line(text) if self._say is None else self.say(text)

    def answer(self, text: str) -> None:
        """Print a line at once, also from a signal handler, unless the console is quiet."""
        if self._say is not None:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())

    def live(self, text: Callable[[], str]) -> None:
        """Draw the live line, if there is one and the last drawing is DRAW_S seconds ago."""
        if self.is_live and time.monotonic() - self._drawn >= DRAW_S:
            with self._lock:
                self._clear()
                width = shutil.get_terminal_size().columns - 1
                print(cut_to(shown(text()), width), end="", file=sys.stderr, flush=True)
                self._drawn = time.monotonic()

    def close(self) -> None:
        """Remove the live line."""
        with self._lock:
            self._clear()

    @contextmanager
    def phase(self, label: str, unit: str = "", *, seconds: float = 0.0) -> Iterator[Progress]:
        """Context manager of work that may take long; yields `update(done, total)`. Its progress is shown if it takes
        more than SOON_S, on a terminal at once. unit: what is counted, such as "pairs". seconds: how long it will take, 0 if unknown."""
        begun, is_over = time.monotonic(), threading.Event()
        counts = [0, 0]

        def update(done: int, total: int) -> None:
            counts[:] = done, total

        def watch() -> None:
            wait = DRAW_S if self.is_live else SOON_S
            while not is_over.wait(wait):
                text = f"{label}: {_progress(counts[0], counts[1], unit, time.monotonic() - begun, seconds)}"
                wait = DRAW_S if self.is_live else AGAIN_S
                self.live(lambda text=text: text) if self.is_live else self.say(text)

        if self._say is None:
            yield update
            return
        thread = threading.Thread(target=watch, name="phase", daemon=True)
        thread.start()
        try:
            yield update
        finally:
            is_over.set()
            thread.join()
            self.close()

    def _clear(self) -> None:
        """Remove the live line, if one is drawn."""
        if self._drawn:
            print("\r\033[2K", end="", file=sys.stderr, flush=True)
            self._drawn = 0.0


def print_line(text: str) -> None:
    """Print one line to stderr; on a terminal it is wrapped between words."""
    if sys.stderr.isatty():
        text = wrapped(text, shutil.get_terminal_size().columns, "  ")
    print(shown(text), file=sys.stderr, flush=True)


def bar(share: float) -> str:
    """Return a bar of BAR_WIDTH characters for a share of 0 to 1."""
    filled = round(BAR_WIDTH * share)
    return f"[{'=' * filled}{' ' * (BAR_WIDTH - filled)}]"


def _progress(done: int, total: int, unit: str, elapsed: float, seconds: float) -> str:
    """Return the progress of a phase as text, such as "12 of 40 pairs, 9s, 21s left"."""
    if done and total:
        left = elapsed * (total - done) / done
        return f"{done:,} of {total:,} {unit}, {duration(elapsed)}, {duration(left)} left"
    return f"{duration(elapsed)}{f' of about {duration(seconds)}' if seconds >= elapsed else ''}"


def duration(seconds: float) -> str:
    """Return a duration as text, such as 9s, 1m07s or 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
