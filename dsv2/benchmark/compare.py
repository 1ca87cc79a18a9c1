"""`python -m dsv2 benchmark --against`: contenders take turns, each turn in a separate process.

Each turn has the whole machine and clean memory. The contenders alternate, so that a GPU that grows warm or
slows down affects all of them alike.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv2.benchmark.peers import adapter, version

OURS = "dsv2"
Turn = Callable[[str, int], dict[str, Any]]  # (contender, round) -> its row, or {"error": why}


def alternate(names: list[str], rounds: int, turn: Turn) -> dict[str, list[dict[str, Any]]]:
    """Let the contenders take turns; return every contender's rows, by round."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            row = turn(name, number)
            rows[name].append(row)
            text = row.get("error") or f"{row['step_ms']:.1f} ms per step, {row['tok_s_gpu']:.0f} tokens/s"
            print(f"round {number + 1} of {rounds}: {name}: {text}", flush=True)
    return rows


def run_turn(arguments: list[str]) -> dict[str, Any]:
    """Return the row that `python -m dsv2 benchmark` writes with these arguments, in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        program = [sys.executable, "-m", "dsv2", "benchmark", "--out", str(out)]
        done = subprocess.run([*program, *arguments], capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(out.read_text(encoding="utf-8")) | {"printed": done.stdout}
    return {"error": what_failed(done.stderr) or f"exit code {done.returncode}"}


def what_failed(stderr: str) -> str:
    """Return the last line that begins an exception.

    Further lines of the exception, and lines that libraries print at exit, come after it. With a process
    group, torch puts the rank before it.
    """
    lines = [line for line in stderr.splitlines() if line.strip()]
    beginning = re.compile(r"(\[rank\d+\]: )?(error: |(\w+\.)*[A-Z]\w*(: |$))")
    return ([line for line in lines if beginning.match(line)] or lines or [""])[-1].strip()[:300]


def summary(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a contender's figures: medians over its rounds, and how far the rounds lie apart."""
    measured = [row for row in rows if "error" not in row]
    figures: dict[str, Any] = {"name": name, "about": about(name), "rounds": rows}
    figures["version"] = None if name == OURS else version(name)
    figures["errors"] = [row["error"] for row in rows if "error" in row]
    if measured:
        first = measured[0]
        steps = [row["step_ms"] for row in measured]
        figures["step_ms"] = statistics.median(steps)
        figures["spread"] = (max(steps) - min(steps)) / figures["step_ms"]
        for key in ("tok_s_gpu", "tflops", "mfu"):  # of the median step
            figures[key] = None if first[key] is None else first[key] * steps[0] / figures["step_ms"]
        for key in ("micro_batch", "mem_gib", "precision"):
            figures[key] = first[key]
    return figures


def about(name: str) -> str:
    return "this repository" if name == OURS else adapter(name).ABOUT


def table(summaries: list[dict[str, Any]]) -> str:
    """Return one line per contender. `states` are Adam's; `speed` is its tokens/s divided by ours."""
    ours = summaries[0].get("tok_s_gpu")
    heads = (
        "contender",
        "weights/states",
        "micro-batch",
        "ms per step",
        "spread",
        "tokens/s",
        "TFLOP/s",
        "MFU",
        "peak GiB",
        "speed",
    )
    widths = [max(12, len(head) + 2) for head in heads[1:]]
    lines = [f"{heads[0]:<28}" + "".join(map(str.rjust, heads[1:], widths))]
    for figures in summaries:
        label = " ".join(filter(None, (figures["name"], figures["version"])))
        if "step_ms" not in figures:
            lines.append(f"{label:<28}  {figures['errors'][-1]}")
            continue
        cells = (
            figures["precision"],
            str(figures["micro_batch"]),
            f"{figures['step_ms']:.1f}",
            f"{figures['spread']:.1%}" if len(figures["rounds"]) > 1 else "-",
            f"{figures['tok_s_gpu']:.0f}",
            f"{figures['tflops']:.4g}",
            "-" if figures["mfu"] is None else f"{figures['mfu']:.1%}",
            "-" if figures["mem_gib"] is None else f"{figures['mem_gib']:.1f}",
            f"{figures['tok_s_gpu'] / ours:.3f}" if ours else "-",
        )
        lines.append(f"{label:<28}" + "".join(map(str.rjust, cells, widths)))
    abouts = (f"{figures['name']}: {figures['about']}" for figures in summaries)
    lines += ["", *abouts, *_close_peers(summaries)]
    return "\n".join(lines)


def _close_peers(summaries: list[dict[str, Any]]) -> list[str]:
    """Return a note on each peer that differs from us by less than the rounds differ from each other."""
    ours, *peers = summaries
    notes = []
    for peer in peers:
        if "step_ms" in ours and "step_ms" in peer:
            spread = max(ours["spread"], peer["spread"])
            if spread > abs(1 - peer["step_ms"] / ours["step_ms"]):
                notes.append(
                    f"note: {peer['name']} differs from {OURS} by less than the rounds' spread, {spread:.1%}"
                )
    return notes
