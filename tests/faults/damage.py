"""Generators of damage, and the one question of these tests: is the outcome equal, or refused by name?

FAULTS_SEED chooses what is drawn (0 unless set; `make faults` draws one and prints it), FAULTS_SHARE how much: the default run
takes a few cases of each kind, `make faults` and the slow tests more.
"""

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmdata.errors import MMError, of_system

SEED = int(os.environ.get("FAULTS_SEED", "0"))
SEAL = "record_sha256"
HUGE = 2**62
VALUES = (
    None,
    -1,
    HUGE,
    10**40,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\0",
    "\ud800",
    "x",
    "../../x",
    True,
    [],
    {},
    [[]],
    0.5,
)


def refusal(action: Callable[[], Any]) -> tuple[Any, str]:
    """The action's result and "", or None and the message that `mm` would print. Any other exception is raised: it would be a
    traceback."""
    try:
        return action(), ""
    except MMError as error:
        assert error.message
        return None, error.message
    except OSError as error:
        described = of_system(error)
        if described is None:
            raise
        return None, described.message


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside JSON data; of long lists only those of the first two."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def edited(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy of JSON data in which `change(container, key)` was called for the value at a path."""
    value = copy.deepcopy(value)
    at = value
    for key in path[:-1]:
        at = at[key]
    change(at, path[-1])
    return value


def spoiled(value: dict[str, Any], draw: random.Random, most: int | None) -> Iterator[tuple[str, Any]]:
    """Copies of a record without its hash, each with one field missing or of another value, with words for it; `most` of them,
    all for None."""
    value = {key: item for key, item in value.items() if key != SEAL}
    cases = [(path, one) for path in places(value) for one in ("missing", *VALUES)]
    for path, one in cases if most is None else draw.sample(cases, min(most, len(cases))):
        if one == "missing":
            yield f"{path} missing", edited(value, path, lambda at, key: at.__delitem__(key))
        else:
            yield f"{path} = {one!r}", edited(value, path, lambda at, key, one=one: at.__setitem__(key, one))


def flipped(content: bytes, draw: random.Random, number: int) -> Iterator[bytes]:
    """Copies with one bit flipped."""
    for _ in range(number):
        copy = bytearray(content)
        copy[draw.randrange(len(copy))] ^= 1 << draw.randrange(8)
        yield bytes(copy)


def torn(content: bytes, draw: random.Random, number: int) -> Iterator[bytes]:
    """Copies that are cut short, zeroed in part, longer, or with flipped bits."""
    for i in range(number):
        at, size = sorted(draw.sample(range(len(content)), 2)) if len(content) > 1 else (0, 1)
        kinds = (
            content[:at],
            content[:at] + b"\0" * (size - at) + content[size:],
            content + draw.randbytes(1 + at % 99),
            next(flipped(content, draw, 1)),
            content[:at] + draw.randbytes(size - at) + content[size:],
        )
        yield kinds[i % len(kinds)]
    yield b""


def attack(
    path: Path, contents: Iterator[tuple[str, bytes]], use: Callable[[], Any], *, may_differ: bool
) -> dict[str, int]:
    """Write each content to a file and use it; the file is restored at the end. Counts the outcomes: equal, refused, and, only if
    `may_differ`, other results: a record without its hash may have another allowed value."""
    before, expected = path.read_bytes(), use()
    counts = {"equal": 0, "refused": 0, "other": 0}
    for words, content in contents:
        path.write_bytes(content)
        try:
            result, message = refusal(use)
        except BaseException as error:
            raise AssertionError(f"{path.name}: {words} (FAULTS_SEED={SEED})") from error
        outcome = "refused" if message else "equal" if result == expected else "other"
        assert outcome != "other" or may_differ, f"{path.name}: {words}: other results (FAULTS_SEED={SEED})"
        counts[outcome] += 1
    path.write_bytes(before)
    assert refusal(use) == (expected, "")
    return counts


def attack_record(path: Path, use: Callable[[], Any], share: float) -> dict[str, int]:
    """Flip bits of a record with a hash of itself, and spoil every field of one without: equal or refused, and of the bits
    nothing else."""
    draw = random.Random(SEED)
    content = path.read_bytes()
    is_all = share >= 1
    if b'"record_sha256"' in content:
        bits = (("a flipped bit", one) for one in flipped(content, draw, 300 if is_all else 12))
        attack(path, bits, use, may_differ=False)
    cases = spoiled(json.loads(content), draw, None if is_all else int(400 * share))
    texts = ((words, json.dumps(value).encode("utf-8", "surrogatepass")) for words, value in cases)
    return attack(path, texts, use, may_differ=True)
