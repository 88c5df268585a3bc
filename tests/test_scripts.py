"""Scripts and languages against plain Python over the same texts."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from mmdata.tokenizer.scripts import (
    DIGIT,
    HAN,
    KANA,
    LANGUAGES,
    LATIN,
    code_points,
    count_scripts,
    languages_of,
    scripts_of,
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
