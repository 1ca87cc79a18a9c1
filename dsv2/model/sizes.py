"""Parameters and floating-point operations of the whole model: sums over its parts' specs. Imports no torch.

The counts follow the convention of published figures. Training on a token takes 6 FLOPs for every active
matrix weight, plus causal attention. The input embedding is a look-up and takes none.
"""

from functools import cache
from math import prod
from typing import NamedTuple

from dsv2.config.schema import ModelConfig
from dsv2.model.attention.kinds import attention_kind
from dsv2.moe.routers.kinds import router_of
from dsv2.moe.sizes import Shapes, expert_parameters, shared_parameters, swiglu_parameters, with_prefix


class ParameterCount(NamedTuple):
    total: int
    active: int  # parameters used for one token, both embeddings included
    active_matmul: int  # elements of the matrices that multiply one token: without input embedding and norms


def is_dense(model: ModelConfig, layer: int) -> bool:
    """Return whether layer number `layer` has a dense FFN instead of experts."""
    return layer < model.first_k_dense_replace


def count_layers(model: ModelConfig) -> tuple[int, int]:
    """Return the number of layers with a dense FFN, and the number of layers with experts."""
    dense = min(model.first_k_dense_replace, model.num_hidden_layers)
    return dense, model.num_hidden_layers - dense


def outer_parameters(model: ModelConfig) -> Shapes:
    """Return the parameters outside the layers: embedding, last norm and output head."""
    return {
        "model.embed_tokens.weight": (model.vocab_size, model.hidden_size),
        "model.norm.weight": (model.hidden_size,),
        "lm_head.weight": (model.vocab_size, model.hidden_size),
    }


def layer_parameters(model: ModelConfig, dense: bool, ep_size: int = 1) -> Shapes:
    """Return one rank's parameters of one layer, by their names below `model.layers.N`."""
    shapes: Shapes = {"input_layernorm.weight": (model.hidden_size,)}
    shapes |= with_prefix("self_attn", attention_kind(model).parameters(model))
    shapes["post_attention_layernorm.weight"] = (model.hidden_size,)
    if dense:
        return shapes | with_prefix("mlp", swiglu_parameters(model.hidden_size, model.intermediate_size))
    shapes |= with_prefix("mlp.gate", router_of(model).parameters(model))
    shapes |= with_prefix("mlp.experts", expert_parameters(model, ep_size))
    return shapes | with_prefix("mlp.shared_experts", shared_parameters(model))


def _elements(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes.values())


def _active_matmul(model: ModelConfig, dense: bool) -> int:
    """Return the number of elements of the matrices that multiply one token in a layer."""
    shapes = layer_parameters(model, dense)
    routed = {name: shape for name, shape in shapes.items() if name.startswith("mlp.experts.")}
    matrices = sum(prod(shape) for shape in shapes.values() if len(shape) > 1)
    unused = model.n_routed_experts - model.num_experts_per_tok
    return matrices - _elements(routed) // model.n_routed_experts * unused


def attention_matrices(model: ModelConfig) -> int:
    """Return the number of parameters of one layer's attention, without its norms."""
    shapes = attention_kind(model).parameters(model).values()
    return sum(prod(shape) for shape in shapes if len(shape) > 1)


def cached_elements(model: ModelConfig) -> int:
    """Return the number of elements that decoding caches per token, over all layers."""
    return attention_kind(model).cached_elements(model) * model.num_hidden_layers


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Return the number of all parameters, and of those used for one token."""
    dense_layers, moe_layers = count_layers(model)
    head = model.vocab_size * model.hidden_size
    total = _elements(outer_parameters(model)) + dense_layers * _elements(layer_parameters(model, True))
    total += moe_layers * _elements(layer_parameters(model, False))
    matmul = dense_layers * _active_matmul(model, True) + moe_layers * _active_matmul(model, False) + head
    unused = model.n_routed_experts - model.num_experts_per_tok
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    return ParameterCount(
        total=total,
        active=total - moe_layers * unused * expert,
        active_matmul=matmul,
    )


def layer_flops(model: ModelConfig, dense: bool, sequence_length: int) -> int:
    """Return one token's training FLOPs (forward and backward) in one layer."""
    score_width = attention_kind(model).score_width(model)
    # A multiplication and addition is 2 FLOPs forward and 4 backward. A token attends to half of the sequence
    # on average.
    attention = 6 // 2 * model.num_attention_heads * score_width * sequence_length
    return 6 * _active_matmul(model, dense) + attention


def head_flops(model: ModelConfig) -> int:
    """Return one token's training FLOPs in the output head."""
    return 6 * model.vocab_size * model.hidden_size


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Return one token's training FLOPs at this sequence length, without recomputation."""
    dense_layers, moe_layers = count_layers(model)
    dense = dense_layers * layer_flops(model, True, sequence_length)
    mixture = moe_layers * layer_flops(model, False, sequence_length)
    return dense + mixture + head_flops(model)


def cut(model: ModelConfig, stages: int, sequence_length: int) -> list[range]:
    """Cut the layers into `stages` pipeline stages so that the costliest stage costs as little as possible.

    A stage's cost is its training FLOPs. The head belongs to the last stage. The embedding is a look-up and
    costs nothing. Of several best cuts, the one with the longest first stages is returned.
    """
    costs = [
        layer_flops(model, is_dense(model, layer), sequence_length)
        for layer in range(model.num_hidden_layers)
    ]
    costs[-1] += head_flops(model)

    @cache
    def best(start: int, stages: int) -> tuple[int, tuple[int, ...]]:
        """Cut the layers from `start` on; return the costliest stage's cost and the end of each stage."""
        if stages == 1:
            return sum(costs[start:]), (len(costs),)
        choices = []
        for end in range(start + 1, len(costs) - stages + 2):
            cost, ends = best(end, stages - 1)
            choices.append((max(sum(costs[start:end]), cost), -end, (end, *ends)))
        cost, _, ends = min(choices)
        return cost, ends

    _, ends = best(0, stages)
    return [range(start, end) for start, end in zip((0, *ends), ends, strict=False)]
