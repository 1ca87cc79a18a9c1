"""Read where a step's time goes, by the model's parts, from a trace of torch.profiler.

The trace is in the Chrome format of `export_chrome_trace`, with the ranges of dsv2/benchmark/ranges.py. A
module's time excludes the modules within it that belong to another part. Backward work belongs to the part
whose forward made autograd's node: both carry the same sequence number. A GPU kernel belongs to the operation
that launched it.

On a GPU the time of a part is the time of its kernels, and `idle` is the rest of the step. On a CPU it is the
time of the host's operations, and there is no `idle`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dsv2.benchmark.ranges import PARTS, PREFIX, STEP

_BACKWARD = "autograd::engine::evaluate_function: "
_HOST = ("cpu_op", "user_annotation")
_LAUNCH = ("cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass
class _Event:
    """An operation, range or launch on a host thread."""

    name: str
    start: float  # microseconds, like all times in a trace
    end: float
    thread: tuple[Any, Any]
    raw: dict[str, Any]
    parent: "_Event | None" = None
    children: float = 0.0  # time of the children, microseconds
    part: str | None = None

    @property
    def annotated(self) -> bool:
        return self.name.startswith(PREFIX) and self.name != STEP

    @property
    def sequence(self) -> int:
        """Return the number of the autograd node that this makes, or runs in backward; -1: none."""
        return self.raw.get("args", {}).get("Sequence number", -1)

    @property
    def plans(self) -> bool:
        """Return whether this works on indices: an operation on integers, or a kernel outside any operation.

        A kernel outside any operation cannot have a gradient, so it is not part of the experts.
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
    """One step's time in milliseconds; the parts sum to the step."""

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
        """Return the longest kernels, by name and part."""
        sums: dict[tuple[str, str], list[float]] = {}
        for kernel in self.kernels:
            sums.setdefault((kernel.name, kernel.part), []).append(kernel.milliseconds)
        lines = [f"{'ms':>10}{'calls':>7}  {'part':<22}  kernel"]
        for (name, part), times in sorted(sums.items(), key=lambda item: -sum(item[1]))[:count]:
            lines.append(f"{sum(times):>10.3f}{len(times):>7}  {part:<22}  {name[:90]}")
        return "\n".join(lines)


def read(file: Path) -> Breakdown:
    """Return the breakdown of a trace that `record` wrote."""
    return breakdown(json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"])


def breakdown(trace: list[dict[str, Any]]) -> Breakdown:
    """Return the breakdown of a trace's events."""
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
            milliseconds = (event.end - event.start - event.children) / 1e3
            parts[event.part or "other"] += milliseconds
            kernels.append(Kernel(event.name, event.part or "other", milliseconds))
    return Breakdown((step.end - step.start) / 1e3, parts, kernels)


def _host_events(timed: list[dict[str, Any]]) -> list[_Event]:
    """Return operations, ranges and launches of every thread, parents before children."""
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
            event.end = min(event.end, event.parent.end)  # rounding may put it after the parent's end
            event.parent.children += event.end - event.start
        stack.append(event)
    return events


def _attribute(host: list[_Event], step: _Event) -> None:
    """Set the part of every event that has one."""
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
            event.part = "routing"  # even if the experts' module does this work
        elif event.name.startswith(_BACKWARD + "torch::autograd::AccumulateGrad"):
            event.part = "gradients"
        elif event.name.startswith(_BACKWARD) and event.sequence in nodes:
            event.part = nodes[event.sequence]
        if event.thread == step.thread and event.sequence >= 0 and id(event) not in in_backward:
            # An operation without a node carries the next node's number. So the last operation with a number
            # is the one that made the node.
            nodes[event.sequence] = event.part


def _of_device(device: list[dict[str, Any]], host: list[_Event], step: _Event) -> Breakdown:
    launches = {}
    operations = {}
    for event in host:
        arguments = event.raw.get("args", {})
        if event.raw["cat"] in _LAUNCH:
            launches[arguments.get("correlation")] = event.part
        elif "External id" in arguments:
            operations[arguments["External id"]] = event.part
    parts = dict.fromkeys(PARTS, 0.0)
    kernels = []
    for raw, milliseconds in _exclusive(device, step):
        arguments = raw.get("args", {})
        part = launches.get(arguments.get("correlation")) or operations.get(arguments.get("External id"))
        parts[part or "other"] += milliseconds
        kernels.append(Kernel(raw["name"], part or "other", milliseconds))
    step_ms = (step.end - step.start) / 1e3
    parts["idle"] = step_ms - sum(parts.values())
    return Breakdown(step_ms, parts, kernels)


def _exclusive(device: list[dict[str, Any]], step: _Event) -> Iterator[tuple[dict[str, Any], float]]:
    """Yield kernels with their milliseconds. Time that several share counts for the one that began first."""
    reached = step.start
    for raw in sorted(device, key=lambda raw: raw["ts"]):
        end = min(raw["ts"] + raw["dur"], step.end)
        if end > reached:
            yield raw, (end - max(raw["ts"], reached)) / 1e3
            reached = end
