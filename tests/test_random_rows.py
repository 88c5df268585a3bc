"""Random rows in every schema: none crashes, each is kept or has a reason, and nothing that a kept row says is lost."""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import eras
import numpy as np
import pytest
from schema_rows import PIECES, Maker, RandomRow, rows
from test_columns import assert_same

from mmdata.encode.columns import read_lines
from mmdata.encode.encoder import EncodedRows, RowEncoder
from mmdata.encode.rows import HELP, LEFT_OUT, LOST, BadRow, Columns, kind_of, parse_row, row_hash, texts_of
from mmdata.encode.sequences import PairSequence
from mmdata.tokenizer.tokenizer import Tokenizer

SIZES = [pytest.param(500, 1, id="500"), pytest.param(20_000, 2, id="20000", marks=pytest.mark.slow)]
KINDS = ("document", "conversation", "pair")
OF_TEMPLATES = LOST | {"template refuses", "template cannot be cut", "chosen equal to rejected", "no trained token"}
SAME = Columns({"loss": "loss"})  # says nothing new, but is not the default: rows with one key take no shortcut


def parsed(raw: bytes, kind: str | None = None, columns: Columns | None = None) -> tuple[Any, Counter[str]]:
    """The row or the reason, and the keys that are ignored."""
    keys: Counter[str] = Counter()
    try:
        return parse_row(raw, kind, extra_keys=keys, **({"columns": columns} if columns else {})), keys
    except BadRow as bad:
        assert bad.reason in HELP and not keys
        return str(bad), keys


@pytest.mark.parametrize(("number", "seed"), SIZES)
def test_rows_are_read_whole_or_refused_by_a_reason(number: int, seed: int) -> None:
    reasons: Counter[str] = Counter()
    for one in rows(number, seed):
        found, keys = parsed(one.raw)
        assert (found, keys) == parsed(one.raw, columns=SAME)
        if isinstance(found, str):
            assert one.is_mutated, (found, one.row)
            reasons[found.partition(":")[0]] += 1
            continue
        assert parsed(one.raw, kind_of(found)) == (found, keys) and len(row_hash(found)) == 32
        if not one.is_mutated:
            assert kind_of(found) == one.kind, one.row
            texts = list(texts_of(found))
            for said in one.said:
                assert any(
                    said.strip() in text or json.dumps(said, ensure_ascii=False)[1:-1] in text for text in texts
                ), (said, one.row)
            assert set(one.unknown) <= keys.keys()
    assert len(reasons) >= 8 and 0.1 * number < reasons.total() < 0.4 * number


def once_for_each(encode: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """The function, which gives what it gave before for a row and its second argument that it was given before."""
    known: dict[str, Any] = {}

    def encoded(rows: Sequence[Any], keeps: Sequence[bool]) -> list[Any]:
        keys = [repr(one) for one in zip(rows, keeps, strict=True)]
        new = [i for i, key in enumerate(keys) if key not in known]
        known.update(zip([keys[i] for i in new], encode([rows[i] for i in new], [keeps[i] for i in new]), strict=True))
        return [known[key] for key in keys]

    return encoded


def rendered(encoded: EncodedRows, row: int, tokenizer: Tokenizer) -> tuple[str, str]:
    """The text of a row's sequences, and that of its trained tokens."""
    ends = np.cumsum(encoded.num_sequences)
    texts, trained = [], []
    for i in range(int(ends[row] - encoded.num_sequences[row]), int(ends[row])):
        one = encoded.sequences[i]
        if isinstance(one, PairSequence):
            sides = ((one.prompt, np.empty((0, 2))), (one.chosen, one.chosen_spans), (one.rejected, one.rejected_spans))
        else:
            sides = ((one.ids, one.spans),)
        for ids, spans in sides:
            texts.append(tokenizer.decode(ids.tolist()))
            trained += [tokenizer.decode(ids[int(begin) : int(end)].tolist()) for begin, end in spans]
    return "\n".join(texts), "\n".join(trained)


@pytest.mark.parametrize("template", ["chatml", "era3", "qwen3", "llama3"])
@pytest.mark.parametrize(("number", "seed"), SIZES)
def test_what_a_kept_row_says_is_in_its_tokens_once_and_trained_as_it_says(
    number: int, seed: int, template: str
) -> None:
    tokenizer = eras.tokenizer(template)
    fast, reference = (RowEncoder(tokenizer, max_len=2**20, is_reference=slow) for slow in (False, True))
    fast._reference.encode = reference._reference.encode = once_for_each(fast._reference.encode)
    every = rows(min(number // 2, 5_000), seed + 10, odd=0.1)  # 20,000 rows with all four templates
    for kind in KINDS:
        raws = [one.raw for one in every]
        encoded = fast.encode_lines(raws, kind)
        assert_same(encoded, reference.encode_lines(raws, kind))
        is_kept = encoded.num_sequences > 0
        assert is_kept.sum() + len(encoded.bad) == len(every) and not is_kept[list(encoded.bad)].any()
        assert is_kept.sum() > 0.5 * sum(one.kind == kind for one in every)
        for i, one in enumerate(every):
            if one.kind != kind or one.is_mutated:
                continue
            if i in encoded.bad:
                assert encoded.bad[i].reason in OF_TEMPLATES, (str(encoded.bad[i]), one.row)
            else:
                check(one, rendered(encoded, i, tokenizer), fast)


def check(one: RandomRow, texts: tuple[str, str], encoder: RowEncoder) -> None:
    """Each string that the row says is in its text; those of untrained messages are not in the trained text."""
    whole, trained = texts
    missing = [
        said
        for said in one.said
        if not any(
            form in whole for form in (said.strip(), json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1])
        )
    ]
    if missing:  # left out on purpose, and counted
        assert set(encoder.encode_lines([one.raw], one.kind).not_written) & LEFT_OUT.keys(), (missing, one.row)
    for said in one.untrained:
        assert said.strip() not in trained, (said, one.row)


@pytest.mark.parametrize(("number", "seed"), SIZES)
def test_lines_read_into_columns_are_the_rows_that_parse_row_reads(number: int, seed: int) -> None:
    maker = Maker(random.Random(seed), tuple(piece for piece in PIECES if "<" not in piece))
    for kind in ("conversation", "pair"):
        raws = []
        for _ in range(number // 4):
            plain = maker.turns(is_plain=True)
            row: Any = {"conversations": plain}
            if kind == "pair":
                row = {"chosen": plain, "rejected": [*plain[:-1], {"role": "assistant", "content": "no"}]}
            raws.append(json.dumps(maker.mutated(row) if maker.maybe(0.03) else row).encode())
        at, columns = read_lines(raws, kind)
        assert len(at) > 0.3 * len(raws)
        for i, digest in zip(at.tolist(), columns.hashes(), strict=True):
            found, keys = parsed(raws[i], kind)
            assert not isinstance(found, str) and not keys and row_hash(found) == digest.tobytes()
