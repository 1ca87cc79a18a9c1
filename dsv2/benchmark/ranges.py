"""Where a step's time goes, by the model's parts, read off a trace of torch.profiler.

Ranges are put around modules by hooks (`Ranges`), so the model knows nothing of it; a module's time is
its own less that of the modules within it that are another part. What backward does belongs to the part
whose forward made autograd's node: both carry the same sequence number. A GPU kernel belongs to the
operation that launched it. The trace is the Chrome format that `export_chrome_trace` writes.

On a GPU a part's time is that of its kernels, and `idle` is the rest of the step. Without one it is the
time of the host's operations, and there is no `idle`.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PARTS: tuple[str, ...] = (
    "embedding",
    "attention",  # the kernel, RoPE, and what puts queries and keys together
    "attention projections",  # and the norms between them
    "routing",  # all of an MoE layer but its experts: router, losses, statistics, plan, exchange
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
_BACKWARD = "autograd::engine::evaluate_function: "
_HOST = ("cpu_op", "user_annotation")
_LAUNCH = ("cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def parts_of_modules(model: Any) -> dict[Any, str]:
    """The modules that a part begins with, by their classes and where they stand."""
    from torch import nn

    from dsv2.model.attention.kinds import Attention
    from dsv2.model.transformer import DecoderLayer, OutputHead
    from dsv2.moe.experts import RoutedExperts, SwiGLU
    from dsv2.moe.layer import MoELayer

    def part(module: nn.Module, around: str) -> str:
        if isinstance(module, nn.RMSNorm | nn.Linear) and around == "attention":
            return "attention projections"
        for kind, name in (
            (nn.Embedding, "embedding"),
            (OutputHead, "head, loss"),
            (Attention, "attention"),
            (MoELayer, "routing"),
            (RoutedExperts, "routed experts"),
            (SwiGLU, "shared experts" if around == "routing" else "dense FFN"),
            (DecoderLayer, "norms, residuals"),
        ):
            if isinstance(module, kind):
                return name
        return "norms, residuals" if isinstance(module, nn.RMSNorm) and around == "other" else around

    found: dict[Any, str] = {}

    def walk(module: nn.Module, around: str) -> None:
        own = part(module, around)
        if own != around:
            found[module] = own
        for child in module.children():
            walk(child, own)

    walk(model, "other")
    return found


def methods_of_modules(model: Any) -> list[tuple[Any, str, str]]:
    """The methods that a part begins with, where no module of its own is called: (module, name, part)."""
    from dsv2.model.attention.mla_module import MultiHeadLatentAttention

    found = [m for m in model.modules() if isinstance(m, MultiHeadLatentAttention)]
    return [(module, "down", "attention projections") for module in found]


class Ranges:
    """Named ranges around modules' forward and around methods, while the context lasts."""

    def __init__(self, modules: dict[Any, str], methods: list[tuple[Any, str, str]]):
        """`methods`: (object, its method's name, part)."""
        self._modules, self._methods, self._undo = modules, methods, []

    def __enter__(self) -> "Ranges":
        from torch.profiler import record_function

        for module, part in self._modules.items():
            entered: list[Any] = []

            def enter(module: Any, given: Any, part: str = part, entered: list[Any] = entered) -> None:
                entered.append(record_function(PREFIX + part))
                entered[-1].__enter__()

            def leave(module: Any, given: Any, out: Any, entered: list[Any] = entered) -> None:
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
    """Write the trace of one step, after one that only warms the profiler up."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function, schedule

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    # Shapes bring the operands' types, which tell work on indices from work on activations.
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


@dataclass
class _Event:
    """Something on a host thread."""

    name: str
    start: float  # microseconds, as all times of a trace
    end: float
    thread: tuple[Any, Any]
    raw: dict[str, Any]
    parent: "_Event | None" = None
    children: float = 0.0  # their time
    part: str | None = None

    @property
    def annotated(self) -> bool:
        return self.name.startswith(PREFIX) and self.name != STEP

    @property
    def sequence(self) -> int:
        """Of the node that this operation makes, or in backward of the one that is run; -1: none."""
        return self.raw.get("args", {}).get("Sequence number", -1)

    @property
    def plans(self) -> bool:
        """Does it work on indices: an operation on integers alone, or a kernel outside of any operation?

        The latter can have no gradient, so it is not the experts' own work.
        """
        types = [t for t in self.raw.get("args", {}).get("Input type", []) if t and not t[0].isupper()]
        integers = bool(types) and all(t.split()[-1] in _INTEGERS for t in types)
        return integers or self.raw["cat"] in _LAUNCH


_INTEGERS = ("int", "char", "bool")  # `long int`, `unsigned char` and so on


class Kernel(NamedTuple):
    name: str
    part: str
    milliseconds: float


@dataclass
class Breakdown:
    """One step's time in milliseconds; the parts add up to the step."""

    step_ms: float
    parts: dict[str, float]
    kernels: list[Kernel] = field(default_factory=list)  # of the GPU, else the host's operations

    def share(self, part: str) -> float:
        return self.parts[part] / self.step_ms

    def as_json(self) -> dict[str, Any]:
        return {p: {"ms": ms, "share": self.share(p)} for p, ms in self.parts.items()}

    def table(self) -> str:
        lines = [f"{'part':<24}{'ms':>10}{'share':>9}"]
        lines += [f"{p:<24}{ms:>10.3f}{self.share(p):>8.1%}" for p, ms in self.parts.items() if ms]
        return "\n".join([*lines, f"{'step, profiled':<24}{self.step_ms:>10.3f}"])

    def top_kernels(self, count: int = 40) -> str:
        """The kernels that take most, by name and part."""
        sums: dict[tuple[str, str], list[float]] = {}
        for kernel in self.kernels:
            sums.setdefault((kernel.name, kernel.part), []).append(kernel.milliseconds)
        lines = [f"{'ms':>10}{'calls':>7}  {'part':<22}  kernel"]
        for (name, part), times in sorted(sums.items(), key=lambda item: -sum(item[1]))[:count]:
            lines.append(f"{sum(times):>10.3f}{len(times):>7}  {part:<22}  {name[:90]}")
        return "\n".join(lines)


def read(file: Path) -> Breakdown:
    """The breakdown of a trace that `record` wrote."""
    return breakdown(json.loads(file.read_text(errors="replace"))["traceEvents"])


def breakdown(trace: list[dict[str, Any]]) -> Breakdown:
    """The same, of a trace's events."""
    timed = [event for event in trace if event.get("ph") == "X"]
    host = _host_events(timed)
    step = [event for event in host if event.name == STEP][-1]
    _attribute(host, step)
    device = [event for event in timed if event.get("cat") in _DEVICE]
    if device:
        return _of_device(device, host, step)
    parts = dict.fromkeys(PARTS, 0.0)
    kernels = []
    for event in host:
        if event.thread == step.thread and step.start <= event.start < step.end:
            own = (event.end - event.start - event.children) / 1e3
            parts[event.part or "other"] += own
            kernels.append(Kernel(event.name, event.part or "other", own))
    return Breakdown((step.end - step.start) / 1e3, parts, kernels)


def _host_events(timed: list[dict[str, Any]]) -> list[_Event]:
    """Operations, ranges and launches of every thread, parents before children."""
    events = []
    for raw in timed:
        if raw.get("cat") in (*_HOST, *_LAUNCH):
            start = float(raw["ts"])
            events.append(_Event(raw["name"], start, start + raw["dur"], (raw["pid"], raw["tid"]), raw))
    events.sort(key=lambda event: (event.start, -event.end))
    stacks: dict[tuple[Any, Any], list[_Event]] = {}
    for event in events:
        stack = stacks.setdefault(event.thread, [])
        while stack and stack[-1].end <= event.start:
            stack.pop()
        if stack:
            event.parent = stack[-1]
            event.end = min(event.end, event.parent.end)  # they are rounded apart
            event.parent.children += event.end - event.start
        stack.append(event)
    return events


def _attribute(host: list[_Event], step: _Event) -> None:
    """Set every event's part, where it has one."""
    nodes: dict[int, str | None] = {}  # of autograd, by sequence number
    in_backward: set[int] = set()
    for event in host:
        parent = event.parent
        if event.name.startswith(_BACKWARD) or (parent is not None and id(parent) in in_backward):
            in_backward.add(id(event))
        event.part = parent.part if parent is not None else None
        if event.annotated:
            event.part = event.name.removeprefix(PREFIX)
        elif event.part == "routed experts" and parent is not None and parent.annotated and event.plans:
            event.part = "routing"  # wherever it is done
        elif event.name.startswith(_BACKWARD + "torch::autograd::AccumulateGrad"):
            event.part = "gradients"
        elif event.name.startswith(_BACKWARD) and event.sequence in nodes:
            event.part = nodes[event.sequence]
        if event.thread == step.thread and event.sequence >= 0 and id(event) not in in_backward:
            # Operations that make no node carry the next one's number: the last one made it.
            nodes[event.sequence] = event.part


def _of_device(device: list[dict[str, Any]], host: list[_Event], step: _Event) -> Breakdown:
    launches, operations = {}, {}
    for event in host:
        arguments = event.raw.get("args", {})
        if event.raw["cat"] in _LAUNCH:
            launches[arguments.get("correlation")] = event.part
        elif "External id" in arguments:
            operations[arguments["External id"]] = event.part
    parts, kernels = dict.fromkeys(PARTS, 0.0), []
    for raw, milliseconds in _exclusive(device, step):
        arguments = raw.get("args", {})
        part = launches.get(arguments.get("correlation")) or operations.get(arguments.get("External id"))
        parts[part or "other"] += milliseconds
        kernels.append(Kernel(raw["name"], part or "other", milliseconds))
    step_ms = (step.end - step.start) / 1e3
    parts["idle"] = step_ms - sum(parts.values())
    return Breakdown(step_ms, parts, kernels)


def _exclusive(device: list[dict[str, Any]], step: _Event) -> Iterator[tuple[dict[str, Any], float]]:
    """Kernels with their milliseconds; time of several at once counts for the one that began first."""
    reached = step.start
    for raw in sorted(device, key=lambda raw: raw["ts"]):
        end = min(raw["ts"] + raw["dur"], step.end)
        if end > reached:
            yield raw, (end - max(raw["ts"], reached)) / 1e3
            reached = end
