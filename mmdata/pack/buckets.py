"""Length buckets: a length in, the smallest padded length that holds it out. A dataset knows no other line lengths."""

from bisect import bisect_left

BUCKETS = (512, 1024, 2048)


def buckets_for(max_len: int) -> tuple[int, ...]:
    """The standard buckets shorter than `max_len`, then `max_len` itself; beyond 2048 the standard ones go on doubling."""
    assert max_len > 0, max_len
    standard: list[int] = list(BUCKETS)
    while standard[-1] < max_len:
        standard.append(2 * standard[-1])
    return (*(bucket for bucket in standard if bucket < max_len), max_len)


def bucket_of(length: int, buckets: tuple[int, ...]) -> int:
    """The smallest of `buckets` (ascending) that holds `length` tokens; a longer one is our own mistake."""
    assert 0 < length <= buckets[-1], (length, buckets)
    return buckets[bisect_left(buckets, length)]
