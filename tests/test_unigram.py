"""Unigram pieces: expectations equal to listing every segmentation, and the same result for the same counts."""

import itertools
import math
import random

import numpy as np
import pytest

from mmdata.tokenizer.toolkit import unigram
from mmdata.tokenizer.toolkit.unigram import train

WORDS = {b"abab": 5, b"abc": 3, b"bc": 2, "你好".encode(): 4, b"a": 1}


def segmentations(word: bytes, pieces: dict[bytes, float]) -> list[tuple[list[bytes], float]]:
    """Every way to write a word, with its probability."""
    found = []
    for cuts in itertools.product((False, True), repeat=len(word) - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [len(word)]
        parts = [word[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        if all(part in pieces for part in parts):
            found.append((parts, math.prod(pieces[part] for part in parts)))
    return found


def test_expected_counts_equal_listing_every_segmentation() -> None:
    draw = random.Random(3)
    pieces = [bytes([byte]) for byte in range(256)] + [b"ab", b"aba", b"bc", b"abc", "你".encode(), "你好".encode()]
    scores = np.array([draw.random() / 300 for _ in pieces])
    text = unigram._Text.of(list(WORDS), [float(count) for count in WORDS.values()])
    found = unigram._expect(text, unigram._find(text, pieces), scores, len(pieces))
    expected = dict.fromkeys(pieces, 0.0)
    for word, count in WORDS.items():
        ways = segmentations(word, dict(zip(pieces, scores.tolist(), strict=True)))
        for parts, probability in ways:
            for part in parts:
                expected[part] += count * probability / sum(p for _, p in ways)
    np.testing.assert_allclose(found, [expected[piece] for piece in pieces], rtol=1e-12)


def test_matches_of_fewer_pieces_are_those_found_anew() -> None:
    pieces = [bytes([byte]) for byte in range(256)] + [b"ab", b"bc", b"abc"]
    text = unigram._Text.of(list(WORDS), [1.0] * len(WORDS))
    kept = np.array([*range(256), 258])
    some, anew = unigram._find(text, pieces).only(kept, len(pieces)), unigram._find(text, [pieces[i] for i in kept])
    scores = np.linspace(0.001, 0.01, len(kept))
    one, other = (unigram._expect(text, matches, scores, len(kept)) for matches in (some, anew))
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_pieces_hold_every_byte_and_what_is_common() -> None:
    pieces = train({b" river": 50, b" stone": 40, "公园".encode(): 30, b" rivers": 5, b"xyz": 1}, 264)
    names = [piece for piece, _ in pieces]
    assert len(set(names)) == 264 and {bytes([byte]) for byte in range(256)} <= set(names)
    assert {b" river", b" stone", "公园".encode()} <= set(names)
    scores = [score for _, score in pieces]
    assert scores == sorted(scores, reverse=True) and all(score <= 0 for score in scores)


def test_counts_in_another_order_give_the_same_pieces() -> None:
    words = {bytes(random.Random(n).choices(b"abcde", k=6)): n % 7 + 1 for n in range(300)}
    backwards = dict(reversed(words.items()))
    assert train(words, 400) == train(backwards, 400)


@pytest.mark.parametrize("word", [b"x" * 100, "你好".encode() * 20, b"\x80" * 60, b""])
def test_long_words_are_cut_between_characters(word: bytes) -> None:
    pieces = unigram._cut(word)
    assert b"".join(pieces) == word and max(map(len, pieces)) <= unigram.WORD_BYTES
    if word.startswith("你".encode()):
        assert all(piece.decode() for piece in pieces)


def test_hashes_are_the_polynomials() -> None:
    data = np.frombuffer(b"hello", np.uint8)
    prefix, powers = unigram._hashes(data)
    base, value = int(unigram._BASE), 0
    for place, byte in enumerate(b"hello", 1):
        value = (value * base + byte + 1) % 2**64
        assert int(prefix[place]) == value
    assert [int(power) for power in powers[:3]] == [1, base, base * base % 2**64]
