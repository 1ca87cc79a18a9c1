"""The Makefile and the CI script, run with recording stand-ins for the programs they start."""

import os
import subprocess
import time

import pytest

from tests.unit.sandbox import RECORD

# A Python whose `-m venv` makes an environment of recording programs; its version and pip can fail.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
-V) echo Python 3.10.4 ;;
-c*) exit "${OLD:-0}" ;;
"-m venv "*)
    mkdir -p "$3/bin"
    for name in python ruff pyright; do cp "$0" "$3/bin/$name"; done ;;
*"pip install"*) echo pip >>"$RECORDS/made"; exit "${PIP_FAILS:-0}" ;;
*) echo "${0##*/} $*" >>"$RECORDS/made" ;;
esac
"""


@pytest.fixture
def make(box):
    box.program(box.bin / "python3", FAKE_PYTHON)
    (box.root / "requirements.txt").write_text("torch\n")

    def run(*words: str, **env: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        made = box.records / "made"
        made.unlink(missing_ok=True)
        done = box.run("make", *words, **env)
        return done, made.read_text().splitlines() if made.exists() else []

    return run


def test_make_train_installs_prepares_and_trains(make):
    done, made = make("train", "ARGS=optim.lr=1e-3 name=x")
    assert done.returncode == 0, done.stderr
    assert made == [
        "pip",
        "python -m dsv2 prepare stdlib",
        "python -m dsv2 train experiment=quickstart optim.lr=1e-3 name=x",
    ]
    assert "installing requirements.txt into .venv" in done.stdout


def test_make_test_checks_format_and_lint_first(make):
    lint = ["ruff check .", "ruff format --check ."]
    tests = "python -m pytest -n 2 --dist loadfile --no-loadscope-reorder"
    assert make("test")[1] == ["pip", *lint, f"{tests} -m not full"]
    assert make("test-all")[1] == [*lint, tests]
    assert make("lint")[1][-1].strip() == "pyright"


def test_make_harness_installs_into_its_own_environment(make, box):
    (box.root / "requirements-harness.txt").write_text("lm-eval\n")
    test = "python -m pytest -m harness -s tests/unit/hf/test_harness.py -x"
    assert make("harness", "ARGS=-x")[1] == ["pip", "pip", test]
    assert all((box.root / name / "installed").exists() for name in (".venv", ".venv-harness"))
    assert make("harness", "ARGS=-x")[1] == [test]
    assert make("test", "ARGS=-x")[1][0] == "ruff check .", "other targets do not need it"


def test_make_soak_passes_its_arguments_on(make):
    assert make("soak", "ARGS=--kills 5")[1] == ["pip", "python -m tests.soak --kills 5"]


def test_make_installs_again_only_for_new_requirements(make, box):
    assert make("format")[1][0] == "pip"
    assert "pip" not in make("format")[1]
    later = time.time() + 10
    os.utime(box.root / "requirements.txt", (later, later))
    assert make("format")[1][0] == "pip"


def test_make_does_not_count_a_failed_installation(make, box):
    done, made = make("train", PIP_FAILS="1")
    assert done.returncode != 0
    assert made == ["pip"]
    assert make("format")[1][0] == "pip"  # it starts again
    assert "pip" not in make("format")[1]
    # Nor does an older success count once a newer attempt has failed, whatever the file's times say.
    later = time.time() + 10
    os.utime(box.root / "requirements.txt", (later, later))
    assert make("format", PIP_FAILS="1")[0].returncode != 0
    os.utime(box.root / "requirements.txt", (1, 1))
    assert make("format")[1][0] == "pip"


def test_make_refuses_an_old_or_missing_python(make, box):
    done, made = make("train", OLD="1")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == (
        "Python 3.11 or newer is needed, but 'python3' is Python 3.10.4; give one with make PYTHON=python3.11"
    )
    done, _ = make("train", "PYTHON=no-such-python")
    assert "but 'no-such-python' is missing" in done.stderr.splitlines()[0]
    assert made == []
    assert not (box.root / ".venv").exists()


def test_make_clean_keeps_runs_and_prepared_data(make, box):
    made = ("dsv2/__pycache__", ".venv", ".venv-harness", ".ruff_cache")
    for folder in ("runs/lite/__pycache__", "prepared/stdlib", *made):
        (box.root / folder).mkdir(parents=True)
    assert make("clean")[0].returncode == 0
    left = {str(path.relative_to(box.root)) for path in box.root.rglob("*") if path.is_dir()}
    assert {"runs/lite/__pycache__", "prepared/stdlib"} <= left
    assert not set(made) & left


def test_ci_runs_make_test_in_a_fresh_environment(box):
    box.program(
        box.bin / "make", RECORD + '[[ ! -e .venv && -z ${PYTHONPATH:-} ]] && exit "${MAKE_EXIT:-0}"\n'
    )
    (box.root / ".venv").mkdir()
    done = subprocess.run([str(box.root / ".ci/run")], cwd="/", env=box.env(PYTHONPATH="/x"), timeout=20)
    assert done.returncode == 0
    assert box.recorded("make") == ["test"]
    assert box.run(".ci/run", MAKE_EXIT="5").returncode == 5
