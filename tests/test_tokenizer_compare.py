"""Two tokenizers on the same text, and whether a model trained with the one may read shards of the other."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import text_data

from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit.compare import IdPair, compare
from mmdata.tokenizer.toolkit.extend import extend
from mmdata.tokenizer.toolkit.sample import TextSample, draw


@pytest.fixture
def corpus(tmp_path: Path) -> TextSample:
    return draw(list(text_data.make(tmp_path / "text").values()), limit_bytes=20_000)


def test_a_tokenizer_may_read_its_own_shards(tmp_path: Path, corpus: TextSample) -> None:
    one = text_data.trained(tmp_path)
    found = compare(one, one, corpus)
    assert found.may_read and found.answer.startswith("Yes: ") and "the same file" in found.answer
    assert found.texts_split_alike == found.texts and found.words_split_differently == 0 and not found.examples
    assert found.shared_tokens == found.same_ids == 420


def test_another_vocabulary_may_not_and_shows_where_it_splits_differently(tmp_path: Path, corpus: TextSample) -> None:
    one, other = text_data.trained(tmp_path), text_data.trained(tmp_path, template="chatml", pattern="gpt2")
    found = compare(one, other, corpus)
    assert not found.may_read and found.answer.startswith("No: ") and "mm pack FILE --tokenizer" in found.answer
    assert found.same_ids < found.shared_tokens < 420
    assert found.first_differing_ids[0] == IdPair(3, "<|object_ref_start|>", "!")
    assert found.control_tokens["only_a"][0] == "<|object_ref_start|>" and found.control_tokens["only_b"] == []
    assert 0 < found.words_split_differently < 1
    for example in found.examples:
        assert example.a != example.b and "".join(example.a) == "".join(example.b) == example.text
    texts = [text for _, each in corpus.groups() for text in each]
    assert found.tokens == [len(each.encode_batch(texts)[0]) for each in (one, other)]
    json.dumps(asdict(found))


def test_an_extended_one_may_after_growing_and_the_other_way_as_it_is(tmp_path: Path, corpus: TextSample) -> None:
    base = text_data.trained(tmp_path)
    extend(base.dir, ["<new>"], tmp_path / "more")
    more = Tokenizer.load(tmp_path / "more")
    grown = compare(base, more, corpus)
    assert not grown.may_read and "has 1 more" in grown.answer and "--resize-embeddings" in grown.answer
    assert compare(more, base, corpus).may_read


def test_tokens_in_reserved_places_are_an_extension_too(tmp_path: Path, corpus: TextSample) -> None:
    base = text_data.trained(tmp_path)
    extend(base.dir, ["<new>"], tmp_path / "placed", reserved=True)
    found = compare(base, Tokenizer.load(tmp_path / "placed"), corpus)
    assert "has 1 more" in found.answer and found.first_differing_ids == [IdPair(27, "<|buffer1|>", "<new>")]


def test_ids_past_the_models_are_said(tmp_path: Path, corpus: TextSample) -> None:
    base, wider = text_data.trained(tmp_path), text_data.trained(tmp_path, vocab_size=430)
    assert compare(wider, base, corpus).answer.endswith("though it has seen text split differently.")
    assert "has 10 more" in compare(base, wider, corpus).answer


def test_renamed_control_tokens_are_told_from_another_vocabulary(tmp_path: Path, corpus: TextSample) -> None:
    base = text_data.trained(tmp_path)
    files = {
        name: content.replace(b"<|im_start|>", b"<s>").replace(b"<|im_end|>", b"</s>")
        for name, content in base.files.items()
    }
    found = compare(base, Tokenizer(tmp_path / "seed", files), corpus)
    assert not found.may_read and "2 control tokens are named differently (<|im_start|> is <s>" in found.answer
    assert found.texts_split_alike == found.texts
