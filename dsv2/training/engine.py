"""The DeepSpeed engine behind three verbs: train a step, evaluate a batch, compute logits.

The loss is a mean over the micro-batch's tokens and sequences, all micro-batches are of one size, and
DeepSpeed averages gradients over ranks; dividing by the number of micro-batches therefore gives the
gradient of the mean over the global batch, whatever the layout.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor, nn

from data.streams.stream import Batch, Stream
from dsv2.config.schema import ModelConfig, OptimConfig, ParallelConfig, Precision, RuntimeConfig
from dsv2.hf.init_from import HFWeights
from dsv2.kernels.sets import REFERENCE, load_kernels
from dsv2.model.init import init_weights
from dsv2.model.transformer import DeepseekV2, ModelOutput
from dsv2.moe.balance import BalanceLosses
from dsv2.moe.execution import Execution
from dsv2.moe.stats import RoutingStats
from dsv2.parallel.mesh import Mesh
from dsv2.parallel.plan import Dim
from dsv2.parallel.zero.base import (
    Fragment,
    adopt,
    base_optimizer,
    fragments,
    is_expert,
    parameter_groups,
    refresh_model_weights,
)
from dsv2.parallel.zero.stage1_bf16 import ZeRO1BF16, expect, take_over


class StepResult(NamedTuple):
    """Means over the global batch, the same on every rank; the statistics are this rank's sums."""

    loss: float  # lm_loss + weighted balance losses
    lm_loss: float  # nats a token
    balance: BalanceLosses  # raw, [L] each
    grad_norm: float  # before clipping
    stats: RoutingStats


def deepspeed_config(
    optim: OptimConfig, parallel: ParallelConfig, runtime: RuntimeConfig, dp_size: int
) -> dict[str, Any]:
    """DeepSpeed's configuration, made from ours; there is no second one to write by hand."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": runtime.micro_batch_size,
        # The engine below scales the loss and marks the last micro-batch itself, as the batch may grow.
        "gradient_accumulation_steps": 1,
        "train_batch_size": runtime.micro_batch_size * dp_size,
        # ZeRO-0's own clipping gets the norm of experts wrong; `_clip_replicated` stands in.
        "gradient_clipping": optim.grad_clip if parallel.zero_stage else 0.0,
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if runtime.precision is Precision.bf16:
        # A gradient goes to its fp32 buffer as soon as it is there, and is freed.
        config["bf16"] = {"enabled": True, "immediate_grad_update": parallel.zero_stage == 1}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        if parallel.zero_stage == 1:
            # Else the step's fp32 gradients would be rounded to bf16 before the ranks' are added up, in bf16.
            # Stages 2 and 3 reduce each micro-batch's bf16 gradients, and would take GiB of copies for it.
            config["communication_data_type"] = "fp32"
    return config


def build_model(
    config: ModelConfig,
    runtime: RuntimeConfig,
    seed: int,
    mesh: Mesh,
    weights: HFWeights | None = None,
) -> DeepseekV2:
    """This rank's share of the model on its device, in its precision: fresh, or with the weights given."""
    kernels = load_kernels(runtime.kernels)
    with torch.device("meta"):  # so that memory is taken once, and in the precision it is used in
        execution = Execution(mesh[Dim.ep], runtime.recompute, kernels, mesh.clock)
        model = DeepseekV2(config, execution)
    dtype = torch.bfloat16 if runtime.precision is Precision.bf16 else torch.float32
    model.to(dtype).to_empty(device=mesh.device)
    if weights is None:
        init_weights(model, config.initializer_range, seed)
    else:
        weights.fill(model)
    return model


def share_of_step(stream: Stream, batch_size: int, micro_batch_size: int, mesh: Mesh) -> list[Batch]:
    """This rank's micro-batches of the next `batch_size` global sequences.

    Consecutive sequences go to consecutive ranks, so that the sequences which one EP group sees
    together depend on their number alone, not on how ranks and micro-batches make it up.
    """
    ranks = mesh[Dim.dp]
    together = micro_batch_size * ranks.size
    return [
        stream.take(together, ranks.rank * micro_batch_size, micro_batch_size)
        for _ in range(batch_size // together)
    ]


class Engine:
    """A model under DeepSpeed, with its optimizer."""

    def __init__(
        self,
        model: DeepseekV2,
        optim: OptimConfig,
        parallel: ParallelConfig,
        runtime: RuntimeConfig,
        mesh: Mesh,
    ):
        adopt(model, mesh)
        self.mesh, self.grad_clip = mesh, optim.grad_clip
        optimizer = torch.optim.AdamW(
            parameter_groups(model, mesh, optim.weight_decay),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )
        self.deepspeed: Any
        config = deepspeed_config(optim, parallel, runtime, mesh[Dim.dp].size)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the memory after every parameter group
            self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        take_over(self.deepspeed, mesh, model.execution.kernels, optim.states)

    @property
    def model(self) -> nn.Module:
        return self.deepspeed.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Adam itself; its state is keyed by `Fragment.owner`."""
        return base_optimizer(self.deepspeed)

    def fragments(self) -> Iterator[Fragment]:
        """Every range of fp32 weights that this rank owns."""
        return fragments(self.deepspeed)

    def refresh_weights(self) -> None:
        """Bring the model up to date after the fp32 weights were written to."""
        refresh_model_weights(self.deepspeed)

    def set_optimizer_steps(self, count: float) -> None:
        """Adam's count of its steps: torch's fused one keeps it beside the weights, ours on the host."""
        ours = isinstance(self.deepspeed.optimizer, ZeRO1BF16)
        for owner, state in self.optimizer.state.items():  # one tensor each: they count up in place
            state["step"] = torch.tensor(count, device="cpu" if ours else owner.device)

    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        """One optimizer step over this rank's micro-batches."""
        count = len(micro_batches)
        expect(self.deepspeed, count)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.train()
        sums: Tensor | None = None
        stats: RoutingStats | None = None
        for index, batch in enumerate(micro_batches):
            last = index == count - 1
            output: ModelOutput = self.deepspeed(*self._inputs(batch))
            self.deepspeed.set_gradient_accumulation_boundary(last)
            self.deepspeed.backward(output.loss / count, scale_wrt_gas=False)
            if last and self.deepspeed.zero_optimization_stage() == 0:
                grad_norm = self._clip_replicated()
            self.deepspeed.step()
            losses = torch.cat((torch.stack((output.loss.detach(), output.lm_loss)), *output.balance))
            sums = losses if sums is None else sums + losses
            stats = output.stats if stats is None else stats.plus(output.stats)
        assert sums is not None, "a step has at least one micro-batch"
        assert stats is not None
        if self.deepspeed.zero_optimization_stage() > 0:
            grad_norm = float(self.deepspeed.get_global_grad_norm())
        # In fp64, so that equal losses stay equal. A stage has zeros for what other stages compute.
        total = self.mesh[Dim.world].sum((sums / count).double())
        means = (total / self.mesh[Dim.dp].size).tolist()
        layers = len(means[2:]) // 3
        balance = BalanceLosses(*torch.tensor(means[2:]).split(layers))
        return StepResult(means[0], means[1], balance, grad_norm, stats)

    @torch.no_grad()
    def lm_losses(self, batch: Batch) -> Tensor:
        """Cross-entropy of every label, fp32 [B, S], in nats; without dropping."""
        self.deepspeed.eval()
        ids, labels, sequence_ids = self._inputs(batch)
        logits = self.deepspeed(ids, None, sequence_ids)
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return losses.view_as(labels)

    @torch.no_grad()
    def logits(self, input_ids_BS: Tensor) -> Tensor:
        """fp32 [B, S, vocab]; every rank must call it, with inputs of one shape."""
        self.deepspeed.eval()
        ids = input_ids_BS.to(self.mesh.device)
        return self.deepspeed(ids, None, torch.zeros(len(ids), dtype=torch.long, device=ids.device))

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        device = self.mesh.device
        return batch.input_ids.to(device), batch.labels.to(device), batch.sequence_ids.to(device)

    def _clip_replicated(self) -> float:
        """Clip reduced gradients that every rank holds whole (ZeRO-0): norm over all experts."""
        dense, experts = [], []
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                (experts if is_expert(parameter) else dense).append(parameter.grad)
        norm = self.mesh.gradient_norm(*(REFERENCE.sum_of_squares(grads) for grads in (dense, experts)))
        for grad in dense + experts:
            grad.mul_((self.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        return float(norm)
