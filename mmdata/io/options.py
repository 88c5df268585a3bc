"""The options of all commands that read rows from files. Imports nothing that is slow to load."""

from dataclasses import dataclass

from mmdata.options import option

READING = "Reading files"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How files of rows are read, see `mmdata.io.lines`; other options classes may derive from this one."""

    encoding: str | None = option(
        None,
        help="Encoding of the text in the files, such as gb18030, utf-16 or cp1252.",
        group=READING,
        metavar="NAME",
        default_text="utf-8",
    )
    text: str | None = option(
        None,
        help="Take plain text files, too; line: every line is a document; file: every file is one.",
        group=READING,
        choices=("line", "file"),
    )

    @property
    def reading(self) -> "ReadOptions":
        """These options alone, where `self` is of a derived class."""
        return ReadOptions(encoding=self.encoding, text=self.text)


DEFAULT_READING = ReadOptions()
