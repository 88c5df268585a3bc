"""The order of an epoch: which cell is drawn at each place, computed from a key without storing a permutation.

A cell is the unit that is shuffled; the loader defines what it holds. Integer arithmetic only: the same on every machine and
with every version of numpy.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

FEISTEL_ROUNDS = 6


def permute(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where each index stands in the permutation of 0..size-1 that `key` names. index: integers [N]; O(N), any size.

    Feistel permutation of (index // low, index % low) with cycle walking: applied again while the result is out of range.
    """
    high = math.isqrt(size - 1) + 1  # high * low is at least size, and more by less than high
    low = np.uint64(-(-size // high))
    round_keys = np.frombuffer(hashlib.sha512(key.encode()).digest(), "<u8")[:FEISTEL_ROUNDS]
    result = np.array(index, np.uint64)
    todo = np.arange(len(result))
    while len(todo):
        left, right = np.divmod(result[todo], low)
        for even, odd in round_keys.reshape(-1, 2):
            left = (left + _mix(right ^ even)) % np.uint64(high)
            right = (right + _mix(left ^ odd)) % low
        result[todo] = left * low + right
        todo = todo[result[todo] >= size]
    return result.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Mix 64 bits into 32 with the multipliers of splitmix64 (Steele, Lea, Flood 2014)."""
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(32)) * np.uint64(0x94D049BB133111EB)
    return x >> np.uint64(32)


def draws_per_epoch(tokens: Sequence[int], cells: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many cells of each dataset an epoch draws, so that its tokens are shared out by weight.

    tokens, cells: what each dataset holds. An epoch has as many tokens as all datasets together (but for rounding to
    whole cells); each dataset gives at least one cell. Exact arithmetic on the weights as they are written.
    """
    shares = [Fraction(str(weight)) for weight in weights]
    total = sum(tokens)
    passes = [share / sum(shares) * total / held for share, held in zip(shares, tokens, strict=True)]
    return [max(1, round(count * times)) for count, times in zip(cells, passes, strict=True)]


@dataclass(frozen=True, slots=True)
class Mixture:
    """Several datasets, of `cells` cells each, of which an epoch draws `draws`: the same number, or as weights say.

    A dataset that gives more than it holds is gone through again, in another order each time; of one that gives less an
    epoch takes up where the last one ended. So every cell of a dataset is drawn equally often, give or take once.
    """

    cells: tuple[int, ...]
    draws: tuple[int, ...]

    @property
    def size(self) -> int:
        """Draws of an epoch, of all datasets."""
        return sum(self.draws)

    def draw(self, places: np.ndarray, epoch: int, key: str) -> tuple[np.ndarray, np.ndarray]:
        """For places of an epoch, int [N]: the cell (numbered over all datasets) and its dataset's own epoch, int64 [N].

        key "": in order.
        """
        drawn = permute(places, self.size, f"{key}:{epoch}:cells") if key else places
        of = np.searchsorted(np.cumsum(self.draws), drawn, side="right")
        passes, cell = np.full(len(drawn), epoch, np.int64), drawn.copy()
        for number in np.unique(of).tolist():
            held, given = self.cells[number], self.draws[number]
            at = np.flatnonzero(of == number)
            local = drawn[at] - sum(self.draws[:number])
            if held != given:
                passes[at], local = np.divmod(epoch * given + local, held)
                local = self._in_own_order(local, passes[at], held, f"{key}:dataset {number}") if key else local
            cell[at] = sum(self.cells[:number]) + local
        return cell, passes

    def _in_own_order(self, cells: np.ndarray, passes: np.ndarray, size: int, key: str) -> np.ndarray:
        ordered = cells.copy()
        for number in np.unique(passes).tolist():
            at = passes == number
            ordered[at] = permute(cells[at], size, f"{key}:{number}")
        return ordered
