"""Time optimizer steps of any model through the engine that trains it.

    python launch/benchmark.py --steps 10 model=lite_slice parallel=gpu parallel.micro_batch_size=8
    torchrun --nproc_per_node=8 launch/benchmark.py model=lite parallel=gpu parallel.expert_parallel_size=8

Random tokens, data.sequence_length long (4096 unless given); routing as the model's weights have it.
Prints a row and, with --out FILE, writes it as JSON; --profile FILE writes a trace for chrome://tracing
and prints where the GPU's time goes.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from dsv2.compose import compose_config, launched_ranks
from dsv2.config import Config
from dsv2.errors import UserError
from dsv2.validate import validate


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time optimizer steps.")
    parser.add_argument("overrides", nargs="*", help="of the configuration, as for train.py")
    parser.add_argument("--steps", type=int, default=10, help="steps that count (10)")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them (4)")
    parser.add_argument("--out", help="write the row there, as JSON")
    parser.add_argument("--profile", help="write a trace of one step there")
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


def measure(config: Config, steps: int, warmup: int, profile: str | None) -> dict[str, Any]:
    """Train on random tokens and return what a step took, on this rank."""
    import torch

    from data.stream import Batch
    from dsv2.engine import Engine, build_model
    from dsv2.model.flops import flops_per_token, peak_flops
    from dsv2.parallel.deepspeed_moe import start_mesh
    from dsv2.parallel.mesh import end_process_group, pick_device

    rank, world_size = launched_ranks()
    parallel, length = config.parallel, config.data.sequence_length
    mesh = start_mesh(pick_device(parallel), rank, world_size, parallel.expert_parallel_size)
    engine = Engine(build_model(config.model, parallel, config.seed, mesh), config.optim, parallel, mesh)
    on_gpu = mesh.device.type == "cuda"
    generator = torch.Generator().manual_seed(rank)
    count = config.optim.batch_size // (parallel.micro_batch_size * world_size)

    def step() -> float:
        shape = (parallel.micro_batch_size, length + 1)
        batches = []
        for _ in range(count):
            tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
            batches.append(Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(len(tokens))))
        start = time.perf_counter()
        engine.train_step(batches, config.optim.lr)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(warmup):
        step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(step() for _ in range(steps))
    tokens = config.optim.batch_size * length / world_size
    flops = tokens * flops_per_token(config.model, length) / seconds
    peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
    row = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "layers": config.model.num_hidden_layers,
        "kernels": parallel.kernels.value,
        "micro_batch": parallel.micro_batch_size,
        "length": length,
        "step_ms": seconds * 1e3,
        "tok_s_gpu": tokens / seconds,
        "tflops": flops / 1e12,
        "mfu": flops / peak if peak else None,
        "mem_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }
    if profile and mesh.is_main:
        _profile(step, profile)
    end_process_group()
    return row


def _profile(step: Any, file: str) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
    recorded.export_chrome_trace(file)
    print(
        recorded.key_averages().table(
            sort_by="self_device_time_total", row_limit=40, max_name_column_width=70
        )
    )


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    rank, world_size = launched_ranks()
    try:
        config = configuration(arguments.overrides, world_size)
        row = measure(config, arguments.steps, arguments.warmup, arguments.profile)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if rank == 0:
        print(
            "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
            flush=True,
        )
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
