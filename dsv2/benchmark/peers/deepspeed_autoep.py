"""DeepSpeed's AutoEP over transformers' model: it replaces every mixture of experts, and adds ZeRO-1."""

from typing import Any

from dsv2.benchmark.peers import Work
from dsv2.benchmark.peers.transformers import build_model
from dsv2.benchmark.timing import Step

REQUIRES = {"deepspeed": "==0.19.8", "transformers": ">=5.0"}
ALONE = ()
STATES = "fp32"
ABOUT = "AutoEP's defaults over transformers with SDPA attention; ZeRO-1, fp32 masters and moments"


def engine_config(work: Work) -> dict[str, Any]:
    import torch

    return {
        "train_micro_batch_size_per_gpu": work.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": work.optim.grad_clip,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": work.dtype == torch.bfloat16},
        "expert_parallel": {"enabled": True, "autoep_size": 1, "preset_model": "deepseek_v2"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def build(work: Work) -> Step:
    import deepspeed
    import torch
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from torch import Tensor

    from dsv2.parallel.plan import ParallelPlan
    from dsv2.parallel.start import start_mesh

    start_mesh(ParallelPlan(), 0, work.device)
    optim = work.optim

    def adam(parameters: Any) -> torch.optim.Optimizer:
        groups = {"params": list(parameters), "name": "all"}
        return torch.optim.AdamW(
            split_params_into_different_moe_groups_for_optimizer(groups),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    engine: Any
    engine, *_ = deepspeed.initialize(model=build_model(work), optimizer=adam, config=engine_config(work))

    def step(micro_batches: list[Tensor]) -> float:
        (tokens,) = micro_batches
        tokens = tokens.to(work.device)
        labels = tokens[:, 1:].contiguous()
        loss = engine(input_ids=tokens[:, :-1], labels=labels, shift_labels=labels).loss
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step
