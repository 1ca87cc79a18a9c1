"""Our parameters and the published tensors: one table, used in both directions.

Every parameter has its published name and shape, but for the routed experts: `mlp.experts.w13` and
`mlp.experts.w2` hold a whole layer's, stacked along dim 0. They are published one matrix an expert
(`mlp.experts.7.up_proj.weight`: the hub's folders, vLLM), or, by `transformers` 5, stacked as here.

Shapes: E routed experts of a layer, F width of an expert, D hidden_size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dsv2.config.schema import ModelConfig
from dsv2.model.transformer import DeepseekV2
from dsv2.moe.experts import RoutedExperts
from dsv2.parallel.buffers import persistent_buffers

# The matrices of one expert that lie below each other in ours: w13 [E, 2F, D] is gate above up, w2 [E, D, F].
_MATRICES = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
_STACKED = {"w13": "gate_up_proj", "w2": "down_proj"}

Index = tuple[int | slice, ...]


class Part(NamedTuple):
    """A piece of one of our parameters, and where its values stand in a published folder."""

    name: str  # the published tensor's
    shape: tuple[int, ...]  # of the whole published tensor
    rows: slice  # the piece of it, along its dim 0
    place: Index  # the piece of our parameter: parameter[place]


def model_outline(config: ModelConfig) -> DeepseekV2:
    """The whole model, with all experts, on the meta device: names and shapes that take no memory."""
    with torch.device("meta"):
        return DeepseekV2(config)


def published_parts(model: DeepseekV2, stacked: bool = False) -> Iterator[tuple[str, Tensor, list[Part]]]:
    """Yield every parameter and persistent buffer of this rank, with the parts that together cover it.

    A buffer is published under its own name, whole.

    Args:
        model: whole, or a rank's share: then the parts are those of its own experts.
        stacked: experts as `transformers` 5 keeps them, in place of one tensor a matrix.
    """
    buffers = persistent_buffers(model)
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name, shape = f"{prefix}.{leaf}", tuple(parameter.shape)
            if not isinstance(module, RoutedExperts):
                parts = [Part(name, shape, slice(None), ())]
            elif stacked:
                own = slice(module.first_expert, module.first_expert + module.n_local)
                whole = (module.n_experts, *shape[1:])
                parts = [Part(f"{prefix}.{_STACKED[leaf]}", whole, own, ())]
            else:
                parts = _parts_by_expert(prefix, leaf, shape, module.first_expert)
            yield name, parameter, parts
        for leaf, buffer in module.named_buffers(recurse=False):
            if (name := f"{prefix}.{leaf}") in buffers:
                yield name, buffer, [Part(name, tuple(buffer.shape), slice(None), ())]


def _parts_by_expert(prefix: str, leaf: str, shape: tuple[int, ...], first_expert: int) -> list[Part]:
    matrices = _MATRICES[leaf]
    n_local, rows, columns = shape
    height = rows // len(matrices)
    return [
        Part(
            f"{prefix}.{first_expert + local}.{matrix}.weight",
            (height, columns),
            slice(None),
            (local, slice(index * height, (index + 1) * height)),
        )
        for local in range(n_local)
        for index, matrix in enumerate(matrices)
    ]
