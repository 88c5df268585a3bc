"""Sequences of ids with their trained spans in; a TokenTally out: what a report says about tokens, as counts that add up.

All of it is numpy over flat ids: some 20 million tokens a second of one core. Scripts of tokens come from the tokenizer's
bytes; a token that only continues a character belongs to the script of the token before it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmdata.encode.sequences import PairSequence
from mmdata.stats.tally import Lengths
from mmdata.tokenizer import text as texts
from mmdata.tokenizer.tokenizer import Tokenizer

NUM_SHARES = 20  # bins of the trained share
ROLES = ("system", "user", "assistant", "tool")
CONTROL = "control"
_CONTINUES = 255  # in a table of scripts: the token holds no beginning of a character


class Flat(NamedTuple):
    """Sequences end to end: ids [T]; lengths [N]; spans [2 M], flat positions begin, end, …, ascending."""

    ids: np.ndarray
    lengths: np.ndarray
    spans: np.ndarray


def flat_of(sequences: Sequence[Any]) -> Flat:
    """Flat sequences of `encode`'s; a pair becomes two, prompt and chosen, prompt and rejected."""
    ids, spans, lengths = [], [], []
    at = 0
    for one in sequences:
        if isinstance(one, PairSequence):
            sides = [(one.prompt, one.chosen, one.chosen_spans), (one.prompt, one.rejected, one.rejected_spans)]
        else:
            sides = [(one.ids[:0], one.ids, one.spans)]
        for prompt, reply, found in sides:
            ids += [prompt, reply]
            spans.append(found.reshape(-1).astype(np.int64) + (at + len(prompt)))
            lengths.append(len(prompt) + len(reply))
            at += lengths[-1]
    if not ids:
        return Flat(np.empty(0, np.uint32), np.empty(0, np.int64), np.empty(0, np.int64))
    return Flat(np.concatenate(ids), np.array(lengths, np.int64), np.concatenate(spans))


class Vocabulary:
    """What is known of a tokenizer's ids: text, script, characters and bytes of each, and which are control tokens."""

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
        # What follows the token that opens a message: a role's name and its line end, which may be one token with it, or
        # the first character of the next.
        self._is_end = np.array([piece.startswith(b"\n") for piece in pieces], bool)
        self._names = [self._names_of(role) for role in ROLES]

    def _names_of(self, role: str) -> list[tuple[list[int], bool]]:
        """Ids that name a role, and whether a token that begins with a line end must follow."""
        alone, line = (self.tokenizer.encode_batch([text])[0].tolist() for text in (role, f"{role}\n"))
        return [(alone, True)] + ([(line, False)] if line[: len(alone)] != alone else [])

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.tokenizer.dir,)

    def text(self, id: int) -> str:
        """An id's text; bytes that are no character by themselves become U+FFFD."""
        return self.pieces[id].decode("utf-8", errors="replace") or self.tokenizer.native.id_to_token(id) or ""

    def roles(self, ids: np.ndarray, opens: np.ndarray) -> np.ndarray:
        """int64 [N]: an index into ROLES for each control token at `opens` that a role's name follows, else -1."""
        found = np.full(len(opens), -1)
        for number, names in enumerate(self._names):
            for name, needs_end in names:
                fits = opens + len(name) + needs_end < len(ids)
                for k, id in enumerate(name, 1):
                    fits[fits] = ids[opens[fits] + k] == id
                if needs_end:
                    fits[fits] = self._is_end[ids[opens[fits] + len(name) + 1]]
                found[fits] = number
        return found

    def header(self, ids: Sequence[int], at: int) -> tuple[str, int] | None:
        """The role that the control token at `at` opens, and where its text begins; None where it opens none."""
        if not self.control[ids[at]]:
            return None
        for role, names in zip(ROLES, self._names, strict=True):
            for name, needs_end in names:
                end = at + 1 + len(name)
                if list(ids[at + 1 : end]) == name and (not needs_end or (end < len(ids) and self._is_end[ids[end]])):
                    return role, end + (needs_end and self.pieces[ids[end]] == b"\n")
        return None


def _rebuild(directory: Path) -> Vocabulary:
    return Vocabulary(Tokenizer.load(directory))


def token_pieces(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes each id stands for; of control tokens and unused ids none."""
    table = dict.fromkeys(range(256)) | {ord(letter): byte for letter, byte in _byte_letters().items()}
    pieces = [b""] * tokenizer.vocab_size
    decoder = json.loads(tokenizer.files["tokenizer.json"]).get("decoder") or {}
    is_byte_level = "ByteLevel" in {part.get("type") for part in (decoder, *decoder.get("decoders", ()))}
    for token, id in tokenizer.native.get_vocab(with_added_tokens=True).items():
        if id in tokenizer.added:
            pieces[id] = b"" if tokenizer.added[id].special else token.encode()
        elif is_byte_level:
            pieces[id] = token.translate(table).encode("latin-1", errors="ignore")
        elif len(token) == 6 and token.startswith("<0x"):
            pieces[id] = bytes([int(token[3:5], 16)])
        else:
            pieces[id] = token.replace("\u2581", " ").encode()
    return pieces


def _byte_letters() -> dict[str, int]:
    """The printable character that byte-level tokenizers write for each byte (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _scripts(pieces: Sequence[bytes]) -> np.ndarray:
    """uint8 [V]: for each token the script most of its characters belong to, spaces apart; of one that holds no whole
    character that of its first byte, and _CONTINUES where it begins none."""
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


@dataclass(slots=True)
class TokenTally:
    """Counts over sequences (of pairs: over both sides, each with its prompt, but for `tokens` and `vocabulary`)."""

    sequences: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    lengths: Lengths = field(default_factory=Lengths)  # of sequences; of a pair its longer side
    shares: np.ndarray = field(default_factory=lambda: np.zeros(NUM_SHARES, np.int64))  # sequences by trained share
    vocabulary: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    scripts: np.ndarray = field(default_factory=lambda: np.zeros((len(texts.SCRIPTS) + 1, 3), np.int64))
    by_role: dict[str, Lengths] = field(default_factory=dict)
    by_turn: dict[int, Lengths] = field(default_factory=dict)  # of the assistant's messages
    pairs: dict[str, Lengths] = field(default_factory=dict)  # prompt, chosen, rejected

    def merge(self, other: "TokenTally") -> None:
        """Add another's counts."""
        self.sequences += other.sequences
        self.tokens += other.tokens
        self.loss_tokens += other.loss_tokens
        self.lengths.merge(other.lengths)
        self.shares = self.shares + other.shares
        self.scripts = self.scripts + other.scripts
        if len(other.vocabulary):
            self.vocabulary = other.vocabulary + (self.vocabulary if len(self.vocabulary) else 0)
        for mine, others in ((self.by_role, other.by_role), (self.by_turn, other.by_turn), (self.pairs, other.pairs)):
            for key, lengths in others.items():
                mine.setdefault(key, Lengths()).merge(lengths)  # type: ignore[arg-type]

    def add(self, flat: Flat, known: Vocabulary, *, pair_prompts: np.ndarray | None = None) -> None:
        """Count sequences. pair_prompts: for pairs, whose two sides follow each other in `flat`, each prompt's length."""
        lengths, ends = flat.lengths, np.cumsum(flat.lengths)
        trained = _trained_in(flat.spans, ends)
        if pair_prompts is None:
            self.lengths.add(lengths)
            stored = flat.ids
        else:
            chosen, rejected = lengths[::2] - pair_prompts, lengths[1::2] - pair_prompts
            for name, found in (("prompt", pair_prompts), ("chosen", chosen), ("rejected", rejected)):
                self.pairs.setdefault(name, Lengths()).add(found)
            self.lengths.add(np.maximum(lengths[::2], lengths[1::2]))
            stored = flat.ids[_without_second_prompts(lengths, pair_prompts)]
        self.sequences += len(lengths) if pair_prompts is None else len(lengths) // 2
        self.tokens += len(stored)
        self.loss_tokens += int(trained.sum())
        share = trained / np.maximum(lengths, 1)
        self.shares = self.shares + np.bincount(
            np.minimum(share * NUM_SHARES, NUM_SHARES - 1).astype(np.int64), minlength=NUM_SHARES
        )
        found = np.bincount(stored, minlength=known.size)
        self.vocabulary = found + (self.vocabulary if len(self.vocabulary) else 0)
        self._add_scripts(stored, known)
        if pair_prompts is None:
            self._add_roles(flat, ends, known)

    def _add_scripts(self, ids: np.ndarray, known: Vocabulary) -> None:
        scripts = known.scripts[ids]
        is_control = known.control[ids]
        scripts[is_control] = len(texts.SCRIPTS)
        begins = np.flatnonzero(scripts != _CONTINUES)
        if not len(begins):
            return
        runs = np.diff(begins, append=len(ids))
        runs[0] += begins[0]
        whose = np.repeat(scripts[begins], runs)
        for column, weights in enumerate((None, known.characters[ids], known.bytes[ids])):
            counted = np.bincount(whose, weights=weights, minlength=len(texts.SCRIPTS) + 1)
            self.scripts[:, column] += counted.astype(np.int64)

    def _add_roles(self, flat: Flat, ends: np.ndarray, known: Vocabulary) -> None:
        """Lengths of messages, template included: from one control token that opens a message to the next."""
        ids = flat.ids
        opens = np.flatnonzero(known.control[ids])
        role = known.roles(ids, opens)
        opens, role = opens[role >= 0], role[role >= 0]
        if not len(opens):
            return
        sequence = np.searchsorted(ends, opens, "right")
        nexts = np.append(opens[1:], ends[-1])
        length = np.minimum(nexts, ends[sequence]) - opens
        for number, name in enumerate(ROLES):
            if (role == number).any():
                self.by_role.setdefault(name, Lengths()).add(length[role == number])
        answers = role == ROLES.index("assistant")
        number = np.arange(1, answers.sum() + 1)
        of = sequence[answers]
        first = np.flatnonzero(np.diff(of, prepend=-1))
        turn = number - np.repeat(first, np.diff(first, append=len(of)))
        turn = np.minimum(turn, 8)
        for at in np.flatnonzero(np.bincount(turn)).tolist():
            self.by_turn.setdefault(at, Lengths()).add(length[answers][turn == at])


def _trained_in(spans: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """int64 [N]: trained tokens of each sequence."""
    of = np.searchsorted(ends, spans[::2], "right")
    return np.bincount(of, weights=spans[1::2] - spans[::2], minlength=len(ends)).astype(np.int64)


def _without_second_prompts(lengths: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """bool [T]: positions of pairs' sides, but for the prompts of the rejected ones."""
    runs = np.stack([lengths[::2], prompts, lengths[1::2] - prompts], axis=1).reshape(-1)
    return np.repeat(np.tile([True, False, True], len(prompts)), runs)
