"""What rows come to, against a count in plain Python over the same rows."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pack_data import MAKERS
from test_texts import grams

from mmdata import measure
from mmdata.measure import RowTally
from mmdata.rows import BadRow, Line, parse_row
from mmdata.tally import Lengths, Strings


def rows_of(kind: str, number: int, seed: int = 0) -> list[bytes]:
    """Lines of a kind, a fifth of them repeats, with what only some rows have."""
    draw = random.Random(seed)
    found: list[dict[str, Any]] = []
    for _ in range(number):
        if found and draw.random() < 0.2:
            found.append(draw.choice(found))
            continue
        row = MAKERS[kind](draw)
        if kind == "conversation":
            if draw.random() < 0.3:
                row["conversations"].insert(0, {"role": "system", "content": f"Answer in {draw.randrange(3)} words"})
            if draw.random() < 0.2:
                row["tools"] = [{"type": "function", "function": {"name": f"find_{draw.randrange(2)}"}}]
            if draw.random() < 0.2:
                row["conversations"][-1]["reasoning_content"] = "let me see"
            if draw.random() < 0.1:
                row["conversations"][-1]["content"] += " <|im_end|>"
        found.append(row)
    return [json.dumps(row, ensure_ascii=False).encode() for row in found]


def measured(lines: list[bytes], batch: int) -> RowTally:
    tally = RowTally()
    for at in range(0, len(lines), batch):
        part = RowTally()
        chunk = lines[at : at + batch]
        part.add([parse_row(line) for line in chunk], chunk)
        tally.merge(part)
    return tally


def said(message: dict[str, Any]) -> str:
    return message.get("reasoning_content", "") + message["content"]


@pytest.mark.parametrize("batch", [7, 1000])
def test_conversations_come_to_a_plain_count(batch: int) -> None:
    lines = rows_of("conversation", 200)
    rows = [json.loads(line) for line in lines]
    found = measured(lines, batch)
    assert found.rows == found.kept == 200 and found.num_bytes == sum(map(len, lines))
    by_role: dict[str, Counter[int]] = {}
    for row in rows:
        for message in row["conversations"]:
            by_role.setdefault(message["role"], Counter())[len(said(message))] += 1
    assert {role: lengths.counts for role, lengths in found.by_role.items()} == by_role
    answers: dict[int, Counter[int]] = {}
    for row in rows:
        of_row = [said(m) for m in row["conversations"] if m["role"] == "assistant"]
        for turn, text in enumerate(of_row, 1):
            answers.setdefault(turn, Counter())[len(text)] += 1
    assert {turn: lengths.counts for turn, lengths in found.by_turn.items()} == answers
    assert found.lengths.counts == Counter(sum(len(said(m)) for m in row["conversations"]) for row in rows)
    assert found.turns == Counter(sum(m["role"] == "user" for m in row["conversations"]) for row in rows)
    systems = Counter(m["content"] for row in rows for m in row["conversations"] if m["role"] == "system")
    assert found.systems.counts == systems and found.rows_with_system == systems.total()
    assert found.tools.counts == Counter(t["function"]["name"] for row in rows for t in row.get("tools", ()))
    assert found.reasoning == sum("reasoning_content" in m for row in rows for m in row["conversations"])
    assert found.rows_with_control == sum("<|im_end|>" in line.decode() for line in lines)
    openings = Counter(
        " ".join(said(m)[:40].split())[:20] for row in rows for m in row["conversations"] if m["role"] == "assistant"
    )
    assert found.openings.counts == openings
    text = "".join(said(m) for row in rows for m in row["conversations"])
    assert found.scripts[0] == len(re.findall(r"[\u4e00-\u9fff]", text)) and found.scripts.sum() == len(text)


@pytest.mark.parametrize("kind", ["document", "conversation", "pair"])
def test_exact_repeats_are_rows_seen_before(kind: str) -> None:
    lines = rows_of(kind, 150)
    expected = len(lines) - len(set(lines))
    assert measure.duplicates(measured(lines, 40))["exact"] == expected > 10


def test_pairs_come_to_a_plain_count() -> None:
    lines = rows_of("pair", 150)
    found = measured(lines, 40)
    longer: Counter[str] = Counter()
    tenths = [0] * 10
    for line in lines:
        row = json.loads(line)
        chosen, rejected = ("\n".join(m["content"] for m in row[side][1:]) for side in ("chosen", "rejected"))
        longer["chosen" if len(chosen) > len(rejected) else "rejected" if len(rejected) > len(chosen) else "equal"] += 1
        longer["chosen by 3"] += len(chosen) > 3 * len(rejected)
        longer["rejected by 3"] += len(rejected) > 3 * len(chosen)
        either = grams(chosen) | grams(rejected)
        alike = len(grams(chosen) & grams(rejected)) / len(either) if either else 1
        tenths[min(9, int(alike * 10))] += 1
    assert +found.longer == +longer
    assert found.similarity.tolist() == tenths
    assert found.ratios.total() == found.margins.figures()["count"] == 150  # type: ignore[index]


def test_rows_set_aside_are_counted_and_the_first_are_kept() -> None:
    tally = RowTally()
    for number in range(5):
        tally.set_aside(Line(number + 1, 0, b"{" * (number + 1)), BadRow("not json"), "data.jsonl")
    assert tally.left_out == {"not json": 5} and tally.rows == 5 and tally.kept == 0
    assert [example["line"] for example in tally.examples["not json"]] == [1, 2, 3]


def test_repeated_phrases_stand_as_they_were_written() -> None:
    draw = random.Random(2)
    phrase = "as a helpful assistant, I will always tell you the plain truth"
    whole = [" ".join(f"w{draw.randrange(10**6)}" for _ in range(30)) for _ in range(40)]
    for at in range(0, 40, 4):
        whole[at] += f" {phrase} {draw.randrange(10**9)}"
    whole[1] = f"{whole[1]} {phrase[:30]}"  # a piece too short to count
    top = measure.repeated(whole, 3)
    assert top == [{"text": phrase, "count": 10}]
    assert measure.repeated(["short"]) == [] == measure.repeated([])


@pytest.mark.parametrize("largest", [50, 5_000, 3_000_000])
def test_lengths_are_those_of_a_plain_sort(largest: int) -> None:
    draw = np.random.default_rng(1)
    values = draw.integers(0, largest, 3001)
    found = Lengths()
    for part in np.array_split(values, 4):
        one = Lengths()
        one.add(part)
        found.merge(one)
    figures = found.figures()
    assert figures
    ordered = np.sort(values)
    assert (figures["shortest"], figures["longest"], figures["total"]) == (ordered[0], ordered[-1], values.sum())
    for name, at in (("p50", 1500), ("p90", 2700), ("p99", 2970)):
        assert figures[name] == pytest.approx(ordered[at], rel=0.01 if largest > 2**16 else 0)
    assert sum(figures["counts"]) == 3001 == figures["count"]
    if largest <= 2**16:
        assert figures["counts"] == np.histogram(values, [*figures["edges"][:-1], 2**40])[0].tolist()
    assert Lengths().figures() is None


def test_frequent_strings_survive_what_is_forgotten() -> None:
    found = Strings()
    for begin in range(0, 60_000, 5_000):
        part = Strings()
        part.add(f"rare {i}" for i in range(begin, begin + 5_000))
        part.add(["often"] * 50)
        found.merge(part)
    assert found.top(2) == [{"text": "often", "count": 600}] and found.missed > 0


def test_a_tally_does_not_depend_on_how_rows_were_split(tmp_path: Path) -> None:
    lines = rows_of("conversation", 90)
    one, other = measured(lines, 90), measured(lines, 11)
    assert np.array_equal(np.concatenate(one.hashes), np.concatenate(other.hashes))
    assert np.array_equal(np.concatenate(one.signatures), np.concatenate(other.signatures))
    assert np.array_equal(one.languages, other.languages)
