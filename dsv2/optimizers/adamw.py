"""AdamW (Loshchilov & Hutter, arXiv 1711.05101)."""

import zlib
from typing import TYPE_CHECKING, Any

from dsv2.config.rules import refuse, require_above_0, require_fraction
from dsv2.config.schema import OptimConfig
from dsv2.optimizers.base import Optimizer, Shard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dsv2.kernels.sets import KernelSet

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(Optimizer):
    name = "adamw"
    counts_steps = True

    def check(self, optim: OptimConfig) -> None:
        require_fraction("optim", optim, ["beta1", "beta2"])
        for name in ("beta1", "beta2"):
            if getattr(optim, name) == 1:
                refuse(f"optim.{name}", getattr(optim, name), "must be below 1")
        require_above_0("optim", optim, ["eps"])

    def state_names(self, group: str) -> tuple[str, ...]:
        return MOMENTS

    def update_copies(self, *, bf16_states: bool, fp32_gradient: bool) -> int:
        """Count the tensors that kernels/reference/adamw.py allocates."""
        if bf16_states:  # the gradient, the three new tensors, and int64 random bits three times
            return 1 + 3 + 3 * 2
        return 1 if fp32_gradient else 2

    def build(self, groups: list[dict[str, Any]], optim: OptimConfig) -> "torch.optim.Optimizer":
        from torch.optim import AdamW as TorchAdamW

        betas = (optim.beta1, optim.beta2)
        return TorchAdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)

    def update(
        self,
        shard: Shard,
        gradient: "Tensor",
        *,
        weight: "Tensor | None",
        scale: "Tensor",
        settings: dict[str, Any],
        step: int,
        kernels: "KernelSet",
    ) -> None:
        from dsv2.kernels.types import AdamWStep

        beta1, beta2 = settings["betas"]
        hyper = AdamWStep(
            lr=settings["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
            step=step,
            seed=zlib.crc32(shard.name.encode()) >> 1,
        )
        weights, mean, square = (shard.tensors[key] for key in ("fp32", *MOMENTS))
        kernels.adamw(
            weights, mean, square, gradient, scale=scale, weight=weight, hyper=hyper, first=shard.offset
        )
