"""How parameters are cut into buckets."""

from hypothesis import given
from hypothesis import strategies as st

from dsv2.parallel.zero.buckets import buckets
from tests.unit.helpers import properties


@properties
@given(sizes=st.lists(st.integers(1, 20), min_size=1), elements=st.integers(1, 30))
def test_buckets_are_as_large_as_allowed(sizes, elements):
    parts = [sizes[part] for part in buckets(sizes, elements)]
    assert [size for part in parts for size in part] == sizes, "all tensors, in order"
    for part, after in zip(parts, [*parts[1:], []], strict=True):
        assert sum(part) <= elements or len(part) == 1
        assert not after or sum(part) + after[0] > elements, "the next tensor would have fitted"


def test_without_a_limit_there_is_one_bucket():
    assert buckets([3, 4, 5], None) == [slice(0, 3)]
    assert buckets([], None) == [slice(0, 0)]
