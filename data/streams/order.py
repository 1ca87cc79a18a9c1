"""The order of training sequences as a pure function, so that it needs no state.

A Feistel network permutes the smallest [0, 4^h) that covers [0, n). Each cycle is followed until a value is
below n. This gives a bijection of [0, n) itself (format-preserving encryption by cycle walking). Every
position is computed separately, so no permutation is ever stored.
"""

import numpy as np

ROUNDS = 6  # Feistel rounds; four already mix well, two more cost little


def permuted_index(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Return int64 [...]: the image of each of `positions` (in [0, n)) in permutation (seed, epoch)."""
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    values = np.asarray(positions, np.int64)
    if values.size and (values.min() < 0 or values.max() >= n):
        raise ValueError(f"positions must lie in [0, {n}), not [{values.min()}, {values.max()}]")
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = np.random.default_rng([seed, epoch]).integers(0, 2**64, ROUNDS, np.uint64)
    result = _feistel(values.astype(np.uint64).ravel(), half_bits, keys)
    outside = np.flatnonzero(result >= n)  # at most 3/4 of the covering range, so the loop ends soon
    while outside.size:
        result[outside] = _feistel(result[outside], half_bits, keys)
        outside = outside[result[outside] >= n]
    return result.astype(np.int64).reshape(values.shape)


def _feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """Permute uint64 `values` of 2 * half_bits bits; arithmetic is modulo 2^64, as numpy's is on arrays."""
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left = values >> shift
    right = values & mask
    for key in keys:
        mixed = left ^ (_mix(right ^ key) & mask)
        left = right
        right = mixed
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Mix all 64 bits (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
