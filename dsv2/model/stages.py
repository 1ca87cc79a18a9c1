"""A stage: consecutive layers of the decoder. The first stage also has the embedding, the last one the head.

Every parameter keeps the name that it has in the whole model (`model.layers.17.mlp.gate.weight`). So
checkpoints and Hugging Face folders do not depend on the number of stages. `cut` in model/sizes.py chooses
the layers of each stage. model/transformer.py is the whole model as a single stage.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsv2.config.schema import ModelConfig
from dsv2.kernels.sets import KernelSet
from dsv2.model.attention.kinds import attention_kind
from dsv2.model.block import DecoderLayer
from dsv2.model.norm import RMSNorm
from dsv2.model.rope import Angles, rope_tables
from dsv2.model.sizes import is_dense
from dsv2.moe.balance import BalanceLosses, balance_losses
from dsv2.moe.execution import Execution
from dsv2.moe.stats import LayerRouting, RoutingStats, routing_stats, stack_sums


class Decoder(nn.Module):
    """Holds those parameters of one stage whose published names begin with `model.`."""

    def __init__(self, config: ModelConfig, layers: range, *, first: bool, last: bool, execution: Execution):
        super().__init__()
        if first:
            # Its own random values, on the meta device, would import torch's compiler: 2 s for nothing.
            values = torch.empty(config.vocab_size, config.hidden_size)
            self.embed_tokens = nn.Embedding.from_pretrained(values, freeze=False)
        self.layers = nn.ModuleDict(
            {str(number): DecoderLayer(config, is_dense(config, number), execution) for number in layers}
        )
        if last:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, execution.kernels)


class OutputHead(nn.Linear):
    """Computes logits, or with labels the loss, so that fused kernels need not hold all logits at once."""

    def __init__(self, hidden_size: int, vocab_size: int, kernels: KernelSet):
        super().__init__(hidden_size, vocab_size, bias=False)
        self.kernels = kernels

    def forward(self, hidden: Tensor, labels_T: Tensor | None = None) -> Tensor:
        """Return the logits of hidden states [..., D]; with labels, the mean cross-entropy of [T, D]."""
        if labels_T is None:
            return super().forward(hidden)
        return self.kernels.head_loss(hidden, self.weight, labels_T)


class StageOutput(NamedTuple):
    x_BSD: Tensor  # the residual stream; if this is the last stage, after the last norm
    routing: list[LayerRouting]  # of the stage's MoE layers


class Stage(nn.Module):
    """Consecutive layers.

    Args:
        config: the sizes and balance recipe of the whole model.
        layers: the numbers of this stage's layers.
        first: does the embedding belong to this stage?
        last: do the last norm and the output head belong to this stage?
        execution: ranks, kernels and other settings that do not change the result.
    """

    def __init__(self, config: ModelConfig, layers: range, *, first: bool, last: bool, execution: Execution):
        super().__init__()
        self.config = config
        self.execution = execution
        self.model = Decoder(config, layers, first=first, last=last, execution=execution)
        if last:
            self.lm_head = OutputHead(config.hidden_size, config.vocab_size, execution.kernels)

    def decoder_layers(self) -> list[DecoderLayer]:
        """Return the layers in order."""
        return cast(list[DecoderLayer], list(self.model.layers.values()))

    def angles(self, positions: Tensor) -> Angles:
        """Return RoPE's angles at these positions."""
        config = self.config
        width = attention_kind(config).rotary_width(config)
        return rope_tables(positions, width, config.rope_theta, config.rope_scaling)

    def hidden_states(self, x: Tensor, sequence_ids_B: Tensor) -> StageOutput:
        """Run the layers.

        Args:
            x: the previous stage's residual stream [B, S, D]; for the first stage, token ids [B, S].
            sequence_ids_B: positions of the sequences in the run's global order.
        """
        x_BSD = self.model.embed_tokens(x) if hasattr(self.model, "embed_tokens") else x
        angles = self.angles(torch.arange(x_BSD.shape[1], device=x_BSD.device))
        routing: list[LayerRouting] = []
        for layer in self.decoder_layers():
            if self.execution.recompute and self.training:
                x_BSD, reported = checkpoint(layer, x_BSD, angles, sequence_ids_B, use_reentrant=False)
            else:
                x_BSD, reported = layer(x_BSD, angles, sequence_ids_B)
            if reported is not None:
                routing.append(reported)
        if hasattr(self.model, "norm"):
            x_BSD = self.model.norm(x_BSD)
        return StageOutput(x_BSD, routing)

    def losses_and_stats(
        self, routing: list[LayerRouting], n_positions: int
    ) -> tuple[BalanceLosses, RoutingStats]:
        """Return the balance losses and the statistics of at least one layer, computed together.

        Args:
            n_positions: tokens of each sequence.
        """
        config = self.config
        sums = stack_sums(routing)
        top_k = config.num_experts_per_tok
        losses = balance_losses(sums, n_positions, top_k, config.n_group, config.topk_group)
        return losses, routing_stats(routing, sums, n_positions)

    def with_balance(self, loss: Tensor, balance: BalanceLosses) -> Tensor:
        """Return `loss` plus the layers' balance losses, each times its alpha: fp32 [] (section 2.2.3)."""
        recipe = self.config.balance
        expert, device, comm = (of_layers.sum() for of_layers in balance)
        return loss + recipe.alpha_expert * expert + recipe.alpha_device * device + recipe.alpha_comm * comm
