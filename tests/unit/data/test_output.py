"""What is printed never ends a program, whatever the terminal, the pipe and the disk do."""

import os
import subprocess
import sys

import pytest

from tests.unit.helpers import REPO

SAMPLE = "где \ufffd \udc80"  # a path may hold the last one
PROGRAM = f"""
import sys
from data.output import make_printing_safe
make_printing_safe(*[getattr(__builtins__, name) for name in sys.argv[1:]])
for number in range(3000):
    print({SAMPLE!r}, number)
    print({SAMPLE!r}, number, file=sys.stderr)
sys.stdout.flush()
open(3, "w").write("reached")
"""


def run(*arguments: str, stdout: int, stderr: int, encoding: str = "utf-8") -> tuple[int, str]:
    """Return the exit code, and whether the last line of the program was reached."""
    reader, writer = os.pipe()
    with open(reader) as told:
        os.set_inheritable(writer, True)
        process = subprocess.Popen(
            ["bash", "-c", f'exec 3>&{writer} "$@"', "-", sys.executable, "-c", PROGRAM, *arguments],
            cwd=REPO,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, "PYTHONIOENCODING": encoding},
            pass_fds=[writer],
        )
        os.close(writer)
        if stdout == subprocess.PIPE:
            assert process.stdout is not None
            process.stdout.readline()
            process.stdout.close()  # as `| head -1` does
        text = told.read()
        return process.wait(timeout=60), text


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_characters_that_the_terminal_lacks_are_escaped(encoding):
    program = f"from data.output import make_printing_safe; make_printing_safe(); print({SAMPLE!r})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPO,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == SAMPLE.encode(encoding, "backslashreplace") + b"\n"
    assert done.stderr == b""


def test_a_reader_that_has_gone_ends_nothing():
    assert run(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) == (0, "reached")
    only_pipes = ("BrokenPipeError",)
    assert run(*only_pipes, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) == (0, "reached")


def test_a_full_disk_under_a_log_ends_nothing():
    with open("/dev/full", "w") as full:
        assert run(stdout=full.fileno(), stderr=full.fileno()) == (0, "reached")


def test_a_full_disk_under_a_result_is_an_error():
    """A command whose result is its output must not seem to succeed."""
    with open("/dev/full", "w") as full:
        code, text = run("BrokenPipeError", stdout=full.fileno(), stderr=full.fileno())
    assert (code != 0, text) == (True, "")


def test_a_verb_says_that_its_output_is_lost():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dsv2", "cache"],
            cwd=REPO,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")


COPIED = r"""
import os, sys
from pathlib import Path
from data.output import copy_output, make_printing_safe, print_in_handler, printed_so_far
make_printing_safe()
path = Path(sys.argv[1])
print("early")
print("complaint", file=sys.stderr)
copy_output(path, "header\n" + printed_so_far())
copy_output(path, "twice\n")
print("\u0433 \udc80", end=" ")
print("same line")
print_in_handler("at once")
print("half", end="", flush=True)
sys.exit("the end")
"""


def copied(path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", COPIED, str(path)],
        cwd=REPO,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
    )


def test_a_file_gets_all_that_is_printed_before_and_after_it_is_known(tmp_path):
    path = tmp_path / "console.log"
    done = copied(path)
    text = "header\nearly\ncomplaint\n\u0433 \\udc80 same line\nat once\nhalfthe end\n"
    assert path.read_text() == text
    assert done.stdout == "early\n\u0433 \\udc80 same line\nat once\nhalf"
    assert done.stderr == "complaint\nthe end\n"
    copied(path)
    assert path.read_text() == f"{text}\n{text}", "a second session stands below an empty line"


@pytest.mark.parametrize("kind", ["folder", "pipe", "full", "missing"])
def test_a_file_that_cannot_be_written_is_one_warning(tmp_path, kind):
    path = tmp_path / "console.log"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # to open it would wait for ever
    elif kind == "full":
        path.symlink_to("/dev/full")
    else:
        path = tmp_path / "missing" / "console.log"
    done = copied(path)
    assert done.returncode == 1, "by the program's own last line"
    assert done.stdout.count("warning: console.log could not be written: ") == 1
    assert done.stdout.endswith("at once\nhalf")


def test_a_disk_that_fills_up_is_one_warning(tmp_path):
    program = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    program += "resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))\n" + COPIED
    path = tmp_path / "console.log"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert len(path.read_bytes()) == 40
    assert done.stdout.count("warning: console.log could not be written: ") == 1
    assert "at once" in done.stdout
