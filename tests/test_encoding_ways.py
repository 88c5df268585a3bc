"""Rows in columns have the ids, spans and reasons of the same rows one by one through jinja2 and `tokenizers`."""

import itertools
from functools import cache
from typing import Any

import eras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from mmdata.encode.columns import columns_of
from mmdata.encode.encoder import EncodedRows, RowEncoder
from mmdata.encode.rows import BadRow, Conversation, Document, Message, Pair, Row
from mmdata.encode.sequences import is_equal
from mmdata.tokenizer.encoders import Encoder, choose

BLOCKS = ("seed", "era2", "era3", "chatml")


@cache
def fast_encoder(name: str, merges: bool) -> Encoder:
    return choose(eras.tokenizer(name, merges_newlines=merges))


@cache
def pair_of_encoders(name: str, max_len: int, train_on: str, merges: bool = False) -> tuple[RowEncoder, RowEncoder]:
    tokenizer = eras.tokenizer(name, merges_newlines=merges)
    options: dict[str, Any] = {"max_len": max_len, "train_on": train_on, "on_lost": "warn"}
    fast = RowEncoder(tokenizer, encoder=fast_encoder(name, merges), **options)
    return fast, RowEncoder(tokenizer, is_reference=True, **options)


def assert_as_reference(rows: list[Any], name: str, max_len: int, train_on: str, merges: bool = False) -> EncodedRows:
    fast, reference = pair_of_encoders(name, max_len, train_on, merges)
    have, want = fast.encode(rows), reference.encode(rows)
    assert {i: str(bad) for i, bad in have.bad.items()} == {i: str(bad) for i, bad in want.bad.items()}
    assert have.num_sequences.tolist() == want.num_sequences.tolist()
    assert (have.num_tokens, have.cut, have.rows_cut) == (want.num_tokens, want.cut, want.rows_cut)
    assert is_equal(have.sequences, want.sequences)
    assert have.not_written == want.not_written
    return have


PIECES = st.sampled_from(
    ["hi", " a b", "\n", " ", "<think>", "</think>\n", "<tool_response>", "<|im_end|>", "<s>", "é👍", "<|im_", "end|>", "x" * 40]
)  # fmt: skip
SAID = st.lists(PIECES, min_size=1, max_size=4).map("".join).filter(str.strip)
CALL = st.fixed_dictionaries(
    {"name": SAID, "arguments": SAID | st.dictionaries(SAID, st.none() | SAID | st.floats(), max_size=2)}
)


RARELY = st.sampled_from([False] * 9 + [True])


def said(role: str, text: st.SearchStrategy[str]) -> st.SearchStrategy[Message]:
    """Messages, of which some have a name, and some are not to be trained on."""
    return st.builds(
        lambda content, is_named, is_left_out: Message(
            role, content, name="Eve" if is_named else None, weight=0 if is_left_out else 1
        ),
        text, RARELY, RARELY,
    )  # fmt: skip


ANSWER = st.tuples(
    SAID, st.none() | st.just("") | SAID, st.lists(CALL | CALL.map(lambda call: {"function": call}), max_size=2)
).map(lambda found: Message("assistant", found[0], found[1], tuple(found[2])))
PLAIN_ANSWER = said("assistant", SAID)
TURN = st.one_of(
    st.tuples(said("user", SAID), PLAIN_ANSWER),
    st.tuples(said("user", SAID), ANSWER),
    st.builds(
        lambda user, call, tools, answer: (user, call, *tools, answer),
        said("user", SAID), ANSWER,
        st.lists(said("tool", SAID), min_size=1, max_size=3), PLAIN_ANSWER,
    ),
)  # fmt: skip
SYSTEM = st.lists(said("system", SAID | st.just("")), max_size=2)
TOOLS = st.lists(st.dictionaries(SAID, SAID | st.booleans(), max_size=2), max_size=2).map(tuple)
TALK = st.builds(
    lambda system, turns, tools: Conversation((*system[:1], *itertools.chain(*turns[:1]), *system[1:], *itertools.chain(*turns[1:])), tools),
    SYSTEM, st.lists(TURN, min_size=1, max_size=3), TOOLS,
)  # fmt: skip
OPTIONS = st.tuples(st.sampled_from([12, 40, 90, 999]), st.sampled_from(["assistant", "last", "all"]))


@examples(80)
@given(rows=st.lists(TALK, min_size=1, max_size=4), options=OPTIONS, name=st.sampled_from(eras.TEMPLATES))
def test_conversations_in_columns_are_as_one_by_one(rows: list[Row], options: tuple[int, str], name: str) -> None:
    assert_as_reference(rows, name, *options)


REPLIES = st.lists(TURN, min_size=1, max_size=3).map(lambda turns: tuple(itertools.chain(*turns)))


@examples(120)
@given(
    rows=st.lists(st.tuples(TALK, REPLIES, REPLIES, ANSWER), min_size=1, max_size=3),
    options=OPTIONS,
    name=st.sampled_from(eras.TEMPLATES),
    merges=st.booleans(),
)
def test_pairs_in_columns_are_as_one_by_one(rows: list[Any], options: tuple[int, str], name: str, merges: bool) -> None:
    """Sides share whole turns and a user's message, and go on alike or not after replies that differ."""
    pairs = []
    for shared, chosen, rejected, other in rows:
        user = chosen[:1]
        rejected = rejected if rejected[1:] and chosen[1:2] != rejected[1:2] else (*user, other)
        sides = [Conversation((*shared.messages, *user, *side[1:]), shared.tools) for side in (chosen, rejected)]
        if sides[0] != sides[1] and Pair(*sides).num_shared == len(shared.messages) + 1:
            pairs.append(Pair(*sides))
    if pairs:
        assert_as_reference(pairs, name, *options, merges)


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_a_pairs_prompt_goes_as_far_as_both_sides_are_alike_and_untrained(train_on: str) -> None:
    pairs = [
        Pair(talk("a", "same start, yes", "c", "d"), talk("a", "same start, no", "c", "d")),
        Pair(talk("a", "b", "c", "d"), talk("a", "b", "c", "e")),
        Pair(talk("a", "b", "c", "d"), talk("a", "B")),
        Pair(talk("a", "\nb"), talk("a", "b")),
        Pair(talk("a", "b" * 200), talk("a", "c")),
    ]
    encoded = assert_as_reference(pairs, "era3", 99, train_on)
    assert {i: bad.reason for i, bad in encoded.bad.items()} == {3: "chosen equal to rejected", 4: "too long"}


@examples(80)
@given(
    rows=st.lists(SAID.map(Document), min_size=1, max_size=5),
    max_len=st.sampled_from([3, 8, 999]),
    name=st.sampled_from(BLOCKS),
)
def test_documents_of_a_fast_encoder_are_those_of_tokenizers(rows: list[Row], max_len: int, name: str) -> None:
    assert_as_reference(rows, name, max_len, "assistant")


def talk(*said: str) -> Conversation:
    return Conversation(tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said)))


@pytest.mark.parametrize("merges", [False, True])
def test_an_answer_that_joins_its_header_and_one_with_control_strings_are_looked_at_alone(merges: bool) -> None:
    rows = [
        talk("a", "b"),
        talk("a", "\n\nb"),
        talk("<|im_end|>", "b"),
        talk("a", "<|im_start|>user\n<|im_end|>\n"),
        talk("c", "d"),
    ]
    batch = assert_as_reference(rows, "chatml", 99, "assistant", merges)
    assert not batch.bad and len(batch.sequences) == 5


def test_calls_after_an_answer_of_newlines_alone_are_left_to_the_template() -> None:
    """Of such an answer a template may write nothing, and yet a newline before the calls."""
    call = ({"name": "f", "arguments": "{}"},)
    sides = [
        Conversation((Message("user", "a"), Message("assistant", said, "why", call), Message("tool", "b"), *talk("c", "d").messages[1:]))
        for said in ("", "\n")
    ]  # fmt: skip
    assert not assert_as_reference(sides, "era3", 99, "assistant").bad
    assert not assert_as_reference([Pair(*sides)], "era3", 99, "assistant").bad


def test_a_document_of_nothing_but_marks_is_left_out_with_a_reason() -> None:
    batch = assert_as_reference([Document("<s></s>"), Document("<s>a</s> <s>b</s>")], "seed", 99, "assistant")
    assert batch.bad[0].reason == "empty content" and batch.num_sequences.tolist() == [0, 2]


def is_fast(encoder: RowEncoder, row: Conversation | Pair) -> bool:
    """Whether a row is encoded without jinja2."""
    assert encoder._fast
    return not encoder._fast.encode(np.arange(1), columns_of([row]), np.ones(1, bool), EncodedRows(1)).any()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", eras.TEMPLATES)
def test_plain_rows_are_encoded_without_jinja2(name: str) -> None:
    fast, _ = pair_of_encoders(name, 999, "assistant")
    system = Conversation((Message("system", "s"), *talk("a", "b", "c", "d").messages))
    rows = [talk("a", "b"), talk(*"abcdef"), *([] if name == "marked" else [system])]
    assert all(is_fast(fast, row) for row in rows)
    assert is_fast(fast, Pair(talk("a", "b", "c", "d"), talk("a", "b", "c", "e")))


def test_rows_with_tools_and_reasoning_are_encoded_without_jinja2() -> None:
    call = {"name": "f", "arguments": {"a": ["\n"]}}
    answers = Message("assistant", "b", "why"), Message("assistant", "", None, (call, {"function": call}))
    for tools, answer in itertools.product([(), ({"name": "f"}, {"é": "<g>"})], answers):
        row = Conversation((Message("user", "a"), answer, Message("tool", "c"), *talk("d", "e").messages[1:]), tools)
        assert is_fast(pair_of_encoders("era3", 999, "assistant")[0], row)


def test_rows_the_template_would_test_are_left_to_it() -> None:
    fast, _ = pair_of_encoders("era3", 999, "assistant")
    blank = Conversation((Message("system", "\n"), *talk("a", "b").messages))
    odd = talk("a", "<think>x</think>b"), talk("a</think>", "b"), talk("a", "<s>"), blank
    assert not any(is_fast(fast, row) for row in odd)


def test_a_rows_encoding_does_not_depend_on_its_neighbours() -> None:
    rows = [talk("a", "b" * n, "c", "d") for n in range(1, 60)]
    fast, _ = pair_of_encoders("era3", 40, "assistant")
    together = fast.encode(rows)
    alone = [fast.encode([row]) for row in rows]
    assert together.num_sequences.tolist() == [int(one.num_sequences[0]) for one in alone]
    assert together.sequences.ids.tolist() == [id for one in alone for id in one.sequences.ids.tolist()]
    assert {bad.reason for one in alone for bad in one.bad.values()} <= {"too long"}
    assert isinstance(together.bad.get(58), BadRow)
