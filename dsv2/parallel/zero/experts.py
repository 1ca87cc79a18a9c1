"""Which parameters belong to routed experts, and where each lies within the parameter of all experts."""

from typing import Any


def is_expert(parameter: Any) -> bool:
    """Return whether the parameter belongs to a routed expert; deepspeed_engine.py marked it so."""
    return not getattr(parameter, "allreduce", True)


def place(parameter: Any, numel: int) -> tuple[int, int]:
    """Return the offset of this rank's parameter in the whole flattened one, and the size of the whole.

    Expert parallelism cuts dim 0, so a rank's range of the whole parameter is contiguous.
    """
    if not is_expert(parameter):
        return 0, numel
    return parameter.expert_rank * numel, parameter.expert_ranks * numel
