"""Vocabularies as bytes, legible, and compared id by id."""

from pathlib import Path

import eras
import pytest
import text_data

from mmdata.errors import TokenizerError
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit.extend import extend
from mmdata.tokenizer.vocabulary import added_ids, byte_of, legible, relate, token_texts


def test_the_byte_table_is_the_librarys() -> None:
    from tokenizers import pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "".join(map(chr, [*range(0x20), *range(0x7F, 0x800), 0x4F60, 0x1F600])) + "plain text"
    ((shown, _),) = level.pre_tokenize_str(text)
    assert bytes(byte_of()[char] for char in shown) == text.encode()
    assert sorted(byte_of()) == sorted(pre_tokenizers.ByteLevel.alphabet()) and len(set(byte_of().values())) == 256


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ("你好".encode(), "你好"),
        (b" the", "␣the"),
        (b"\n\t\r", "⏎⇥␍"),
        ("你".encode()[:2], "‹e4 bd›"),
        ("你".encode()[1:] + b"a", "‹bd a0›a"),
        ("好".encode() + "你".encode()[:1], "好‹e4›"),
        (b"\x00", "‹U+0000›"),
        ("\u200b".encode(), "‹U+200B›"),
        ("🇨🇳".encode(), "🇨🇳"),
        (b"\xff\xfe", "‹ff fe›"),
        (b"\xed\xa0\x80", "‹ed a0 80›"),  # half a surrogate pair is no character
        (b"", ""),
    ],
)
def test_bytes_are_shown_as_characters_where_they_form_any(data: bytes, shown: str) -> None:
    assert legible(data) == shown


def test_tokens_of_a_text_join_to_its_bytes() -> None:
    tokenizer = eras.tokenizer("era3")
    texts = token_texts(tokenizer)
    assert len(texts) == tokenizer.vocab_size
    for text in ("Hello 你好\n\n🙂 <think>", "\x00é"):
        assert b"".join(texts[id] or b"" for id in tokenizer.encode_batch([text])[0]) == text.encode()
    assert texts[tokenizer.control_tokens["<|im_end|>"]] == b"<|im_end|>"


def test_relations_of_the_same_an_extended_and_another_vocabulary(tmp_path: Path) -> None:
    base = text_data.trained(tmp_path)
    extend(base.dir, ["<|one|>", "<two>"], tmp_path / "more")
    more, other = Tokenizer.load(tmp_path / "more"), text_data.trained(tmp_path, vocab_size=430)
    same, grown, shrunk = relate(base, base), relate(base, more), relate(more, base)
    assert same.b_is_readable and not same.b_extends_a and same.is_split_alike
    assert grown.b_extends_a and not grown.b_is_readable and (grown.size_a, grown.size_b) == (420, 422)
    assert shrunk.b_is_readable and not shrunk.b_extends_a
    assert added_ids(base, more) == (420, 421) and added_ids(base, base) == ()
    assert added_ids(base, other) == tuple(
        range(420, 430)
    )  # trained further on the same text: the first merges are the same
    assert not relate(base, other).is_split_alike


def test_reserved_places_may_be_taken_and_not_given_back(tmp_path: Path) -> None:
    base = text_data.trained(tmp_path)
    extend(base.dir, ["<|one|>"], tmp_path / "placed", reserved=True)
    placed = Tokenizer.load(tmp_path / "placed")
    there, back = relate(base, placed), relate(placed, base)
    assert there.b_extends_a and not there.b_is_readable and there.placed == (27,) and there.is_split_alike
    assert added_ids(base, placed) == (27,)
    assert back.differing == (27,) and not back.b_is_readable and not back.b_extends_a


def test_what_is_no_extension_is_refused(tmp_path: Path) -> None:
    base, wider = text_data.trained(tmp_path), text_data.trained(tmp_path, template="chatml")
    with pytest.raises(TokenizerError, match=r"does not extend .*: 4\d\d of its ids are other tokens"):
        added_ids(base, wider)
    with pytest.raises(TokenizerError, match="it has 430 ids, the other only 420"):
        added_ids(text_data.trained(tmp_path, vocab_size=430), base)
