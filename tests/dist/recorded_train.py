"""train.py that also writes each rank's own numbers to $RECORD/RANK.pt, for test_metrics.py."""

import os
import runpy
from pathlib import Path
from typing import Any

import torch

from data.streams.base import Batch
from dsv2.model.transformer import DeepseekV2, ModelOutput
from dsv2.parallel.clock import Times, WaitClock
from dsv2.parallel.environment import launched_ranks
from dsv2.training.engine import Engine

ROOT = Path(__file__).parents[2]
forward = DeepseekV2.forward
take = WaitClock.take
lm_losses = Engine.lm_losses
# Copies: what a collective may do to a tensor afterwards must not reach them.
passes: list[dict[str, Any]] = []  # of each micro-batch trained on
waits: list[float] = []  # of each step
evaluated: list[dict[str, Any]] = []  # of each micro-batch evaluated


def recorded_forward(self: DeepseekV2, *inputs: Any) -> Any:
    output = forward(self, *inputs)
    if isinstance(output, ModelOutput):
        numbers = output._asdict() | output.balance._asdict() | output.stats._asdict()
        passes.append(
            {k: v.detach().double().numpy().copy() for k, v in numbers.items() if torch.is_tensor(v)}
        )
    return output


def recorded_times(self: WaitClock) -> Times:
    times = take(self)
    waits.append(times.wait_ms)
    return times


def recorded_losses(self: Engine, batch: Batch) -> torch.Tensor:
    losses = lm_losses(self, batch)
    evaluated.append(
        {"ids": batch.sequence_ids.numpy(), "labels": batch.labels.numpy(), "nats": losses.numpy()}
    )
    return losses


def main() -> None:
    DeepseekV2.forward = recorded_forward
    WaitClock.take = recorded_times
    Engine.lm_losses = recorded_losses
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    target = Path(os.environ["RECORD"]) / f"{launched_ranks()[0]}.pt"
    torch.save({"passes": passes, "waits": waits, "evaluated": evaluated}, target)


if __name__ == "__main__":
    main()
