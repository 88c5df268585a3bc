import numpy as np
import pytest

from mmdata.pack.packing import buckets_for, pack


@pytest.mark.parametrize(
    ("max_len", "buckets"),
    [
        (100, (100,)),
        (512, (512,)),
        (513, (512, 513)),
        (1024, (512, 1024)),
        (2048, (512, 1024, 2048)),
        (3000, (512, 1024, 2048, 3000)),
        (8192, (512, 1024, 2048, 4096, 8192)),
    ],
)
def test_buckets_are_the_standard_lengths_up_to_max_len(max_len: int, buckets: tuple[int, ...]) -> None:
    assert buckets_for(max_len) == buckets


@pytest.mark.parametrize(
    ("length", "bucket"), [(1, 512), (512, 512), (513, 1024), (1024, 1024), (1025, 1500), (1500, 1500)]
)
def test_a_length_belongs_to_the_smallest_bucket_that_holds_it(length: int, bucket: int) -> None:
    assert pack(np.array([length]), buckets_for(1500)).buckets.tolist() == [bucket]


@pytest.mark.parametrize("length", [0, 1501])
def test_a_length_that_fits_no_bucket_is_a_mistake_of_ours(length: int) -> None:
    with pytest.raises(AssertionError):
        pack(np.array([length]), buckets_for(1500))
