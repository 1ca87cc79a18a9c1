"""Bytes of the experts' exchange, from the sizes alone."""


def bytes_per_row(hidden_size: int, top_k: int, element_bytes: int, recompute: bool = False) -> int:
    """Return the bytes that one row sent to another rank costs in a training step.

    The hidden state crosses four times: to the experts and back, forward and backward. Its choice and
    weights, in fp32, cross twice. A layer recomputed in backward repeats the exchanges of its forward,
    which is half of all.
    """
    forward = 2 * hidden_size * element_bytes + 2 * top_k * 4
    return (3 if recompute else 2) * forward
