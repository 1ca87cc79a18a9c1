"""Measure optimizer steps: those of the engine that trains, or another framework's on the same work."""

import json
import sys
import tempfile
from argparse import Namespace
from itertools import count
from pathlib import Path
from typing import Any

from dsv2.benchmark.compare import OURS, alternate, run_turn, summary, table
from dsv2.benchmark.peers import NO_DATA, Work, adapter, check_peers
from dsv2.config.compose import compose_config
from dsv2.config.schema import Config, Precision
from dsv2.errors import UserError
from dsv2.parallel.environment import launched_ranks, local_processes, without_warnings_logged
from dsv2.planner.fit import check_machine
from dsv2.training.out_of_memory import memory_explained
from dsv2.training.validate import validate


def check_options(options: Namespace) -> None:
    """Refuse options that contradict each other or are out of range."""
    if options.balanced and options.against:
        raise UserError("--balanced: must be left out with --against; peers route as their routers choose")
    for name, least in (("steps", 1), ("warmup", 0), ("rounds", 1)):
        if (value := getattr(options, name)) < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    for name in ("out", "profile"):
        if file := getattr(options, name):
            _require_writable(f"--{name}", Path(file))


def _require_writable(option: str, file: Path) -> None:
    """Refuse a file that cannot be written before the measurement, not after it."""
    try:
        with file.open("ab"):
            return
    except OSError as error:
        raise UserError(f"{option} {file}: cannot be written ({error.strerror})") from None


def configuration(overrides: list[str], world_size: int) -> Config:
    """Return the configuration; unless overridden, data are random and a step is one micro-batch per rank."""
    overridden = {item.split("=", 1)[0].lstrip("+") for item in overrides}
    defaults = {"data": "local", "data.path": NO_DATA, "data.sequence_length": "4096"}
    defaults["optim.total_tokens"] = str(10**15)  # or large steps would be refused as longer than the run
    config = compose_config([f"{k}={v}" for k, v in defaults.items() if k not in overridden] + overrides)
    config.checkpoint.asynchronous = False  # nothing is saved, so no memory is needed for it
    if "optim.batch_size" not in overridden:
        config.optim.batch_size = config.runtime.micro_batch_size * world_size
    validate(config, world_size)
    return config


def measure(config: Config, device: Any, arguments: Namespace) -> dict[str, Any]:
    """Train, and return this rank's row of figures."""
    from torch import Tensor, arange, tensor

    with without_warnings_logged():
        from data.streams.base import Batch
        from dsv2.benchmark.timing import balance_routing, random_tokens, row, stream_tokens, time_steps
        from dsv2.parallel.plan import Dim, ParallelPlan
        from dsv2.parallel.start import end_process_group, start_mesh
        from dsv2.training.build import build_model, start_transport
        from dsv2.training.engine import Engine

    rank, world_size = launched_ranks()
    mesh = start_mesh(ParallelPlan.of(config.parallel, world_size), rank, device)
    transport = start_transport(config, mesh)
    model = build_model(config.model, config.runtime, config.seed, mesh, transport=transport)
    if arguments.balanced:
        balance_routing(model)
    engine = Engine(model, config.optim, config.parallel, config.runtime, mesh)
    random = config.data.path == NO_DATA
    dp = mesh[Dim.dp]
    tokens = random_tokens(config, dp.rank, dp.size) if random else stream_tokens(config, mesh)

    micro_batch_size = config.runtime.micro_batch_size
    numbers = count(dp.rank * micro_batch_size, micro_batch_size * dp.size)

    def step(micro_batches: list[Tensor]) -> float:
        batches = [Batch(t[:, :-1], t[:, 1:], next(numbers) + arange(len(t))) for t in micro_batches]
        return engine.train_step(batches, config.optim.lr).lm_loss

    timing = time_steps(step, tokens, device, arguments.steps, arguments.warmup)
    if timing.peak_gib is not None:
        peaks = mesh[Dim.world].gather(tensor([timing.peak_gib], device=device))
        timing = timing._replace(peak_gib=float(peaks.max()))
    precision = f"{config.runtime.precision.value}/{config.optim.states.value}"
    figures = row(config, device, timing, world_size, precision)
    figures |= {
        "kernels": config.runtime.kernels,
        "routing": "balanced" if arguments.balanced else "learned",
        "data": "random" if random else config.data.path,
    }
    if arguments.contender is None:
        keep = Path(arguments.profile) if arguments.profile and mesh.is_main else None
        batch = next(tokens)  # fetched outside the profiled step, whose parts are the model's
        figures |= _parts(engine, lambda: step(batch), keep)
    end_process_group()
    return figures


def _parts(engine: Any, step: Any, keep: Path | None) -> dict[str, Any]:
    """Profile one step; return the share of each part, also as text. The trace goes to `keep`."""
    from dsv2.profiling.ranges import ranges_of_engine, record
    from dsv2.profiling.trace import read

    with tempfile.TemporaryDirectory() as folder:
        file = keep or Path(folder) / "trace.json"
        with ranges_of_engine(engine):
            record(step, file, engine.mesh.device.type == "cuda")
        breakdown = read(file)
    return {
        "profiled_step_ms": breakdown.step_ms,
        "parts": breakdown.as_json(),
        "text": breakdown.table() + (f"\n\n{breakdown.top_kernels()}" if keep else ""),
    }


def measure_peer(config: Config, device: Any, arguments: Namespace) -> dict[str, Any]:
    """Train a peer in this process, and return its row of figures."""
    import torch

    from dsv2.benchmark.timing import random_tokens, row, time_steps

    runtime = config.runtime
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = torch.bfloat16 if runtime.precision is Precision.bf16 else torch.float32
    length = config.data.sequence_length
    work = Work(
        model=config.model,
        optim=config.optim,
        micro_batch=runtime.micro_batch_size,
        length=length,
        seed=config.seed,
        device=device,
        dtype=dtype,
    )
    peer = adapter(arguments.contender)
    timing = time_steps(
        peer.build(work), random_tokens(config, 0, 1), device, arguments.steps, arguments.warmup
    )
    precision = runtime.precision.value
    return row(config, device, timing, 1, f"{precision}/{peer.STATES or precision}")


def compare(sizes: dict[str, int | None], arguments: Namespace) -> tuple[dict[str, Any], str]:
    """Let the contenders take turns; return the result for JSON and the text to print."""

    def turn(name: str, number: int) -> dict[str, Any]:
        options = ["--steps", str(arguments.steps), "--warmup", str(arguments.warmup)]
        if name != OURS or number:  # our first turn also measures the parts
            options += ["--contender", name]
        elif arguments.profile:
            options += ["--profile", arguments.profile]
        overrides = list(arguments.overrides)
        if size := sizes.get(name):
            overrides += [f"runtime.micro_batch_size={size}", f"optim.batch_size={size}"]
        return run_turn([*options, *overrides])

    rows = alternate([OURS, *sizes], arguments.rounds, turn)
    first = rows[OURS][0].get("printed", "")
    for row in (row for rows_of_name in rows.values() for row in rows_of_name):
        row.pop("printed", None)
    summaries = [summary(name, rows_of_name) for name, rows_of_name in rows.items()]
    return {"rounds": arguments.rounds, "contenders": summaries}, f"\n{first}\n{table(summaries)}"


def announcement(config: Config, device: Any, sizes: dict[str, int | None], arguments: Namespace) -> str:
    """Return a line on what is about to be timed."""
    steps = f"{arguments.warmup} + {arguments.steps} steps on {device.type}"
    length = config.data.sequence_length
    if not sizes:
        return f"{steps}, {config.optim.batch_size} x {length} tokens each"
    default = config.runtime.micro_batch_size
    all_sizes = {OURS: default, **sizes}
    contenders = ", ".join(f"{name} {size or default} x {length}" for name, size in all_sizes.items())
    rounds = "1 round" if arguments.rounds == 1 else f"{arguments.rounds} rounds"
    return f"{rounds} of {steps}: {contenders} tokens each"


def one_line(row: dict[str, Any]) -> str:
    """Return the row's single values as text."""

    def word(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.0f}" if value >= 1e4 else f"{value:.4g}"
        return str(value)

    return "  ".join(f"{k} {word(v)}" for k, v in row.items() if not isinstance(v, list | dict))


def benchmark(options: Namespace) -> int:
    """Run `python -m dsv2 benchmark` with these options and print the figures; return 1 if a peer failed.

    Raises:
        UserError: an option, the configuration or a peer is refused.
    """
    check_options(options)
    rank, world_size = launched_ranks()
    config = configuration(options.overrides, world_size)
    sizes = check_peers(options.against, config, world_size) if options.against else {}
    device_name = check_machine(config, world_size, local_processes())

    import torch  # not above: a mistake is told without it

    device = torch.device(device_name)
    if rank == 0 and options.contender is None:  # the steps take a while on a CPU
        print(announcement(config, device, sizes, options), file=sys.stderr, flush=True)
    if sizes:
        result, text = compare(sizes, options)
    else:
        is_peer = options.contender not in (None, OURS)
        with memory_explained(config):
            result = (measure_peer if is_peer else measure)(config, device, options)
        parts = result.pop("text", "")
        text = f"{one_line(result)}\n\n{parts}"
    if rank == 0:
        print(text, flush=True)
        if options.out:
            Path(options.out).write_text(json.dumps(result) + "\n", encoding="utf-8")
    return int(any(contender["errors"] for contender in result.get("contenders", ())))
