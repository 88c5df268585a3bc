"""Rows with something odd in them (fixtures/odd_rows.tsv): what each says is rendered, or counted by a name."""

import re
from collections import Counter
from pathlib import Path

import endings
import eras
import pytest

from mmdata.encode.encoder import RowEncoder, preview
from mmdata.encode.rows import BadRow, kind_of, parse_row
from mmdata.tokenizer.tokenizer import Tokenizer

LINES = (Path(__file__).parent / "fixtures" / "odd_rows.tsv").read_text(encoding="utf-8").splitlines()[1:]
ROWS = [line.split("\t", 2) for line in LINES]  # what becomes of it, what is odd, the row; said words are W1, W2, …
SAID = re.compile(r"W\d+")


@pytest.mark.parametrize(("expected", "row"), [(e, row) for e, _, row in ROWS], ids=[odd for _, odd, _ in ROWS])
def test_an_odd_row_is_read_ignored_in_part_or_left_out(expected: str, row: str) -> None:
    ignored: Counter[str] = Counter()
    try:
        parse_row(row.encode(), extra_keys=ignored)
        found = f"ignores {', '.join(sorted(ignored))}" if ignored else "-"
    except BadRow as bad:
        found = bad.reason
    assert found == expected


@pytest.mark.parametrize(
    "tokenizer",
    [eras.tokenizer("era3"), eras.tokenizer("llama3"), eras.tokenizer("seed"), endings.tokenizer("named")],
    ids=["era3", "llama3", "seed", "named"],
)
def test_no_word_of_an_odd_row_vanishes(tokenizer: Tokenizer) -> None:
    encoder = RowEncoder(
        tokenizer, max_len=4096, is_reference=True
    )  # test_encoding_ways.py: the fast way gives the same
    whole = 0
    for expected, odd, row in ROWS:
        if expected != "-" and not expected.startswith("ignores "):
            continue
        shown = preview(row.encode(), encoder, kind_of(parse_row(row.encode())))
        text = "".join(segment.text for side in shown.segments for segment in side)
        missing = set(SAID.findall(row)) - set(SAID.findall(text))
        counted = shown.bad or shown.encoded.not_written or shown.encoded.extra_keys
        assert not missing or counted, (odd, missing)
        whole += not missing
    assert whole > 20
