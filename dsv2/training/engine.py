"""A model and its optimizer as one object: it trains a step, evaluates a batch, saves and loads.

The loss is a mean over the micro-batch's tokens and sequences. All micro-batches have the same size, and
DeepSpeed averages gradients over ranks. Dividing by the number of micro-batches therefore gives the
gradient of the mean over the global batch, whatever the layout.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data.streams.base import Batch
from dsv2.checkpoint.state import Found, Loaded, RunState, Snapshot
from dsv2.checkpoint.store import CheckpointStore
from dsv2.config.schema import OptimConfig, ParallelConfig, RuntimeConfig
from dsv2.errors import Diverged
from dsv2.model.transformer import DeepseekV2, ModelOutput
from dsv2.moe.balance import BalanceLosses
from dsv2.moe.stats import RoutingStats
from dsv2.optimizers.rules import find_optimizer
from dsv2.parallel.mesh import Mesh, peers_watched
from dsv2.parallel.plan import Dim
from dsv2.parallel.progress import Part
from dsv2.parallel.zero.stages import find_stage
from dsv2.training.results import StepResult


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
        self.mesh = mesh
        self.sharded = find_stage(parallel.zero_stage, runtime.precision).wrap(
            model,
            find_optimizer(optim.name),
            optim=optim,
            runtime=runtime,
            mesh=mesh,
            kernels=model.execution.kernels,
        )
        # Routers that change after each step, one per MoE layer. Without buffers, a router cannot change.
        self._routers: list[Any] = [
            m for m in model.modules() if hasattr(m, "after_step") and list(m.buffers())
        ]

    @property
    def deepspeed(self) -> Any:
        """Return DeepSpeed's engine."""
        return self.sharded.engine

    @property
    def model(self) -> nn.Module:
        return self.deepspeed.module

    def snapshot(self, state: RunState) -> Snapshot:
        """Return what this rank contributes to a checkpoint. Its tensors are views. Collective.

        Raises:
            Diverged: on every rank, if a weight or a state is not a finite number on any rank.
        """
        if self.mesh[Dim.world].agree(not self._is_finite()):
            raise Diverged(
                f"step {state.step}: the update made weights or optimizer states infinite or NaN; this step "
                "is not saved; try a lower optim.lr"
            )
        shards = list(self.sharded.shards())
        return Snapshot(shards, state, float(self.sharded.steps_done), torch.get_rng_state())

    def _is_finite(self) -> bool:
        """Return whether all weights, optimizer states and buffers of this rank are finite numbers."""
        tensors = [tensor for shard in self.sharded.shards() for tensor in shard.tensors.values()]
        return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())

    def load(self, store: CheckpointStore, found: Found) -> Loaded:
        """Load weights, optimizer, buffers and random state. Collective; see `CheckpointStore.load`."""
        loaded = store.load(found, self.sharded.shards(), self.mesh)
        self.sharded.steps_done = loaded.optimizer_steps
        self.sharded.refresh()
        return loaded

    @peers_watched()
    def train_step(
        self, micro_batches: Sequence[Batch], lr: float, accepts: Callable[[float], bool] | None = None
    ) -> StepResult:
        """Take one optimizer step over this rank's micro-batches.

        Args:
            accepts: returns whether the update may be applied, given the loss; the same on every rank.
        """
        begin = time.perf_counter()
        count = len(micro_batches)
        self.deepspeed.train()
        sums: Tensor | None = None
        stats: RoutingStats | None = None
        for index, batch in enumerate(micro_batches):
            self.mesh.progress.enter(Part.compute)
            with self.mesh.clock.working(self.mesh.device):
                output: ModelOutput = self.sharded.forward(*self.inputs(batch))
            self.sharded.backward(output.loss / count, last=index == count - 1)
            losses = torch.cat((torch.stack((output.loss.detach(), output.lm_loss)), *output.balance))
            sums = losses if sums is None else sums + losses
            stats = output.stats if stats is None else stats.plus(output.stats)
        assert sums is not None, "a step has at least one micro-batch"
        assert stats is not None
        self.mesh.progress.enter(Part.optimizer)
        # The loss is read before the step only if somebody judges it: reading waits for the GPU.
        means = self._means(sums / count) if accepts else []
        updated = accepts is None or accepts(means[0])
        grad_norm = self.sharded.step(lr, apply=updated)
        if updated:
            self._after_step(stats)
        means = means or self._means(sums / count)
        layers = len(means[2:]) // 3
        times = self.mesh.clock.take()
        return StepResult(
            loss=means[0],
            lm_loss=means[1],
            balance=BalanceLosses(*torch.tensor(means[2:]).split(layers)),
            grad_norm=grad_norm,
            stats=stats,
            wait_ms=times.wait_ms,
            work_ms=times.work_ms,
            data_s=self.mesh.progress.take_data_s(),
            seconds=time.perf_counter() - begin,
            updated=updated,
        )

    def _means(self, losses: Tensor) -> list[float]:
        """Return the means over the global batch."""
        # In fp64, so that equal losses stay equal. A pipeline stage has zeros for what other stages compute.
        total = self.mesh[Dim.world].sum(losses.double())
        return (total / self.mesh[Dim.dp].size).tolist()

    @torch.no_grad()
    def _after_step(self, stats: RoutingStats) -> None:
        """Give each router with an `after_step` its layer's load of this step, summed over all ranks."""
        if not self._routers:
            return
        load_LE = self.mesh[Dim.dp].sum(stats.load_E)
        for router, load_E in zip(self._routers, load_LE, strict=True):
            router.after_step(load_E)

    @torch.no_grad()
    def lm_losses(self, batch: Batch) -> Tensor:
        """Return the cross-entropy of every label, fp32 [B, S], in nats; nothing is dropped."""
        self.deepspeed.eval()
        ids, labels, sequence_ids = self.inputs(batch)
        logits = self.sharded.forward(ids, None, sequence_ids)
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return losses.view_as(labels)

    @torch.no_grad()
    def logits(self, input_ids_BS: Tensor) -> Tensor:
        """Return the logits, fp32 [B, S, vocab]. Collective: inputs have the same shape on every rank."""
        self.deepspeed.eval()
        ids = input_ids_BS.to(self.mesh.device)
        return self.sharded.forward(ids, None, torch.zeros(len(ids), dtype=torch.long, device=ids.device))

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        device = self.mesh.device
        return batch.input_ids.to(device), batch.labels.to(device), batch.sequence_ids.to(device)
