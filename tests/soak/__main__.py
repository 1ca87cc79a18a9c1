"""Kill, race and wear out jobs, which takes hours: `make soak ARGS="--kills 5 --worlds 1,2 --steps 500"`.

A table says how it went. The exit code is 1 if a row failed.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from tests.dist.end_to_end import ROOT
from tests.soak.endurance import endure
from tests.soak.kills import PREPARATION, SAME, SAVE, Preparing, Training, kill_and_continue
from tests.soak.race import race


class Row(NamedTuple):
    what: str
    result: str
    seen: str
    seconds: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    add = parser.add_argument
    add("--kills", type=int, default=50, help="per number of processes; at least 2: a preparation and a save")
    add("--worlds", default="1,2,4", help="numbers of processes, of 1, 2 and 4")
    add("--steps", type=int, default=5000, help="of the long run; at least 60")
    add("--seed", type=int, default=0, help="of the moments at which jobs are killed")
    chosen = parser.parse_args()
    if chosen.kills < 2 or chosen.steps < 60:
        parser.error(f"--kills {chosen.kills} --steps {chosen.steps}: must be at least 2 and 60")
    if set(chosen.worlds.split(",")) - {"1", "2", "4"}:
        parser.error(f"--worlds {chosen.worlds}: must be 1, 2 or 4, or several of them as in 1,2")
    return chosen


def kills(processes: int, count: int, preparing: Preparing, folder: Path, rng: random.Random) -> str:
    """Kill a tenth of `count` times in preparations, the other times in training."""
    preparations = max(1, count // 10)
    prepared = kill_and_continue(preparing, preparations, folder / "prepared")
    training = Training(processes, preparing.whole, folder, rng)
    trained = kill_and_continue(training, count - preparations, folder / "run")
    same = f"{prepared.pop(SAME)} folders and {trained.pop(SAME)} runs ended bit-equal"
    seen = ", ".join(f"{number} in {part}" for part, number in (prepared + trained).items()) + f"; {same}"
    assert prepared[PREPARATION] > 0, seen
    assert trained[SAVE] > 0, seen
    return seen


def row(what: str, test: Callable[[], str]) -> Row:
    """Run one test. Its failure does not end the others."""
    begin = time.monotonic()
    try:
        result = "ok"
        seen = test()
    except Exception as error:
        traceback.print_exc()
        result = "FAILED"
        seen = (str(error) or type(error).__name__).splitlines()[0]
    done = Row(what, result, seen, time.monotonic() - begin)
    print(f"{done.result}: {done.what}: {done.seen}", flush=True)
    return done


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    cpu = names[0] if names else "unknown CPU"
    return f"{cpu}, {os.cpu_count()} cores, torch {torch.__version__}, commit {commit or 'unknown'}"


def soak(chosen: argparse.Namespace, folder: Path) -> Iterator[Row]:
    rng = random.Random(chosen.seed)
    preparing = Preparing(folder, rng)
    for world in map(int, chosen.worlds.split(",")):
        at = folder / f"world-{world}"
        at.mkdir()
        name = f"{world} process{'es' * (world > 1)}"
        yield row(f"kills, {name}", partial(kills, world, chosen.kills, preparing, at, rng))
        yield row(f"race, {name}", partial(race, world, preparing.whole, at))
    yield row("long run, 1 process", partial(endure, chosen.steps, preparing.whole, folder))


def main() -> int:
    chosen = arguments()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # `weights` wants it so
    where = machine()  # now, because the commit may change while jobs run
    folder = Path(tempfile.mkdtemp(prefix="dsv2-soak-"))
    rows = list(soak(chosen, folder))
    print("\n" + where, "".join(f" --{name} {value}" for name, value in vars(chosen).items()), sep=",")
    print("\n| what | result | seen | minutes |\n|---|---|---|---|")
    for done in rows:
        print(f"| {done.what} | {done.result} | {done.seen} | {done.seconds / 60:.1f} |")
    if any(done.result != "ok" for done in rows):
        print(f"\nthe jobs' files are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
