"""A dataset of pairs is held against itself before anything is trained on it."""

import json
from pathlib import Path
from typing import Any

from train_data import CONTROL

from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack
from mmdata.shards.checks import figures_of_pairs, pair_lines
from mmdata.shards.dataset import Dataset, open_dataset
from mmdata.tokenizer.tokenizer import CHATML, train_bpe


def packed(tmp_path: Path, pairs: list[tuple[str, str, str]], **options: Any) -> Dataset:
    """Pairs of prompt, chosen, rejected."""
    rows = [
        {
            side: [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
            for side, reply in (("chosen", chosen), ("rejected", rejected))
        }
        for prompt, chosen, rejected in pairs
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = (text for pair in pairs for text in pair)
    train_bpe(texts, vocab_size=270, control_tokens=CONTROL, chat_template=CHATML, out_dir=tmp_path / "tokenizer")
    options = {"max_len": 64, "val_fraction": 0.0, "tokenizer": tmp_path / "tokenizer"} | options
    pack([tmp_path / "rows.jsonl"], tmp_path / "dpo", PackOptions(**options))
    return open_dataset(tmp_path / "dpo")


def test_counts_are_those_of_the_rows(tmp_path: Path) -> None:
    pairs = [
        ("a?", "yes it is", "no"),
        ("b?", "yes", "nooooo it is not"),
        ("a?", "yes", "not"),
        ("c?", "0123456789" * 30, "yes"),
    ]
    found = figures_of_pairs([packed(tmp_path, pairs)])
    assert (found.num_pairs, found.rows, found.left_out) == (3, 4, {"too long": 1})
    assert found.duplicate_prompts == 1 and found.equal_replies == 0 and found.longer in (1 / 3, 0.5)
    said = pair_lines(found)
    assert "left out of 4 rows: 1 (1 too long)" in said[0] and "seen before: 1" in said[0]
    assert any("25% of the rows were left out" in line and "--max-len" in line for line in said)
    assert any("33% of the pairs repeat" in line for line in said)


def test_a_length_bias_is_warned_of_with_the_option_that_helps(tmp_path: Path) -> None:
    pairs = [(f"{number}?", "a long and winding answer", "no") for number in range(8)]
    found = figures_of_pairs([packed(tmp_path, pairs)])
    assert found.longer == 1 and found.mean_chosen > found.mean_rejected
    assert any("longer in 100%" in line and "sigmoid_norm" in line for line in pair_lines(found))


def test_prompts_on_both_sides_of_the_split_are_counted(tmp_path: Path) -> None:
    pairs = [("same?", f"yes {number}", "no") for number in range(40)]
    found = figures_of_pairs([packed(tmp_path, pairs, val_fraction=0.3)])
    assert found.val_prompts > 0 and any("val accuracy flatters" in line for line in pair_lines(found))


def test_nothing_is_warned_of_where_nothing_is_wrong(tmp_path: Path) -> None:
    pairs = [(f"{n}?", *(("yes it is", "no") if n % 2 else ("no", "yes it is"))) for n in range(10)]
    assert len(pair_lines(figures_of_pairs([packed(tmp_path, pairs)]))) == 1
