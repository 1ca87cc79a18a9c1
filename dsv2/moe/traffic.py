"""What the experts' exchange costs, from the sizes alone."""


def bytes_per_row(hidden_size: int, top_k: int, element_bytes: int) -> int:
    """Bytes that one crossing row costs in a training step: there and back, forward and backward.

    The hidden state crosses four times, its choice and weights twice, in fp32.
    """
    return 4 * hidden_size * element_bytes + 2 * 2 * top_k * 4
