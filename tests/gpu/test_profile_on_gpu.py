"""A run profiles some of its steps on a GPU."""

import gzip
import json
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dsv2.profiling.ranges import STEP
from dsv2.profiling.trace import read
from tests.gpu.process import ROOT, train_command

pytestmark = pytest.mark.gpu
STEPS = 3


def traced_device_ms(file: Path) -> float:
    """The time per step in which the GPU works, from the events themselves."""
    events = [e for e in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"] if e.get("ph") == "X"]
    steps = [e for e in events if e["name"] == STEP and e["cat"] == "user_annotation"]
    assert len(steps) == STEPS
    work = [e for e in events if e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    total = 0.0
    for step in steps:
        reached = step["ts"]
        for event in sorted(work, key=lambda e: e["ts"]):
            end = min(event["ts"] + event["dur"], step["ts"] + step["dur"])
            total += max(0.0, end - max(event["ts"], reached))
            reached = max(reached, end)
    return total / STEPS / 1e3


def printed_table(output: str) -> dict[str, float]:
    """The milliseconds of each part, as the run has printed them."""
    lines = output.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("  part  "))
    parts: dict[str, float] = {}
    for line in lines[begin + 1 :]:
        parts[line[2:26].strip()] = float(line[26:36])
        if line.startswith("  step, profiled"):
            return parts
    raise AssertionError(output)


def test_the_parts_sum_to_the_devices_time_and_there_is_a_snapshot(tmp_path):
    command = [*train_command(tmp_path), "name=profiled", "stop_step=9", "profile.steps=[6,8]"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    folder = tmp_path / "profiled" / "profile" / "step-6-8"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.memory.pickle", "rank-0.trace.json.gz"]
    assert "  time of the GPU's kernels, with the profiler running" in done.stdout
    found = read(folder / "rank-0.trace.json.gz")
    traced = traced_device_ms(folder / "rank-0.trace.json.gz")
    # Every moment in which the GPU works belongs to one part, so only floats are rounded.
    assert sum(kernel.milliseconds for kernel in found.kernels) / STEPS == pytest.approx(traced, rel=1e-6)
    assert sum(found.parts.values()) == pytest.approx(found.step_ms, rel=1e-6)
    printed = printed_table(done.stdout)
    step = printed.pop("step, profiled")
    rounding = 0.0005 * len(printed)  # three digits behind the point
    assert sum(printed.values()) == pytest.approx(step, abs=rounding)
    waited = found.parts["data"] - sum(k.milliseconds for k in found.kernels if k.part == "data") / STEPS
    assert waited > 0
    assert sum(printed.values()) - printed["idle"] - waited == pytest.approx(traced, abs=rounding)
    for part in ("attention", "routing", "routed experts", "shared experts"):
        assert 0 < found.backward[part] < found.parts[part], part
    assert min(found.parts[part] for part in ("dispatch", "head, loss", "optimizer")) > 0
    assert found.parts["other"] < 0.2 * traced  # nearly all without ranges
    check_snapshot(pickle.loads((folder / "rank-0.memory.pickle").read_bytes()))


def check_snapshot(snapshot: dict[str, Any]) -> None:
    """It holds what is allocated, and the steps' allocations with the lines that made them."""
    assert sum(segment["allocated_size"] for segment in snapshot["segments"]) > 2**20
    (history,) = (trace for trace in snapshot["device_traces"] if trace)
    allocations = [entry for entry in history if entry["action"] == "alloc"]
    files = {frame["filename"] for entry in allocations for frame in entry["frames"]}
    assert any(name.endswith("dsv2/moe/layer.py") for name in files)
