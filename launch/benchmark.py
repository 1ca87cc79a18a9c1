"""Time optimizer steps of any model through the engine that trains it, and see where the time goes.

    python launch/benchmark.py --steps 10 model=lite_slice parallel=gpu parallel.micro_batch_size=8
    torchrun --nproc_per_node=8 launch/benchmark.py model=lite parallel=gpu parallel.expert_parallel_size=8

Random tokens, data.sequence_length long (4096 unless given); routing as the model's weights have it.
Prints a row and, of one more step, the share of each part; --out FILE writes both as JSON, and
--profile FILE keeps that step's trace for chrome://tracing and prints its top kernels.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from dsv2.compose import compose_config, launched_ranks, local_processes
from dsv2.config import Config
from dsv2.errors import UserError
from dsv2.validate import validate


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time optimizer steps.")
    parser.add_argument("overrides", nargs="*", help="of the configuration, as for train.py")
    parser.add_argument("--steps", type=int, default=10, help="steps that count (10)")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them (4)")
    parser.add_argument("--out", help="write the figures there, as JSON")
    parser.add_argument("--profile", help="write a trace of one step there, and print its top kernels")
    return parser.parse_args(argv)


def configuration(overrides: list[str], world_size: int) -> Config:
    """The overrides' configuration for random data: one micro-batch a rank and step unless given."""
    given = {item.split("=", 1)[0].lstrip("+") for item in overrides}
    defaults = {"data": "local", "data.path": "none", "data.sequence_length": "4096"}
    config = compose_config([f"{k}={v}" for k, v in defaults.items() if k not in given] + overrides)
    if "optim.batch_size" not in given:
        config.optim.batch_size = config.parallel.micro_batch_size * world_size
    validate(config, world_size)
    return config


def measure(config: Config, steps: int, warmup: int, profile: Path | None) -> dict[str, Any]:
    """Train on random tokens and return what a step took, on this rank."""
    from torch import Tensor, arange

    from data.stream import Batch
    from dsv2.engine import Engine, build_model
    from dsv2.parallel.deepspeed_moe import start_mesh
    from dsv2.parallel.mesh import end_process_group, pick_device
    from launch.timing import random_tokens, row, time_steps

    rank, world_size = launched_ranks()
    device = pick_device(config.parallel, local_processes())
    mesh = start_mesh(device, rank, world_size, config.parallel.expert_parallel_size)
    model = build_model(config.model, config.parallel, config.seed, mesh)
    engine = Engine(model, config.optim, config.parallel, mesh)
    tokens = random_tokens(config, rank, world_size)

    def step(micro_batches: list[Tensor]) -> float:
        batches = [Batch(t[:, :-1], t[:, 1:], arange(len(t))) for t in micro_batches]
        return engine.train_step(batches, config.optim.lr).loss

    timing = time_steps(step, tokens, device, steps, warmup)
    figures = row(config, device, timing, world_size)
    figures |= {
        "kernels": config.parallel.kernels.value,
        "optimizer_states": config.parallel.optimizer_states.value,
    }
    parts = _parts(engine, lambda: step(next(tokens)), profile if mesh.is_main else None)
    end_process_group()
    return figures | parts


def _parts(engine: Any, step: Any, keep: Path | None) -> dict[str, Any]:
    """The share of each part, as (JSON, text to print); the trace goes to `keep`."""
    from launch.parts import Ranges, parts_of_modules, read, record

    methods = [
        (engine.deepspeed, "step", "optimizer"),
        (engine.deepspeed, "allreduce_gradients", "gradients"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = keep or Path(folder) / "trace.json"
        with Ranges(parts_of_modules(engine.model), methods):
            record(step, file, engine.mesh.device.type == "cuda")
        found = read(file)
    return {
        "profiled_step_ms": found.step_ms,
        "parts": found.as_json(),
        "text": found.table() + (f"\n\n{found.top_kernels()}" if keep else ""),
    }


def one_line(row: dict[str, Any]) -> str:
    shown = {k: v for k, v in row.items() if not isinstance(v, list | dict)}
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    rank, world_size = launched_ranks()
    try:
        config = configuration(arguments.overrides, world_size)
        keep = Path(arguments.profile) if arguments.profile else None
        row = measure(config, arguments.steps, arguments.warmup, keep)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if rank == 0:
        text = row.pop("text")
        print(f"{one_line(row)}\n\n{text}", flush=True)
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
