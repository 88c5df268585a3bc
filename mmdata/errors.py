"""Every error that a user can meet, as one tree of exceptions.

`cli.main` catches MMError, prints `error: <message>` and `fix: <fix>` to stderr and exits with `exit_code`. Raise the subclass
that fits. Any other exception that ends a command is a bug of mm and shows its traceback.
"""


class MMError(Exception):
    """Base class of all errors that a user can cause and correct.

    message: what is wrong, where (file and line), and what was expected.
    fix: a command, an option or a step that helps; empty if there is none.
    """

    exit_code = 1

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix


class UsageError(MMError):
    """An option has a wrong value, contradicts another one, or names something that does not exist."""

    exit_code = 2


class InputError(MMError):
    """An input file is missing, empty or of the wrong kind, or too many of its rows cannot be used."""


class TokenizerError(MMError):
    """A tokenizer is missing, cannot be read, or does not fit the model or the dataset."""


class DatasetError(MMError):
    """A packed dataset is missing, incomplete or damaged, or of another kind than the stage needs."""


class CheckpointError(MMError):
    """A checkpoint is missing or damaged, or does not fit the model, the tokenizer or the data."""


class TrainError(MMError):
    """Training cannot continue: non-finite losses, reference logps of another model, or a rank that died."""


class DiskError(MMError):
    """A file cannot be written: the disk is full, or permission is missing."""

    exit_code = 7


# --- downloads (`mm fetch`)


class FetchError(MMError):
    """A download failed for a reason that no subclass names."""

    exit_code = 5


class NotFoundError(FetchError):
    """The source does not have the file, revision or repository."""

    exit_code = 3


class AccessError(FetchError):
    """The repository is gated or private, or the source refused the token."""

    exit_code = 4


class NetworkError(FetchError):
    """The source cannot be reached, answers with an error, or sends nothing for too long."""


class IntegrityError(FetchError):
    """The bytes received are not the published ones, even after a second download."""

    exit_code = 6


class ConflictError(FetchError):
    """A file of the user's own is where a downloaded one would go."""

    exit_code = 8


class InterruptedFetch(FetchError):
    """The user stopped the download; the bytes received so far are kept."""

    exit_code = 130
