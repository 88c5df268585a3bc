"""The options of all commands that read rows from files. Imports nothing that is slow to load."""

from dataclasses import dataclass

from mmdata.options import flag_of, option, options_of

READING = "Reading files"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How files of rows are read, see `mmdata.io.lines` and `mmdata.encode.rows`; other options classes may derive from this one."""

    encoding: str | None = option(
        None,
        "Encoding of the text in the files, such as gb18030, utf-16 or cp1252.",
        READING,
        metavar="NAME",
        default_text="utf-8",
    )
    text: str | None = option(
        None,
        "Take plain text files, too; line: every line is a document, as with --kind document; file: every file is one.",
        READING,
        choices=("line", "file"),
    )
    kind: str | None = option(
        None,
        "Take the rows that can be read as this kind and set the others aside, counted.",
        READING,
        choices=("document", "conversation", "pair"),
        default_text="the kind of the first rows",
    )
    mapping: tuple[str, ...] = option(
        (),
        "Column that holds a field of rows or messages, as in prompt=question; may be repeated.",
        READING,
        flag="--map",
        metavar="FIELD=COLUMN",
        default_text="see docs/data.md",
    )

    @property
    def reading(self) -> "ReadOptions":
        """These options alone, where `self` is of a derived class."""
        return ReadOptions(encoding=self.encoding, text=self.text, kind=self.kind, mapping=self.mapping)

    @property
    def flags(self) -> list[str]:
        """The words of a command line that give these options."""
        words = []
        for name, declaration in options_of(ReadOptions):
            value = getattr(self, name) or ()
            for item in (value,) if isinstance(value, str) else value:
                words += [flag_of(name, declaration), item]
        return words


DEFAULT_READING = ReadOptions()
