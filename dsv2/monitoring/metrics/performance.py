"""How fast steps are, and how much memory they take."""

import resource
from typing import TYPE_CHECKING

from dsv2.config.schema import Config
from dsv2.model.sizes import flops_per_token
from dsv2.monitoring.metrics.base import Metric, Panel, Producer, Section, When, Window
from dsv2.parallel.gpus import peak_flops

if TYPE_CHECKING:
    from dsv2.checkpoint.state import Saved
    from dsv2.parallel.mesh import Mesh

SPEED = Panel(Section.performance, "Speed")
TIME = Panel(Section.performance, "Time of a step")
SAVE = Panel(Section.performance, "Time of a save", smooth=False)


class Performance(Producer[Window]):
    when = When.step
    metrics = (
        Metric(name="perf/tok_s", unit="tokens per second", meaning="of all ranks together", panel=SPEED),
        Metric(name="perf/tok_s_gpu", unit="tokens per second", meaning="of one rank", panel=SPEED),
        Metric(
            name="perf/tflops",
            unit="TFLOP/s of one rank",
            meaning="6 x active matrix weights, plus causal attention, per token",
            panel=Panel(Section.performance, "Arithmetic"),
        ),
        Metric(
            name="perf/mfu",
            unit="0 to 1",
            meaning="`perf/tflops` as a share of the GPU's dense bf16 peak; only on known GPUs",
            panel=Panel(Section.performance, "Share of the GPU's peak"),
        ),
        Metric(name="perf/step_s", unit="seconds", meaning="a whole step", panel=TIME),
        Metric(name="perf/data_s", unit="seconds", meaning="waiting for data, per step", panel=TIME),
        Metric(
            name="perf/mem_gib",
            unit="GiB, rank 0",
            meaning="peak memory: allocated by CUDA; on the CPU, resident",
            panel=Panel(Section.performance, "Peak memory", smooth=False),
        ),
    )

    def __init__(self, config: Config, mesh: "Mesh") -> None:
        super().__init__(config, mesh)
        self._flops = flops_per_token(config.model, config.data.sequence_length)
        self._peak: float | None = None
        if mesh.device.type == "cuda":
            import torch

            self._peak = peak_flops(torch.cuda.get_device_name(mesh.device))

    def values(self, seen: Window) -> dict[str, float]:
        tokens_per_second = (seen.plan.tokens_after - seen.plan.tokens) / seen.seconds
        flops_of_rank = tokens_per_second / self.mesh.plan.world * self._flops
        values = {
            "perf/tok_s": tokens_per_second,
            "perf/tok_s_gpu": tokens_per_second / self.mesh.plan.world,
            "perf/tflops": flops_of_rank / 1e12,
            "perf/step_s": seen.seconds,
            "perf/data_s": seen.data_seconds,
            "perf/mem_gib": self._peak_memory_gib(),
        }
        if self._peak is not None:
            values["perf/mfu"] = flops_of_rank / self._peak
        return values

    def _peak_memory_gib(self) -> float:
        if self.mesh.device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self.mesh.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


class Saving(Producer["Saved"]):
    """How long saves take. A save ends at another time on every rank, so `values` sums nothing over ranks."""

    when = When.save
    metrics = (
        Metric(
            name="perf/save_stop_s",
            unit="seconds, rank 0",
            meaning="for which training stopped: to copy, and if the next save had to wait for this one",
            panel=SAVE,
        ),
        Metric(
            name="perf/save_s",
            unit="seconds, rank 0",
            meaning="from the save's beginning until the checkpoint was complete",
            panel=SAVE,
        ),
    )

    def values(self, seen: "Saved") -> dict[str, float]:
        return {"perf/save_stop_s": seen.stopped_s + seen.waited_s, "perf/save_s": seen.seconds}
