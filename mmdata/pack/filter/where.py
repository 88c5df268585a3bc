"""Conditions on the columns of rows, in polars' SQL, such as `language = 'Chinese' and tokens between 20 and 512`."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator

import polars as pl

from mmdata.errors import UsageError
from mmdata.pack.filter.features import COLUMNS, schema

MOST_CHARACTERS = 1000  # of a condition: the time to parse one grows with the square of its length
MOST_DOUBLED = 10  # operators that polars replaces by two copies of an operand: nested, each doubles the time
_DOUBLED = re.compile(r"\b(between|case|nullif)\b", re.IGNORECASE)
HELP = "conditions are SQL: --where \"language = 'Chinese' and characters between 20 and 2000 and not duplicate\""


class Where:
    """A parsed condition, UsageError if it is none on `COLUMNS`. text: as given. names: its columns, in their order."""

    def __init__(self, text: str, option: str = "--where"):
        self.text = text
        shown = text if len(text) <= 60 else f"{text[:60]}…"
        if len(text) > MOST_CHARACTERS:
            raise UsageError(f"{option} has {len(text):,} characters, at most {MOST_CHARACTERS:,} are read", HELP)
        if (number := len(_DOUBLED.findall(text))) > MOST_DOUBLED:
            problem = f"BETWEEN, CASE and NULLIF stand {number} times in it, at most {MOST_DOUBLED} are read"
            raise UsageError(
                f"{option} {shown!r}: {problem}", "write ranges as `characters >= 20 and characters <= 2000`"
            )
        try:
            with _quiet_panics():
                self._condition = pl.sql_expr(text)
                used = self._condition.meta.root_names()
        except (Exception, pl.exceptions.PanicException) as error:  # polars raises many types
            raise UsageError(f"{option} {shown!r}: {_first_line(error)}", HELP) from None
        for name in used:
            if name not in COLUMNS:
                raise UsageError(
                    f"{option} {shown!r}: there is no column {name!r}", f"the columns are {', '.join(COLUMNS)}"
                )
        self.names = tuple(name for name in COLUMNS if name in used)
        try:
            with _quiet_panics():
                self.holds(pl.DataFrame(schema=schema(self.names)))
        except (Exception, pl.exceptions.PanicException) as error:
            raise UsageError(f"{option} {shown!r}: {_first_line(error)}", HELP) from None

    def holds(self, frame: pl.DataFrame) -> pl.Series:
        """Return for each row of a frame whether the condition holds; unknown (null) counts as not. The frame must have
        all rows, because a condition may compare them, as in `characters > avg(characters)`."""
        strings = pl.selectors.enum().cast(pl.String)  # `like` and functions of strings take no enums
        found = frame.select(self.names).with_columns(strings).with_columns(self._condition.alias("holds"))["holds"]
        if found.dtype != pl.Boolean:
            raise ValueError(f"it gives {found.dtype}, not true or false")
        return found.fill_null(False)


@contextlib.contextmanager
def _quiet_panics() -> Iterator[None]:
    """Keep off the terminal what Rust prints of a panic, such as that of polars on `least() = 1`, before it is raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters."""
    return str(error).partition("\n")[0][:200]
