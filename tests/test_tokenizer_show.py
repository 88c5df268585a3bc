"""Text by token and vocabularies, legible."""

from pathlib import Path

import pytest
import text_data

from mmdata.errors import UsageError
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.vocabulary import list_tokens, split_text


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return text_data.trained(tmp_path)


def test_a_text_is_shown_by_token_with_ids_and_bytes(tokenizer: Tokenizer) -> None:
    text = " river\n公园 12"
    found = split_text(tokenizer, text)
    assert [entry.id for entry in found] == tokenizer.encode_batch([text])[0].tolist()
    assert b"".join(bytes.fromhex(entry.bytes) for entry in found) == text.encode()
    assert "⏎" in [entry.text for entry in found] and [entry.text for entry in found[-2:]] == ["1", "2"]


def test_a_character_that_several_tokens_share_is_named_with_each(tokenizer: Tokenizer) -> None:
    found = split_text(tokenizer, "a魑魅")
    torn = [entry for entry in found if "‹" in entry.text]
    assert found[0].text == "a" and not found[0].note
    assert len(torn) >= 4 and all("part of 魑" in entry.note or "part of 魅" in entry.note for entry in torn)


def test_control_strings_are_text_unless_asked_for(tokenizer: Tokenizer) -> None:
    assert len(split_text(tokenizer, "<|im_end|>")) > 1
    (entry,) = split_text(tokenizer, "<|im_end|>", control=True)
    assert (entry.id, entry.text, entry.note) == (2, "<|im_end|>", "control")
    assert split_text(tokenizer, "<think>")[0].note == "added"
    assert split_text(tokenizer, "") == []


def test_a_stretch_of_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert [entry.id for entry in list_tokens(tokenizer, 416, 100)] == [416, 417, 418, 419]
    assert list_tokens(tokenizer, 2, 1)[0].text == "<|im_end|>"
    found = list_tokens(tokenizer, 0, 5, find="公")
    assert found and all("公" in entry.text for entry in found)


@pytest.mark.parametrize(("begin", "count"), [(420, 1), (-1, 1), (0, 0)])
def test_a_stretch_that_is_not_there_is_refused(tokenizer: Tokenizer, begin: int, count: int) -> None:
    with pytest.raises(UsageError, match="has ids 0 to 419"):
        list_tokens(tokenizer, begin, count)
