"""How the processes of a job are started, told to stop and ended; the processes are small scripts here."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from dsv2.cli import ranks
from dsv2.cli.machines import Machines
from dsv2.cli.ranks import run_ranks
from tests.unit.helpers import REPO


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Run a script as ranks of one machine: script(text, processes) returns the exit code."""
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("OUT", str(tmp_path))

    def run(text: str, processes: int = 2, patience_s: float = 60) -> int:
        begin = "import os, signal, sys, time\nfrom pathlib import Path\n"
        begin += "rank = int(os.environ['RANK'])\nout = Path(os.environ['OUT'])\n"
        begin += "def wait():\n    (out / f'up{rank}').touch()\n    time.sleep(60)\n"
        command = [sys.executable, "-c", begin + textwrap.dedent(text)]
        return run_ranks(command, processes, Machines(1), {"MINE": "1"}, patience_s)

    return run


def when_up(folder: Path, count: int, act) -> threading.Thread:
    """Act in a thread when that many ranks are up."""

    def watch() -> None:
        deadline = time.monotonic() + 60
        while len(list(folder.glob("up*"))) < count and time.monotonic() < deadline:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_every_process_knows_its_place(script, tmp_path):
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MINE"]
    code = script(f"(out / str(rank)).write_text(' '.join(os.environ[name] for name in {names}))", 3)
    assert code == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [
        f"{rank} {rank} 3 3 127.0.0.1 1" for rank in range(3)
    ]


def test_the_first_failure_ends_the_others_and_gives_the_exit_code(script, monkeypatch, capfd):
    """One process prints its error. Another would wait for it for ever, and does not heed SIGTERM."""
    monkeypatch.setattr(ranks, "GRACE_S", 0.3)
    begin = time.monotonic()
    code = script(
        """
        from dsv2.cli.failure import end
        from dsv2.errors import Diverged
        if rank == 1:
            end(Diverged("step 3: the loss is NaN"), 3)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait()
        """
    )
    assert (code, capfd.readouterr()) == (3, ("", "error: step 3: the loss is NaN\n"))
    assert time.monotonic() - begin < 50, "the other one was killed"


def test_a_killed_process_is_named_in_one_line(script, monkeypatch, capfd):
    monkeypatch.setattr(ranks, "GRACE_S", 0.3)
    assert script("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else wait()") == 1
    error = capfd.readouterr().err
    assert re.fullmatch(r"error: rank 1 on \S+ was ended by SIGKILL; dmesg tells .*\n", error), error


def test_a_traceback_is_left_as_it_is(script, monkeypatch, capfd):
    monkeypatch.setattr(ranks, "GRACE_S", 0.3)
    assert script("sys.exit('of rank 0') if rank == 0 else wait()") == 1
    assert capfd.readouterr().err == "of rank 0\n"


SAVES = """
def save(*_):
    (out / f'saved{rank}').touch()
    sys.exit(0)
signal.signal(signal.SIG, save)
wait()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_is_passed_on_once_and_saved_means_0(script, tmp_path, capfd, name):
    thread = when_up(tmp_path, 2, lambda: os.kill(os.getpid(), signal.Signals[name]))
    assert script(SAVES.replace("SIG,", f"{name},")) == 0
    thread.join()
    assert len(list(tmp_path.glob("saved*"))) == 2
    assert capfd.readouterr() == ("", "")


def test_a_signal_before_training_is_told_in_one_line(script, tmp_path, capfd):
    thread = when_up(tmp_path, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert script("wait()") == 130
    thread.join()
    assert capfd.readouterr().err == "error: interrupted before training began; nothing was changed\n"


@pytest.mark.parametrize("again", [True, False])
def test_who_does_not_end_after_a_signal_is_killed(script, tmp_path, capfd, again):
    """After its patience, or at once after a second Ctrl-C."""

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        if again:
            when_up(tmp_path, 4, lambda: os.kill(os.getpid(), signal.SIGINT)).join()

    thread = when_up(tmp_path, 2, interrupt)
    text = "signal.signal(signal.SIGINT, lambda *_: (out / f'up-told{rank}').touch())\nwait()\nwait()"
    assert script(text, patience_s=60 if again else 0.5) == 1
    thread.join()
    assert capfd.readouterr().err == (
        "error: SIGINT: not every rank ended in time, so all were killed without saving\n"
    )


def test_the_processes_stop_if_their_launcher_is_killed(tmp_path):
    """SIGKILL leaves a launcher no time: the kernel sends its processes SIGTERM."""
    text = "from dsv2.parallel.environment import stop_with_launcher\nstop_with_launcher()\n"
    text += "import os, signal, sys, time\nfrom pathlib import Path\nout = Path(os.environ['OUT'])\n"
    text += "def save(*_):\n    (out / 'saved').touch()\n    sys.exit(0)\n"
    text += "signal.signal(signal.SIGTERM, save)\n(out / 'up').touch()\ntime.sleep(60)\n"
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    variables = {**os.environ, "PYTHONPATH": str(REPO), "OUT": str(tmp_path), "LOCAL_RANK": "0"}
    with subprocess.Popen([sys.executable, "-c", launcher, text], env=variables) as job:
        when_up(tmp_path, 1, lambda: None).join()
        (process,) = psutil.Process(job.pid).children()
        job.kill()
    psutil.wait_procs([process], timeout=30)
    assert (tmp_path / "saved").exists()
