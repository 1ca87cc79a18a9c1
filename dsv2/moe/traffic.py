"""The number of bytes that the ranks exchange for the routed experts, computed from sizes."""


def bytes_per_row(hidden_size: int, top_k: int, element_bytes: int, recompute: bool = False) -> int:
    """Return the bytes that one row sent to another rank costs in a training step.

    The hidden state crosses four times: to the experts and back, in the forward and in the backward pass. The
    token's choice and weights, in fp32, cross once, and the weights' gradients once. Recomputation sends the
    row to the experts again. It stops before the results go home, which the backward pass does not need.
    """
    row = hidden_size * element_bytes
    numbers = top_k * 4
    to_experts = row + 2 * numbers
    return to_experts + row + (2 * row + numbers) + (to_experts if recompute else 0)
