"""What an evaluation reports."""

import math

import pytest

from dsv2.training.evaluate import bits_per_byte


def test_bits_per_byte():
    """A uniform guess among 256 bytes costs 8 bits per byte."""
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8.0)
    assert bits_per_byte(10 * math.log(4096), 40) == pytest.approx(3.0), "12 bits for each token of 4 bytes"
