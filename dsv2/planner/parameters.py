"""The parameters that one rank holds, by optimizer group, from the sizes alone.

The groups are those of `Optimizer.groups` in dsv2/optimizers/base.py; a test compares both with the
built model.
"""

from math import prod

from dsv2.config.schema import ModelConfig
from dsv2.model.sizes import is_dense, layer_parameters, outer_parameters
from dsv2.optimizers.base import GroupSizes, RankParameters


def rank_parameters(model: ModelConfig, world_size: int, ep_size: int) -> RankParameters:
    """Return one rank's tensors; all ranks hold tensors of the same sizes."""
    shapes = list(outer_parameters(model).items())
    tables = {dense: layer_parameters(model, dense, ep_size) for dense in (True, False)}
    for layer in range(model.num_hidden_layers):
        shapes += tables[is_dense(model, layer)].items()
    experts = [prod(shape) for name, shape in shapes if name.startswith("mlp.experts.")]
    others = [shape for name, shape in shapes if not name.startswith("mlp.experts.")]
    return RankParameters(
        decay=GroupSizes([prod(shape) for shape in others if len(shape) > 1], world_size),
        no_decay=GroupSizes([prod(shape) for shape in others if len(shape) == 1], world_size),
        experts=GroupSizes(experts, world_size // ep_size),
    )
