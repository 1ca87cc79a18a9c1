"""console.log holds what the launcher and rank 0 print, and the error of whoever fails."""

import os
import subprocess
import sys
import textwrap

from tests.unit.helpers import REPO

JOB = """
import sys
from data.output import make_printing_safe
from dsv2.cli import ranks
from dsv2.cli.machines import Machines
make_printing_safe(BrokenPipeError)
print("of the launcher")
ranks.GRACE_S = 0.3
sys.exit(ranks.run_ranks([sys.executable, "-c", sys.argv[1]], 2, Machines(1), {}, 60))
"""
RANK = """
import os, signal, time
from pathlib import Path
from data.output import make_printing_safe
from dsv2.cli.console_log import begin_log
from dsv2.cli.failure import end, job_folder
from dsv2.errors import Diverged
make_printing_safe()
rank = int(os.environ["RANK"])
out = Path(os.environ["OUT"])
print("early, of rank", rank)
if rank == 0:
    begin_log(out, job_folder())
    print("of rank 0", flush=True)
    (out / "up").touch()
    time.sleep(60)
deadline = time.monotonic() + 60
while not (out / "up").exists() and time.monotonic() < deadline:
    time.sleep(0.02)
"""


def log_of(tmp_path, failure: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", JOB, RANK + textwrap.dedent(failure)],
        cwd=REPO,
        env={**os.environ, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    header, *lines = (tmp_path / "console.log").read_text().splitlines()
    assert header.startswith("===== 20")
    assert f" UTC, {os.uname().nodename}: {sys.executable} -c " in header
    # The command of these processes has several lines.
    return lines[lines.index("of the launcher") :]


def test_another_ranks_error_is_in_the_log(tmp_path):
    lines = log_of(tmp_path, 'end(Diverged("step 3: the loss is NaN"), 3)')
    assert lines == ["of the launcher", "early, of rank 0", "of rank 0", "error: step 3: the loss is NaN"]


def test_the_launchers_word_on_a_killed_process_is_in_the_log(tmp_path):
    lines = log_of(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert lines[:3] == ["of the launcher", "early, of rank 0", "of rank 0"]
    assert len(lines) == 4
    assert lines[3].startswith("error: rank 1 on ")
    assert " was ended by SIGKILL" in lines[3]
