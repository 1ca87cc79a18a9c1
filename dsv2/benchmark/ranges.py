"""Mark a model's modules and methods with named ranges, and record a trace of one step.

The ranges are hooks (`Ranges`), so the model does not know them. dsv2/benchmark/trace.py reads the trace.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS: tuple[str, ...] = (
    "embedding",
    "attention",  # the kernel, RoPE, and joining the parts of queries and keys
    "attention projections",  # with the norms between them
    "routing",  # all of an MoE layer except its experts: router, losses, statistics, plan, exchange
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
    """Return the methods at which a part begins without a call of a module: (module, name, part)."""
    from dsv2.model.block import DecoderLayer

    attentions = [layer.self_attn for layer in model.modules() if isinstance(layer, DecoderLayer)]
    return [(module, name, "attention projections") for module in attentions for name in module.projections]


class Ranges:
    """A context that puts named ranges around the forward of modules and around methods."""

    def __init__(self, modules: dict[Any, str], methods: list[tuple[Any, str, str]]):
        """Take modules with their parts, and methods as (object, name of its method, part)."""
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
                module.register_forward_hook(leave).remove,
            ]
        for owner, name, part in self._methods:
            setattr(owner, name, _in_range(getattr(owner, name), part))
            self._undo.append(lambda owner=owner, name=name: delattr(owner, name))
        return self

    def __exit__(self, *raised: Any) -> None:
        for undo in self._undo:
            undo()


def _in_range(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    from torch.profiler import record_function

    def wrapped(*args: Any, **options: Any) -> Any:
        with record_function(PREFIX + part):
            return function(*args, **options)

    return wrapped


def record(step: Callable[[], Any], file: Path, on_gpu: bool) -> None:
    """Write the trace of one step to `file`. A step before it only warms up the profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function, schedule

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    # With shapes the trace also has the operands' types, which tell work on indices from work on activations.
    with profile(
        activities=activities, record_shapes=True, schedule=schedule(wait=0, warmup=1, active=1)
    ) as recorded:
        for counts in (False, True):
            if counts:
                recorded.step()
            with record_function(STEP):
                step()
                if on_gpu:
                    torch.cuda.synchronize()
    recorded.export_chrome_trace(str(file))
