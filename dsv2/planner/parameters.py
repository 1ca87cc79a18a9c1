"""List the parameters that one rank holds, by optimizer group, from the configured sizes alone.

`Optimizer.groups` in dsv2/optimizers/base.py forms the same groups. A test compares the lists with the built
model.
"""

from math import prod

from dsv2.config.schema import ModelConfig
from dsv2.model.sizes import is_dense, layer_parameters, outer_parameters
from dsv2.optimizers.base import GroupSizes, RankParameters
from dsv2.parallel.plan import Dim, ParallelPlan


def rank_parameters(model: ModelConfig, layout: ParallelPlan) -> RankParameters:
    """Return the sizes of one rank's tensors. They are the same on all ranks."""
    shapes = list(outer_parameters(model).items())
    shapes_of_layer = {
        has_dense_ffn: layer_parameters(model, has_dense_ffn, layout.ep) for has_dense_ffn in (True, False)
    }
    for layer in range(model.num_hidden_layers):
        shapes += shapes_of_layer[is_dense(model, layer)].items()
    experts = [prod(shape) for name, shape in shapes if name.startswith("mlp.experts.")]
    dense = [shape for name, shape in shapes if not name.startswith("mlp.experts.")]
    return RankParameters(
        decay=GroupSizes([prod(shape) for shape in dense if len(shape) > 1], layout.sizes[Dim.dp]),
        no_decay=GroupSizes([prod(shape) for shape in dense if len(shape) == 1], layout.sizes[Dim.dp]),
        experts=GroupSizes(experts, layout.sizes[Dim.edp]),
    )
