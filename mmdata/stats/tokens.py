"""Sequences of ids with their trained spans, and what is counted of their tokens: some 20 million tokens a second of one core.

Scripts of tokens come from the tokenizer's bytes; a token that only continues a character belongs to the script of the token before
it.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from mmdata.encode.sequences import PairSequence
from mmdata.stats.frames import NUM_TURNS
from mmdata.stats.tally import Tally
from mmdata.tokenizer import text as texts
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.vocabulary import token_texts

NUM_SHARES = 20  # bins of the trained share
ROLES = ("system", "user", "assistant", "tool")
_CONTINUES = 255  # in a table of scripts: the token holds no beginning of a character


class FlatSequences(NamedTuple):
    """Sequences end to end. ids: [T]. lengths: [N]. spans: [2 M], flat positions begin, end, …, ascending. prompts: for pairs,
    whose two sides (prompt and chosen, prompt and rejected) follow each other, the length of each prompt, [N / 2]."""

    ids: np.ndarray
    lengths: np.ndarray
    spans: np.ndarray
    prompts: np.ndarray | None = None


def flat_sequences(sequences: Iterable[Any]) -> FlatSequences:
    """Flat sequences of encoded ones (`encode.Sequence`) or of pairs (`PairSequence`); at least one, all of one kind."""
    ids, spans, lengths, prompts = [], [], [], []
    at = 0
    for one in sequences:
        sides = [(one.ids[:0], one.ids, one.spans)] if not isinstance(one, PairSequence) else []
        if isinstance(one, PairSequence):
            prompts.append(len(one.prompt))
            sides = [(one.prompt, one.chosen, one.chosen_spans), (one.prompt, one.rejected, one.rejected_spans)]
        for prompt, reply, trained in sides:
            ids += [prompt, reply]
            spans.append(trained.reshape(-1).astype(np.int64) + (at + len(prompt)))
            lengths.append(len(prompt) + len(reply))
            at += lengths[-1]
    of_pairs = np.array(prompts, np.int64) if prompts else None
    return FlatSequences(np.concatenate(ids), np.array(lengths, np.int64), np.concatenate(spans), of_pairs)


class Vocabulary:
    """A tokenizer's ids: text, script, characters and bytes of each, and which are control tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.size = tokenizer.vocab_size
        self.control = np.zeros(self.size, bool)
        self.control[list(tokenizer.control_tokens.values())] = True
        self.pieces = pieces = token_pieces(tokenizer)
        self.bytes = np.fromiter(map(len, pieces), np.int64, self.size)
        is_begin = np.frombuffer(b"".join(pieces), np.uint8) & 0xC0 != 0x80
        ends = np.concatenate([[0], np.cumsum(is_begin)])[np.cumsum(self.bytes)]
        self.characters = np.diff(ends, prepend=0)  # those that begin in the token
        self.scripts = _scripts(pieces)
        # After the token that opens a message come a role's name and a line end. The line end may be one token with the
        # name, or with the first characters of the message.
        self._is_end = np.array([piece.startswith(b"\n") for piece in pieces], bool)
        self._names = [self._names_of(role) for role in ROLES]

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_vocabulary, (self.tokenizer.dir,)

    def _names_of(self, role: str) -> list[tuple[list[int], bool]]:
        """Ids that name a role, and whether a token that begins with a line end must follow."""
        alone, line = (self.tokenizer.encode_batch([text])[0].tolist() for text in (role, f"{role}\n"))
        return [(alone, True)] + ([(line, False)] if line[: len(alone)] != alone else [])

    def text(self, id: int) -> str:
        """An id's text; bytes that are no character by themselves become U+FFFD."""
        return self.pieces[id].decode("utf-8", errors="replace") or self.tokenizer.native.id_to_token(id) or ""

    def roles(self, ids: np.ndarray, opens: np.ndarray) -> np.ndarray:
        """int64 [N]: for each control token (at the positions `opens`) the role, as an index into ROLES, that is named after it,
        or -1."""
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
        """The role of the message that the control token at `at` opens, and where its text begins; None if it opens none."""
        if not self.control[ids[at]]:
            return None
        for role, names in zip(ROLES, self._names, strict=True):
            for name, needs_end in names:
                end = at + 1 + len(name)
                if list(ids[at + 1 : end]) == name and (not needs_end or (end < len(ids) and self._is_end[ids[end]])):
                    return role, end + (needs_end and self.pieces[ids[end]] == b"\n")
        return None


def _load_vocabulary(directory: Path) -> Vocabulary:
    return Vocabulary(Tokenizer.load(directory))


def token_pieces(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each id; none of control tokens and unused ids."""
    special = {id for id, token in tokenizer.added.items() if token.special}
    return [b"" if id in special else text or b"" for id, text in enumerate(token_texts(tokenizer))]


def _scripts(pieces: Sequence[bytes]) -> np.ndarray:
    """uint8 [V]: for each token the script of most of its characters, spaces apart; of a token without a whole character the
    script of its first byte, and _CONTINUES if no character begins in it."""
    whole = [piece.decode("utf-8", errors="ignore") for piece in pieces]
    lengths = np.fromiter(map(len, whole), np.int64, len(whole))
    counts = texts.count_scripts(texts.scripts_of(texts.code_points("".join(whole))), lengths)
    counts[counts.sum(axis=1) > counts[:, texts.SPACE], texts.SPACE] = 0
    scripts = counts.argmax(axis=1).astype(np.uint8)
    for id in np.flatnonzero(lengths == 0).tolist():
        lead = next((byte for byte in pieces[id] if byte >= 0xC0), 0)
        is_han, is_mark = 0xE3 <= lead <= 0xE9, lead in (0xE2, 0xEF, 0xF0)
        scripts[id] = texts.HAN if is_han else texts.MARK if is_mark else texts.OTHER if lead else _CONTINUES
    return scripts


# --- counting


def count_tokens(tally: Tally, flat: FlatSequences, vocabulary: Vocabulary) -> None:
    """Count sequences: of pairs both sides, each with its prompt, but for `tokens`, the vocabulary and scripts."""
    lengths, ends = flat.lengths, np.cumsum(flat.lengths)
    of = np.searchsorted(ends, flat.spans[::2], "right")
    trained = np.bincount(of, weights=flat.spans[1::2] - flat.spans[::2], minlength=len(ends)).astype(np.int64)
    bins = np.minimum(trained / np.maximum(lengths, 1) * NUM_SHARES, NUM_SHARES - 1).astype(np.int64)
    tally.add("trained shares", np.bincount(bins, minlength=NUM_SHARES))
    if flat.prompts is None:
        ids, longest = flat.ids, lengths
        _count_messages(tally, flat, ends, vocabulary)
    else:
        chosen, rejected = lengths[::2] - flat.prompts, lengths[1::2] - flat.prompts
        runs = np.stack([lengths[::2], flat.prompts, rejected], axis=1).reshape(-1)
        ids = flat.ids[np.repeat(np.tile([True, False, True], len(flat.prompts)), runs)]  # without the second prompts
        longest = np.maximum(lengths[::2], lengths[1::2])
        for name, values in (("prompt", flat.prompts), ("chosen", chosen), ("rejected", rejected)):
            tally.count("tokens by part", pl.DataFrame({"n": values}), key=pl.lit(name), value=pl.col("n"))
    tally.count("tokens", pl.DataFrame({"n": longest}), value=pl.col("n"))
    tally.sums.update({"sequences": len(longest), "tokens": len(ids), "loss_tokens": int(trained.sum())})
    tally.add("vocabulary", np.bincount(ids, minlength=vocabulary.size))
    _count_scripts(tally, ids, vocabulary)


def _count_scripts(tally: Tally, ids: np.ndarray, vocabulary: Vocabulary) -> None:
    """Add tokens, characters and bytes of each script (the last one: control tokens)."""
    scripts = vocabulary.scripts[ids]
    scripts[vocabulary.control[ids]] = len(texts.SCRIPTS)
    begins = np.flatnonzero(scripts != _CONTINUES)
    if len(begins):
        runs = np.diff(begins, append=len(ids))
        runs[0] += begins[0]
        whose = np.repeat(scripts[begins], runs)
        weights = (None, vocabulary.characters[ids], vocabulary.bytes[ids])
        counts = [np.bincount(whose, weights=each, minlength=len(texts.SCRIPTS) + 1) for each in weights]
        tally.add("token scripts", np.stack(counts, axis=1).astype(np.int64))


def _count_messages(tally: Tally, flat: FlatSequences, ends: np.ndarray, vocabulary: Vocabulary) -> None:
    """Count tokens of messages, template included: from one control token that opens a message to the next."""
    opens = np.flatnonzero(vocabulary.control[flat.ids])
    roles = vocabulary.roles(flat.ids, opens)
    opens, roles = opens[roles >= 0], roles[roles >= 0]
    if not len(opens):
        return
    sequence = np.searchsorted(ends, opens, "right")
    length = np.minimum(np.append(opens[1:], ends[-1]), ends[sequence]) - opens
    messages = pl.DataFrame({"sequence": sequence, "role": np.array(ROLES)[roles], "tokens": length})
    tally.count("tokens by role", messages, key=pl.col("role"), value=pl.col("tokens"))
    number = pl.int_range(1, pl.len() + 1).over("sequence").clip(upper_bound=NUM_TURNS)
    answers = messages.filter(pl.col("role") == "assistant").with_columns(turn=number)
    tally.count("tokens by turn", answers, key=pl.col("turn"), value=pl.col("tokens"))
