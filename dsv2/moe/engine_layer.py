"""The MoE layer as a subclass of the type that DeepSpeed's engine recognises as a mixture of experts.

Only training builds its model with this class (training/build.py): generation and export need no DeepSpeed.
parallel/zero marks the experts' parameters after they are allocated.
"""

from typing import Any

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import nn

from dsv2.config.schema import ModelConfig
from dsv2.moe.execution import Execution
from dsv2.moe.layer import MoELayer


class _Recognised(AutoEPMoELayer):
    """DeepSpeed's type with an empty constructor. DeepSpeed's constructor would build another layer."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class EngineMoELayer(MoELayer, _Recognised):
    """`MoELayer` with the attributes that the engine reads."""

    def __init__(self, config: ModelConfig, execution: Execution):
        super().__init__(config, execution)
        experts = self.experts
        self.num_experts = experts.n_experts
        self.num_local_experts = experts.n_local
        self.ep_size = experts.n_experts // experts.n_local
        self.ep_rank = experts.first_expert // experts.n_local
        self.ep_group_name = f"ep_size_{self.ep_size}"

    def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the layer was built with its groups."""
