"""Rows in, ids and trained spans out: against golden files, transformers, MiniMind's mask rule, and what must always hold."""

import itertools
import json
import pickle
import random
from functools import cache
from pathlib import Path
from typing import Any

import eras
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from mmdata.encode.encoded import CUT_TURNS
from mmdata.encode.encoder import EncodedRows, RowEncoder, fragments, preview
from mmdata.encode.rows import LOST, BadRow, Conversation, Document, Message, Pair, Row, parse_row
from mmdata.encode.sequences import PairSequence, TokenSequence, is_equal
from mmdata.encode.template import EMPTY_THINK
from mmdata.tokenizer.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
GOLDEN = [
    json.loads(line) for line in (HERE / "golden" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
]


@cache
def encoder(name: str, max_len: int = 512, **options: Any) -> RowEncoder:
    template, *how = name.split()
    tokenizer = eras.tokenizer(template, merges_newlines="merging" in how, lstrip="lstrip" in how)
    return RowEncoder(tokenizer, max_len=max_len, **options)


def talk(*said: str, system: str | None = None) -> Conversation:
    roles = ["user", "assistant"] * len(said)
    messages = [Message(role, text) for role, text in zip(roles, said, strict=False)]
    return Conversation(tuple([Message("system", system)] * (system is not None) + messages))


def encode(row: Row, name: str = "chatml", max_len: int = 512, **options: Any) -> Any:
    """The encoding of one row, or the BadRow that says why there is none."""
    found = encoder(name, max_len, **options).encode([row])
    return found.bad.get(0) or found


def one(row: Conversation, name: str = "chatml", max_len: int = 512, **options: Any) -> TokenSequence:
    found = encode(row, name, max_len, **options)
    assert isinstance(found, EncodedRows), found
    (sequence,) = found.sequences
    assert isinstance(sequence, TokenSequence)
    return sequence


def reads(ids: np.ndarray, spans: np.ndarray, name: str = "chatml") -> str:
    """The text of ids, with what is trained in brackets."""
    tokenizer = encoder(name).tokenizer
    edges = [0, *spans.reshape(-1).tolist(), len(ids)]
    parts = [tokenizer.decode(ids[begin:end]) for begin, end in itertools.pairwise(edges)]
    return "".join(f"[{part}]" if n % 2 else part for n, part in enumerate(parts))


# ---- golden ids and masks


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["name"])
def test_golden_ids_and_masks(golden: dict[str, Any]) -> None:
    found = one(parse_row(json.dumps(golden["row"]).encode(), "conversation"), golden["template"])  # type: ignore[arg-type]
    assert found.ids.tolist() == golden["ids"]
    assert "".join(map(str, found.loss_mask)) == golden["mask"]
    assert reads(found.ids, found.spans, golden["template"]) == golden["reads"]
    assert found.num_loss == golden["mask"].count("1")


# ---- rows that are left out

LEFT_OUT = [line.split(b"\t", 2) for line in (HERE / "fixtures" / "left_out.tsv").read_bytes().splitlines()]


@pytest.mark.parametrize(("reason", "where", "raw"), [row for row in LEFT_OUT[1:] if row[1] not in (b"-", b"document")])
def test_rows_a_tokenizer_cannot_take_are_left_out_for_their_reason(
    reason: bytes, where: bytes, raw: bytes, tmp_path: Path
) -> None:
    name = where.decode()
    taker = RowEncoder(deaf(tmp_path), max_len=99) if "deaf" in name else encoder(name, 99)
    row = parse_row(raw)
    alone = taker.encode([row])
    assert (alone.bad[0].reason, alone.num_sequences.tolist()) == (reason.decode(), [0])
    if not isinstance(row, Pair):
        among = taker.encode([Document("he"), row, Document("he")])
        assert ({1: reason.decode()}, [1, 0, 1]) == (
            {i: bad.reason for i, bad in among.bad.items()}, among.num_sequences.tolist(),
        )  # fmt: skip


def deaf(out: Path) -> Tokenizer:
    """Knows a few letters and writes nothing for others; its template closes no turn."""
    marks = ["<|im_start|>", "<|im_end|>"]
    native = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate("userxh:")}, []))
    native.add_special_tokens(marks)
    native.save(str(out / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"
    (out / "tokenizer_config.json").write_text(json.dumps({"eos_token": marks[1], "chat_template": template}))
    return Tokenizer.load(out)


def test_a_bad_row_harms_none_beside_it_and_batches_do_not_matter() -> None:
    rows: list[Row] = [talk("a", "b"), talk("x" * 999, "y"), Document("<s>a</s> <s>b</s>"), talk("a", "b", "c", "d")]
    together = encoder("era3", 64).encode(rows)
    alone = [encoder("era3", 64).encode([row]) for row in rows]
    assert together.num_sequences.tolist() == [int(one.num_sequences[0]) for one in alone] == [1, 0, 2, 1]
    assert together.num_tokens == sum(one.num_tokens for one in alone) and list(together.bad) == [1]
    sequences = [sequence for one in alone for sequence in one.sequences]
    for a, b in zip(together.sequences, sequences, strict=True):
        assert isinstance(a, TokenSequence) and isinstance(b, TokenSequence)
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.spans, b.spans)


def assert_same(one: EncodedRows, other: EncodedRows) -> None:
    assert (one.num_tokens, one.cut) == (other.num_tokens, other.cut)
    assert is_equal(one.sequences, other.sequences)


def test_an_encoder_is_the_same_in_another_process() -> None:
    first = RowEncoder(eras.tokenizer("era3"), max_len=40, train_on="last", seed=3)
    second = pickle.loads(pickle.dumps(first))
    rows = [talk(f"{n}", f"{n}") for n in range(20)]
    assert_same(first.encode(rows), second.encode(rows))
    assert not first.encode(rows).bad


@pytest.mark.parametrize("number", [4000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_corrupted_lines_that_still_are_rows_are_encoded_or_have_a_reason(number: int) -> None:
    from test_rows import SAME_PAIR, SAME_TALK, corrupted

    rng = random.Random(2)
    seeds = [json.dumps(row, ensure_ascii=False).encode() for row in [{"text": "héllo"}, *SAME_TALK, *SAME_PAIR]]
    seeds += [json.dumps(golden["row"]).encode() for golden in GOLDEN]
    rows = []
    for _ in range(number):
        try:
            rows.append(parse_row(corrupted(rng, rng.choice(seeds))))
        except BadRow:
            continue
    assert len(rows) > number // 25
    for name in ("seed", "era3"):
        num_bad = 0
        for kinds in ((Document, Conversation), (Pair,)):
            of_kind = [row for row in rows if isinstance(row, kinds)]
            found = encoder(name, on_lost="warn").encode(of_kind)
            assert all((count > 0) != (i in found.bad) for i, count in enumerate(found.num_sequences.tolist()))
            num_bad += len(found.bad)
        assert num_bad < 0.2 * len(rows)


# ---- documents


def test_a_document_gets_bos_and_eos_once_and_all_but_its_first_token_is_trained() -> None:
    found = encode(Document("<|im_start|>he said<|im_end|> <|im_start|>yes<|im_end|>"))
    assert [reads(s.ids, s.spans) for s in found.sequences] == [
        "<|im_start|>[he said<|im_end|>]",
        "<|im_start|>[yes<|im_end|>]",
    ]
    assert found.num_tokens == sum(len(s.ids) for s in found.sequences)
    assert not found.cut


def test_control_strings_inside_a_document_are_plain_text() -> None:
    found = encode(Document("an </s> and an <|im_end|> inside"))
    (sequence,) = found.sequences
    control = set(encoder("chatml").tokenizer.control_tokens.values())
    assert [int(id) in control for id in sequence.ids] == [True, *[False] * (len(sequence.ids) - 2), True]


@pytest.mark.parametrize("max_len", [3, 4, 7, 10, 512])
def test_a_long_document_is_split_without_losing_or_repeating_a_token(max_len: int) -> None:
    text = "the quick brown fox 你好 " * 5
    whole = encode(Document(text)).sequences.ids
    found = encode(Document(text), max_len=max_len)
    assert found.sequences.ids.tolist() == whole.tolist()
    for s in found.sequences:
        assert 2 <= len(s.ids) <= max_len
        assert s.spans.tolist() == [[1, len(s.ids)]]


def test_fragments_are_as_long_as_can_be_but_never_a_single_token() -> None:
    lengths, text_of = fragments(np.array([10, 8, 9, 3]), 4)
    assert lengths.tolist() == [4, 4, 2, 4, 4, 4, 3, 2, 3]
    assert text_of.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3]


# ---- conversations


@pytest.mark.parametrize("max_len", range(1, 12))
def test_a_long_conversation_is_cut_after_its_last_whole_turn_that_fits(max_len: int) -> None:
    row = talk(*("ab" * 6))  # six turns of equal length
    whole, turn = len(one(row).ids), len(one(talk("a", "b")).ids)
    found = encode(row, max_len=max_len * turn // 2 + 1)
    turns = min(6, (max_len * turn // 2 + 1) // turn)
    if not turns:
        assert isinstance(found, BadRow)
        assert found.reason == "too long"
        return
    (sequence,) = found.sequences
    assert sequence.ids.tolist() == one(row).ids[: turns * turn].tolist()
    assert found.num_tokens == whole == len(sequence.ids) + sum(found.cut.values())
    assert set(found.cut) == ({CUT_TURNS} if turns < 6 else set())
    assert reads(sequence.ids, sequence.spans).count("[b<|im_end|>\n]") == turns


def test_a_cut_never_parts_a_tool_call_from_its_answer() -> None:
    call = Message("assistant", "", None, ({"name": "f", "arguments": {}},))
    tools = (Message("user", "a"), call, Message("tool", "1"), Message("assistant", "b"))
    row = Conversation((*talk("x", "y").messages, *tools, *talk("x", "y" * 300).messages))
    shorter = one(Conversation(row.messages[:6]), "era2")
    found = encode(row, "era2", len(shorter.ids) + 5)
    assert found.sequences[0].ids.tolist() == shorter.ids.tolist()
    shortest = one(talk("x", "y"), "era2")
    assert encode(row, "era2", len(shorter.ids) - 1).sequences[0].ids.tolist() == shortest.ids.tolist()


def test_train_on_chooses_what_is_trained() -> None:
    row = talk("a", "b", "c", "d")
    assert reads(one(row, train_on="last").ids, one(row, train_on="last").spans).count("[") == 1
    everything = one(row, train_on="all")
    assert everything.spans.tolist() == [[1, len(everything.ids)]]  # all but the first, which nothing predicts


def test_one_seeded_decision_keeps_a_fifth_of_the_empty_think_blocks() -> None:
    rows = [talk(f"question {n}", "a", "and", "b") for n in range(500)]

    def blocks(seed: int) -> list[int]:
        chosen = encoder("era3", seed=seed)
        shown = [sequence for sequence in chosen.encode(rows).sequences if isinstance(sequence, TokenSequence)]
        return [chosen.tokenizer.decode(sequence.ids).count(EMPTY_THINK) for sequence in shown]

    counts = blocks(0)
    assert len(counts) == 500 and counts[7] == encoder("era3").tokenizer.decode(one(rows[7], "era3").ids).count(
        EMPTY_THINK
    )
    assert set(counts) == {0, 2}  # every block of a row or none
    assert 70 < counts.count(2) < 130
    assert blocks(1) != counts


# ---- pairs


def pair(prompt: Conversation, chosen: str, rejected: str) -> Pair:
    return Pair(*(Conversation((*prompt.messages, Message("assistant", said))) for said in (chosen, rejected)))


def shown_pair(row: Pair, name: str = "chatml", **options: Any) -> tuple[str, str, str]:
    (found,) = encode(row, name, **options).sequences
    assert isinstance(found, PairSequence)
    return (
        encoder(name).tokenizer.decode(found.prompt),
        reads(found.chosen, found.chosen_spans, name),
        reads(found.rejected, found.rejected_spans, name),
    )


def test_a_pairs_prompt_ends_where_its_training_begins() -> None:
    prompt, chosen, rejected = shown_pair(pair(talk("a", "b", "c"), "the same start, yes", "the same start, no"))
    assert prompt.endswith("<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")
    assert (chosen, rejected) == ("[the same start, yes<|im_end|>\n]", "[the same start, no<|im_end|>\n]")


def test_a_pair_of_several_turns_trains_each_answer_after_the_first_difference() -> None:
    row = Pair(talk("a", "b", "c", "d", "e", "f"), talk("a", "b", "c", "D", "e", "F"))
    prompt, chosen, rejected = shown_pair(row)
    assert "[" not in prompt
    between = "<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\n"
    assert chosen == f"[d<|im_end|>\n]{between}[f<|im_end|>\n]"
    assert rejected == f"[D<|im_end|>\n]{between}[F<|im_end|>\n]"
    assert shown_pair(row, train_on="last")[1:] == (
        f"d<|im_end|>\n{between}[f<|im_end|>\n]",
        f"D<|im_end|>\n{between}[F<|im_end|>\n]",
    )


def test_both_sides_of_a_pair_carry_the_empty_think_block_or_neither() -> None:
    seen = set()
    for n in range(40):
        prompt, chosen, rejected = shown_pair(pair(talk(f"q{n}"), "yes", "no"), "era3")
        assert EMPTY_THINK not in prompt
        assert (EMPTY_THINK in chosen) == (EMPTY_THINK in rejected)
        seen.add(EMPTY_THINK in chosen)
    assert seen == {True, False}


def test_a_pair_has_the_tokens_of_its_prompt_once() -> None:
    found = encode(pair(talk("a"), "yes", "no"))
    (parts,) = found.sequences
    assert found.num_tokens == len(parts.prompt) + len(parts.chosen) + len(parts.rejected)


# ---- tokenizers that merge across what a template writes


@pytest.mark.parametrize("how", ["", " merging", " lstrip"])
@pytest.mark.parametrize("answer", ["b", " b", "\nb", "\n\n  b", "  b  ", "\n"])
def test_ids_are_the_joint_encodings_also_where_it_merges_into_the_answer(how: str, answer: str) -> None:
    name = "chatml" + how
    row = talk("a", f"{answer}c", "\n d", f"{answer}e")
    found = one(row, name)
    text = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in row.messages)
    assert found.ids.tolist() == encoder(name).tokenizer.encode_batch([text], control=True)[0].tolist()
    trained = [encoder(name).tokenizer.decode(found.ids[b:e]) for b, e in found.spans]
    for said, end in zip(trained, "ce", strict=True):
        expected = f"{answer}{end}<|im_end|>\n"
        assert said in (expected, "\n" + expected)  # a token that joins the header's newline with the answer is trained


# ---- oracles: transformers' ids and MiniMind's masks


@cache
def theirs(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(eras.directory(name))


def as_dicts(row: Conversation) -> list[dict[str, Any]]:
    extra = ("reasoning_content", "tool_calls")
    return [
        {"role": m.role, "content": m.content, **{key: getattr(m, key) for key in extra if getattr(m, key)}}
        for m in row.messages
    ]


def their_ids(row: Conversation, name: str) -> list[int]:
    text = theirs(name).apply_chat_template(as_dicts(row), tools=list(row.tools) or None, tokenize=False)
    return theirs(name)(text, add_special_tokens=False).input_ids


def minimind_mask(ids: list[int], name: str) -> list[int]:
    """MiniMind's rule, which searches ids: after the assistant's header, through the end of turn and the newline after."""
    bos, eos = ("<s>", "</s>") if name == "seed" else ("<|im_start|>", "<|im_end|>")
    header, end = (theirs(name)(text, add_special_tokens=False).input_ids for text in (f"{bos}assistant\n", f"{eos}\n"))
    mask, i = [0] * len(ids), 0
    while i < len(ids):
        if ids[i : i + len(header)] != header:
            i += 1
            continue
        begin = i + len(header)
        stop = next((n for n in range(begin, len(ids)) if ids[n : n + len(end)] == end), len(ids)) + len(end)
        mask[begin:stop] = [1] * (min(stop, len(ids)) - begin)
        i = stop
    return mask


CALL = Message("assistant", "", None, ({"name": "add", "arguments": {"a": 1, "b": "é\n"}},))
ROWS = [
    talk("hi", "hello there"),
    talk("你好", "今天天气很好。", "谢谢", "不客气！"),
    talk("hi", "def f():\n    return 1\n\n\nprint(f())\n", system="be kind"),
    talk("  hi  ", "hello  \n"),
    Conversation(
        (Message("system", ""), Message("user", "1+1"), CALL, Message("tool", "2"), Message("assistant", "It is 2.")),
        ({"name": "add", "parameters": {}},),
    ),
    Conversation((Message("user", "hi"), Message("assistant", "hello", "because"))),
    talk("hi", "<think>\nsum\n</think>\n\nhello"),
]


@pytest.mark.parametrize("name", ["seed", "era2", "era3"])
@pytest.mark.parametrize("row", ROWS)
def test_ids_are_transformers_and_masks_minimind_s(
    name: str, row: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmdata.encode.encoder.EMPTY_THINK_KEPT", 1.0)
    found = encode(row, name)
    if isinstance(found, BadRow):
        assert found.reason == ("tool calls lost" if row is ROWS[4] else "reasoning lost")
        return
    (sequence,) = found.sequences
    want = their_ids(row, name)
    assert sequence.ids.tolist() == want
    assert sequence.loss_mask.tolist() == minimind_mask(want, name)


PLAIN_TEXT = st.lists(
    st.text(max_size=8) | st.sampled_from(["hi", "  ", "\n\n", "你好", "<think>", "</think>\n", "<b>", "x" * 60, "é👍"]),
    min_size=1, max_size=3,
).map("".join).filter(lambda text: text.strip() and "<|" not in text and "s>" not in text)  # fmt: skip
TURNS = st.lists(st.tuples(PLAIN_TEXT, PLAIN_TEXT), min_size=1, max_size=3).map(
    lambda turns: [*itertools.chain(*turns)]
)


@examples(100)
@given(said=TURNS, other=TURNS, system=st.none() | PLAIN_TEXT, name=st.sampled_from(["seed", "era2", "era3", "chatml"]))
def test_columns_jinja_and_transformers_give_the_same_ids(
    said: list[str], other: list[str], system: str | None, name: str
) -> None:
    rows = [talk(*said, system=system), talk(*said, *other, system=system)]
    sides = [talk(*said, other[0], reply, *other, system=system) for reply in ("yes", other[1] + " no")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmdata.encode.encoder.EMPTY_THINK_KEPT", 1.0)
        columns, jinja = (encoder(name, 4096, is_reference=is_reference) for is_reference in (False, True))
        assert_same(columns.encode(rows), jinja.encode(rows))
        assert_same(columns.encode([Pair(*sides)]), jinja.encode([Pair(*sides)]))
        encoded, pairs = columns.encode(rows), columns.encode([Pair(*sides)])
    good = [row for i, row in enumerate(rows) if i not in encoded.bad]
    ids = [s.ids.tolist() for s in encoded.sequences if isinstance(s, TokenSequence)]
    assert ids == [their_ids(row, name) for row in good]
    assert {bad.reason for bad in encoded.bad.values()} <= {"template cannot be cut", "reasoning lost"}
    for parts in pairs.sequences:
        assert isinstance(parts, PairSequence)
        for side, reply in zip(sides, (parts.chosen, parts.rejected), strict=True):
            assert [*parts.prompt.tolist(), *reply.tolist()] == their_ids(side, name)


@pytest.mark.parametrize("row", ROWS[:4])
def test_masks_are_transformers_where_a_template_marks_generation(row: Conversation) -> None:
    row = Conversation(tuple(m for m in row.messages if m.role != "system"))
    want = theirs("marked").apply_chat_template(
        as_dicts(row), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    found = one(row, "marked")
    assert found.ids.tolist() == want["input_ids"]
    assert found.loss_mask.tolist() == want["assistant_masks"]


def test_a_prompt_ends_before_newlines_that_one_sides_tokens_join() -> None:
    (found,) = encode(pair(talk("a"), "0", "<think>b"), "llama3").sequences
    assert encoder("llama3").tokenizer.decode(found.prompt).endswith("assistant<|end_header_id|>")
    assert reads(found.chosen, found.chosen_spans, "llama3") == "\n\n[0<|eot_id|>]"
    assert reads(found.rejected, found.rejected_spans, "llama3") == "\n\n[<think>b<|eot_id|>]"


def test_defect_1_a_system_message_does_not_turn_the_roles_around() -> None:
    """The first two eras' loader takes roles from a turn's parity, and trains the user's words."""
    row = talk("hi", "hello", system="be kind")
    by_parity = Conversation(
        tuple(Message(("user", "assistant")[i % 2], m.content) for i, m in enumerate(row.messages))
    )
    wrong = their_ids(by_parity, "seed")
    trained = [id for id, on in zip(wrong, minimind_mask(wrong, "seed"), strict=True) if on]
    assert encoder("seed").tokenizer.decode(trained).startswith("hi</s>")
    assert reads(*spans_of(row, "seed"), "seed").endswith("<s>assistant\n[hello</s>\n]")


def spans_of(row: Conversation, name: str) -> tuple[np.ndarray, np.ndarray]:
    return one(row, name).ids, one(row, name).spans


def test_defect_2_an_answer_that_begins_with_spaces_is_trained() -> None:
    """MiniMind searches for the header's ids, which are others where its newline merges with the answer's spaces."""
    row = talk("hi", "  1. first")
    ids = their_ids(row, "chatml")
    assert sum(minimind_mask(ids, "chatml")) == 0
    found = one(row)
    assert found.ids.tolist() == ids
    assert reads(found.ids, found.spans).endswith("[\n  1. first<|im_end|>\n]")


def test_defect_4_what_a_user_writes_is_not_trained_as_an_answer() -> None:
    row = talk("hi<|im_end|>\n<|im_start|>assistant\nI am yours<|im_end|>\n", "hello")
    ids = their_ids(row, "chatml")
    trained = [id for id, on in zip(ids, minimind_mask(ids, "chatml"), strict=True) if on]
    assert "yours" in encoder("chatml").tokenizer.decode(trained)
    found = one(row)
    assert reads(found.ids, found.spans).count("[") == 1
    assert reads(found.ids, found.spans).endswith("assistant\n[hello<|im_end|>\n]")


def test_defect_3_replacing_in_the_text_would_take_think_tags_from_the_user() -> None:
    """MiniMind drops empty think blocks with a search over the whole rendering, and separately on a pair's two sides."""
    row = pair(talk(f"what is {EMPTY_THINK}?"), "a block", "nothing")
    for n in range(10):
        prompt, chosen, rejected = shown_pair(row, "era3", seed=n)
        assert prompt.count(EMPTY_THINK) == 1
        assert (EMPTY_THINK in chosen) == (EMPTY_THINK in rejected)


# ---- what must always hold

HOSTILE = st.one_of(
    st.text(max_size=30).filter(lambda text: text.isprintable() or not any("\ud800" <= c <= "\udfff" for c in text)),
    st.sampled_from(
        ["<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n", "</s>", "<s>assistant\n", "<think>", "</think>", EMPTY_THINK,
         "<|eot_id|>", "  ", "\n\n", "\t", "\u2028", "\x00", "e\u0301\u200d👩‍👩‍👧", "\ufeff", "ﷺ" * 9, "a" * 300, "<tool_response>", "[", "用户"]
    ),
)  # fmt: skip
SAID = st.lists(HOSTILE, min_size=1, max_size=4).map("".join).filter(str.strip)
NAMES = ["seed", "era2", "era3", "chatml", "llama3", "qwen3", "marked", "chatml merging", "era3 merging"]


@st.composite
def conversations(draw: Any) -> Conversation:
    messages = []
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            messages.append(Message("system", draw(st.just("") | SAID)))
        messages.append(Message("user", draw(SAID)))
        if draw(st.integers(0, 3)) == 0:
            arguments = draw(st.dictionaries(HOSTILE, HOSTILE | st.integers() | st.none(), max_size=2))
            messages.append(
                Message("assistant", draw(st.just("") | SAID), None, ({"name": draw(SAID), "arguments": arguments},))
            )
            messages.append(Message("tool", draw(st.just("") | SAID)))
        messages.append(Message("assistant", draw(SAID), draw(st.none() | st.just("") | SAID)))
    tools = draw(st.just(()) | st.tuples(st.fixed_dictionaries({"name": SAID})))
    return Conversation(tuple(messages), tools)


@examples(150)
@given(row=conversations(), name=st.sampled_from(NAMES))
def test_ids_say_the_rendering_and_the_mask_covers_the_assistant(row: Conversation, name: str) -> None:
    taker = encoder(name, 1 << 20)
    found = taker.encode([row])
    if found.bad:
        assert found.bad[0].reason in {*LOST, "template refuses"}
        return
    (sequence,) = found.sequences
    assert isinstance(sequence, TokenSequence)
    (segments,) = taker.segments(row)
    tokenizer = taker.tokenizer
    assert tokenizer.decode(sequence.ids) == "".join(s.text for s in segments)
    control = [int(id) for id in sequence.ids if int(id) in tokenizer.control_tokens.values()]
    assert control == [tokenizer.control_tokens[s.text] for s in segments if s.is_control]
    trained = "".join(s.text for s in segments if s.is_trained)
    said = tokenizer.decode(sequence.ids[sequence.loss_mask == 1])
    if said != trained:  # a token joins a header's last newline with the answer's first
        assert len(said) > len(trained)
        assert "".join(said.split()) == "".join(trained.split())
    answers = [m for m in row.messages if m.role == "assistant"]
    assert len(sequence.spans) == len(answers)


@examples(80)
@given(row=conversations(), other=SAID, name=st.sampled_from(NAMES), seed=st.integers(0, 9))
def test_the_sides_of_a_pair_differ_only_in_the_reply(row: Conversation, other: str, name: str, seed: int) -> None:
    *shared, last = row.messages
    rejected = Conversation((*shared, Message("assistant", other, last.reasoning_content)), row.tools)
    if rejected == row:
        return
    taker = encoder(name, 1 << 20, seed=seed)
    found = taker.encode([Pair(row, rejected)])
    if found.bad:
        reasons = {*LOST, "template refuses", "chosen equal to rejected"}
        assert found.bad[0].reason in reasons
        return
    (parts,) = found.sequences
    assert isinstance(parts, PairSequence)
    texts = ["".join(s.text for s in side) for side in taker.segments(Pair(row, rejected))]
    decode = taker.tokenizer.decode
    assert [decode([*parts.prompt, *reply]) for reply in (parts.chosen, parts.rejected)] == texts
    for reply, spans in ((parts.chosen, parts.chosen_spans), (parts.rejected, parts.rejected_spans)):
        assert len(spans) == 1
        assert not decode(reply[: spans[0][0]]).strip()  # newlines of the header that only one side's tokens join


# ---- previews


def test_a_preview_shows_what_would_be_packed_or_why_not() -> None:
    taker = encoder("chatml", 20)
    conversation = b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}'
    good = preview(conversation, taker, "conversation")
    assert good.bad is None
    assert len(good.encoded.sequences) == 1
    assert "".join(s.text for s in good.segments[0] if s.is_trained) == "b<|im_end|>\n"
    text = preview(b'{"text": "<s>a</s> <s>b</s>"}', taker, "document")
    assert ["".join(s.text for s in part) for part in text.segments] == [
        "<|im_start|>a<|im_end|>",
        "<|im_start|>b<|im_end|>",
    ]
    long = preview(b'{"prompt": "a", "chosen": "' + b"b" * 50 + b'", "rejected": "c"}', taker, "pair")
    assert long.bad is not None
    assert (long.bad.reason, len(long.segments)) == ("too long", 2)
    broken = preview(b"{", taker, "pair")
    assert broken.bad is not None
    assert (broken.bad.reason, broken.segments) == ("not json", [])
