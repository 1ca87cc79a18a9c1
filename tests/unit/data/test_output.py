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
