"""One decoder layer (arXiv 2405.04434, section 2): attention, then a dense FFN or the mixture of experts."""

from torch import Tensor, nn

from dsv2.config.schema import ModelConfig
from dsv2.model.attention.base import AttentionModule
from dsv2.model.attention.kinds import attention_kind
from dsv2.model.norm import ResidualNorm
from dsv2.model.rope import Angles
from dsv2.moe.execution import Execution
from dsv2.moe.experts import SwiGLU
from dsv2.moe.layer import MoELayer
from dsv2.moe.stats import LayerRouting


class DecoderLayer(nn.Module):
    """Two blocks, each with a norm before it and a residual connection around it."""

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
    ) -> tuple[Tensor, LayerRouting | None]:
        x_BSD, normed_BSD = self.input_layernorm(x_BSD)
        return self.feed_forward(x_BSD, self.self_attn(normed_BSD, angles), sequence_ids_B)

    def feed_forward(
        self, x_BSD: Tensor, attended_BSD: Tensor, sequence_ids_B: Tensor
    ) -> tuple[Tensor, LayerRouting | None]:
        """Run the second block. Return the residual stream and, in an MoE layer, what it reports.

        Args:
            x_BSD: the residual stream before the attention's output is added.
            attended_BSD: the attention's output.
            sequence_ids_B: positions of the sequences in the run's global order.
        """
        x_BSD, normed_BSD = self.post_attention_layernorm(x_BSD, attended_BSD)
        if isinstance(self.mlp, MoELayer):
            return self.mlp(normed_BSD, sequence_ids_B, x_BSD)
        return x_BSD + self.mlp(normed_BSD), None
