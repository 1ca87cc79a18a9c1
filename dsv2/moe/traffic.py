"""What the experts' exchange costs, from the sizes alone."""


def bytes_per_row(hidden_size: int, top_k: int, element_bytes: int, recompute: bool = False) -> int:
    """Bytes that one crossing row costs in a training step: there and back, forward and backward.

    The hidden state crosses four times, its choice and weights twice, in fp32. A layer that is recomputed
    in backward exchanges anew what its forward did, which is half of it.
    """
    forward = 2 * hidden_size * element_bytes + 2 * top_k * 4
    return (3 if recompute else 2) * forward
