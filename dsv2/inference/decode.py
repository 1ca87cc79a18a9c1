"""One token after another from a cache (arXiv 2405.04434, sections 2.1.2 and 2.1.3).

Prompts of different lengths share a batch: they are padded behind their ends, where no token of theirs
looks, and each goes on from its own length. What a sequence gets does not depend on its neighbours.

Shapes: B sequences, S tokens of the longest prompt, T places of the cache.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dsv2.model.transformer import DecoderLayer, DeepseekV2


@dataclass
class Cache:
    layers: list[tuple[Tensor, Tensor]]  # of each layer what its attention's `cached` returns, [B, T, ...]
    lengths_B: Tensor  # int64: tokens of each sequence so far
    longest: int  # the largest of them, known without asking the device

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors of the layers really occupy."""
        return sum(tensor.untyped_storage().nbytes() for pair in self.layers for tensor in pair)


def _layers(model: DeepseekV2) -> Iterable[DecoderLayer]:
    return cast(Iterable[DecoderLayer], model.model.layers)


def _room(kept: Tensor, capacity: int) -> Tensor:
    """A tensor for `capacity` places, of which the first hold what is kept [B, S, ...] of the prompts."""
    places = kept.new_zeros(len(kept), capacity, *kept.shape[2:])
    places[:, : kept.shape[1]] = kept
    return places


@torch.no_grad()
def prefill(model: DeepseekV2, ids_BS: Tensor, lengths_B: Tensor, capacity: int) -> tuple[Tensor, Cache]:
    """Read the prompts: fp32 logits [B, vocab] of the token behind each, and a cache of T = `capacity`.

    Args:
        model: in eval mode (so that no token is dropped), with all experts.
        ids_BS: int64, each row a prompt and anything behind it.
        lengths_B: int64, the prompts' lengths, at least 1.
    """
    batch, longest = ids_BS.shape
    assert not model.training
    assert longest <= capacity
    cos_SP, sin_SP = model.rope_tables(torch.arange(longest, device=ids_BS.device))
    rows_B = torch.arange(batch, device=ids_BS.device)
    x_BSD = model.model.embed_tokens(ids_BS)
    layers = []
    for layer in _layers(model):
        x_BSD, normed_BSD = layer.input_layernorm(x_BSD)
        first, second = layer.self_attn.cached(normed_BSD, cos_SP, sin_SP)
        layers.append((_room(first, capacity), _room(second, capacity)))
        x_BSD, _, _ = layer.feed_forward(x_BSD, layer.self_attn(normed_BSD, cos_SP, sin_SP), rows_B)
    last_BD = model.model.norm(x_BSD[rows_B, lengths_B - 1])
    return model.lm_head(last_BD).float(), Cache(layers, lengths_B.clone(), longest)


@torch.no_grad()
def decode(model: DeepseekV2, ids_B: Tensor, cache: Cache) -> Tensor:
    """Append one token to each sequence, in place: fp32 logits [B, vocab] of the token behind it."""
    positions_B1, rows_B = cache.lengths_B.unsqueeze(1), torch.arange(len(ids_B), device=ids_B.device)
    cache.longest += 1
    cos_B1P, sin_B1P = model.rope_tables(positions_B1)
    # Behind a sequence's own end lies padding, or room that longer ones have filled in their own rows.
    visible_BT = torch.arange(cache.longest, device=ids_B.device) <= positions_B1
    x_B1D = model.model.embed_tokens(ids_B).unsqueeze(1)
    for layer, pair in zip(_layers(model), cache.layers, strict=True):
        x_B1D, normed_B1D = layer.input_layernorm(x_B1D)
        new = layer.self_attn.cached(normed_B1D, cos_B1P, sin_B1P)
        for places, kept in zip(pair, new, strict=True):
            places[rows_B, cache.lengths_B] = kept.squeeze(1)
        first, second = (places[:, : cache.longest] for places in pair)
        attended_B1D = layer.self_attn.decode(normed_B1D, cos_B1P, sin_B1P, first, second, visible_BT)
        x_B1D, _, _ = layer.feed_forward(x_B1D, attended_B1D, rows_B)
    cache.lengths_B += 1
    return model.lm_head(model.model.norm(x_B1D.squeeze(1))).float()
