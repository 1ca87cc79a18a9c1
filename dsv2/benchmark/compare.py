"""`python -m dsv2 benchmark --against`: contenders in alternation, each turn in a process of its own.

One after another they have the whole machine and clean memory; in alternation, so that a card that
grows warm or slows down does so for all of them alike.
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
    """Every contender's rows, by round."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            row = turn(name, number)
            rows[name].append(row)
            said = row.get("error") or f"{row['step_ms']:.1f} ms a step, {row['tok_s_gpu']:.0f} tokens/s"
            print(f"round {number + 1} of {rounds}: {name}: {said}", flush=True)
    return rows


def run_turn(arguments: list[str]) -> dict[str, Any]:
    """The row that `python -m dsv2 benchmark` writes under these arguments, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        program = [sys.executable, "-m", "dsv2", "benchmark", "--out", str(out)]
        done = subprocess.run([*program, *arguments], capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(out.read_text()) | {"printed": done.stdout}
    return {"error": what_failed(done.stderr) or f"exit code {done.returncode}"}


def what_failed(stderr: str) -> str:
    """The last line that begins an exception: its further lines, and what libraries print at exit, follow.

    With a process group torch puts the rank before it.
    """
    lines = [line for line in stderr.splitlines() if line.strip()]
    begins = re.compile(r"(\[rank\d+\]: )?(error: |(\w+\.)*[A-Z]\w*(: |$))")
    return ([line for line in lines if begins.match(line)] or lines or [""])[-1].strip()[:300]


def summary(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A contender's figures: medians over its rounds, and how far the rounds lie apart."""
    good = [row for row in rows if "error" not in row]
    found: dict[str, Any] = {"name": name, "about": about(name), "rounds": rows}
    found["version"] = None if name == OURS else version(name)
    found["errors"] = [row["error"] for row in rows if "error" in row]
    if good:
        steps = [row["step_ms"] for row in good]
        found["step_ms"] = statistics.median(steps)
        found["spread"] = (max(steps) - min(steps)) / found["step_ms"]
        for key in ("tok_s_gpu", "tflops", "mfu"):  # of the median step
            found[key] = None if good[0][key] is None else good[0][key] * steps[0] / found["step_ms"]
        for key in ("micro_batch", "mem_gib", "precision"):
            found[key] = good[0][key]
    return found


def about(name: str) -> str:
    return "this repository" if name == OURS else adapter(name).ABOUT


def table(summaries: list[dict[str, Any]]) -> str:
    """One line a contender; `states` are Adam's, `speed` is its tokens/s over ours."""
    ours = summaries[0].get("tok_s_gpu")
    heads = (
        "contender",
        "weights/states",
        "micro-batch",
        "ms a step",
        "spread",
        "tokens/s",
        "TFLOP/s",
        "MFU",
        "peak GiB",
        "speed",
    )
    widths = [max(12, len(head) + 2) for head in heads[1:]]
    lines = [f"{heads[0]:<28}" + "".join(map(str.rjust, heads[1:], widths))]
    for found in summaries:
        label = " ".join(filter(None, (found["name"], found["version"])))
        if "step_ms" not in found:
            lines.append(f"{label:<28}  {found['errors'][-1]}")
            continue
        cells = (
            found["precision"],
            str(found["micro_batch"]),
            f"{found['step_ms']:.1f}",
            f"{found['spread']:.1%}" if len(found["rounds"]) > 1 else "-",
            f"{found['tok_s_gpu']:.0f}",
            f"{found['tflops']:.4g}",
            "-" if found["mfu"] is None else f"{found['mfu']:.1%}",
            "-" if found["mem_gib"] is None else f"{found['mem_gib']:.1f}",
            f"{found['tok_s_gpu'] / ours:.3f}" if ours else "-",
        )
        lines.append(f"{label:<28}" + "".join(map(str.rjust, cells, widths)))
    lines += ["", *(f"{found['name']}: {found['about']}" for found in summaries), *_unsure(summaries)]
    return "\n".join(lines)


def _unsure(summaries: list[dict[str, Any]]) -> list[str]:
    """A line on each peer whose distance from us is less than that of one's rounds from one another."""
    ours, *peers = summaries
    notes = []
    for peer in peers:
        if "step_ms" in ours and "step_ms" in peer:
            spread = max(ours["spread"], peer["spread"])
            if spread > abs(1 - peer["step_ms"] / ours["step_ms"]):
                notes.append(f"note: {peer['name']}'s distance is within the rounds' spread, {spread:.1%}")
    return notes
