"""Statistics of tokens: lengths, trained tokens, use of the vocabulary, scripts, and message lengths by role.

About 20 million tokens per second are counted on one core. The script of a token is computed from its bytes. A token in which no character begins (its bytes continue a
character) is counted in the script of the token before it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mmdata.encode.sequences import PAIR_MARKS, Sequences, ranges
from mmdata.stats.tally import Tally
from mmdata.tokenizer.scripts import HAN, MARK, OTHER, SCRIPTS, SPACE, code_points, count_scripts, scripts_of
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.vocabulary import token_texts

NUM_SHARES = 20  # equal bins, from 0 to 1, of the share of a sequence's tokens that is trained
NUM_TURNS = 8  # answers of later turns are counted as answers of this turn
MESSAGE_ROLES = ("system", "user", "assistant", "tool")
ROLES = pl.Enum((*MESSAGE_ROLES, "document", "chosen", "rejected"))  # of texts
_CONTINUES = 255  # in place of a script: no character begins in the token


class Vocabulary:
    """A tokenizer with properties of each of its V ids, by id. size: V. control: bool [V], special tokens that only
    chat templates write. pieces: the bytes of each text, empty for control tokens and unused ids. bytes, characters:
    int64 [V], the number of bytes, and of characters whose first byte is in the token. scripts: uint8 [V], an index
    into `text.SCRIPTS`, or 255 if no character begins in the token. It is pickled as the tokenizer's directory and
    loaded again in the other process."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.size = tokenizer.vocab_size
        self.control = np.zeros(self.size, bool)
        self.control[list(tokenizer.control_tokens.values())] = True
        self.pieces = pieces = token_pieces(tokenizer)
        self.bytes = np.fromiter(map(len, pieces), np.int64, self.size)
        is_begin = np.frombuffer(b"".join(pieces), np.uint8) & 0xC0 != 0x80
        ends = np.concatenate([[0], np.cumsum(is_begin)])[np.cumsum(self.bytes)]
        self.characters = np.diff(ends, prepend=0)  # a character is counted in the token that has its first byte
        self.scripts = _scripts(pieces)
        # A chat template begins a message with a control token, the name of the role and a newline. The newline may be
        # merged into one token with the name, or with the first characters of the message.
        self._is_end = np.array([piece.startswith(b"\n") for piece in pieces], bool)
        self._names = [self._names_of(role) for role in MESSAGE_ROLES]

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_vocabulary, (self.tokenizer.dir,)

    def _names_of(self, role: str) -> list[tuple[list[int], bool]]:
        """Return the ids that can follow a message's first control token to name `role`, as (ids, needs_end).
        needs_end: a token that begins with a newline must follow; False where the newline is merged into the tokens of
        the name."""
        alone, line = (self.tokenizer.encode_batch([text])[0].tolist() for text in (role, f"{role}\n"))
        return [(alone, True)] + ([(line, False)] if line[: len(alone)] != alone else [])

    def text(self, id: int) -> str:
        """Return the text of an id for display: a control token's name; "" if unused; U+FFFD for incomplete
        characters."""
        return self.pieces[id].decode("utf-8", errors="replace") or self.tokenizer.native.id_to_token(id) or ""

    def roles(self, ids: np.ndarray, opens: np.ndarray) -> np.ndarray:
        """Return the role of the message that each of N control tokens begins: int64 [N], indices into MESSAGE_ROLES;
        -1 if no role name follows. opens: positions of the control tokens in `ids`."""
        roles = np.full(len(opens), -1)
        for number, names in enumerate(self._names):
            for name, needs_end in names:
                fits = opens + len(name) + needs_end < len(ids)
                for k, id in enumerate(name, 1):
                    fits[fits] = ids[opens[fits] + k] == id
                if needs_end:
                    fits[fits] = self._is_end[ids[opens[fits] + len(name) + 1]]
                roles[fits] = number
        return roles

    def header(self, ids: Sequence[int], at: int) -> tuple[str, int] | None:
        """Return the role of the message that begins at position `at`, and where its text begins; None if it is no
        control token or no role name follows."""
        if not self.control[ids[at]]:
            return None
        for role, names in zip(MESSAGE_ROLES, self._names, strict=True):
            for name, needs_end in names:
                end = at + 1 + len(name)
                if list(ids[at + 1 : end]) == name and (not needs_end or (end < len(ids) and self._is_end[ids[end]])):
                    return role, end + (needs_end and self.pieces[ids[end]] == b"\n")
        return None


def _load_vocabulary(directory: Path) -> Vocabulary:
    """Called when a `Vocabulary` is unpickled."""
    return Vocabulary(Tokenizer.load(directory))


def token_pieces(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes of the text of each id, [vocab_size]; empty for control tokens and unused ids."""
    special = {id for id, token in tokenizer.added.items() if token.special}
    return [b"" if id in special else text or b"" for id, text in enumerate(token_texts(tokenizer))]


def _scripts(pieces: Sequence[bytes]) -> np.ndarray:
    """Return the script of each token, uint8 [V]: an index into `text.SCRIPTS`, of most of its characters, spaces only
    if there is nothing else. Without a complete character it is guessed from the first byte that begins one, else
    _CONTINUES."""
    whole = [piece.decode("utf-8", errors="ignore") for piece in pieces]
    lengths = np.fromiter(map(len, whole), np.int64, len(whole))
    counts = count_scripts(scripts_of(code_points("".join(whole))), lengths)
    counts[counts.sum(axis=1) > counts[:, SPACE], SPACE] = 0
    scripts = counts.argmax(axis=1).astype(np.uint8)
    for id in np.flatnonzero(lengths == 0).tolist():
        lead = next((byte for byte in pieces[id] if byte >= 0xC0), 0)
        is_han, is_mark = 0xE3 <= lead <= 0xE9, lead in (0xE2, 0xEF, 0xF0)
        scripts[id] = HAN if is_han else MARK if is_mark else OTHER if lead else _CONTINUES
    return scripts


# --- counting


def count_tokens(tally: Tally, sequences: Sequences, vocabulary: Vocabulary) -> None:
    """Count the tokens of sequences or pairs in `tally`: the frame "sequences" (tokens; of pairs also prompt, chosen
    and rejected), the share of trained tokens of each sequence, ids, scripts, and, except for pairs, the frame
    "messages" (role, turn, tokens). The length of a pair is that of its longer side, prompt included; shares of trained
    tokens are of both sides with the prompt, which counts once in the total and by id and script."""
    parts: dict[str, np.ndarray] = {}
    lengths, trained = sequences.lengths, sequences.num_loss
    if sequences.is_pairs:
        prompts, chosen, rejected, num_marks, _ = sequences.pair_marks().T
        parts = {"prompt": prompts, "chosen": chosen, "rejected": rejected}
        lengths = np.concatenate([prompts + chosen, prompts + rejected])
        marks = sequences.mark_begins + PAIR_MARKS
        ends = sequences.marks[ranges(marks, num_marks)]
        pair = np.repeat(np.arange(len(prompts)), num_marks)
        signs = 2 * ((np.arange(len(ends)) - np.repeat(np.cumsum(num_marks) - num_marks, num_marks)) % 2) - 1
        of_chosen = np.bincount(pair, weights=signs * ends, minlength=len(prompts)).astype(np.int64)
        trained = np.concatenate([of_chosen, trained - of_chosen])
    else:
        _count_messages(tally, sequences, vocabulary)
    bins = np.minimum(trained / np.maximum(lengths, 1) * NUM_SHARES, NUM_SHARES - 1).astype(np.int64)
    tally.add("trained shares", np.bincount(bins, minlength=NUM_SHARES))
    tally.frames["sequences"].append(pl.DataFrame({"tokens": sequences.widths(), **parts}).cast(pl.UInt32))
    ids, num_loss = sequences.ids, int(trained.sum())
    tally.sums.update({"sequences": len(sequences), "tokens": len(ids), "loss_tokens": num_loss})
    tally.add("vocabulary", np.bincount(ids, minlength=vocabulary.size))
    _count_scripts(tally, ids, vocabulary)


def _count_scripts(tally: Tally, ids: np.ndarray, vocabulary: Vocabulary) -> None:
    """Add the tokens, characters and bytes of each script to the array "token scripts", int64 [scripts + 1, 3], last
    those of control tokens."""
    scripts = vocabulary.scripts[ids]
    scripts[vocabulary.control[ids]] = len(SCRIPTS)
    begins = np.flatnonzero(scripts != _CONTINUES)
    if len(begins):
        runs = np.diff(begins, append=len(ids))
        runs[0] += begins[0]
        whose = np.repeat(scripts[begins], runs)
        weights = (None, vocabulary.characters[ids], vocabulary.bytes[ids])
        counts = [np.bincount(whose, weights=each, minlength=len(SCRIPTS) + 1) for each in weights]
        tally.add("token scripts", np.stack(counts, axis=1).astype(np.int64))


def _count_messages(tally: Tally, sequences: Sequences, vocabulary: Vocabulary) -> None:
    """Count the tokens of each message, from the control token that begins it to the next such one or the end of the
    sequence, with what the chat template adds."""
    ends = np.cumsum(sequences.lengths)
    opens = np.flatnonzero(vocabulary.control[sequences.ids])
    roles = vocabulary.roles(sequences.ids, opens)
    opens, roles = opens[roles >= 0], roles[roles >= 0]
    if not len(opens):
        return
    sequence = np.searchsorted(ends, opens, "right")
    length = np.minimum(np.append(opens[1:], ends[-1]), ends[sequence]) - opens
    messages = pl.DataFrame({"sequence": sequence, "role": pl.Series(np.array(MESSAGE_ROLES)[roles], dtype=ROLES)})
    messages = with_turns(messages.with_columns(tokens=pl.Series(length, dtype=pl.UInt32)), "sequence")
    tally.frames["messages"].append(messages.select("role", "turn", "tokens"))


def with_turns(texts: pl.DataFrame, row: str) -> pl.DataFrame:
    """Add the column turn: the number of an answer (role "assistant") in its row, from 1, at most NUM_TURNS; else null.
    row: the column that numbers the rows."""
    is_answer = pl.col("role") == "assistant"
    turn = is_answer.cast(pl.UInt32).cum_sum().over(row).clip(upper_bound=NUM_TURNS)
    return texts.with_columns(turn=pl.when(is_answer).then(turn).cast(pl.UInt8))
