"""The number of bytes that the ranks exchange for the routed experts, computed from sizes."""


def bytes_per_row(hidden_size: int, top_k: int, element_bytes: int, recompute: bool = False) -> int:
    """Return the bytes that one row sent to another rank costs in a training step.

    The hidden state crosses four times: to the experts and back, in the forward and in the backward pass. The
    token's choice and weights, in fp32, cross twice. Recomputation repeats the exchanges of the forward
    pass, which are half of all exchanges.
    """
    forward = 2 * hidden_size * element_bytes + 2 * top_k * 4
    return (3 if recompute else 2) * forward
