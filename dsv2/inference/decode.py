"""Decoding one token after another from a cache (arXiv 2405.04434, sections 2.1.2 and 2.1.3).

Prompts of different lengths share a batch. They are padded after their ends, where none of their tokens
attends, and each continues from its own length. A sequence's result does not depend on its neighbours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv2.model.transformer import DeepseekV2


@dataclass
class Cache:
    """What attention keeps of the tokens so far."""

    layers: list[tuple[Tensor, ...]]  # per layer the tensors of its attention's `cached`, [B, C, ...]
    lengths_B: Tensor  # int64: tokens of each sequence so far
    longest: int  # the largest length, known without asking the device

    @property
    def nbytes(self) -> int:
        """Return the bytes of the storages of all cached tensors."""
        return sum(tensor.untyped_storage().nbytes() for kept in self.layers for tensor in kept)


def _with_room(kept: Tensor, capacity: int) -> Tensor:
    """Copy what attention kept of the prompts, [B, S, ...], into a tensor with `capacity` positions."""
    positions = kept.new_zeros(len(kept), capacity, *kept.shape[2:])
    positions[:, : kept.shape[1]] = kept
    return positions


@torch.no_grad()
def prefill(model: DeepseekV2, ids_BS: Tensor, lengths_B: Tensor, capacity: int) -> tuple[Tensor, Cache]:
    """Read the prompts; return the next token's fp32 logits [B, vocab] and a cache of `capacity` positions.

    Args:
        model: in eval mode (so that no token is dropped), with all experts.
        ids_BS: int64, each row a prompt, padded with any ids.
        lengths_B: int64, the prompts' lengths, at least 1.
    """
    batch, longest = ids_BS.shape
    assert not model.training
    assert longest <= capacity
    angles = model.angles(torch.arange(longest, device=ids_BS.device))
    rows_B = torch.arange(batch, device=ids_BS.device)
    x_BSD = model.model.embed_tokens(ids_BS)
    layers = []
    for layer in model.decoder_layers():
        x_BSD, normed_BSD = layer.input_layernorm(x_BSD)
        kept = layer.self_attn.cached(normed_BSD, angles)
        layers.append(tuple(_with_room(tensor, capacity) for tensor in kept))
        x_BSD, _ = layer.feed_forward(x_BSD, layer.self_attn(normed_BSD, angles), rows_B)
    last_BD = model.model.norm(x_BSD[rows_B, lengths_B - 1])
    return model.lm_head(last_BD).float(), Cache(layers, lengths_B.clone(), longest)


@torch.no_grad()
def decode(model: DeepseekV2, ids_B: Tensor, cache: Cache) -> Tensor:
    """Append one token to each sequence of the cache; return the next token's fp32 logits [B, vocab]."""
    positions_B1 = cache.lengths_B.unsqueeze(1)
    rows_B = torch.arange(len(ids_B), device=ids_B.device)
    cache.longest += 1
    angles = model.angles(positions_B1)
    # After a sequence's own end lies padding, or room that longer sequences have filled in their own rows.
    visible_BC = torch.arange(cache.longest, device=ids_B.device) <= positions_B1
    x_B1D = model.model.embed_tokens(ids_B).unsqueeze(1)
    for layer, kept in zip(model.decoder_layers(), cache.layers, strict=True):
        x_B1D, normed_B1D = layer.input_layernorm(x_B1D)
        new = layer.self_attn.cached(normed_B1D, angles)
        for positions, tensor in zip(kept, new, strict=True):
            positions[rows_B, cache.lengths_B] = tensor.squeeze(1)
        filled = tuple(positions[:, : cache.longest] for positions in kept)
        attended_B1D = layer.self_attn.decode(normed_B1D, angles, filled, visible_BC)
        x_B1D, _ = layer.feed_forward(x_B1D, attended_B1D, rows_B)
    cache.lengths_B += 1
    return model.lm_head(model.model.norm(x_B1D.squeeze(1))).float()
