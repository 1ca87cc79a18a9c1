"""How a process of train.py ends with an error: one line per machine on stderr, and an error file.

The launcher (`python -m dsv2 train`, or torchrun) gives each process of a machine its own error file, in
folders beside each other. The first process that fails prints the error and writes its file, for torchrun's
report. It also leaves a mark with its exit code in the common folder. Processes that fail later find the mark
and stay silent: they found the same error, or they lost that process.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from filelock import FileLock

from dsv2.cli.base import print_error
from dsv2.cli.console_log import join_log

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
MARK = "told"


def job_folder() -> Path | None:
    """Return the folder that the launcher and its processes on this machine share; None without launcher."""
    file = os.environ.get(ERROR_FILE)
    return Path(file).parents[1] if file else None  # .../attempt_0 of .../attempt_0/RANK/error.json


def tell(error: BaseException, code: int) -> None:
    """Print the error unless another process of this machine has printed one."""
    if (folder := job_folder()) is None:
        print_error(error)
        return
    mark = folder / MARK
    mark.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{mark}.lock"):  # whoever waits here leaves only after the error is printed
        if mark.exists():
            return
        join_log(folder)
        print_error(error)
        _write_error_file(Path(os.environ[ERROR_FILE]), error)
        mark.write_text(str(int(code)), encoding="utf-8")


def told_code(folder: Path) -> int | None:
    """Return the exit code of the process that has printed an error; None if none has.

    Args:
        folder: the parent of the folders with the processes' error files.
    """
    mark = folder / MARK
    return int(mark.read_text(encoding="utf-8")) if mark.exists() else None


def _write_error_file(file: Path, error: BaseException) -> None:
    # torchrun names the earliest failure as the cause and compares whole seconds. One second less makes this
    # failure the earliest, even if other processes fail within the same second.
    content = {"message": str(error), "timestamp": int(time.time()) - 1}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def end(error: BaseException, code: int, together: bool = False) -> NoReturn:
    """Tell the error and exit with `code`.

    If all processes fail `together`, they leave together. If one exits while another still communicates with
    it, the other one aborts.
    """
    tell(error, code)
    if together:
        from dsv2.parallel.start import end_process_group

        end_process_group()
    sys.exit(code)
