"""The order of an epoch: which cell is drawn at each place, computed from a key without storing a permutation.

A cell is the unit that is shuffled: a group of samples for packs (loader.py), a single pair for pairs (pairs.py). Only
integer arithmetic is used, so the order is the same on every machine and with every version of numpy.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

FEISTEL_ROUNDS = 6


def permute(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """Return the image of each index (integers [N] in 0..size-1) under the pseudo-random permutation of 0..size-1 that
    `key` determines: int64 [N]. O(N) time and memory."""
    return permute_each(index, size, np.zeros(len(index), np.int64), lambda _: key)


def permute_each(index: np.ndarray, size: int, of: np.ndarray, key: Callable[[int], str]) -> np.ndarray:
    """Return the image of each index (integers [N] in 0..size-1) under a permutation of 0..size-1 of its own, which is
    determined by `key(of[i])`: int64 [N]. O(N) time and memory, whatever the number of keys. A Feistel network on
    (index // low, index % low), applied again while the result is outside the range (cycle walking)."""
    high = math.isqrt(size - 1) + 1  # size <= high * low < size + high
    low = np.uint64(-(-size // high))
    numbers, which = np.unique(of, return_inverse=True)
    digests = b"".join(hashlib.sha512(key(number).encode()).digest() for number in numbers.tolist())
    round_keys = np.frombuffer(digests, "<u8").reshape(-1, 8)[:, :FEISTEL_ROUNDS]
    result = np.array(index, np.uint64)
    todo = np.arange(len(result))
    while len(todo):
        left, right = np.divmod(result[todo], low)
        keys = round_keys[which[todo]].T if len(numbers) > 1 else round_keys[0]
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            left = (left + _mix(right ^ even)) % np.uint64(high)
            right = (right + _mix(left ^ odd)) % low
        result[todo] = left * low + right
        todo = todo[result[todo] >= size]
    return result.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Mix 64-bit integers into 32-bit ones, with the multipliers of splitmix64 (Steele, Lea, Flood 2014)."""
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(32)) * np.uint64(0x94D049BB133111EB)
    return x >> np.uint64(32)


def draws_per_epoch(tokens: Sequence[int], cells: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return how many cells of each dataset an epoch draws, at least one, so that the datasets' shares of its tokens
    are as `weights`, taken as exact decimals. An epoch has as many tokens as all datasets together, up to whole cells.
    tokens, cells: of each dataset."""
    shares = [Fraction(str(weight)) for weight in weights]
    total = sum(tokens)
    passes = [share / sum(shares) * total / held for share, held in zip(shares, tokens, strict=True)]
    return [max(1, round(count * times)) for count, times in zip(cells, passes, strict=True)]


@dataclass(frozen=True, slots=True)
class Mixture:
    """Several datasets of which an epoch draws cells. cells: how many each has. draws: how many of them an epoch draws.
    More draws than cells go through a dataset several times, each time in another order; with fewer an epoch continues
    where the last ended. So every epoch ends with all cells of a dataset drawn equally often, give or take once."""

    cells: tuple[int, ...]
    draws: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of cells drawn in an epoch, of all datasets together."""
        return sum(self.draws)

    def draw(self, places: np.ndarray, epoch: int, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the cells drawn at these places (integers [N] in 0..size-1) of an epoch, numbered from 0 over all
        datasets, and the pass over their dataset, counted over all epochs: int64 [N] each. key: determines the
        order."""
        drawn = permute(places, self.size, f"{key}:{epoch}:cells")
        of = np.searchsorted(np.cumsum(self.draws), drawn, side="right")
        passes, cell = np.full(len(drawn), epoch, np.int64), drawn.copy()
        for number in np.unique(of).tolist():
            held, given = self.cells[number], self.draws[number]
            at = np.flatnonzero(of == number)
            local = drawn[at] - sum(self.draws[:number])
            if held != given:
                passes[at], local = np.divmod(epoch * given + local, held)
                local = permute_each(local, held, passes[at], lambda of_pass, n=number: f"{key}:dataset {n}:{of_pass}")
            cell[at] = sum(self.cells[:number]) + local
        return cell, passes
