import random
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from mmdata.pack.packing import pack

BUCKETS = (8, 16, 32)


def one_by_one(lengths: list[int], buckets: tuple[int, ...]) -> list[int]:
    """The rule, one sequence at a time: longest first, into an open pack with the least room. The rooms left, sorted."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, room in enumerate(rooms) if room >= length]
        if not fits:
            fits = [len(rooms)]
            rooms.append(next(bucket for bucket in buckets if bucket >= length))
        rooms[min(fits, key=lambda i: rooms[i])] -= length
    return sorted(rooms)


def fewest_positions(lengths: list[int], buckets: tuple[int, ...]) -> int:
    """The optimum by trying every partition: the least sum of buckets."""

    @cache
    def best(left: int) -> int:
        if not left:
            return 0
        first = left & -left
        rest = left ^ first
        cost = 10**9
        subset = rest
        while True:
            total = sum(length for i, length in enumerate(lengths) if (subset | first) >> i & 1)
            if total <= buckets[-1]:
                cost = min(cost, next(b for b in buckets if b >= total) + best(rest & ~subset))
            if not subset:
                return cost
            subset = (subset - 1) & rest

    return best(2 ** len(lengths) - 1)


@given(st.lists(st.integers(1, 32), max_size=80))
@examples(200)
def test_every_sequence_stands_in_exactly_one_pack_and_none_overflows(lengths: list[int]) -> None:
    packs = list(pack(np.array(lengths, np.int64), BUCKETS))
    assert sorted(i for _, members in packs for i in members.tolist()) == list(range(len(lengths)))
    for bucket, members in packs:
        total = sum(lengths[i] for i in members)
        smaller = max((b for b in BUCKETS if b < bucket), default=0)
        assert smaller < total <= bucket  # a pack is never in a larger bucket than it needs
        assert members.tolist() == sorted(members.tolist())


@given(st.lists(st.integers(1, 32), max_size=60))
@examples(200)
def test_packs_leave_the_rooms_of_the_one_by_one_rule_or_less(lengths: list[int]) -> None:
    packs = pack(np.array(lengths, np.int64), BUCKETS)
    rooms = [bucket - sum(lengths[i] for i in members) for bucket, members in packs]
    rule = one_by_one(lengths, BUCKETS)
    assert sum(rooms) < sum(rule) or sorted(rooms) == rule  # which of two packs with equal room is taken is no matter


def test_packs_come_close_to_the_brute_force_optimum() -> None:
    draw = random.Random(0)
    used = least = optimal = 0
    for _ in range(60):
        lengths = [draw.randint(1, 16) for _ in range(draw.randint(1, 9))]
        found = int(pack(np.array(lengths), BUCKETS).buckets.sum())
        best = fewest_positions(lengths, BUCKETS)
        assert best <= found
        used, least, optimal = used + found, least + best, optimal + (found == best)
    assert used < 1.02 * least and optimal >= 55  # best-fit alone: 1.054 and 48


TABLE = [  # lengths; the packs as bucket and members
    ([32], [(32, [0])]),
    ([8, 8], [(8, [0]), (8, [1])]),
    ([5, 3], [(8, [0, 1])]),
    ([9, 7], [(16, [0, 1])]),
    ([20, 12, 8], [(32, [0, 1]), (8, [2])]),
    ([3, 30, 2, 1], [(8, [0, 3]), (32, [1, 2])]),  # 3 opens its own: 30 leaves room for 2 alone; 1 fits the fullest
    ([4, 4, 4, 4, 17], [(32, [0, 1, 2, 4]), (8, [3])]),  # equal lengths in bulk, in source order
    ([9, 9, 9], [(32, [0, 1, 2])]),  # 5 of room in a larger bucket, 7 in each of three smaller ones
    ([7, 7, 7, 2, 7, 2], [(16, [0, 1, 3]), (16, [2, 4, 5])]),  # the same closest sum twice; one by one takes five of 8
]


@pytest.mark.parametrize(("lengths", "packs"), TABLE)
def test_packs_of_small_cases(lengths: list[int], packs: list[tuple[int, list[int]]]) -> None:
    found = [(bucket, members.tolist()) for bucket, members in pack(np.array(lengths), BUCKETS)]
    assert sorted(found) == sorted(packs)


def test_packs_stand_in_the_order_of_their_first_member() -> None:
    packs = pack(np.array([3, 30, 9, 9, 2, 31, 8]), BUCKETS)
    assert [members.tolist()[0] for _, members in packs] == sorted(members.tolist()[0] for _, members in packs)


def test_the_result_depends_on_nothing_but_the_lengths() -> None:
    lengths = np.random.default_rng(5).integers(1, 2049, 5000)
    for dtype in (np.int64, np.int32, np.uint16):
        again = pack(lengths.astype(dtype), (512, 1024, 2048))
        assert np.array_equal(again.members, pack(lengths, (512, 1024, 2048)).members)


@pytest.mark.parametrize(("middle", "spread"), [(250, 0.8), (250, 0.5), (120, 0.5)])  # best-fit alone: 0.05, 0.8, 0.5 %
def test_a_part_of_real_looking_lengths_wastes_less_than_a_ten_thousandth(middle: int, spread: float) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(middle), spread, 40_000), 8, 2048).astype(np.int64)
    packs = pack(lengths, (512, 1024, 2048))
    assert 1 - lengths.sum() / packs.buckets.sum() < 0.0001


def test_nothing_gives_no_packs() -> None:
    assert list(pack(np.empty(0, np.int64), BUCKETS)) == []
