"""Rows in bulk have the ids, spans and reasons of the same rows one by one through jinja2 and `tokenizers`."""

import itertools
from functools import cache
from typing import Any

import eras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdata.encode.blocks import learn, split_letters
from mmdata.encode.encoder import Batch, RowEncoder
from mmdata.encode.rows import BadRow, Conversation, Document, Message, Row, row_hash
from mmdata.encode.sequences import is_equal
from mmdata.encode.talks import talks_of
from mmdata.encode.template import Template
from mmdata.tokenizer.encoders import choose

BLOCKS = ("seed", "era2", "era3", "chatml")


@cache
def pair_of_encoders(name: str, max_len: int, train_on: str, merges: bool = False) -> tuple[RowEncoder, RowEncoder]:
    tokenizer = eras.tokenizer(name, merges_newlines=merges)
    options: dict[str, Any] = {"max_len": max_len, "train_on": train_on}
    fast = RowEncoder(tokenizer, encoder=choose(tokenizer), **options)
    return fast, RowEncoder(tokenizer, is_reference=True, **options)


NO_HASHES = np.empty((0, 32), np.uint8)


def hashes_of(rows: list[Any]) -> np.ndarray:
    return np.frombuffer(b"".join(map(row_hash, rows)), np.uint8).reshape(-1, 32)


def assert_as_reference(rows: list[Any], name: str, max_len: int, train_on: str, merges: bool = False) -> Batch:
    fast, reference = pair_of_encoders(name, max_len, train_on, merges)
    have, want = fast.encode_batch(rows, hashes_of(rows)), reference.encode_batch(rows, NO_HASHES)
    assert {i: str(bad) for i, bad in have.bad.items()} == {i: str(bad) for i, bad in want.bad.items()}
    assert have.num_sequences.tolist() == want.num_sequences.tolist()
    assert (have.num_tokens, have.cut, have.rows_cut) == (want.num_tokens, want.cut, want.rows_cut)
    assert is_equal(have.flat, want.flat)
    return have


PIECES = st.sampled_from(
    ["hi", " a b", "\n", " ", "<think>", "</think>\n", "<tool_response>", "<|im_end|>", "<s>", "é👍", "<|im_", "end|>", "x" * 40]
)  # fmt: skip
SAID = st.lists(PIECES, min_size=1, max_size=4).map("".join).filter(str.strip)
CALL = st.fixed_dictionaries(
    {"name": SAID, "arguments": SAID | st.dictionaries(SAID, st.none() | SAID | st.floats(), max_size=2)}
)


def said(role: str, text: st.SearchStrategy[str]) -> st.SearchStrategy[Message]:
    return text.map(lambda content: Message(role, content))


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


@settings(max_examples=80, deadline=None, derandomize=True)
@given(rows=st.lists(TALK, min_size=1, max_size=4), options=OPTIONS, name=st.sampled_from((*BLOCKS, "llama3", "qwen3")))
def test_conversations_in_bulk_are_as_one_by_one(rows: list[Row], options: tuple[int, str], name: str) -> None:
    assert_as_reference(rows, name, *options)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.lists(SAID.map(Document), min_size=1, max_size=5),
    max_len=st.sampled_from([3, 8, 999]),
    name=st.sampled_from(BLOCKS),
)
def test_documents_in_bulk_are_as_one_by_one(rows: list[Row], max_len: int, name: str) -> None:
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
    assert not batch.bad and len(batch.flat) == 5


def test_a_document_of_nothing_but_marks_is_left_out_with_a_reason() -> None:
    batch = assert_as_reference([Document("<s></s>"), Document("<s>a</s> <s>b</s>")], "seed", 99, "assistant")
    assert batch.bad[0].reason == "empty content" and batch.num_sequences.tolist() == [0, 2]


def test_blocks_are_learned_from_the_templates_that_write_them_and_from_no_others() -> None:
    found = {name: learn(Template(eras.tokenizer(name))) for name in eras.TEMPLATES}
    assert {name for name, blocks in found.items() if blocks} == set(BLOCKS)
    words = {name: blocks.words for name, blocks in found.items() if blocks}
    assert {name for name, w in words.items() if w.tools and w.has_calls} == {"era2", "era3"}
    assert {name for name, w in words.items() if w.thinks} == {"era3"}


def test_rows_the_template_would_test_are_left_to_it() -> None:
    blocks = learn(Template(eras.tokenizer("era3")))
    assert blocks
    call = Conversation((Message("user", "a"), Message("assistant", "", None, ({"name": "f"},))))
    found = blocks.render(talks_of([talk("a", "<think>x</think>b"), talk("a", "b"), call]), np.full(3, True))
    assert found.texts == ["<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nb<|im_end|>\n"]
    assert (split_letters(found), found.is_odd.tolist()) == (["ua"], [True, False, True])


def test_a_row_in_bulk_does_not_hang_on_its_neighbours() -> None:
    rows = [talk("a", "b" * n, "c", "d") for n in range(1, 60)]
    fast, _ = pair_of_encoders("era3", 40, "assistant")
    hashes = hashes_of(rows)
    together = fast.encode_batch(rows, hashes)
    alone = [fast.encode_batch([row], hashes[i : i + 1]) for i, row in enumerate(rows)]
    assert together.num_sequences.tolist() == [int(one.num_sequences[0]) for one in alone]
    assert together.flat.ids.tolist() == [id for one in alone for id in one.flat.ids.tolist()]
    assert {bad.reason for one in alone for bad in one.bad.values()} <= {"too long"}
    assert isinstance(together.bad.get(58), BadRow)
