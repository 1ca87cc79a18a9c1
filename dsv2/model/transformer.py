"""The DeepSeek-V2 decoder in one process, and its training loss (arXiv 2405.04434, section 2).

Module names are those of the published weights (`model.layers.3.self_attn.kv_b_proj.weight`).
"""

from typing import NamedTuple

from torch import Tensor

from dsv2.config.schema import ModelConfig
from dsv2.model.stages import Stage
from dsv2.moe.balance import BalanceLosses
from dsv2.moe.execution import Execution
from dsv2.moe.stats import RoutingStats


class ModelOutput(NamedTuple):
    loss: Tensor  # [] lm_loss plus the balance losses times their alphas; the backward pass starts here
    lm_loss: Tensor  # [] mean cross-entropy per token, nats
    balance: BalanceLosses  # of the MoE layers, before alpha
    stats: RoutingStats  # of the MoE layers


class DeepseekV2(Stage):
    """The whole model in one stage: all layers, an untied output head and the training loss.

    Args:
        config: sizes and balance recipe.
        execution: ranks, kernels and other settings that do not change the result.
    """

    def __init__(self, config: ModelConfig, execution: Execution | None = None):
        layers = range(config.num_hidden_layers)
        super().__init__(config, layers, first=True, last=True, execution=execution or Execution())

    def forward(
        self, input_ids_BS: Tensor, labels_BS: Tensor | None, sequence_ids_B: Tensor
    ) -> ModelOutput | Tensor:
        """Return the training loss of B sequences, or without labels the fp32 logits [B, S, vocab]."""
        hidden_BSD, routing = self.hidden_states(input_ids_BS, sequence_ids_B)
        if labels_BS is None:
            return self.lm_head(hidden_BSD).float()
        balance, stats = self.losses_and_stats(routing, input_ids_BS.shape[1])
        lm_loss = self.lm_head(hidden_BSD.flatten(0, 1), labels_BS.flatten())
        loss = self.with_balance(lm_loss, balance)
        detached = BalanceLosses(*(of_layers.detach() for of_layers in balance))
        return ModelOutput(loss, lm_loss.detach(), detached, stats)
