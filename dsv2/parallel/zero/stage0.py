"""ZeRO-0, fp32 only: every rank keeps all optimizer states of its parameters, in torch's own optimizer."""

from collections.abc import Iterator
from typing import Any

from dsv2.config.schema import OptimConfig, RuntimeConfig
from dsv2.optimizers.base import GroupSizes
from dsv2.parallel.zero.base import FP32, Job, Range, Sharded, States, ZeroStage, copied_into_buckets
from dsv2.parallel.zero.experts import is_expert, place


class Replicated(Sharded):
    """Every rank updates the model's own parameters."""

    def ranges(self) -> Iterator[Range]:
        names = self.names
        for index, group in enumerate(self.torch_optimizer.param_groups):
            for parameter in group["params"]:
                numel = parameter.numel()
                offset, total = place(parameter, numel)
                yield Range(
                    name=names[id(parameter)],
                    offset=offset,
                    total=total,
                    group=index,
                    owner=parameter,
                    start=0,
                    length=numel,
                )

    def refresh(self) -> None:
        """Do nothing: the optimizer holds the model's own parameters."""

    def step(self, lr: float, *, apply: bool = True) -> float:
        norm = self._clip()
        self.update(lr, apply=apply)
        return norm

    def _clip(self) -> float:
        """Clip the reduced gradients by their norm over all experts, and return it."""
        from dsv2.kernels.sets import REFERENCE

        parameters = [p for p in self.engine.module.parameters() if p.grad is not None]
        dense = [p.grad for p in parameters if not is_expert(p)]
        experts = [p.grad for p in parameters if is_expert(p)]
        squares = (REFERENCE.sum_of_squares(gradients) for gradients in (dense, experts))
        norm = self.mesh.gradient_norm(*squares)
        for gradient in dense + experts:
            gradient.mul_((self.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        return float(norm)


class Stage0(ZeroStage):
    number = 0
    sharded = Replicated

    def settings(self, optim: OptimConfig, runtime: RuntimeConfig, ranks: int) -> dict[str, Any]:
        # DeepSpeed's own clipping gets the norm of experts wrong; `step` clips instead.
        return super().settings(optim, runtime, ranks) | {"gradient_clipping": 0.0}

    def owned(self, group: GroupSizes) -> int:
        return group.elements

    def states(self, job: Job) -> States:
        weights = FP32 * self.all_owned(job)
        return States(weights=weights, gradients=0, masters=0, moments=self.moments(job), buffers=0)

    def traffic(self, micro_batches: int, weight_bytes: int) -> float:
        return 2 * weight_bytes  # gradients summed

    def reduction(self, job: Job) -> float:
        return copied_into_buckets(job)

    def stepping(self, job: Job) -> float:
        return 0
