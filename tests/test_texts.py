"""Scripts, languages, shingles and signatures against plain Python over the same texts."""

import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from mmdata.tokenizer.text import (
    DIGIT,
    GRAM,
    HAN,
    KANA,
    LANGUAGES,
    LATIN,
    code_points,
    count_scripts,
    jaccard,
    languages_of,
    likeness,
    near_duplicates,
    scripts_of,
    shingles,
    signatures,
)

PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def arrays(whole: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return code_points("".join(whole)), np.array([len(text) for text in whole], np.int64)


@examples(60)
@given(st.lists(PLAIN, min_size=1, max_size=8))
def test_scripts_are_counted_per_text(whole: list[str]) -> None:
    points, lengths = arrays(whole)
    counts = count_scripts(scripts_of(points), lengths)
    assert counts.sum(axis=1).tolist() == lengths.tolist()
    for text, found in zip(whole, counts, strict=True):
        assert found[HAN] >= sum(unicodedata.name(c, "").startswith("CJK UNIFIED IDEOGRAPH") for c in text)
        assert found[LATIN] == sum(c.isascii() and c.isalpha() for c in text)
        assert found[DIGIT] == sum(c in "0123456789" for c in text)
        assert found[KANA] >= sum(
            unicodedata.name(c, "").startswith(("HIRAGANA LETTER", "KATAKANA LETTER")) and ord(c) < 0x3200 for c in text
        )


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("灯塔照亮了港口的夜晚。", "Chinese"),
        ("用 Python 写一个函数，计算两个数的和。", "Chinese"),
        ("The lighthouse stands at the end of the pier.", "English"),
        ("What is 3 + 4?", "English"),
        ("Der Leuchtturm steht seit vielen Jahren am Ende einer langen Mole.", "other"),
        ("Маяк стоит на конце мола.", "other"),
        ("灯台はみなとのはしにたっています。", "other"),
        ("for (int i = 0; i < n; ++i) { total += a[i] * b[i]; }", "code"),
        ("Here it is:\n```python\ndef add(a, b):\n    return a + b\n```", "code"),
        ("1 2 3 4 5", "other"),
        ("", "other"),
    ],
)
def test_the_rule_of_thumb_for_languages(text: str, language: str) -> None:
    points, lengths = arrays([text])
    counts = count_scripts(scripts_of(points), lengths)
    assert LANGUAGES[languages_of(counts, [text])[0]] == language


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
