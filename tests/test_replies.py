"""An answer is told apart the same however it is cut, and nothing of it is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.inference.replies import Splitter, split

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
CASES = {
    "plain": ("Hello.\n\nBye\n", None, "Hello.\n\nBye\n", 0),
    "thinking": ("<think>\nfirst\nthen\n</think>\n\nSo.", "first\nthen", "So.", 0),
    "empty thinking": ("<think>\n\n</think>\n\nSo.", None, "So.", 0),
    "thinking never ends": ("<think>\nstill", "still", "", 0),
    "a call": (CALL, None, "", 1),
    "words and two calls": (f"I look.\n{CALL}\n{CALL}", None, "I look.", 2),
    "thinking, words, call": (f"<think>\nhm\n</think>\n\nYes.\n{CALL}", "hm", "Yes.", 1),
    "a mark later is a word": ("In html <think> is no tag.", None, "In html <think> is no tag.", 0),
    "an end without a beginning": ("a </think> b", None, "a </think> b", 0),
    "a call that is no json": ("<tool_call>{oops</tool_call>", None, "<tool_call>{oops</tool_call>", 0),
    "a call without a name": ('<tool_call>{"a": 1}</tool_call>', None, '<tool_call>{"a": 1}</tool_call>', 0),
    "a call that never ends": ('x<tool_call>{"na', None, 'x<tool_call>{"na', 0),
    "half a mark": ("<thin", None, "<thin", 0),
    "nothing": ("", None, "", 0),
    "space alone": ("  ", None, "  ", 0),
}


def together(cuts: list[str], **options: bool) -> tuple[str | None, str, int]:
    splitter = Splitter(**options)
    pieces = [piece for text in cuts for piece in splitter.feed(text)] + splitter.close()
    reasoning = "".join(p.text for p in pieces if p.kind == "reasoning")
    return (
        reasoning or None,
        "".join(p.text for p in pieces if p.kind == "content"),
        sum(p.call is not None for p in pieces),
    )


@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_told_apart_however_it_is_cut(case: str) -> None:
    text, reasoning, content, num_calls = CASES[case]
    for size in range(1, len(text) + 2):
        cuts = [text[i : i + size] for i in range(0, len(text), size)]
        assert together(cuts) == (reasoning, content, num_calls), size


def test_the_call_s_arguments_are_json() -> None:
    assert split(CALL).calls == [{"name": "add", "arguments": '{"a": 1}'}]
    assert split('<tool_call>{"name": "now", "arguments": "{}"}</tool_call>').calls[0]["arguments"] == "{}"


def test_without_calls_the_marks_are_words() -> None:
    assert together([CALL], with_calls=False) == (None, CALL, 0)


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", "<", "\n", "a", " "]), max_size=9)
)
def test_words_are_never_lost_and_cuts_do_not_matter(parts: list[str]) -> None:
    text = "".join(parts)
    whole = together([text])
    assert together(list(text)) == whole
    assert (whole[0] or "").count("a") + whole[1].count("a") == text.count("a")
