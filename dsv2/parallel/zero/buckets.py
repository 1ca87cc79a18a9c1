"""Buckets: neighbouring parameters that are reduced and gathered together."""

from itertools import pairwise


def buckets(sizes: list[int], elements: int | None) -> list[slice]:
    """Cut neighbouring tensors into buckets of at most so many elements. None: all in one bucket.

    A larger tensor gets its own bucket.
    """
    cuts = [0]
    total = 0
    for index, size in enumerate(sizes):
        if elements is not None and total and total + size > elements:
            cuts.append(index)
            total = 0
        total += size
    return [slice(start, stop) for start, stop in pairwise([*cuts, len(sizes)])]
