"""Which parameters belong to routed experts, and which part of the whole layer's they are."""

from typing import Any


def is_expert(parameter: Any) -> bool:
    """Return whether it belongs to a routed expert, as deepspeed_engine.py marked it."""
    return not getattr(parameter, "allreduce", True)


def place(parameter: Any, numel: int) -> tuple[int, int]:
    """Return where this rank's parameter begins within the whole flattened one, and the whole one's size.

    Expert parallelism cuts dim 0, so an expert's range within the whole parameter is contiguous.
    """
    if not is_expert(parameter):
        return 0, numel
    return parameter.expert_rank * numel, parameter.expert_ranks * numel
