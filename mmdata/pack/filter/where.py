"""Conditions on the columns of rows, in polars' SQL, such as `language = 'Chinese' and tokens between 20 and 512`."""

import polars as pl

from mmdata.errors import UsageError
from mmdata.pack.filter.features import COLUMNS, schema

MOST_CHARACTERS = 1000  # of a condition: the time to parse one grows with the square of its length
HELP = "conditions are SQL: --where \"language = 'Chinese' and characters between 20 and 2000 and not duplicate\""


class Where:
    """A parsed condition, UsageError if it is none on `COLUMNS`. text: as given. names: its columns, in their order."""

    def __init__(self, text: str, option: str = "--where"):
        self.text = text
        shown = text if len(text) <= 60 else f"{text[:60]}…"
        if len(text) > MOST_CHARACTERS:
            raise UsageError(f"{option} has {len(text):,} characters, at most {MOST_CHARACTERS:,} are read", HELP)
        try:
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


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters."""
    return str(error).partition("\n")[0][:200]
