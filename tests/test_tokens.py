"""What tokens come to, against a count in plain Python over the rows of a packed dataset."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmdata.pack.pipeline import PackResult
from mmdata.shards.dataset import open_dataset, source_rows
from mmdata.stats.scan import scan_shards
from mmdata.stats.tokens import Vocabulary, token_pieces
from mmdata.tokenizer.scripts import SCRIPTS
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.vocabulary import token_bytes


@pytest.mark.parametrize("kind", ["document", "conversation", "pair"])
def test_counts_are_those_of_every_row(packed: dict[str, PackResult], kind: str) -> None:
    dataset = open_dataset(packed[kind].out)
    tally = scan_shards(dataset, Vocabulary(Tokenizer.load(dataset.tokenizer_dir)))
    vocabulary: Counter[int] = Counter()
    trained = 0
    for row in source_rows(dataset):
        for name in ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids"):
            vocabulary.update(row.get(name, ()))
        trained += sum(sum(row.get(name, ())) for name in ("loss_mask", "chosen_mask", "rejected_mask"))
    assert tally.sums["tokens"] == vocabulary.total() == packed[kind].tokens
    assert tally.sums["loss_tokens"] == trained == packed[kind].loss_tokens
    assert {id: n for id, n in enumerate(tally.arrays["vocabulary"].tolist()) if n} == vocabulary
    assert tally.arrays["token scripts"][:, 0].sum() == tally.sums["tokens"]
    assert tally.arrays["trained shares"].sum() == tally.sums["sequences"] * (2 if kind == "pair" else 1)


def test_messages_are_measured_by_role_and_turn(packed: dict[str, PackResult]) -> None:
    dataset = open_dataset(packed["conversation"].out)
    tokenizer = Tokenizer.load(dataset.tokenizer_dir)
    tally = scan_shards(dataset, Vocabulary(Tokenizer.load(dataset.tokenizer_dir)))
    by_role: dict[str, Counter[int]] = {}
    by_turn: dict[int, Counter[int]] = {}
    begin = tokenizer.control_tokens["<|im_start|>"]
    for row in source_rows(dataset):
        starts = [at for at, id in enumerate(row["input_ids"]) if id == begin]
        turn = 0
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            role = tokenizer.decode(row["input_ids"][start + 1 : end]).split("\n")[0]
            by_role.setdefault(role, Counter())[end - start] += 1
            if role == "assistant":
                turn += 1
                by_turn.setdefault(turn, Counter())[end - start] += 1
    messages = tally.frame("messages")
    for key, counts in (("role", by_role), ("turn", by_turn)):
        assert set(messages[key].drop_nulls()) == set(counts)
        for value, lengths in counts.items():
            assert Counter(messages.filter(messages[key] == value)["tokens"].to_list()) == lengths


def test_characters_and_bytes_of_scripts_are_those_of_the_text(packed: dict[str, PackResult]) -> None:
    dataset = open_dataset(packed["document"].out)
    tokenizer = Tokenizer.load(dataset.tokenizer_dir)
    text = "".join(tokenizer.decode(row["input_ids"], skip_control=True) for row in source_rows(dataset))
    tally = scan_shards(dataset, Vocabulary(Tokenizer.load(dataset.tokenizer_dir)))
    assert tally.arrays["token scripts"][:, 1].sum() == len(text)
    assert tally.arrays["token scripts"][:, 2].sum() == len(text.encode())
    han = tally.arrays["token scripts"][SCRIPTS.index("han")]
    number = sum("\u4e00" <= c <= "\u9fff" for c in text)
    assert number <= han[1] <= number + text.count(" ")  # a token of a word may hold the space before it


def test_pieces_join_to_what_decoding_gives(tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_dir)
    pieces = token_pieces(tokenizer)
    for text in ("灯塔 harbour 😀 é\n\t", "a  b", "\u200f\u05d0"):
        ids = tokenizer.encode_batch([text])[0].tolist()
        assert b"".join(pieces[id] for id in ids).decode() == text
    assert [len(piece) for piece in pieces] == token_bytes(tokenizer).tolist()
    known = Vocabulary(tokenizer)
    assert np.array_equal(np.flatnonzero(known.control), sorted(tokenizer.control_tokens.values()))


@pytest.mark.parametrize("kind", ["document", "pair"])
def test_a_share_of_the_shards_is_a_sample(packed: dict[str, PackResult], kind: str) -> None:
    dataset = open_dataset(packed[kind].out)
    tally = scan_shards(dataset, Vocabulary(Tokenizer.load(dataset.tokenizer_dir)), share=0.3)
    assert 0 < tally.sums["tokens"] <= packed[kind].tokens
