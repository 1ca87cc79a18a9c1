"""Commands that have moved name their replacement."""

import subprocess
import sys

import pytest

from tests.unit.helpers import REPO

MOVED = {"dsv2.check": "check", "dsv2.export": "export", "dsv2.generate": "generate", "dsv2.plan": "plan"}


@pytest.mark.parametrize(("module", "verb"), [*MOVED.items(), ("dsv2.model.cache", "cache")])
def test_an_old_command_names_its_replacement(module, verb):
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    message = f"error: python -m {module}: this command is now python -m dsv2 {verb}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
