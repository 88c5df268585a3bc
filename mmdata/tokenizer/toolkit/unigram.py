"""Training of a unigram language model over bytes (Kudo 2018, "Subword Regularization"), in numpy.

Pieces and their log-probabilities are found by expectation maximization (EM) over all segmentations of the words. The
trainer of the `tokenizers` library adds floats in the order of a hash table, so its result differs from run to run;
here the same counts give the same pieces. Takes about 5 s and 0.5 GB for 2 MB of different words. At most MAX_BYTES are
used, the most frequent words first.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

MAX_BYTES = 1_500_000  # total length of the different words that are used
WORD_BYTES = 24  # longer words are cut between characters, so that the probability of a word does not underflow
_SEEDS_PER_PIECE = 8  # initial candidates for each piece of the result
_KEPT = 0.75  # share of the candidates that remain after each round of pruning
_EM_STEPS = 2  # steps of expectation maximization in each round
_FLOOR = 1e-9  # least probability of a single byte: any text must have a segmentation
_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class _Text:
    """W words end to end, N bytes in all. `data`: uint8 [N]. `begins`, `ends`: of each word, int64 [W]. `counts`:
    float64 [W]. `prefix`: rolling hashes of all prefixes of `data`, uint64 [N + 1]. `powers`: of the hash's base,
    uint64 [WORD_BYTES + 1]."""

    data: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    counts: np.ndarray
    prefix: np.ndarray
    powers: np.ndarray

    @classmethod
    def of(cls, words: list[bytes], counts: list[float]) -> "_Text":
        """Return these words, laid end to end, with their counts."""
        data = np.frombuffer(b"".join(words), np.uint8)
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        ends = lengths.cumsum()
        return cls(data, ends - lengths, ends, np.array(counts, np.float64), *_hashes(data))

    def keys(self, begins: np.ndarray, length: int) -> np.ndarray:
        """Return a 64-bit hash of the `length` bytes from each of the offsets `begins` on."""
        return self.prefix[begins + length] - self.prefix[begins] * self.powers[length]


def _hashes(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes h of all prefixes of `data`, and the powers of the base B from 0 to WORD_BYTES. h[i + 1] = h[i]
    * B + data[i] + 1 modulo 2^64. B is odd and has an inverse, so h[i] * B^-i is a cumulative sum."""
    inverse = np.uint64(pow(int(_BASE), -1, 1 << 64))
    steps = len(data) + 1
    with np.errstate(over="ignore"):
        up = np.multiply.accumulate(np.full(steps, _BASE, np.uint64)) * inverse  # B^0, B^1 …
        down = np.multiply.accumulate(np.full(steps, inverse, np.uint64))  # B^-1, B^-2 …
        sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum((data.astype(np.uint64) + np.uint64(1)) * down[:-1])))
        return sums * up, up[: WORD_BYTES + 1]


@dataclass(frozen=True, slots=True)
class _Matches:
    """All occurrences of pieces in words. `begin`, `end`: byte offsets; `piece`, `word`: indices; int64 [M] each.
    `forward` and `backward` group them (see `_grouped`) for the forward-backward algorithm: by the distance of their
    end from the word's begin, and of their begin from the word's end, shortest first."""

    begin: np.ndarray
    end: np.ndarray
    piece: np.ndarray
    word: np.ndarray
    forward: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    backward: list[tuple[np.ndarray, np.ndarray, np.ndarray]]

    def only(self, kept: np.ndarray, num_pieces: int) -> "_Matches":
        """Return the matches of the pieces `kept` (indices), renumbered from 0, without sorting again."""
        number = np.full(num_pieces, -1)
        number[kept] = np.arange(len(kept))
        piece = number[self.piece]
        stays = piece >= 0
        moved = np.cumsum(stays) - 1
        forward, backward = (
            [_grouped(moved[one[stays[one]]], place[one[stays[one]]]) for one, _, _ in steps if stays[one].any()]
            for steps, place in ((self.forward, self.end), (self.backward, self.begin))
        )
        return _Matches(self.begin[stays], self.end[stays], piece[stays], self.word[stays], forward, backward)


def _grouped(matches: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `matches`, the different places, and where in `matches` those of each place begin. matches: indices of
    matches, sorted by place. places: byte offset of each."""
    firsts = np.concatenate((np.zeros(1, np.int64), np.flatnonzero(np.diff(places)) + 1))
    return matches, places[firsts], firsts


def train(counts: Mapping[bytes, int], num_pieces: int) -> list[tuple[bytes, float]]:
    """Learn `num_pieces` (at least 256) pieces, all single bytes included, from words and their counts. Returns (piece,
    log-probability), most probable first; fewer if too few substrings occur twice."""
    assert num_pieces >= 256
    text = _Text.of(*_chosen(counts))
    pieces = _seeds(text, _SEEDS_PER_PIECE * num_pieces)
    scores = np.full(len(pieces), 1.0 / len(pieces))
    matches = _find(text, pieces)
    while True:
        for _ in range(_EM_STEPS):
            expected = _expect(text, matches, scores, len(pieces))
            scores = _normalised(expected, pieces)
        if len(pieces) <= num_pieces:
            break
        kept = _prune(pieces, expected, scores, max(num_pieces, int(_KEPT * len(pieces))))
        matches = matches.only(kept, len(pieces))
        pieces, scores = [pieces[i] for i in kept], scores[kept] / scores[kept].sum()
    order = sorted(range(len(pieces)), key=lambda i: (-scores[i], pieces[i]))
    return [(pieces[i], round(float(np.log(scores[i])), 6)) for i in order]


def _chosen(counts: Mapping[bytes, int]) -> tuple[list[bytes], list[float]]:
    """Return the most frequent words, cut to WORD_BYTES, and their counts; at most MAX_BYTES."""
    cut: dict[bytes, float] = {}
    for word, count in counts.items():
        for piece in _cut(word):
            cut[piece] = cut.get(piece, 0.0) + count
    words, size = [], 0
    for word in sorted(cut, key=lambda word: (-cut[word], word)):
        size += len(word)
        if size > MAX_BYTES:
            break
        words.append(word)
    return words, [cut[word] for word in words]


def _cut(word: bytes) -> list[bytes]:
    """Return the word in pieces of at most WORD_BYTES, cut between UTF-8 characters if possible."""
    pieces, begin = [], 0
    while len(word) - begin > WORD_BYTES:
        end = begin + WORD_BYTES
        while end > begin + 1 and word[end] & 0xC0 == 0x80:
            end -= 1
        pieces.append(word[begin:end])
        begin = end
    return [*pieces, word[begin:]]


def _seeds(text: _Text, most: int) -> list[bytes]:
    """Return the initial candidates: all 256 bytes, and the `most` - 256 substrings with the largest count * length.
    They must occur twice and consist of whole characters, or be the first two bytes of one of three or four."""
    weights = np.repeat(text.counts, text.ends - text.begins)
    room = np.repeat(text.ends, text.ends - text.begins) - np.arange(len(text.data))
    starts = (text.data & 0xC0) != 0x80  # of a character
    stops = np.append(starts, True)
    found: list[tuple[float, bytes]] = []
    for length in range(2, WORD_BYTES + 1):
        begins = np.flatnonzero(starts & (room >= length))
        is_whole = stops[begins + length] | (room[begins] == length)
        if length == 2:
            is_whole |= text.data[begins] >= 0xE0
        begins = begins[is_whole]
        if not len(begins):
            continue
        keys, first, inverse = np.unique(text.keys(begins, length), return_index=True, return_inverse=True)
        totals = np.bincount(inverse, weights[begins], len(keys))
        for i in np.flatnonzero(totals >= 2).tolist():
            place = int(begins[first[i]])
            found.append((totals[i] * length, text.data[place : place + length].tobytes()))
    found.sort(key=lambda item: (-item[0], item[1]))
    return [bytes([byte]) for byte in range(256)] + [piece for _, piece in found[: most - 256]]


def _find(text: _Text, pieces: list[bytes]) -> _Matches:
    """Return every occurrence of every piece inside a word."""
    table = _Text.of(pieces, [1.0] * len(pieces))
    sizes = table.ends - table.begins
    room = np.repeat(text.ends, text.ends - text.begins) - np.arange(len(text.data))
    begins, ends, numbers = [], [], []
    for length in range(1, int(sizes.max()) + 1):
        ids = np.flatnonzero(sizes == length)
        places = np.flatnonzero(room >= length)
        if not len(ids) or not len(places):
            continue
        keys = table.keys(table.begins[ids], length)
        order = np.argsort(keys, kind="stable")
        sought = text.keys(places, length)
        at = np.minimum(np.searchsorted(keys, sought, sorter=order), len(ids) - 1)
        is_match = keys[order[at]] == sought
        begins.append(places[is_match])
        ends.append(places[is_match] + length)
        numbers.append(ids[order[at[is_match]]])
    begin, end, piece = (np.concatenate(each) for each in (begins, ends, numbers))
    word = np.searchsorted(text.ends, begin, side="right")
    forward = _steps(end - text.begins[word], end)
    backward = _steps(text.ends[word] - begin, begin)
    return _Matches(begin, end, piece, word, forward, backward)


def _steps(step: np.ndarray, place: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return the matches grouped by `step`, their distance in bytes from the word's begin or end, smallest first; each
    group as `_grouped` returns it. place: byte offset of each match."""
    order = np.lexsort((place, step))
    return [_grouped(one, place[one]) for one in np.split(order, np.flatnonzero(np.diff(step[order])) + 1)]


def _expect(text: _Text, matches: _Matches, scores: np.ndarray, num_pieces: int) -> np.ndarray:
    """Return how often each piece is expected to be used over all segmentations of all words: float64 [num_pieces]
    (forward-backward algorithm). scores: probability of each piece. A word ends where the next begins, so there is one
    array per pass, alpha indexed by ends and beta by begins."""
    p = scores[matches.piece]
    alpha, beta = np.zeros(len(text.data) + 1), np.zeros(len(text.data) + 1)
    is_first, is_last = matches.begin == text.begins[matches.word], matches.end == text.ends[matches.word]
    for one, places, firsts in matches.forward:
        alpha[places] = np.add.reduceat(p[one] * np.where(is_first[one], 1.0, alpha[matches.begin[one]]), firsts)
    for one, places, firsts in matches.backward:
        beta[places] = np.add.reduceat(p[one] * np.where(is_last[one], 1.0, beta[matches.end[one]]), firsts)
    whole = np.where(alpha[text.ends] > 0, alpha[text.ends], 1.0)
    share = np.where(is_first, 1.0, alpha[matches.begin]) * p * np.where(is_last, 1.0, beta[matches.end])
    return np.bincount(matches.piece, share * (text.counts / whole)[matches.word], num_pieces)


def _normalised(expected: np.ndarray, pieces: list[bytes]) -> np.ndarray:
    """Return the probability of each piece: its share of the expected uses, for a single byte at least _FLOOR."""
    scores = expected / expected.sum()
    is_byte = np.fromiter((len(piece) == 1 for piece in pieces), bool, len(pieces))
    return np.where(is_byte, np.maximum(scores, _FLOOR), scores)


def _prune(pieces: list[bytes], expected: np.ndarray, scores: np.ndarray, size: int) -> np.ndarray:
    """Return the indices, sorted, of the `size` pieces whose removal would lower the likelihood most; bytes always
    stay. The loss of a piece is its expected uses times the difference of its log-probability and that of its best
    segmentation into other pieces."""
    text = _Text.of(pieces, [1.0] * len(pieces))
    matches = _find(text, pieces)
    logs = np.log(np.maximum(scores, 1e-300))[matches.piece]
    is_self = (matches.end - matches.begin) == (text.ends - text.begins)[matches.word]
    best = np.full(len(text.data) + 1, -np.inf)
    is_first = matches.begin == text.begins[matches.word]
    for one, places, firsts in matches.forward:
        values = np.where(is_self[one], -np.inf, logs[one] + np.where(is_first[one], 0.0, best[matches.begin[one]]))
        best[places] = np.maximum.reduceat(values, firsts)
    others = best[text.ends]
    gain = expected * (np.log(np.maximum(scores, 1e-300)) - np.maximum(others, -1e3))
    gain[:256] = np.inf
    return np.sort(np.lexsort((np.arange(len(pieces)), -gain))[:size])
