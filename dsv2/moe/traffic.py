"""The bytes of the experts' exchange, computed from sizes."""


def bytes_per_row(hidden_size: int, top_k: int, element_bytes: int, recompute: bool = False) -> int:
    """Return the bytes that one row sent to another rank costs in a training step.

    The hidden state crosses four times: to the experts and back, in the forward and in the backward pass. The
    token's choice and weights, in fp32, cross twice. A recomputed layer repeats the exchanges of its forward
    pass, which are half of all.
    """
    forward = 2 * hidden_size * element_bytes + 2 * top_k * 4
    return (3 if recompute else 2) * forward
