"""The DeepSeek-V2 decoder (arXiv 2405.04434, section 2).

Shapes: B sequences, S tokens a sequence, D hidden_size, L MoE layers, P rotary pairs. Module names
are those of the published weights (`model.layers.3.self_attn.kv_b_proj.weight`).
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsv2.config.schema import ModelConfig
from dsv2.kernels.sets import KernelSet
from dsv2.model.attention.base import AttentionModule
from dsv2.model.attention.kinds import attention_kind
from dsv2.model.norm import ResidualNorm, RMSNorm
from dsv2.model.rope import Angles, rope_tables
from dsv2.moe.balance import BalanceLosses
from dsv2.moe.execution import Execution
from dsv2.moe.experts import SwiGLU
from dsv2.moe.layer import MoELayer
from dsv2.moe.stats import RoutingStats


class DecoderLayer(nn.Module):
    """Attention, then the dense FFN or the mixture of experts, each behind a norm and a residual."""

    def __init__(self, config: ModelConfig, dense: bool, execution: Execution):
        super().__init__()
        norm = (config.hidden_size, config.rms_norm_eps, execution.kernels)
        self.input_layernorm = ResidualNorm(*norm)
        self.self_attn: AttentionModule = attention_kind(config).build(config, execution.kernels)
        self.post_attention_layernorm = ResidualNorm(*norm)
        self.mlp = (
            SwiGLU(config.hidden_size, config.intermediate_size, execution.kernels)
            if dense
            else (execution.moe_layer or MoELayer)(config, execution)
        )

    def forward(
        self, x_BSD: Tensor, angles: Angles, sequence_ids_B: Tensor
    ) -> tuple[Tensor, BalanceLosses | None, RoutingStats | None]:
        x_BSD, normed_BSD = self.input_layernorm(x_BSD)
        return self.feed_forward(x_BSD, self.self_attn(normed_BSD, angles), sequence_ids_B)

    def feed_forward(
        self, x_BSD: Tensor, attended_BSD: Tensor, sequence_ids_B: Tensor
    ) -> tuple[Tensor, BalanceLosses | None, RoutingStats | None]:
        """What follows the attention, whose result is not yet added to the stream x."""
        x_BSD, normed_BSD = self.post_attention_layernorm(x_BSD, attended_BSD)
        if isinstance(self.mlp, MoELayer):
            return self.mlp(normed_BSD, sequence_ids_B, x_BSD)
        return x_BSD + self.mlp(normed_BSD), None, None


class Decoder(nn.Module):
    """Embedding, layers and the last norm; `model.*` of the published weights."""

    def __init__(self, config: ModelConfig, execution: Execution):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index < config.first_k_dense_replace, execution)
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, execution.kernels)


class ModelOutput(NamedTuple):
    loss: Tensor  # [] lm_loss + the balance losses by their alphas: what backward starts from
    lm_loss: Tensor  # [] mean cross-entropy a token, nats
    balance: BalanceLosses  # raw, [L] each
    stats: RoutingStats  # stacked over the L layers


class OutputHead(nn.Linear):
    """Logits, or with labels the loss itself: whole logits are the largest tensor of all."""

    def __init__(self, hidden_size: int, vocab_size: int, kernels: KernelSet):
        super().__init__(hidden_size, vocab_size, bias=False)
        self.kernels = kernels

    def forward(self, hidden: Tensor, labels_T: Tensor | None = None) -> Tensor:
        """[..., vocab] for hidden states [..., D]; with labels the mean cross-entropy, for [T, D]."""
        if labels_T is None:
            return super().forward(hidden)
        return self.kernels.head_loss(hidden, self.weight, labels_T)


class DeepseekV2(nn.Module):
    """Decoder with an untied output head and the training loss.

    Args:
        config: sizes and balance recipe.
        execution: ranks, kernels and the like, which change no result.
    """

    def __init__(self, config: ModelConfig, execution: Execution | None = None):
        super().__init__()
        self.config, self.execution = config, execution or Execution()
        self.model = Decoder(config, self.execution)
        self.lm_head = OutputHead(config.hidden_size, config.vocab_size, self.execution.kernels)

    def decoder_layers(self) -> list[DecoderLayer]:
        """Return the layers in order."""
        return cast(list[DecoderLayer], list(self.model.layers))

    def angles(self, positions: Tensor) -> Angles:
        """Return RoPE's angles of tokens at these positions."""
        config = self.config
        width = attention_kind(config).rotary_width(config)
        return rope_tables(positions, width, config.rope_theta, config.rope_scaling)

    def hidden_states(
        self, input_ids_BS: Tensor, sequence_ids_B: Tensor
    ) -> tuple[Tensor, list[BalanceLosses], list[RoutingStats]]:
        """[B, S, D] after the last norm, with every MoE layer's losses and statistics."""
        x_BSD = self.model.embed_tokens(input_ids_BS)
        angles = self.angles(torch.arange(input_ids_BS.shape[1], device=x_BSD.device))
        losses, stats = [], []
        for layer in self.model.layers:
            if self.execution.recompute and self.training:
                x_BSD, loss, stat = checkpoint(layer, x_BSD, angles, sequence_ids_B, use_reentrant=False)
            else:
                x_BSD, loss, stat = layer(x_BSD, angles, sequence_ids_B)
            if loss is not None:
                losses.append(loss)
                stats.append(stat)
        return self.model.norm(x_BSD), losses, stats

    def forward(
        self, input_ids_BS: Tensor, labels_BS: Tensor | None, sequence_ids_B: Tensor
    ) -> ModelOutput | Tensor:
        """The training loss of B sequences, or, without labels, the fp32 logits [B, S, vocab]."""
        hidden_BSD, losses, stats = self.hidden_states(input_ids_BS, sequence_ids_B)
        if labels_BS is None:
            return self.lm_head(hidden_BSD).float()
        lm_loss = self.lm_head(hidden_BSD.flatten(0, 1), labels_BS.flatten())
        balance = BalanceLosses(*(torch.stack(parts) for parts in zip(*losses, strict=True)))
        recipe = self.config.balance
        loss = (
            lm_loss
            + recipe.alpha_expert * balance.expert.sum()
            + recipe.alpha_device * balance.device.sum()
            + recipe.alpha_comm * balance.comm.sum()
        )
        return ModelOutput(
            loss, lm_loss.detach(), BalanceLosses(*(x.detach() for x in balance)), RoutingStats.stack(stats)
        )
