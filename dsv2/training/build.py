"""One rank's share of the model, built on its device."""

import torch

from dsv2.config.schema import Config, ExpertExchange, ModelConfig, Precision, RuntimeConfig
from dsv2.hf.init_from import HFWeights
from dsv2.kernels.sets import load_kernels
from dsv2.model.init import init_weights, materialize
from dsv2.model.transformer import DeepseekV2
from dsv2.moe.engine_layer import EngineMoELayer
from dsv2.moe.execution import Execution
from dsv2.moe.memory import symmetric_buffer
from dsv2.moe.transport import SymmetricTransport, Transport
from dsv2.parallel.mesh import Mesh
from dsv2.parallel.micro_batch import micro_batch
from dsv2.parallel.plan import Dim
from dsv2.parallel.symmetric import SymmetricBuffer


def start_transport(config: Config, mesh: Mesh) -> Transport | None:
    """Return the transport that parallel.expert_exchange names; None is the all-to-all. Collective.

    Raises:
        UserError: the GPUs cannot reach one another's memory.
    """
    ep = mesh[Dim.ep]
    if config.parallel.expert_exchange is ExpertExchange.collective or ep.size == 1:
        return None
    rows, row_bytes = symmetric_buffer(micro_batch(config, ranks_per_token=1.0))
    return SymmetricTransport(SymmetricBuffer(ep, rows, row_bytes, mesh.device))


def build_model(
    config: ModelConfig,
    runtime: RuntimeConfig,
    seed: int,
    mesh: Mesh,
    weights: HFWeights | None = None,
    transport: Transport | None = None,
) -> DeepseekV2:
    """Return this rank's share of the model, in the run's precision, with fresh weights or with `weights`.

    Args:
        transport: as `start_transport` returns it.
    """
    execution = Execution(
        ep=mesh[Dim.ep],
        recompute=runtime.recompute,
        kernels=load_kernels(runtime.kernels),
        transport=transport,
        clock=mesh.clock,
        moe_layer=EngineMoELayer,
    )
    with torch.device("meta"):  # so that memory is allocated once, in the final precision
        model = DeepseekV2(config, execution)
    materialize(model, torch.bfloat16 if runtime.precision is Precision.bf16 else torch.float32, mesh.device)
    if weights is None:
        init_weights(model, config.initializer_range, seed)
    else:
        weights.fill(model)
    return model
