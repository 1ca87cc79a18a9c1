"""Read where a step's time goes, by the model's parts, from a trace of torch.profiler.

The trace is in the Chrome format of `export_chrome_trace`, with the ranges of dsv2/profiling/ranges.py. A
module's time excludes the modules within it that belong to another part. Backward work belongs to the part
whose forward made autograd's node: both carry the same sequence number. A GPU kernel belongs to the operation
that launched it.

On a GPU the time of a part is the time of its kernels, and `idle` is the time in which none runs. While the
host fetches data, that time counts as `data` instead. On a CPU the time of a part is the time of the host's
operations, and there is no `idle`.
"""

import gzip
import json
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dsv2.profiling.ranges import PARTS, PREFIX, STEP

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
    backward: bool = False

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
    backward: bool = False


@dataclass
class Breakdown:
    """The mean time of a step in milliseconds; the parts sum to the step."""

    step_ms: float
    parts: dict[str, float]
    on_gpu: bool
    steps: int = 1
    kernels: list[Kernel] = field(default_factory=list)  # of all steps: the GPU's, else the host's operations

    @property
    def backward(self) -> dict[str, float]:
        """Return how much of each part is work of the backward pass, in milliseconds per step."""
        sums = dict.fromkeys(self.parts, 0.0)
        for kernel in self.kernels:
            sums[kernel.part] += kernel.milliseconds / self.steps if kernel.backward else 0.0
        return sums

    def share(self, part: str) -> float:
        return self.parts[part] / self.step_ms

    def as_json(self) -> dict[str, Any]:
        return {p: {"ms": ms, "share": self.share(p)} for p, ms in self.parts.items()}

    def table(self) -> str:
        backward = self.backward
        lines = [f"{'part':<24}{'ms':>10}{'backward':>10}{'share':>9}"]
        for part, ms in self.parts.items():
            if ms:
                lines.append(f"{part:<24}{ms:>10.3f}{backward[part]:>10.3f}{self.share(part):>9.1%}")
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
    """Return the breakdown of a trace, which may be compressed with gzip.

    Raises:
        ValueError: the file is not a whole trace, or no step is marked in it.
    """
    content = file.read_bytes()
    if file.suffix == ".gz":
        content = gzip.decompress(content)
    return breakdown(json.loads(content.decode(errors="replace"))["traceEvents"])


def breakdown(trace: list[dict[str, Any]]) -> Breakdown:
    """Return the breakdown of a trace's events.

    Raises:
        ValueError: no step is marked.
    """
    timed = [event for event in trace if event.get("ph") == "X"]
    host = _host_events(timed)
    steps = [event for event in host if event.name == STEP]
    if not steps:
        raise ValueError("no step is marked in the trace")
    _attribute(host, steps[0].thread)
    device = sorted((event for event in timed if event.get("cat") in _DEVICE), key=lambda raw: raw["ts"])
    kernels = _kernels(device, host, steps) if device else _operations(host, steps)
    total_ms = sum(step.end - step.start for step in steps) / 1e3
    sums = dict.fromkeys(PARTS, 0.0)
    for kernel in kernels:
        sums[kernel.part] += kernel.milliseconds
    if device:
        sums["data"] += sum(_wait_for_data(device, host, step) for step in steps)
        sums["idle"] = total_ms - sum(sums.values())
    return Breakdown(
        step_ms=total_ms / len(steps),
        parts={part: ms / len(steps) for part, ms in sums.items()},
        on_gpu=bool(device),
        steps=len(steps),
        kernels=kernels,
    )


def _operations(host: list[_Event], steps: list[_Event]) -> list[Kernel]:
    """Return the operations of the thread that takes the steps, each without the operations inside it."""
    kernels = []
    for step in steps:
        for event in _inside(step, host):
            milliseconds = (event.end - event.start - event.children) / 1e3
            kernels.append(Kernel(event.name, event.part or "other", milliseconds, event.backward))
    return kernels


def _inside(step: _Event, host: list[_Event]) -> Iterator[_Event]:
    """Yield the events of the step's thread that begin within the step, itself included."""
    for event in host:
        if event.thread == step.thread and step.start <= event.start < step.end:
            yield event


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


def _attribute(host: list[_Event], thread: tuple[Any, Any]) -> None:
    """Set the part of every event that has one. `thread` runs the forward passes."""
    nodes: dict[int, str | None] = {}  # of autograd, by sequence number
    for event in host:
        parent = event.parent
        event.backward = event.name.startswith(_BACKWARD) or (parent is not None and parent.backward)
        event.part = parent.part if parent is not None else None
        if event.annotated:
            event.part = event.name.removeprefix(PREFIX)
        elif event.part == "routed experts" and parent is not None and parent.annotated and event.plans:
            event.part = "dispatch"  # even if the experts' module does this work
        elif event.name.startswith(_BACKWARD + "torch::autograd::AccumulateGrad"):
            event.part = "gradients"
        elif event.name.startswith(_BACKWARD) and event.sequence in nodes:
            event.part = nodes[event.sequence]
        if event.thread == thread and event.sequence >= 0 and not event.backward:
            # An operation without a node carries the next node's number. So the last operation with a number
            # is the one that made the node.
            nodes[event.sequence] = event.part


def _kernels(device: list[dict[str, Any]], host: list[_Event], steps: list[_Event]) -> list[Kernel]:
    """Return the GPU's kernels and copies within the steps. `device` is in the order of time."""
    launches = {}
    operations = {}
    for event in host:
        arguments = event.raw.get("args", {})
        if event.raw["cat"] in _LAUNCH:
            launches[arguments.get("correlation")] = event
        elif "External id" in arguments:
            operations[arguments["External id"]] = event
    kernels = []
    for step in steps:
        for raw, start, end in _exclusive(device, step):
            arguments = raw.get("args", {})
            cause = launches.get(arguments.get("correlation"))
            if cause is None or cause.part is None:
                cause = operations.get(arguments.get("External id"), cause)
            part = cause.part if cause else None
            backward = cause is not None and cause.backward
            kernels.append(Kernel(raw["name"], part or "other", (end - start) / 1e3, backward))
    return kernels


def _exclusive(device: list[dict[str, Any]], step: _Event) -> Iterator[tuple[dict[str, Any], float, float]]:
    """Yield a step's kernels with their start and end.

    Time that several kernels share counts for the one that began first.
    """
    reached = step.start
    for raw in device:
        start = max(raw["ts"], reached)
        end = min(raw["ts"] + raw["dur"], step.end)
        if start < end:
            yield raw, start, end
            reached = end


def _wait_for_data(device: list[dict[str, Any]], host: list[_Event], step: _Event) -> float:
    """Return the milliseconds of a step in which the host fetches data and no kernel runs."""
    busy = [(start, end) for _, start, end in _exclusive(device, step)]
    fetches = [event for event in _inside(step, host) if event.name == PREFIX + "data"]
    waited = 0.0
    for fetch in fetches:
        first = bisect_left(busy, fetch.start, key=lambda kernel: kernel[1])
        last = bisect_left(busy, fetch.end, key=lambda kernel: kernel[0])
        covered = sum(min(end, fetch.end) - max(start, fetch.start) for start, end in busy[first:last])
        waited += fetch.end - fetch.start - covered
    return waited / 1e3
