"""The exceptions for every error that a user can cause or correct, as one class tree.

`cli.main` prints `error: <message>` and `fix: <fix>` to stderr and exits with the class's `exit_code`. Any other
exception that ends a command is a bug of mm and shows its traceback.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

# Characters that move the cursor, colour or reorder text; newlines and tabs are not among them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    """Return a text in which control characters are written as escapes, such as \\x1b: what a terminal shows of data,
    names and paths is data, and never moves its cursor or changes its colours."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1].replace("\\\\", "\\"), text)


# Spaces and what follows them up to where a line may end: a word, or a wide character, such as of Chinese, with the
# punctuation that begins no line.
_WIDE = "\u2e80-\ud7ff\uf900-\ufaff\uff00-\uff60\U0001f000-\U0003fffd"
_CLOSING = "\u2019\u201d\u2026\u3001\u3002\u300b\u300d\u300f\u3011\uff01\uff09\uff0c\uff1a\uff1b\uff1f"
_PIECE = re.compile(rf"\s*(?:[{_WIDE}][{_CLOSING}]*|[^\s{_WIDE}]+)")


def wrapped(text: str, width: int, indent: str = "") -> str:
    """Return a text in lines of at most `width` cells of a terminal, of which a wide character takes two. They end
    between words, or beside a wide character; a longer word stays whole. All but the first begin with `indent`."""
    from rich.cells import cell_len

    lines, line = [], ""
    for piece in _PIECE.findall(text.expandtabs()):
        if line.strip() and cell_len(line + piece) > width:
            lines.append(line)
            line = indent + piece.lstrip()
        else:
            line += piece
    return "\n".join([*lines, line])


def cut_to(text: str, width: int) -> str:
    """Return the beginning of a line that fits `width` cells of a terminal."""
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= width else set_cell_size(text, max(0, width)).rstrip()


class MMError(Exception):
    """Base class of all errors that a user can cause and correct.

    message: what is wrong, where (file and line), and what was expected. fix: a command, an option or a step that
    helps; empty if there is none. `exit_code` is inherited by subclasses without one of their own.
    """

    exit_code = 1

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix


class UsageError(MMError):
    """An option has a wrong value, contradicts another one, or names something that does not exist."""

    exit_code = 2


@contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """Context manager around the import of an optional package: ImportError becomes a UsageError that says `what` needs
    which package, and names the `extra` of mm-toolkit to install."""
    try:
        yield
    except ImportError as error:
        raise UsageError(what, f"pip install 'mm-toolkit[{extra}]'") from error


class InputError(MMError):
    """An input file is missing, empty or of the wrong kind, or too many of its rows cannot be used."""


class TokenizerError(MMError):
    """A tokenizer is missing, cannot be read, or does not match the model or the dataset."""


class DatasetError(MMError):
    """A packed dataset is missing, incomplete or damaged, or its rows are of another kind than the stage needs."""


class CheckpointError(MMError):
    """A checkpoint is missing or damaged, or does not match the model, the tokenizer or the data."""


class TrainError(MMError):
    """Training cannot continue: a loss is not finite, the reference logps are another model's, or a rank died."""


class DiskError(MMError):
    """A file cannot be written: the disk is full, or permission is missing."""

    exit_code = 7


def of_system(error: OSError) -> MMError | None:
    """Return the error to print for an error of the system: DiskError for a full disk or exceeded quota, a device that
    fails or cannot be written, InputError for every other. None if the error was not raised by the system."""
    name = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(f"the disk is full while writing {name}", "free some space (`df -h .`) and run it again")
    if error.errno in (errno.EIO, errno.EROFS):
        return DiskError(f"{name}: {error.strerror}", "check the disk (`dmesg | tail`), or use another one")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return InputError(f"{name}: {error.strerror}", "allow more (`ulimit -n 65536`) and run it again")
    if error.errno is None:
        return None
    return InputError(f"{name}: {error.strerror}", f"check the path and its permissions (`ls -ld {name}`)")


# --- downloads (`mm fetch`)


class FetchError(MMError):
    """A download failed for a reason that none of the subclasses describes."""

    exit_code = 5


class NotFoundError(FetchError):
    """The download source does not have the file, revision or repository."""

    exit_code = 3


class AccessError(FetchError):
    """The repository is gated or private, or the source refused the access token."""

    exit_code = 4


class NetworkError(FetchError):
    """The source cannot be reached, answers with an error, or sends no data for too long."""


class IntegrityError(FetchError):
    """The bytes received do not match the published size, checksum or file type, and a retry does not help."""

    exit_code = 6


class ConflictError(FetchError):
    """A file that would have to be replaced was not downloaded by mm, so it is left untouched."""

    exit_code = 8


class InterruptedFetch(FetchError):
    """The user stopped the download with Ctrl-C; the next run resumes from the bytes received so far."""

    exit_code = 130
