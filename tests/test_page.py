"""The page as such: text stays text, JSON cannot end its element, nothing points outside, every phrase is translated."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import HOSTILE, parsed

from mmdata.stats.report import page
from mmdata.stats.report.page import Bar, Section, Words


def whole(text: str, lang: str = "en") -> str:
    words = Words(lang, {})
    spec = page.bars([1, 2, 4], {text: [1, 2]}, marks=[(2, text)], unit=text)
    sample = {
        "why": "random",
        "file": text,
        "line": 1,
        "characters": 3,
        "parts": [{"name": "", "hidden": 0, "messages": [{"role": "user", "text": [text], "ids": [], "marks": "0"}]}],
    }
    blocks = [
        page.paragraph(text),
        page.cards([(text, text, text)]),
        page.callouts([text]),
        page.table([text, ""], [(page.code(text), Bar(0.5, text))], title=text),
        page.fold(text, text),
        page.plot(text, spec, note=text),
        page.browser([sample], words),
    ]
    return page.page(text, text, [Section("one", text, blocks)], words)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_makes_no_element(text: str) -> None:
    plain, hostile = parsed(whole("plain")), parsed(whole(text))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert all(set(one) == set(other) for (_, one), (_, other) in zip(hostile.tags, plain.tags, strict=True))
    data = [json.loads(script) for script in hostile.scripts if script[:1] in "[{"]
    assert data[0]["series"][0]["name"] == text and data[1][0]["file"] == text


@settings(max_examples=40, deadline=None)
@given(st.recursive(st.text() | st.integers() | st.none(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)))
def test_script_json_is_the_value_and_ends_nothing(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    found = page.to_script_json(value)
    assert json.loads(found) == value
    assert not re.search("[<>&\u2028\u2029]", found)


def test_the_page_asks_nobody() -> None:
    html = whole("plain")
    assert "default-src 'none'" in html and "connect-src 'none'" in html
    for tag, attributes in parsed(html).tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name) is None or attributes[name][:1] == "#" or attributes[name] == "data:,", tag  # type: ignore[index]
    assert "connect-src 'self'" in page.page("t", "s", [], Words("en", {}), refresh_s=2)
    assert len(html) < 200_000


def test_a_phrase_without_translation_is_our_mistake() -> None:
    with pytest.raises(KeyError):
        Words("zh", {})("never written down")
    assert Words("zh", {"rows": "行数"})("rows") == "行数" and Words("zh", {}).or_same("a name") == "a name"
    assert 'lang="zh-CN"' in whole("plain", "zh")
