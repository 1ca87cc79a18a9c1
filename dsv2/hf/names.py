"""Our parameters and the published tensors: one table, used in both directions.

Every parameter has its published name and shape, except the routed experts: `mlp.experts.w13` and
`mlp.experts.w2` hold all experts of a layer, stacked along dim 0. The hub's folders and vLLM have one tensor
per expert and matrix (`mlp.experts.7.up_proj.weight`). `transformers` 5 stacks them as this project does.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dsv2.config.schema import ModelConfig
from dsv2.model.transformer import DeepseekV2
from dsv2.moe.experts import RoutedExperts
from dsv2.parallel.buffers import persistent_buffers

# The published matrices within ours, from top to bottom: w13 [E, 2F, D] is gate above up, w2 [E, D, F] down.
_MATRICES = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
_STACKED = {"w13": "gate_up_proj", "w2": "down_proj"}

Index = tuple[int | slice, ...]


class Part(NamedTuple):
    """A piece of one of our parameters, and the published tensor that holds its values."""

    name: str  # of the published tensor
    shape: tuple[int, ...]  # of the whole published tensor
    rows: slice  # the piece within the published tensor, along dim 0
    indices: Index  # the piece within our parameter: parameter[indices]


def model_outline(config: ModelConfig) -> DeepseekV2:
    """Return the whole model, with all experts, on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return DeepseekV2(config)


def published_parts(model: DeepseekV2, stacked: bool = False) -> Iterator[tuple[str, Tensor, list[Part]]]:
    """Yield every parameter and persistent buffer of this rank, with the parts that together cover it.

    A buffer is published whole, under its name in our model.

    Args:
        model: the whole model, or a rank's share of it; a share has only the parts of its experts.
        stacked: whether experts are stacked, as `transformers` 5 does, instead of one tensor per matrix.
    """
    buffers = persistent_buffers(model)
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}"
            shape = tuple(parameter.shape)
            if not isinstance(module, RoutedExperts):
                parts = [Part(name, shape, slice(None), ())]
            elif stacked:
                local_rows = slice(module.first_expert, module.first_expert + module.n_local)
                whole = (module.n_experts, *shape[1:])
                parts = [Part(f"{prefix}.{_STACKED[leaf]}", whole, local_rows, ())]
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
