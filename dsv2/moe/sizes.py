"""Shapes of the feed-forward networks' parameters, from the configuration alone. Imports no torch.

dsv2/moe/experts.py and dsv2/moe/layer.py build the parameters. A test compares their names and shapes.
"""

from dsv2.config.schema import ModelConfig

Shapes = dict[str, tuple[int, ...]]  # a parameter's name below its module: its shape


def swiglu_parameters(hidden: int, width: int) -> Shapes:
    """Return the matrices of one SwiGLU: the dense FFN, or all shared experts."""
    return {
        "gate_proj.weight": (width, hidden),
        "up_proj.weight": (width, hidden),
        "down_proj.weight": (hidden, width),
    }


def expert_parameters(model: ModelConfig, ep_size: int = 1) -> Shapes:
    """Return one rank's routed experts of one layer, stacked along the first dimension."""
    n_local = model.n_routed_experts // ep_size
    hidden = model.hidden_size
    width = model.moe_intermediate_size
    return {"w13": (n_local, 2 * width, hidden), "w2": (n_local, hidden, width)}


def shared_parameters(model: ModelConfig) -> Shapes:
    """Return one layer's shared experts, which are one wide SwiGLU; {} if there are none."""
    if model.n_shared_experts == 0:
        return {}
    return swiglu_parameters(model.hidden_size, model.n_shared_experts * model.moe_intermediate_size)


def with_prefix(prefix: str, shapes: Shapes) -> Shapes:
    """Return the same shapes under names that begin with `prefix`."""
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}
