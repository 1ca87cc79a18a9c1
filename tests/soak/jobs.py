"""Jobs that are waited for, killed, and read."""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.dist.end_to_end import LAUNCHER, ROOT, kill_hard, tiny_run

PATIENCE_S = 900
POLL_S = 0.002  # a tiny model's save takes some tens of milliseconds


class Job:
    """A started command of `processes` processes. Its output goes to a file in `folder`."""

    def __init__(self, command: list[str], folder: Path, processes: int = 1) -> None:
        environment = {**os.environ, "NPROC": str(processes), "OMP_NUM_THREADS": "1"}
        number, name = tempfile.mkstemp(prefix="output-", dir=folder)
        self._output = Path(name)
        with os.fdopen(number, "wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def lines(self) -> list[str]:
        """Return what the job has printed, without the launcher's first line, which is the command."""
        lines = self._output.read_text(errors="replace").splitlines()
        return [line for line in lines if not line.startswith("+ ")]

    def reaches(self, has_come: Callable[[], bool]) -> bool:
        """Wait until `has_come()`. False: the job ended before.

        Raises:
            TimeoutError: neither happened.
        """
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            if has_come():
                return True
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happened in {PATIENCE_S} s: {self.process.args}")
            time.sleep(POLL_S)
        return False

    def outlives(self, seconds: float) -> bool:
        """Let the job run for so long. False: it ended before."""
        deadline = time.monotonic() + seconds
        return self.reaches(lambda: time.monotonic() >= deadline)

    def finish(self) -> None:
        """Wait for the job, which must end well."""
        code = self.process.wait(PATIENCE_S)
        assert code == 0, f"exit code {code}: {' / '.join(self.lines()[-3:])}"

    def kill(self) -> None:
        kill_hard(self.process)


def start_training(processes: int, corpus: Path, run_dir: Path, *overrides: str) -> Job:
    """Start a tiny run. Two processes share the experts."""
    layout = f"parallel.expert_parallel_size={min(2, processes)}"
    command = [*LAUNCHER, *tiny_run(corpus, run_dir.parent, run_dir.name, layout, *overrides)]
    return Job(command, run_dir.parent, processes)
