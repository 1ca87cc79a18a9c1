"""A copy of the launchers, with stand-ins for the programs they start."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]

RECORD = '#!/bin/bash\nprintf "%s\\n" "${0##*/}" "$@" >>"$RECORDS/${0##*/}"\n'
STANDINS = {
    "python": RECORD + 'env >"$RECORDS/env"\neval "${TRAIN_DOES:-}"\n',
    "nvidia-smi": '#!/bin/bash\nfor ((i = 0; i < ${GPUS:-0}; i++)); do echo "GPU $i: H100"; done\n',
    "srun": RECORD + 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": RECORD + '[[ $1 == requeue ]] || printf "node7\\nnode8\\nnode9\\n"\n',
    "scancel": RECORD + 'kill -TERM "$(<"$RECORDS/pid")"\n',
}


class Sandbox:
    """A copy of the launchers, stand-ins on PATH, and what these recorded."""

    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path / "repo"
        self.records = tmp_path / "records"
        self.bin = tmp_path / "bin"
        for folder in (self.root / "runs" / "lite", self.records, self.bin):
            folder.mkdir(parents=True)
        shutil.copytree(ROOT / "launch", self.root / "launch", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        shutil.copy(ROOT / "Makefile", self.root)
        for name, text in STANDINS.items():
            self.program(self.bin / name, text)

    @staticmethod
    def program(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def env(self, **more: str) -> dict[str, str]:
        return {"PATH": f"{self.bin}:/usr/bin:/bin", "RECORDS": str(self.records), **more}

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=self.root, env=self.env(**env), capture_output=True, text=True, timeout=30
        )

    def recorded(self, program: str) -> list[str]:
        """The arguments of every call of the program, one after the other."""
        path = self.records / program
        return [line for line in path.read_text().splitlines() if line != program] if path.exists() else []

    def recorded_env(self) -> dict[str, str]:
        lines = (self.records / "env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)
