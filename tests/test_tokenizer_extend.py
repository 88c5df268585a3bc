"""A few tokens more: after the last id, or in the places of reserved ones; everything else means what it meant."""

import json
from pathlib import Path

import eras
import pytest
import text_data

from mmdata.errors import UsageError
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit.extend import extend

TEXT = "river 你好 <|tool|> <|buffer1|> 12"


@pytest.fixture
def base(tmp_path: Path) -> Tokenizer:
    return text_data.trained(tmp_path)


def test_tokens_follow_the_last_id_and_nothing_else_changes(base: Tokenizer, tmp_path: Path) -> None:
    assert extend(base.dir, ["<|tool|>", "<tag>"], tmp_path / "out") == {"<|tool|>": 420, "<tag>": 421}
    found = Tokenizer.load(tmp_path / "out")
    old, _ = base.encode_batch([TEXT.replace("<|tool|>", "")])
    new, _ = found.encode_batch([TEXT.replace("<|tool|>", "")])
    assert old.tolist() == new.tolist()
    assert 420 in found.encode_batch([TEXT])[0]  # plain: text becomes it
    assert found.control_tokens == base.control_tokens and found.chat_template == base.chat_template


def test_control_tokens_are_never_text(base: Tokenizer, tmp_path: Path) -> None:
    extend(base.dir, ["<|tool|>"], tmp_path / "out", is_control=True)
    found = Tokenizer.load(tmp_path / "out")
    assert found.control_tokens["<|tool|>"] == 420
    assert 420 not in found.encode_batch([TEXT])[0] and 420 in found.encode_batch([TEXT], control=True)[0]


def test_transformers_gives_the_added_tokens_the_same_ids(base: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    extend(base.dir, ["<|tool|>", "<tag>"], tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "a<tag> <|tool|>你"
    assert (
        theirs(text, add_special_tokens=False).input_ids
        == Tokenizer.load(tmp_path / "out").encode_batch([text])[0].tolist()
    )
    assert theirs.convert_tokens_to_ids(["<|tool|>", "<tag>", "<think>"]) == [420, 421, 25]


def test_reserved_places_are_taken_and_nothing_grows(base: Tokenizer, tmp_path: Path) -> None:
    assert extend(base.dir, ["<|a|>", "<|b|>"], tmp_path / "out", reserved=True) == {"<|a|>": 27, "<|b|>": 28}
    found = Tokenizer.load(tmp_path / "out")
    assert found.vocab_size == base.vocab_size
    assert found.native.token_to_id("<|buffer1|>") is None and found.native.token_to_id("<|buffer3|>") == 29
    assert found.encode_batch(["<|a|>river"])[0].tolist() == [27, *base.encode_batch(["river"])[0].tolist()]
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"]["27"]["content"] == "<|a|>"


def test_a_tokenizer_of_another_make_is_extended_too(tmp_path: Path) -> None:
    old = eras.tokenizer("llama3")
    (id,) = extend(old.dir, ["<new>"], tmp_path / "out").values()
    assert id == old.vocab_size == Tokenizer.load(tmp_path / "out").vocab_size - 1


@pytest.mark.parametrize(
    ("tokens", "reserved", "words"),
    [
        ([], False, "no token to add"),
        (["<think>"], False, "has it already, with id 25"),
        (["a", "a"], False, "given twice"),
        ([" "], False, "empty"),
        ([f"<{n}>" for n in range(10)], True, "has 9 reserved tokens, 10 are to be placed"),
    ],
)
def test_tokens_that_cannot_be_added_are_refused(
    base: Tokenizer, tmp_path: Path, tokens: list[str], reserved: bool, words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        extend(base.dir, tokens, tmp_path / "out", reserved=reserved)
    assert words in caught.value.message and caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_directory_that_holds_something_is_left_alone(base: Tokenizer) -> None:
    with pytest.raises(UsageError, match="is not empty"):
        extend(base.dir, ["<x>"], base.dir)
