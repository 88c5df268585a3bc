"""The result of encoding a batch of rows: sequences, and counts of what was cut, left out or not written."""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from mmdata.encode.rows import BadRow
from mmdata.encode.sequences import Sequences, join, reorder
from mmdata.tokenizer.tokenizer import Tokenizer

CUT_TURNS = "cut after the last whole turn that fits"


class EncodedRows:
    """The encoding of a batch of R rows or lines. `RowEncoder` makes it and adds sequences to it.

    num_tokens: tokens of the usable rows, before cutting. rows_cut: rows of which tokens were dropped. cut: reason ->
    tokens dropped. bad: row index -> why the row cannot be used, in order. hashes, characters: uint8 [R, 32] and int64
    [R], the `row_hash` and `num_characters` of each row; 0 for invalid lines. controls: row index -> special-token
    strings in the row's own text; extra_keys: how often lines have each ignored key; both only by `encode_lines`.
    not_written: reason, of `rows.LOST` or `rows.LEFT_OUT` -> usable rows of which the template leaves something out.
    text_bytes, unknown_bytes: UTF-8 bytes of the rendered texts of usable rows, and those that the tokenizer does not
    know; 0 if it knows every text.
    """

    def __init__(self, num_rows: int):
        self.num_tokens = self.rows_cut = 0
        self.cut: Counter[str] = Counter()
        self.bad: dict[int, BadRow] = {}
        self.hashes = np.zeros((num_rows, 32), np.uint8)
        self.characters = np.zeros(num_rows, np.int64)
        self.controls: dict[int, list[str]] = {}
        self.not_written: Counter[str] = Counter()
        self.text_bytes = self.unknown_bytes = 0
        self.extra_keys: Counter[str] = Counter()
        self._parts: list[tuple[np.ndarray, Sequences]] = []

    def add(self, row_of: np.ndarray, sequences: Sequences, num_tokens: int) -> None:
        """Add sequences and the tokens that their rows had before cutting. row_of: int64 [sequences], the row of each,
        ascending."""
        self.num_tokens += num_tokens
        if len(row_of):
            self._parts.append((row_of, sequences))

    def add_texts(self, texts: Sequence[str], tokenizer: Tokenizer, *, control: bool) -> None:
        """Count the bytes of texts, and those that a tokenizer that may lose text does not know. control: see
        `Tokenizer.encode_batch`."""
        if tokenizer.may_lose_text:
            self.text_bytes += sum(len(text.encode()) for text in texts)
            self.unknown_bytes += tokenizer.count_lost_bytes(texts, control=control)

    def add_cut(self, num_tokens: int) -> None:
        """Count a conversation that was cut, and the number of tokens that were dropped from it."""
        self.cut[CUT_TURNS] += num_tokens
        self.rows_cut += 1

    @cached_property
    def _row_of(self) -> np.ndarray:
        """The row of each sequence (int64), in the order in which they were added."""
        return np.concatenate([np.empty(0, np.int64), *(row_of for row_of, _ in self._parts)])

    @cached_property
    def sequences(self) -> Sequences:
        """The sequences of all usable rows, in the order of rows. Computed at first use; add nothing afterwards."""
        sequences = join([part for _, part in self._parts])
        is_sorted = bool((self._row_of[1:] >= self._row_of[:-1]).all())
        return sequences if is_sorted else reorder(sequences, np.argsort(self._row_of, kind="stable"))

    @cached_property
    def num_sequences(self) -> np.ndarray:
        """int64 [R]: the number of sequences of each row; 0 for rows that cannot be used."""
        return np.bincount(self._row_of, minlength=len(self.characters))
