"""What a template or a tokenizer loses of a row is found and counted; messages of weight 0 are not trained."""

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import eras
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from pack_data import pack_with
from properties import examples

from mmdata.commands.show import show_file
from mmdata.encode.encoder import RowEncoder
from mmdata.encode.rows import EARLIER_REASONING, TOOL_REFERENCES, BadRow, Conversation, Message, Pair, parse_row
from mmdata.encode.sequences import PairSequence, TokenSequence, is_equal
from mmdata.encode.template import Template
from mmdata.encode.template.losses import Loss
from mmdata.encode.validate import validate
from mmdata.errors import InputError, TokenizerError
from mmdata.io.options import ReadOptions
from mmdata.pack.estimate import estimate
from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import PackResult
from mmdata.shards.dataset import open_dataset
from mmdata.stats.stats import measure_file
from mmdata.tokenizer.tokenizer import Tokenizer

LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TOOL = {"type": "function", "function": {"name": "f", "description": "does it", "parameters": {"type": "object"}}}


def tokenizer_with(text: str) -> Tokenizer:
    config = {"eos_token": "<|im_end|>", "chat_template": text}
    return Tokenizer(Path("t"), {**eras.tokenizer("chatml").files, "tokenizer_config.json": json.dumps(config).encode()})  # fmt: skip


def template(text: str) -> Template:
    return Template(tokenizer_with(text))


def row(*messages: dict[str, Any], **fields: Any) -> Conversation:
    found = parse_row(json.dumps({"messages": messages, **fields}).encode())
    assert isinstance(found, Conversation)
    return found


ASK = {"role": "user", "content": "Ask"}
TELL = {"role": "assistant", "content": "Tell"}
SYSTEM = {"role": "system", "content": "Be brief"}


def called(*calls: tuple[str, str], **more: Any) -> dict[str, Any]:
    tool_calls = [{"id": id, "function": {"name": name, "arguments": {"a": f"to {id}"}}} for id, name in calls]
    return {"role": "assistant", "content": "", "tool_calls": tool_calls, **more}


def given_by(id: str, name: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": f"of {id}", "tool_call_id": id, **({"name": name} if name else {})}


# ---- what a template leaves out

CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
WITH_CALLS = LOOP.replace("<|im_end|>", CALLS + "<|im_end|>")
CASES: dict[str, tuple[str, Conversation, list[Loss]]] = {
    "a content": (
        LOOP.replace("{{ m.content }}", "{{ m.content if m.content != 'More' }}"),
        row(ASK, TELL, {**ASK, "content": "More"}, TELL),
        [Loss("content lost", "message 3 (user): 'More'")],
    ),
    "the end of a content": (
        LOOP.replace("{{ m.content }}", "{{ m.content[:6] }}"),
        row(ASK, {**TELL, "content": "Tell me more"}),
        [Loss("content lost", "message 2 (assistant): 'e more'")],
    ),
    "the middle of a content": (
        LOOP.replace("{{ m.content }}", "{{ m.content[:1] + m.content[-1:] if m.content[1] == '-' else m.content }}"),
        row(ASK, {**TELL, "content": "a-b-c"}),
        [Loss("content lost", "message 2 (assistant): '-b-'")],
    ),
    "a content that is rewritten": (
        LOOP.replace("{{ m.content }}", "{{ m.content | upper if m.content == 'no' else m.content }}"),
        row({**ASK, "content": "no"}, TELL),
        [Loss("content lost", "message 1 (user): 'no'")],
    ),
    "marks that the template searches for": (
        LOOP.replace("{{ m.content }}", "{{ m.content.replace('/think', '').strip() }}"),
        row({**ASK, "content": " Ask /think\n"}, TELL),
        [],
    ),
    "reasoning": (LOOP, row(ASK, {**TELL, "reasoning_content": "Why"}), [Loss("reasoning lost", "message 2 (assistant): 'Why'")]),
    "blank reasoning": (LOOP, row(ASK, {**TELL, "reasoning_content": " \n"}), []),
    "reasoning under another name": (
        LOOP.replace("{{ m.content", "{{ m.thinking or '' }}{{ m.content"), row(ASK, {**TELL, "reasoning_content": "Why"}), [],
    ),
    "earlier reasoning": (
        LOOP.replace("{{ m.content", "{{ m.reasoning_content if loop.last and m.reasoning_content }}{{ m.content"),
        row(*[ASK, {**TELL, "reasoning_content": "Why"}] * 3),
        [Loss(EARLIER_REASONING, "message 2"), Loss(EARLIER_REASONING, "message 4")],
    ),
    "tools": (LOOP, row(ASK, TELL, tools=[TOOL]), [Loss("tools lost", "'f'"), Loss("tools lost", "'does it'")]),
    "a tool's description": (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + LOOP, row(ASK, TELL, tools=[TOOL]),
        [Loss("tools lost", "'does it'")],
    ),
    "the second tool": (
        "{{ (tools or [])[:1] | tojson }}" + LOOP, row(ASK, TELL, tools=[TOOL, {"name": "g"}]), [Loss("tools lost", "'g'")],
    ),
    "a parameter": (
        "{% for t in tools or [] %}{{ t.name }}{% endfor %}" + LOOP,
        row(ASK, TELL, tools=[{"name": "f", "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}}]),
        [Loss("tools lost", "'town'")],
    ),
    "the second call": (
        WITH_CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
        row(ASK, called(("x", "f"), ("y", "f")), given_by("x"), given_by("y"), TELL),
        [
            Loss(TOOL_REFERENCES, "message 2"), Loss("tool calls lost", "message 2: 'f'"),
            Loss("tool calls lost", "message 2: 'a'"), Loss("tool calls lost", "message 2: 'to y'"),
            Loss(TOOL_REFERENCES, "message 3"), Loss(TOOL_REFERENCES, "message 4"),
        ],
    ),
    "ids in order": (
        WITH_CALLS, row(ASK, called(("x", "f"), ("y", "g")), given_by("x", "f"), given_by("y", "g"), TELL),
        [Loss(TOOL_REFERENCES, f"message {n}") for n in (2, 3, 4)],
    ),
    "ids in another order": (
        WITH_CALLS, row(ASK, called(("x", "f"), ("y", "f")), given_by("y"), given_by("x"), TELL),
        [Loss(TOOL_REFERENCES, "message 2"), Loss("tool calls lost", "message 3: 'y'"), Loss("tool calls lost", "message 4: 'x'")],
    ),
    "another tool's name": (
        WITH_CALLS, row(ASK, called(("x", "f")), given_by("x", "g"), TELL),
        [Loss(TOOL_REFERENCES, "message 2"), Loss("name lost", "message 3: 'g'"), Loss(TOOL_REFERENCES, "message 3")],
    ),
    "the speaker's name": (LOOP, row({**ASK, "name": "Eve"}, TELL), [Loss("name lost", "message 1: 'Eve'")]),
    "a name that is written": (LOOP.replace("{{ m.role }}", "{{ m.role }}{{ ' ' + m.name if m.name }}"), row({**ASK, "name": "Eve"}, TELL), []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_a_template_leaves_out_is_found(case: str) -> None:
    text, conversation, losses = CASES[case]
    assert template(text).losses(conversation) == losses


@pytest.mark.parametrize(
    "text",
    [
        LOOP.replace("{{ m.content }}", "{{ m.content }}{{ m.content if m.content == 'Ask' }}"),
        LOOP.replace("in messages", "in messages[:1] + messages"),
        LOOP.replace("in messages", "in (messages if messages | length < 5 else messages[2:] + messages[:2])"),
    ],
)
def test_a_content_that_is_written_twice_or_out_of_its_place_is_refused(text: str) -> None:
    rows = [row(*[{"role": "user", "content": "Ask"}, TELL] * 3)]
    try:
        encoded = RowEncoder(tokenizer_with(text), max_len=999).encode(rows)
    except TokenizerError as error:  # also the test conversation
        assert "once, in order" in error.message
    else:
        assert encoded.bad[0].reason == "template cannot be cut"


WITH_REASONING = LOOP.replace("{{ m.content }}", "{{ m.reasoning_content or '' }}{{ m.content }}")
TWICE = {  # what is written twice, or out of its place: a template, and a conversation
    "reasoning": (
        WITH_REASONING.replace("{{ m.content }}", "{{ m.content }}{{ m.reasoning_content or '' }}"),
        row(ASK, {**TELL, "reasoning_content": "Why"}),
    ),
    "the reasoning of all answers first": (
        "{% for m in messages %}{{ m.reasoning_content or '' }}{% endfor %}" + LOOP,
        row(*[ASK, {**TELL, "reasoning_content": "Tell"}] * 2),
    ),
    "arguments": (
        WITH_CALLS.replace("{{ c.function.name }}", "{{ c.function.arguments | tojson }}{{ c.function.name }}"),
        row(ASK, called(("x", "f")), given_by("x"), TELL),
    ),
    "a system message": (
        LOOP.replace("{{ m.content }}", "{{ messages[0].content if messages[0].role == 'system' and not loop.first }}{{ m.content }}"),
        row({"role": "system", "content": "Ask"}, ASK, TELL),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TWICE)
def test_no_part_of_a_message_is_written_twice_or_out_of_its_place(case: str) -> None:
    """Texts that are equal to another, or part of it, are told apart."""
    text, conversation = TWICE[case]
    with pytest.raises(BadRow, match="is written twice, or out of its place"):
        template(text).segments(conversation)
    assert template(WITH_REASONING.replace("<|im_end|>", CALLS + "<|im_end|>")).segments(conversation)


@pytest.mark.parametrize("messages", [(ASK, SYSTEM, TELL), (ASK, TELL, SYSTEM, ASK, TELL)])
def test_a_template_may_write_system_messages_first(messages: tuple[dict[str, Any], ...]) -> None:
    """DeepSeek's does."""
    first = LOOP.replace(" %}", " if m.role == 'system' %}", 1) + LOOP.replace(" %}", " if m.role != 'system' %}", 1)
    segments = template(first).segments(row(*messages))
    assert "".join(segment.text for segment in segments).startswith("<|im_start|>system\nBe brief")
    assert sum("Tell" in segment.text and segment.is_trained for segment in segments) == len(messages) // 2


TEXT = st.text(st.sampled_from("ab <>/|é\n{}\"'\\"), max_size=9)
WORD = TEXT.filter(str.strip)
VALUE = st.recursive(WORD | st.integers() | st.none(), lambda one: st.lists(one, max_size=2) | st.dictionaries(WORD, one, max_size=2), max_leaves=4)  # fmt: skip
TOOLS = st.lists(st.fixed_dictionaries({"name": WORD, "description": WORD, "parameters": st.fixed_dictionaries({"properties": st.dictionaries(WORD, VALUE, max_size=2)})}), max_size=2)  # fmt: skip
CALL = st.fixed_dictionaries({"name": WORD, "arguments": st.dictionaries(WORD, VALUE, max_size=2)})
ANSWERS = st.builds(lambda content, reasoning, calls: Message("assistant", content, reasoning, tuple(calls)), WORD, st.none() | WORD, st.lists(CALL, max_size=2))  # fmt: skip
TURNS = st.lists(st.tuples(WORD.map(lambda text: Message("user", text)), ANSWERS), min_size=1, max_size=3)
WHOLE = (
    "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.reasoning_content or '' }}|{{ m.content }}|"
    "{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>\n{% endfor %}"
)


@cache
def whole() -> Template:
    return template(WHOLE)


@examples(100)
@given(turns=TURNS, tools=TOOLS)
def test_nothing_is_lost_where_everything_is_written(turns: list[tuple[Message, ...]], tools: list[Any]) -> None:
    conversation = Conversation(tuple(itertools.chain(*turns)), tuple(tools))
    assert whole().losses(conversation) == []


@examples(100)
@given(turns=TURNS, tools=TOOLS, data=st.data())
def test_each_string_that_a_template_does_not_write_is_lost(
    turns: list[tuple[Message, ...]], tools: list[Any], data: st.DataObject
) -> None:
    """Of a conversation with one more string than is written, this string is missing."""
    messages = list(itertools.chain(*turns))
    at = data.draw(st.integers(0, len(messages) - 1))
    only = data.draw(st.sampled_from(["content", "name", "tools"]))
    reason = {"content": "content lost", "name": "name lost", "tools": "tools lost"}[only]
    if only == "tools":
        tools = [*tools, {"name": "LOST"}]
        text = WHOLE.replace("tools |", "(tools or [])[:-1] |")
    elif only == "name":
        messages[at] = messages[at]._replace(name="LOST")
        text = WHOLE
    else:
        messages[at] = messages[at]._replace(content=messages[at].content.strip() + "LOST")
        text = WHOLE.replace("{{ m.content }}", "{{ m.content[:-4] if m.content[-4:] == 'LOST' else m.content }}")
    losses = template(text).losses(Conversation(tuple(messages), tuple(tools)))
    assert [loss.reason for loss in losses] == [reason] and "LOST" in losses[0].detail


# ---- --on-lost


@pytest.fixture
def pack_rows(tmp_path: Path) -> Any:
    """Packs rows of MiniMind-like data, of which some have reasoning that the template does not write."""

    def run(on_lost: str = "set-aside", out: str = "out", name: str = "era2") -> PackResult:
        answers = [{**TELL, "reasoning_content": "Why"} if n % 4 == 0 else TELL for n in range(12)]
        rows = [{"messages": [{**ASK, "content": f"Ask {n}"}, answer]} for n, answer in enumerate(answers)]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        return pack_with([path], tmp_path / out, tokenizer=eras.directory(name), max_len=64, on_lost=on_lost)

    return run


def test_rows_of_which_a_part_is_lost_are_set_aside_and_counted(pack_rows: Any, tmp_path: Path) -> None:
    packed = pack_rows()
    assert (packed.kept, packed.left_out, packed.not_written) == (9, {"reasoning lost": 3}, {})
    first = json.loads((tmp_path / "out" / "rejected" / "part-00000.jsonl").read_text().splitlines()[0])
    assert (first["line"], first["detail"]) == (1, "message 2 (assistant): 'Why'")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "on_lost" not in manifest["arguments"] and "not_written" not in manifest["totals"]


def test_they_are_packed_and_counted_with_warn_and_stop_with_fail(pack_rows: Any, tmp_path: Path) -> None:
    packed = pack_rows("warn")
    assert (packed.kept, packed.left_out, packed.not_written) == (12, {}, {"reasoning lost": 3})
    manifest = open_dataset(tmp_path / "out").manifest
    assert (manifest.arguments.on_lost, manifest.totals.not_written) == ("warn", {"reasoning lost": 3})
    assert json.loads((tmp_path / "out" / "stats.json").read_text())["not_written"] == {"reasoning lost": 3}
    assert not pack_rows("set-aside").up_to_date and pack_rows("set-aside").up_to_date
    with pytest.raises(InputError, match="line 1: reasoning lost") as caught:
        pack_rows("fail", out="other")
    assert "--on-lost set-aside" in caught.value.fix


def test_what_is_left_out_on_purpose_is_counted_with_the_rows_that_are_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(*[ASK, {**TELL, "reasoning_content": "Why"}] * 2), row(ASK, TELL)]
    encoded = RowEncoder(eras.tokenizer("qwen3"), max_len=99).encode(rows)
    assert (encoded.not_written, encoded.bad) == ({EARLIER_REASONING: 1}, {})
    path = tmp_path / "row.jsonl"
    path.write_text(json.dumps({"messages": [ASK, {**TELL, "reasoning_content": "Why"}] * 2}))
    show_file(path, ReadOptions(), 0, eras.directory("qwen3"), 64, False, False)
    assert "the chat template leaves out: earlier reasoning" in capsys.readouterr().out


def test_rows_of_roles_and_contents_alone_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the template writes of rows of this kind was learned from the first of them: the others are not rendered."""
    encoder = RowEncoder(eras.tokenizer("era3"), max_len=99)
    lines = [
        json.dumps({"messages": [ASK, {**TELL, **more}]}).encode() for more in ({}, {"weight": 1}, {"name": "Eve"})
    ]
    encoder.encode_lines(lines, "conversation")
    looked_at: list[Conversation] = []
    monkeypatch.setattr(Template, "losses", lambda self, conversation: looked_at.append(conversation) or [])
    encoder.encode_lines(lines, "conversation")
    assert [conversation.messages[1].name for conversation in looked_at] == ["Eve"]


# ---- weights


def trained(train_on: str, weights: list[int], name: str = "chatml") -> str:
    """The words that are trained: "q1" and "a1" are the first question and its answer."""
    said = [f"{'qa'[n % 2]}{n // 2 + 1}" for n in range(len(weights))]
    messages = [
        Message(("user", "assistant")[n % 2], text, weight=weight) for n, (text, weight) in enumerate(zip(said, weights, strict=True))
    ]  # fmt: skip
    rows = [Conversation(tuple(messages))]
    fast, reference = (RowEncoder(eras.tokenizer(name), max_len=999, train_on=train_on, is_reference=is_reference) for is_reference in (False, True))  # fmt: skip
    encoded = fast.encode(rows)
    assert is_equal(encoded.sequences, reference.encode(rows).sequences)
    if encoded.bad:
        return encoded.bad[0].reason
    (sequence,) = encoded.sequences
    assert isinstance(sequence, TokenSequence)
    text = fast.tokenizer.decode(sequence.ids[sequence.loss_mask == 1])
    return " ".join(word for word in said if word in text)


@pytest.mark.parametrize("name", ["chatml", "llama3", "marked", "era2"])
def test_messages_of_weight_0_are_not_trained(name: str) -> None:
    assert trained("assistant", [1, 1, 1, 1, 1, 1], name) == "a1 a2 a3"
    assert trained("assistant", [1, 0, 1, 1, 1, 0], name) == "a2"
    assert trained("assistant", [1, 0, 1, 0, 1, 0], name) == "no trained token"
    assert trained("last", [1, 1, 1, 1, 1, 0], name) == "a2"
    assert trained("last", [1, 0, 1, 0, 1, 1], name) == "a3"
    assert trained("all", [1, 0, 0, 1, 1, 0], name) == "q1 a2 q3"


def test_all_trains_headers_but_not_the_end_of_an_answer_of_weight_0() -> None:
    rows = [Conversation((Message("user", "q"), Message("assistant", "a", weight=0), Message("user", "r", weight=0), Message("assistant", "b")))]  # fmt: skip
    encoder = RowEncoder(eras.tokenizer("chatml"), max_len=99, train_on="all")
    (segments,) = encoder.segments(rows[0])
    assert "".join(f"[{s.text}]" if s.is_trained else s.text for s in segments).replace("][", "") == (
        "[<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n]a<|im_end|>\n[<|im_start|>user\n]r"
        "[<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n]"
    )


def test_weights_of_rows_are_read_and_are_part_of_their_hash() -> None:
    """`weight`, `train` and `loss` say the same; a row with other trained answers is another row."""
    keys: list[dict[str, Any]] = [{}, {"weight": 0}, {"train": False}, {"loss": 0}]
    lines = [json.dumps({"messages": [ASK, {**TELL, **more}, ASK, TELL]}).encode() for more in keys]
    encoded = RowEncoder(eras.tokenizer("era3"), max_len=99, seed=3).encode_lines(lines, "conversation")
    spans = [len(sequence.spans) for sequence in encoded.sequences if isinstance(sequence, TokenSequence)]
    assert (spans, encoded.bad) == ([2, 1, 1, 1], {})
    assert len({bytes(one) for one in encoded.hashes}) == 2


def test_a_pair_does_not_train_replies_of_weight_0() -> None:
    shared = (Message("user", "q"), Message("assistant", "a"), Message("user", "r"))
    sides = [Conversation((*shared, Message("assistant", said), Message("user", "s"), Message("assistant", "end", weight=weight))) for said, weight in (("yes", 0), ("no", 1))]  # fmt: skip
    (parts,) = RowEncoder(eras.tokenizer("chatml"), max_len=99).encode([Pair(*sides)]).sequences
    assert isinstance(parts, PairSequence)
    assert (len(parts.chosen_spans), len(parts.rejected_spans)) == (1, 2)


# ---- unknown characters


def lossy(model: Any, **parts: Any) -> Tokenizer:
    native = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(native, name, part)
    native.add_special_tokens(["</s>"])
    return Tokenizer(Path("t"), {"tokenizer.json": native.to_str().encode(), "tokenizer_config.json": b'{"eos_token": "</s>", "unk_token": "[UNK]"}'})  # fmt: skip


PIECES = ["[UNK]", "h", "##e", "he", "##l", "##o", "a", "e", "l", "o"]
VOCABULARY = {piece: n for n, piece in enumerate(PIECES)}
normalizers, pre_tokenizers, models = tokenizers.normalizers, tokenizers.pre_tokenizers, tokenizers.models
LOSSES = {
    "word pieces: a word with an unknown character is unknown": (
        lossy(models.WordPiece(VOCABULARY, unk_token="[UNK]"), pre_tokenizer=pre_tokenizers.Whitespace()), "hello hey é", 5,
    ),
    "unigram without byte fallback": (
        lossy(models.Unigram([("[UNK]", 0.0), ("h", -1.0), ("e", -1.0), (" ", -1.0)], 0, False)), "he é龘 h", 5,
    ),
    "BPE that drops what it does not know": (lossy(models.BPE({"h": 0, "e": 1}, [])), "hex é", 3),
    "BPE with an unknown token": (lossy(models.BPE({"[UNK]": 0, "h": 1}, [], unk_token="[UNK]")), "hé", 2),
    "a normalizer that drops accents and control characters": (
        lossy(
            models.BPE({"h": 0, "e": 1}, []),
            normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Replace("\u200b", "")]),
        ), "h\u200bé", 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOSSES)
def test_unknown_characters_are_counted_in_bytes(case: str) -> None:
    tokenizer, text, num_bytes = LOSSES[case]
    assert tokenizer.may_lose_text
    assert tokenizer.count_lost_bytes([text, "h"]) == num_bytes


def test_tokenizers_with_a_token_for_each_byte_lose_nothing() -> None:
    tokenizer = eras.tokenizer("chatml")
    assert not tokenizer.may_lose_text and tokenizer.count_lost_bytes(["\x00龘\u200b"]) == 0
    fallback = {f"<0x{n:02X}>": n for n in range(256)}
    with_bytes = lossy(models.BPE(fallback, [], byte_fallback=True), normalizer=normalizers.Replace(" ", "▁"))
    assert not with_bytes.may_lose_text
    assert lossy(models.BPE({**fallback, "x": 0}, [], byte_fallback=False)).may_lose_text
    del fallback["<0xFF>"]
    assert lossy(models.BPE(fallback, [], byte_fallback=True)).may_lose_text


def bert(root: Path) -> Path:
    """A tokenizer of word pieces for lower-case Latin letters, with a template of its own tokens."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789:"]
    vocabulary = {piece: n for n, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{one}" for one in letters)])}  # fmt: skip
    native = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    native.normalizer, native.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    native.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    root.mkdir()
    native.save(str(root / "tokenizer.json"))
    template = "{% for m in messages %}[CLS]{{ m.role + ': ' + m.content }}[SEP]{% endfor %}{% if add_generation_prompt %}[CLS]assistant: {% endif %}"
    config = {"eos_token": "[SEP]", "unk_token": "[UNK]", "bos_token": "[CLS]", "chat_template": template}
    (root / "tokenizer_config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize("kind", ["document", "conversation"])
def test_packing_warns_of_unknown_characters_and_refuses_many(kind: str, tmp_path: Path) -> None:
    notes: list[str] = []

    def pack(num_unknown: int, out: str, **options: Any) -> PackResult:
        texts = [f"water boils number {n}" + (" 龘龘" if n < num_unknown else "") for n in range(50)]
        rows = [
            {"text": text} if kind == "document" else {"messages": [ASK, {**TELL, "content": text}]} for text in texts
        ]
        path = tmp_path / f"{out}.jsonl"
        path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows))
        return pack_with([path], tmp_path / out, tokenizer=tmp_path / "bert", max_len=64, note=notes.append, **options)

    bert(tmp_path / "bert")
    assert (packed := pack(0, "none")).kept == 50 and packed.unknown_share is None and "unknown" not in str(notes)
    few = pack(1, "few")
    assert few.kept == 50 and few.unknown_share and 0.001 < few.unknown_share < 0.01
    figures = measure_file(tmp_path / "few.jsonl", tmp_path / "bert").figures
    assert figures["unknown_bytes"] / figures["text_bytes"] == few.unknown_share
    assert any(one["code"] == "unknown characters" for one in figures["warnings"])
    validated = validate(
        tmp_path / "few.jsonl", encode=RowEncoder(Tokenizer.load(tmp_path / "bert"), max_len=64).encode
    )
    assert validated.num_good == 50 and validated.unknown_bytes / validated.text_bytes == few.unknown_share
    planned = estimate([tmp_path / "few.jsonl"], PackOptions(tokenizer=tmp_path / "bert"))
    assert [one.unknown_share for one in planned.outlooks] == [few.unknown_share] * len(planned.outlooks)
    assert any("does not know 6 of" in note for note in notes)
    with pytest.raises(TokenizerError, match="does not know 300 of") as caught:
        pack(50, "many")
    assert "--allow-unknown" in caught.value.fix and not (tmp_path / "many").exists()
    packed = pack(50, "many", allow_unknown=True)
    assert (packed.kept, packed.left_out) == (50, {})
    figures = json.loads((tmp_path / "many" / "stats.json").read_text())
    assert figures["unknown_bytes"] == 300 and figures["unknown_bytes"] / figures["text_bytes"] == packed.unknown_share
    assert "text_bytes" not in json.loads((tmp_path / "none" / "manifest.json").read_text())["arguments"]
