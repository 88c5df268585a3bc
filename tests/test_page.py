"""The page as such: text stays text, JSON cannot end its element, nothing points outside, every phrase is translated."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import HOSTILE, parsed
from properties import examples

from mmdata.stats.report import page
from mmdata.stats.report.page import Column, Phrase, Section, Translation, as_name


def whole(text: str, lang: str = "en") -> str:
    """A page with every kind of block, each holding the text wherever it can."""
    said = as_name(text)
    spec = page.bars([1, 2, 4], [(said, [1, 2])], marks=[2], unit=said, names=[text, text])
    message = {"role": "user", "text": [text], "ids": [], "marks": "0"}
    sample = {
        "why": "random",
        "file": text,
        "line": 1,
        "characters": 3,
        "parts": [{"name": "", "hidden": 0, "messages": [message]}],
    }
    kinds = {"text": text, "word": text, "code": text, "figure": text, "noted": [(text, text)], "count": 1, "bar": 0.5}
    blocks = [
        page.Note(said),
        page.Heading(said),
        page.Cards([(said, text, said)]),
        page.Callouts([said]),
        page.Table([Column(said, kind) for kind in kinds], [list(kinds.values())] * 2, said, marked=[1]),
        page.Fold(said, [page.Strings([text])]),
        page.Grid([[page.Plot(said, spec, said)], page.Note(said)]),
        page.Browser([sample]),
    ]
    return page.render(said, said, [Section("one", said, blocks)], lang, axes={"step": said})


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_makes_no_element(text: str) -> None:
    plain, hostile = parsed(whole("p" * len(text))), parsed(whole(text))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert all(set(one) == set(other) for (_, one), (_, other) in zip(hostile.tags, plain.tags, strict=True))
    data = [json.loads(script) for script in hostile.scripts if script[:1] in "[{"]
    assert data[0]["series"][0]["name"] == text and data[1][0]["file"] == text


@examples(40)
@given(st.recursive(st.text() | st.integers() | st.none(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)))
def test_script_json_is_the_value_and_ends_nothing(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    found = page.script_json(value)
    assert json.loads(found) == value
    assert not re.search("[<>&\u2028\u2029]", found)


def test_the_page_asks_nobody() -> None:
    html = whole("plain")
    assert "default-src 'none'" in html and "connect-src 'none'" in html
    for tag, attributes in parsed(html).tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name) is None or attributes[name][:1] == "#" or attributes[name] == "data:,", tag  # type: ignore[index]
    assert "connect-src 'self'" in page.render("t", "s", [], "en", refresh_s=2)
    assert len(html) < 200_000


def test_a_phrase_without_translation_is_our_mistake() -> None:
    translation = Translation("zh")
    with pytest.raises(KeyError):
        translation("never written down")
    assert translation("rows") == "行数" and translation(as_name("a name")) == "a name"
    assert translation(
        Phrase("{share} of {one} is also in {other}", {"share": 1, "one": "code", "other": as_name("x")})
    )
    assert 'lang="zh-CN"' in whole("plain", "zh")


def test_values_are_written_by_the_kind_of_their_column() -> None:
    shown = {
        "count": (12345, "12,345"),
        "share": (0.314, "31 %"),
        "percent2": (0.314, "31.40 %"),
        "bytes": (1234, "1.2 kB"),
        "hours": (0.5, "30 m 00 s"),
        "bar": (0.1, "███"),
        "noted": ([("a", "rows"), ("b", "")], "a 行数 b"),
        "word": ("trained tokens", "参与训练的 token"),
        "text": ("tokens", "tokens"),
    }
    for kind, (value, text) in shown.items():
        assert Column("", kind).show(value, Translation("zh")) == text
        assert Column("", kind).show(None, Translation("zh")) == "–"
