"""Mark a model's modules and methods with named ranges, and record a trace of steps.

The ranges are hooks (`Ranges`), so the model does not know them. dsv2/profiling/trace.py reads the trace.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTS: tuple[str, ...] = (
    "data",  # fetching a step's data, and copying it to the device
    "embedding",
    "attention",  # the kernel, RoPE, and joining the parts of queries and keys
    "attention projections",  # with the norms between them
    "routing",  # the router, its losses and statistics, and the sum of a layer's terms
    "dispatch",  # which row goes where, sending rows between ranks, and summing each token's results
    "routed experts",
    "shared experts",
    "dense FFN",
    "norms, residuals",
    "head, loss",
    "gradients",  # sums over micro-batches, reduction over ranks
    "optimizer",  # norm, clipping, AdamW, clearing
    "other",
    "idle",
)
PREFIX = "part: "
STEP = PREFIX + "step"


def parts_of_modules(model: Any) -> dict[Any, str]:
    """Return the modules at which a new part begins, each with its part."""
    from torch import nn

    from dsv2.model.block import DecoderLayer
    from dsv2.model.stages import OutputHead
    from dsv2.moe.experts import RoutedExperts, SwiGLU
    from dsv2.moe.layer import MoELayer

    attention = {layer.self_attn for layer in model.modules() if isinstance(layer, DecoderLayer)}

    def part(module: nn.Module, around: str) -> str:
        if module in attention:
            return "attention"
        if isinstance(module, nn.RMSNorm | nn.Linear) and around == "attention":
            return "attention projections"
        for kind, name in (
            (nn.Embedding, "embedding"),
            (OutputHead, "head, loss"),
            (MoELayer, "routing"),
            (RoutedExperts, "routed experts"),
            (SwiGLU, "shared experts" if around == "routing" else "dense FFN"),
            (DecoderLayer, "norms, residuals"),
        ):
            if isinstance(module, kind):
                return name
        return "norms, residuals" if isinstance(module, nn.RMSNorm) and around == "other" else around

    parts: dict[Any, str] = {}

    def walk(module: nn.Module, around: str) -> None:
        part_of_module = part(module, around)
        if part_of_module != around:
            parts[module] = part_of_module
        for child in module.children():
            walk(child, part_of_module)

    walk(model, "other")
    return parts


def methods_of_modules(model: Any) -> list[tuple[Any, str, str]]:
    """Return where a part begins without a call of a module, as `Ranges` takes it."""
    from dsv2.model.block import DecoderLayer
    from dsv2.moe import layer
    from dsv2.moe.dispatch import ExchangedDispatch

    attentions = [layer.self_attn for layer in model.modules() if isinstance(layer, DecoderLayer)]
    projections = [
        (module, name, "attention projections") for module in attentions for name in module.projections
    ]
    dispatch = [(ExchangedDispatch, name, "dispatch") for name in ("arrive", "combine")]
    return [*projections, (layer, "start_dispatch", "dispatch"), *dispatch]


def ranges_of_engine(engine: Any, stream: Any = None) -> "Ranges":
    """Return the ranges of everything that a training step does.

    Args:
        engine: a `dsv2.training.engine.Engine`.
        stream: where the steps' data come from; None if they are not fetched within a step.
    """
    methods = [
        (engine, "inputs", "data"),
        (engine.deepspeed, "step", "optimizer"),
        (engine.deepspeed, "allreduce_gradients", "gradients"),
        *methods_of_modules(engine.model),
    ]
    if stream is not None:
        methods.append((stream, "take", "data"))
    return Ranges(parts_of_modules(engine.model), methods)


class Ranges:
    """A context that puts named ranges around the forward of modules and around methods."""

    def __init__(self, modules: dict[Any, str], methods: list[tuple[Any, str, str]]):
        """Take modules with their parts, and methods as (object, name of its method, part).

        The object may also be a class, or a Python module with a function of that name.
        """
        self._modules = modules
        self._methods = methods
        self._undo: list[Callable[[], Any]] = []

    def __enter__(self) -> "Ranges":
        from torch.profiler import record_function

        for module, part in self._modules.items():
            entered: list[Any] = []

            def enter(module: Any, inputs: Any, part: str = part, entered: list[Any] = entered) -> None:
                entered.append(record_function(PREFIX + part))
                entered[-1].__enter__()

            def leave(module: Any, inputs: Any, out: Any, entered: list[Any] = entered) -> None:
                entered.pop().__exit__(None, None, None)

            self._undo += [
                module.register_forward_pre_hook(enter, prepend=True).remove,
                # Always: torch ends the recomputation of a layer with an exception.
                module.register_forward_hook(leave, always_call=True).remove,
            ]
        for owner, name, part in self._methods:
            self._undo.append(_way_back(owner, name))
            setattr(owner, name, _in_range(getattr(owner, name), part))
        return self

    def __exit__(self, *raised: Any) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()


def _way_back(owner: Any, name: str) -> Callable[[], None]:
    """Return what undoes a later `setattr(owner, name, ...)`."""
    if name not in vars(owner):  # a method of the owner's class
        return lambda: delattr(owner, name)
    before = vars(owner)[name]
    return lambda: setattr(owner, name, before)


def _in_range(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    from torch.profiler import record_function

    def wrapped(*args: Any, **options: Any) -> Any:
        with record_function(PREFIX + part):
            return function(*args, **options)

    return wrapped


def torch_profiler(on_gpu: bool) -> Any:
    """Return a profiler. It only warms up after its `start()`, and records from its first `step()` on."""
    from torch.profiler import ProfilerAction, ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch announces the profiler's start and end
    # With shapes the trace also has the operands' types, which tell work on indices from work on activations.
    return profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu,
        record_shapes=True,
        schedule=lambda number: ProfilerAction.RECORD if number else ProfilerAction.WARMUP,
    )


@contextmanager
def marked_step(on_gpu: bool) -> Iterator[None]:
    """Mark a step in the trace. It ends when the GPU has done its work."""
    import torch
    from torch.profiler import record_function

    with record_function(STEP):
        yield
        if on_gpu:
            torch.cuda.synchronize()


def record(step: Callable[[], Any], file: Path, on_gpu: bool) -> None:
    """Write the trace of one step to `file`. A step before it only warms up the profiler."""
    profiler = torch_profiler(on_gpu)
    profiler.start()
    with marked_step(on_gpu):
        step()
    profiler.step()
    with marked_step(on_gpu):
        step()
    profiler.stop()
    profiler.export_chrome_trace(str(file))
