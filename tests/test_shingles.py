"""Shingles, signatures and near duplicates against plain Python over the same texts."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from test_scripts import PLAIN, arrays

from mmdata.pack.filter.grams import GRAM, jaccard, likeness, near_duplicates, shingles, signatures


def grams(text: str) -> set[str]:
    return {text[i : i + GRAM] for i in range(len(text) - GRAM + 1)}


@examples(60)
@given(st.lists(PLAIN, min_size=1, max_size=8))
def test_shingles_are_those_inside_each_text(whole: list[str]) -> None:
    hashes, text = shingles(*arrays(whole))
    for number, one in enumerate(whole):
        assert len(set(hashes[text == number].tolist())) == len(grams(one))
        assert (text == number).sum() == max(0, len(one) - GRAM + 1)
    same, _ = shingles(*arrays([one for one in whole for _ in range(2)]))
    assert set(same.tolist()) == set(hashes.tolist())


def sentences(draw: random.Random, number: int) -> str:
    return "".join(chr(draw.choice((0x4E00, 0x61)) + draw.randrange(26)) for _ in range(number))


def test_likeness_of_signatures_estimates_jaccard() -> None:
    draw = random.Random(4)
    estimated, exact = [], []
    for _ in range(300):
        one = sentences(draw, 400)
        cut = draw.randrange(400)
        other = one[:cut] + sentences(draw, 400 - cut)
        found = signatures(*shingles(*arrays([one, other])), 2)
        estimated.append(likeness(found[:1], found[1:])[0])
        exact.append(len(grams(one) & grams(other)) / len(grams(one) | grams(other)))
    assert abs(np.mean(estimated) - np.mean(exact)) < 0.02
    assert np.corrcoef(estimated, exact)[0, 1] > 0.9


def test_near_duplicates_are_the_planted_ones() -> None:
    draw = random.Random(5)
    whole = [sentences(draw, draw.randint(200, 1500)) for _ in range(400)]
    planted = set()
    for at in range(50, 400, 10):
        original = draw.choice(whole[:40])
        whole[at] = original[:-3] + "xyz"
        planted.add(at)
    found = near_duplicates(signatures(*shingles(*arrays(whole)), len(whole)))
    marked = set(np.flatnonzero(found).tolist())
    assert marked <= planted and len(marked) >= 0.9 * len(planted)


@examples(40)
@given(st.lists(PLAIN, min_size=2, max_size=8).filter(lambda whole: len(whole) % 2 == 0))
def test_jaccard_is_that_of_the_sets(whole: list[str]) -> None:
    found = jaccard(*shingles(*arrays(whole)), len(whole) // 2)
    for i, (one, other) in enumerate(zip(whole[::2], whole[1::2], strict=True)):
        either = grams(one) | grams(other)
        assert found[i] == pytest.approx(len(grams(one) & grams(other)) / len(either) if either else 1)


def test_no_text_at_all() -> None:
    hashes, text = shingles(*arrays([]))
    assert len(hashes) == 0 and not near_duplicates(signatures(hashes, text, 0)).any()
