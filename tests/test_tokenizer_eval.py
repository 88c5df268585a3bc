"""Figures of tokenizers, told by counting by hand on small text."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import text_data

from mmdata.tokenizer.hostile import hostile_strings
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit.evaluate import EmbeddingShare, RoundTrip, Shape, evaluate
from mmdata.tokenizer.toolkit.sample import draw
from mmdata.tokenizer.vocabulary import token_texts

SHAPES = {"small": Shape(64, 10_000)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(scope="module")
def both(root: Path) -> list[Tokenizer]:
    return [text_data.trained(root), text_data.trained(root, vocab_size=500)]


def test_every_token_is_counted_once_by_language_and_by_file(root: Path, both: list[Tokenizer]) -> None:
    files = list(text_data.make(root / "again").values())
    corpus = draw(files, limit_bytes=10**9)
    ticks: list[tuple[int, int]] = []
    found = evaluate(both, corpus, shapes=SHAPES, step_tokens=100, progress=lambda *now: ticks.append(now))
    texts = [text for _, each in corpus.groups() for text in each]
    assert found.text.bytes == sum(len(text.encode()) for text in texts)
    assert ticks[-1] == (2 * found.text.bytes,) * 2
    for one, tokenizer in zip(found.tokenizers, both, strict=True):
        ids = tokenizer.encode_batch(texts)[0]
        assert one.tokens == len(ids) == sum(group.tokens for group in one.by_language.values())
        assert one.tokens == sum(group.tokens for group in one.by_file.values())
        assert one.bytes_per_token == pytest.approx(found.text.bytes / len(ids))
        assert one.characters_per_token == pytest.approx(sum(map(len, texts)) / len(ids))
        used = set(ids.tolist())
        assert one.vocab_used == len(used)
        ordinary = set(range(tokenizer.vocab_size)) - set(tokenizer.added)
        assert one.never_used == len(ordinary - used)
        assert one.glitch_prone + one.never_used_bytes == one.never_used
        assert one.vocab_used_share == pytest.approx(len(ordinary & used) / len(ordinary))
        assert one.round_trip == RoundTrip(len(texts), 0, 1000, 0, [])
    assert set(found.tokenizers[0].by_language) == {"Chinese", "English", "code"}
    assert found.tokenizers[1].bytes_per_token > found.tokenizers[0].bytes_per_token
    json.dumps(asdict(found))


def test_words_and_chinese_characters_are_encoded_on_their_own(tmp_path: Path, both: list[Tokenizer]) -> None:
    path = text_data.write(tmp_path / "a.jsonl", [{"text": "river stone, 公园散步"}, {"text": "river 公园"}])
    (one,) = evaluate(both[:1], draw([path], limit_bytes=10**6), shapes={}, step_tokens=1).tokenizers

    def count(text: str) -> int:
        return len(both[0].encode_batch([text])[0])

    assert one.tokens_per_word == pytest.approx((2 * count("river") + count(" stone")) / 3)
    assert one.tokens_per_chinese_character == pytest.approx((count("公园散步") + count("公园")) / 6)


def test_text_without_words_has_no_figure_for_them(tmp_path: Path, both: list[Tokenizer]) -> None:
    path = text_data.write(tmp_path / "a.jsonl", [{"text": "公园散步"}])
    (one,) = evaluate(both[:1], draw([path], limit_bytes=10**6), shapes={}, step_tokens=1).tokenizers
    assert one.tokens_per_word is None and one.tokens_per_chinese_character > 0


def test_single_bytes_of_characters_are_told_from_plain_letters(tmp_path: Path, both: list[Tokenizer]) -> None:
    path = text_data.write(
        tmp_path / "a.jsonl", [{"text": "魑Q"}]
    )  # never seen in training: three lone bytes, a letter
    (one,) = evaluate(both[:1], draw([path], limit_bytes=10**6), shapes={}, step_tokens=1).tokenizers
    texts = token_texts(both[0])
    lone = [
        id for id in both[0].encode_batch(["魑Q"])[0] if len(texts[id] or b"") == 1 and (texts[id] or b"")[0] >= 0x80
    ]
    assert one.byte_fallback_share == pytest.approx(len(lone) / one.tokens) and lone


def test_what_a_vocabulary_means_for_models_and_steps(root: Path, both: list[Tokenizer]) -> None:
    path = text_data.write(root / "b.jsonl", [{"text": "river stone"}])
    one, other = evaluate(both, draw([path], limit_bytes=10**6), shapes=SHAPES, step_tokens=1000).tokenizers
    assert one.embedding["small"] == EmbeddingShare(420 * 64, 26_880 / 36_880, 36_880)
    assert one.tokens_per_gigabyte == round(1e9 / one.bytes_per_token)
    assert other.steps_per_gigabyte == round(other.tokens_per_gigabyte / 1000)


def test_a_tokenizer_that_changes_text_is_found_out(tmp_path: Path, both: list[Tokenizer]) -> None:
    parts = json.loads(both[0].files["tokenizer.json"]) | {"normalizer": {"type": "Lowercase"}}
    lossy = Tokenizer(tmp_path, both[0].files | {"tokenizer.json": json.dumps(parts).encode()})
    path = text_data.write(tmp_path / "a.jsonl", [{"text": "River"}, {"text": "stone"}])
    (one,) = evaluate([lossy], draw([path], limit_bytes=10**6), shapes={}, step_tokens=1).tokenizers
    assert one.round_trip.texts_changed == 1 and one.round_trip.hostile_changed > 100
    assert one.round_trip.examples


def test_hostile_strings_follow_from_their_seed_and_hold_control_strings_whole_and_torn() -> None:
    first, again, other = (list(hostile_strings(500, seed=seed, tokens=["<|im_end|>"])) for seed in (1, 1, 2))
    assert first == again != other
    joined = "".join(first)
    assert "<|im_end|>" in joined and "<|im_end|" in joined.replace("<|im_end|>", "")
    assert all(text.encode() for text in first)
