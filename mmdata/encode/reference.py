"""Encoding of conversations and pairs from text that jinja2 rendered: slow, for every template. Rows that the module
`fast` cannot encode are encoded here, and the ids of the others are checked against this module's.

The text between two control tokens is encoded as one string, which gives the same ids as the whole rendering at once.
Training may begin inside such a string: if the ids of the untrained beginning alone are the first ids of the whole
string, the tokens after them are trained; otherwise the tokenizer's character offsets decide. For a tokenizer that
normalizes text, or joins it with neighbouring control tokens, the whole rendering is encoded at once, with offsets
throughout.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mmdata.encode.rows import LOST, BadRow, Conversation, Pair
from mmdata.encode.sequences import PairSequence, TokenSequence
from mmdata.encode.template import Segment, Template, stretches
from mmdata.tokenizer.encoders import Encoder
from mmdata.tokenizer.tokenizer import Tokenizer

# A rendering, divided by `stretches`: each control token alone, and all segments between two control tokens together.
Groups = list[list[Segment]]
Ids = dict[str, np.ndarray]  # text -> its ids, uint32
NOT_PLAIN = "this tokenizer cannot keep control strings in content plain text"


class EncodedRow(NamedTuple):
    """The ids and trained ranges of one row. num_tokens: before cutting to `max_len`; for a pair, of the prompt
    (counted once) and both replies. cut: how many of them were dropped. not_written: reasons, of LOST or LEFT_OUT."""

    sequence: TokenSequence | PairSequence
    num_tokens: int
    cut: int = 0
    not_written: tuple[str, ...] = ()


class _Tokens(NamedTuple):
    """One rendering as tokens: ids, uint32 [T], and mask, bool [T], True for tokens that are trained on."""

    ids: np.ndarray
    mask: np.ndarray


class ReferenceEncoder:
    """Encodes conversations and pairs with one tokenizer and its chat template. max_len: the most tokens of a
    conversation, or of the prompt and one reply of a pair. train_on: see `Template.segments`. keeps_lost: use also rows
    of which the template does not write everything."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        encoder: Encoder,
        *,
        max_len: int,
        train_on: str,
        keeps_lost: bool = False,
    ):
        self._tokenizer = tokenizer
        self._template = template
        self._encoder = encoder
        self._max_len = max_len
        self._train_on = train_on
        self._keeps_lost = keeps_lost
        self._control_ids = {text: np.array([id], np.uint32) for text, id in tokenizer.control_tokens.items()}

    def segments(self, row: Conversation | Pair, keep_empty_think: bool) -> list[list[Segment]]:
        """Render a row and cut the text into segments: one list for a conversation, two (chosen, rejected) for a pair,
        in which only messages after the shared ones are trained. Raises BadRow if the rendering cannot be cut.
        keep_empty_think: whether to keep the empty think blocks that the template writes."""
        first_trained = row.num_shared if isinstance(row, Pair) else 0
        return [
            self._template.segments(
                side, train_on=self._train_on, first_trained=first_trained, keep_empty_think=keep_empty_think
            )
            for side in _sides(row)
        ]

    def _not_written(self, row: Conversation | Pair) -> tuple[str, ...]:
        """Return the reasons for what the template does not write of a row. Raises BadRow for the first in LOST, unless
        such rows are kept."""
        losses = [loss for side in _sides(row) for loss in self._template.losses(side)]
        lost = next((loss for loss in losses if loss.reason in LOST), None)
        if lost and not self._keeps_lost:
            raise BadRow(*lost)
        return tuple(dict.fromkeys(loss.reason for loss in losses))

    def encode(
        self, rows: Sequence[Conversation | Pair], keep_empty_thinks: Sequence[bool]
    ) -> list[EncodedRow | BadRow]:
        """Render rows and encode all their texts in one native call. Return for each row its encoding, or a BadRow (not
        raised) if the template leaves out a part of it, its rendering cannot be cut into segments, no token is trained,
        not even the first turn of a conversation fits `max_len`, or the sides of a pair are too long or equal. A longer
        conversation is cut after its last whole turn (a user message and all up to its final answer) that fits.
        keep_empty_thinks: for each row, whether to keep the empty think blocks that the template writes."""
        renderings: list[list[Groups] | BadRow] = []
        not_written: list[tuple[str, ...]] = []
        for row, keep in zip(rows, keep_empty_thinks, strict=True):
            reasons: tuple[str, ...] = ()
            try:
                reasons = self._not_written(row)
                renderings.append([stretches(segments) for segments in self.segments(row, keep)])
            except BadRow as bad:
                renderings.append(bad)
            not_written.append(reasons)
        encoded = self._encode_texts(itertools.chain.from_iterable(s for s in renderings if not isinstance(s, BadRow)))
        results: list[EncodedRow | BadRow] = []
        for row, keep, sides, reasons in zip(rows, keep_empty_thinks, renderings, not_written, strict=True):
            try:
                if isinstance(sides, BadRow):
                    raise sides
                results.append(self._row(row, keep, sides, encoded)._replace(not_written=reasons))
            except BadRow as bad:
                results.append(bad)
        return results

    def _row(self, row: Conversation | Pair, keep: bool, sides: list[Groups], encoded: Ids) -> EncodedRow:
        """Return the encoding of one row. Raises BadRow without trained tokens, for a long row or equal sides."""
        tokens = [self._tokens(groups, encoded) for groups in sides]
        for side in tokens:
            side.mask[0] = False  # no token before it to predict it from
            if not side.mask.any():
                raise BadRow("no trained token")
        return self._conversation(row, keep, tokens[0]) if isinstance(row, Conversation) else self._pair(*tokens)

    # --- segments -> ids and mask

    def _encode_texts(self, renderings: Iterable[Groups]) -> Ids:
        """Encode every text between two control tokens, and the first segment of each alone. Return the ids by text:
        none for a tokenizer whose renderings must be encoded as a whole."""
        places: dict[str, int] = {}
        for group in itertools.chain.from_iterable(renderings if self._tokenizer.is_exact else ()):
            if not group[0].is_control:
                places.setdefault("".join([s.text for s in group]), len(places))
                if len(group) > 1:
                    places.setdefault(group[0].text, len(places))
        flat, ends = self._encoder.encode(list(places), False)
        ends = ends.tolist()
        return {text: flat[begin:end] for text, begin, end in zip(places, [0, *ends], ends, strict=False)}

    def _tokens(self, groups: Groups, encoded: Ids) -> _Tokens:
        """Return the tokens of a rendering. encoded: the ids that `_encode_texts` returned for its texts."""
        if not self._tokenizer.is_exact:
            return self._encode_jointly(list(itertools.chain.from_iterable(groups)))
        ids: list[np.ndarray] = []
        runs: list[tuple[bool, int]] = []  # is_trained and number of tokens
        for group in groups:
            first = group[0]
            if first.is_control:
                ids.append(self._control_ids[first.text])
                runs.append((first.is_trained, 1))
                continue
            ids.append(encoded["".join([s.text for s in group])])
            head = encoded[first.text]
            if len(group) == 1:
                runs.append((first.is_trained, len(head)))
            elif len(group) == 2 and ids[-1][: len(head)].tobytes() == head.tobytes():
                runs += [(first.is_trained, len(head)), (group[1].is_trained, len(ids[-1]) - len(head))]
            else:
                tokens = self._by_offsets(group, control=False)
                ids[-1] = tokens.ids
                runs += [(is_trained, 1) for is_trained in tokens.mask.tolist()]
        is_trained, counts = zip(*runs, strict=True)
        return _Tokens(np.concatenate(ids), np.array(is_trained).repeat(counts))

    def _by_offsets(self, segments: list[Segment], *, control: bool) -> _Tokens:
        """Encode the joined segments. A token is trained if one of its characters is in a trained segment. control:
        whether special-token strings in the text become control ids."""
        ids, offsets = self._tokenizer.encode_with_offsets("".join(s.text for s in segments), control=control)
        trained = np.repeat([s.is_trained for s in segments], [len(s.text) for s in segments])
        before = np.concatenate(([0], np.cumsum(trained)))
        begin, end = offsets[:, 0], np.maximum(offsets[:, 1], np.minimum(offsets[:, 0] + 1, len(trained)))
        return _Tokens(ids, before[end] > before[begin])

    def _encode_jointly(self, segments: list[Segment]) -> _Tokens:
        """Encode a whole rendering at once, with character offsets. Raises BadRow if it has another number of control
        ids than the template wrote, as when a content contains a control token's string. The unknown token, which
        stands for characters of contents, does not count."""
        tokens = self._by_offsets(segments, control=True)
        ids = {text: id for text, id in self._tokenizer.control_tokens.items() if id != self._tokenizer.unknown_id}
        num_control = np.isin(tokens.ids, list(ids.values())).sum()
        if num_control != sum(s.is_control and s.text in ids for s in segments):
            raise BadRow("template cannot be cut", NOT_PLAIN)
        return tokens

    # --- ids and mask -> sequences

    def _conversation(self, row: Conversation, keep: bool, whole: _Tokens) -> EncodedRow:
        """Return the encoded conversation, cut after the last whole turn that fits. Raises BadRow if there is none.
        keep: whether to keep empty think blocks. whole: the tokens of the uncut conversation."""
        if len(whole.ids) <= self._max_len:
            return EncodedRow(TokenSequence(whole.ids, _spans_of(whole.mask)), len(whole.ids))
        fitting = self._longest_that_fits(row, keep)
        if fitting is None:
            raise BadRow("too long", too_long(len(whole.ids), self._max_len))
        cut = len(whole.ids) - len(fitting.ids)
        return EncodedRow(TokenSequence(fitting.ids, _spans_of(fitting.mask)), len(whole.ids), cut)

    def _longest_that_fits(self, row: Conversation, keep: bool) -> _Tokens | None:
        """Return the tokens of as many whole turns from the beginning as fit `max_len`, found by bisection; None if not
        even the first turn fits, or if none of its tokens is trained."""
        messages = row.messages
        ends = [
            i + 1
            for i in range(len(messages) - 1)
            if messages[i].role == "assistant" and messages[i + 1].role != "tool"
        ]
        best, low, high = None, 0, len(ends)
        while low < high:
            middle = (low + high) // 2
            (segments,) = self.segments(Conversation(messages[: ends[middle]], row.tools), keep)
            groups = stretches(segments)
            tokens = self._tokens(groups, self._encode_texts([groups]))
            if len(tokens.ids) > self._max_len:
                high = middle
                continue
            tokens.mask[0] = False
            best, low = (tokens if tokens.mask.any() else best), middle + 1
        return best

    def _pair(self, chosen: _Tokens, rejected: _Tokens) -> EncodedRow:
        # The prompt is the common beginning of both sides, at most up to the first trained token. If the tokenizer
        # joins the last newlines of the header with the first characters of one reply only, the prompt ends before
        # these newlines.
        """Divide both sides into the prompt and two replies. Raises BadRow if their ids are equal or one is too long."""
        shared = common_length(chosen.ids, rejected.ids)
        begin = min(int(chosen.mask.argmax()), int(rejected.mask.argmax()), shared)
        if np.array_equal(chosen.ids, rejected.ids):
            raise BadRow("chosen equal to rejected", SAME_RENDERING)
        longest = max(len(chosen.ids), len(rejected.ids))
        if longest > self._max_len:
            raise BadRow("too long", too_long_pair(longest, self._max_len))
        replies = chosen.ids[begin:], rejected.ids[begin:]
        spans = _spans_of(chosen.mask[begin:]), _spans_of(rejected.mask[begin:])
        return EncodedRow(PairSequence(chosen.ids[:begin], *replies, *spans), begin + sum(map(len, replies)))


def _sides(row: Conversation | Pair) -> list[Conversation]:
    """Return a conversation alone, or the two sides of a pair."""
    return [row.chosen, row.rejected] if isinstance(row, Pair) else [row]


SAME_RENDERING = "once written by the template"


def too_long(length: int, max_len: int) -> str:
    """Return the detail of the BadRow for a conversation of `length` tokens whose first turn alone is too long."""
    return f"{length:,} tokens, and its first turn alone is longer than {max_len:,}"


def too_long_pair(length: int, max_len: int) -> str:
    """Return the detail of the BadRow for a pair whose longer side has `length` tokens."""
    return f"{length:,} tokens, expected at most {max_len:,}"


def common_length(one: np.ndarray, other: np.ndarray) -> int:
    """Return the number of leading elements that are equal in two arrays."""
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if len(different) else shorter


def _spans_of(mask: np.ndarray) -> np.ndarray:
    """Return the range [begin, end) of each run of True in the mask (int32 [n, 2])."""
    padded = np.zeros(len(mask) + 2, dtype=bool)
    padded[1:-1] = mask
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    return edges.reshape(-1, 2).astype(np.int32)
