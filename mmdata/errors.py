"""Every error a user can meet, as one tree. Each carries what is wrong, the line that helps, and the exit code.

`cli` prints `error: <message>` and `fix: <fix>` and exits with `exit_code`; nothing else catches these.
"""


class MMError(Exception):
    """Something a user can cause and mend. `message`: what was found and expected, with file and line; `fix`: what helps."""

    exit_code = 1

    def __init__(self, message: str, fix: str = ""):
        super().__init__(message)
        self.message = message
        self.fix = fix


class UsageError(MMError):
    """Options that contradict each other or name something that is not there."""

    exit_code = 2


class InputError(MMError):
    """An input file that is missing, empty, of the wrong kind, or holds too many rows that cannot be used."""


class TokenizerError(MMError):
    """A tokenizer that is missing, unreadable, or does not fit the model or the dataset."""


class DatasetError(MMError):
    """A packed dataset that is missing, incomplete, damaged, or of another kind than asked for."""


class CheckpointError(MMError):
    """A checkpoint that is missing, damaged, or does not fit the model, the tokenizer or the data."""


class TrainError(MMError):
    """Training that cannot go on: non-finite loss, a stale reference, a rank that died."""


class DiskError(MMError):
    """The disk is full or cannot be written."""

    exit_code = 7


class FetchError(MMError):
    """A download that did not end with the published bytes in place."""

    exit_code = 5


class NotFoundError(FetchError):
    """A file, revision or repository that the source does not have."""

    exit_code = 3


class AccessError(FetchError):
    """A repository that is gated or private, or a token that was refused."""

    exit_code = 4


class NetworkError(FetchError):
    """A source that cannot be reached, or that stopped sending for too long."""


class IntegrityError(FetchError):
    """Bytes that are not the published ones, even after fetching them again."""

    exit_code = 6


class ConflictError(FetchError):
    """A file of the user's own where a fetched one would go."""

    exit_code = 8


class InterruptedFetch(FetchError):
    """A download that the user stopped; what arrived is kept."""

    exit_code = 130
