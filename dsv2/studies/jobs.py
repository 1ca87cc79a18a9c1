"""The runs of a study: their configurations, and how a run is started."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dsv2.config.compose import compose_config, read_saved
from dsv2.config.schema import Config, Device
from dsv2.errors import UserError
from dsv2.monitoring.status import read_status
from dsv2.studies.arms import STUDIES
from dsv2.training.validate import validate

ROOT = Path(__file__).resolve().parents[2]


class Job(NamedTuple):
    """One run of a study."""

    arm: str
    seed: int
    overrides: list[str]
    config: Config

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir


def plan(study: str, seeds: int, out: Path, overrides: list[str]) -> list[Job]:
    """Return every run: all arms with the first seed, then all arms with the next.

    Raises:
        UserError: the study does not exist, or a configuration cannot run on one process.
    """
    if study not in STUDIES:
        raise UserError(f"{study}: there is no such study; one of {', '.join(STUDIES)}")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: must be at least 1")
    planned = []
    for seed in range(seeds):
        for arm, changes in STUDIES[study].items():
            of_run = [f"name={arm}-s{seed}", f"runs_dir={out.resolve()}"]
            of_run += [f"seed={seed}", f"data.seed={seed}"]
            words = [f"experiment=study/{study}", *changes, *overrides, *of_run]
            config = compose_config(words)
            validate(config, world_size=1)
            if config.stop_step is not None:
                raise UserError(f"stop_step={config.stop_step}: a study's runs end with optim.total_tokens")
            planned.append(Job(arm, seed, words, config))
    return planned


def is_finished(job: Job) -> bool:
    """Return whether the run already exists and is finished.

    Raises:
        UserError: the run has another configuration. A different `runs_dir` does not count.
    """
    if read_status(job.run_dir).get("state") != "finished":
        return False
    if replace(read_saved(job.run_dir / "config.yaml"), runs_dir=job.config.runs_dir) != job.config:
        raise UserError(
            f"{job.run_dir}: finished with another configuration than this command's; choose another --out, "
            "or remove that folder"
        )
    return True


def run(job: Job, gpu: str | None) -> int:
    """Train the run on that GPU, or on the CPU for None; return the exit code. Output goes to RUN_DIR.log."""
    environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    with job.run_dir.with_name(f"{job.run_dir.name}.log").open("w", encoding="utf-8") as log:
        command = [sys.executable, str(ROOT / "train.py"), *job.overrides]
        return subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode


def refused(job: Job) -> int:
    """Check the run without training; return the check's exit code. A refusal goes to stderr."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "dsv2", "check", "1", *job.overrides]
    return subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=False).returncode


def gpus(config: Config) -> list[str]:
    """Return the GPUs for the runs, as CUDA_VISIBLE_DEVICES names them; none if runs use the CPU."""
    import torch

    if config.runtime.device is Device.cpu or not torch.cuda.is_available():
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",") if chosen else [str(index) for index in range(torch.cuda.device_count())]
