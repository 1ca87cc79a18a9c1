"""Python command lines run by forks of the fork server: like processes of their own, without 8 s of imports.

A fork has its own process id, environment, arguments, output and exit code. What depends on the start of a
process needs a real one: launchers, signals, the encoding of the output, limits of the kernel, and how soon a
mistake is told.
"""

import os
import runpy
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.dist.pool import fork_server

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900


def run_forked(words: list[str], world_size: int = 1) -> tuple[list[int], str]:
    """Run `python WORDS` in the project's folder, as one process or as the ranks of a job, to the end.

    Returns:
        The ranks' exit codes, and what all ranks printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        job = _Job(world_size, Path(folder)) if world_size > 1 else None
        processes = [
            fork_server().Process(target=_run, args=(words, os.environ | variables, output))
            for variables in (job.variables if job else [{}])
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(TIMEOUT_S)
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()  # does nothing if it has ended
                process.join()
        printed = output.read_text() if output.exists() else ""
    assert None not in codes, f"no end in {TIMEOUT_S} s: {printed}"
    return codes, printed


class _Job:
    """The environment variables that torchrun would set for each rank, and the store of their rendezvous."""

    def __init__(self, world_size: int, folder: Path):
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        self.variables = [
            {
                **common,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "TORCHELASTIC_ERROR_FILE": str(folder / "errors" / str(rank) / "error.json"),
            }
            for rank in range(world_size)
        ]


def _run(words: list[str], environment: Mapping[str, str], output: Path) -> None:
    with output.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.orig_argv = [sys.executable, *words]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
