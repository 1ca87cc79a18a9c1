"""The real command line: mistakes give one line and exit code 2, and help needs no torch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv2.config.changes import differences
from dsv2.config.compose import compose_overrides, from_plain, to_plain
from dsv2.config.fields import field_types
from dsv2.config.renamed import FIELDS, OPTIONS
from dsv2.config.schema import (
    Device,
    OptimConfig,
    ParallelConfig,
    Precision,
    RuntimeConfig,
)
from dsv2.errors import UserError
from tests.unit.helpers import REPO, compose_config, cpu_seconds_of_children


def train(*arguments: str, cwd: Path, python_options: tuple[str, ...] = (), **environment: str):
    command = [sys.executable, *python_options, str(REPO / "train.py"), *arguments]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        command, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=120, check=False
    )


MISTAKES = {
    # an unknown field, with and without `+`, in the wrong section, and nothing like any field
    "optim.lrr=1": ["optim.lrr=1: there is no such field; did you mean optim.lr?"],
    "+optim.lrr=1": ["optim.lrr=1: there is no such field; did you mean optim.lr?"],
    "steps=8": [
        "steps=8: there is no such field; optim.total_tokens sets the length of a run, stop_step stops it "
        "earlier"
    ],
    "ep=2": ["ep=2: there is no such field; did you mean parallel.expert_parallel_size?"],
    "batch_size=8": ["batch_size=8: there is no such field; did you mean optim.batch_size?"],
    "model.balance.alpha_exprt=0": ["alpha_exprt=0: there is no such field", "model.balance.alpha_expert?"],
    "++zzz=1": ["zzz=1: there is no such field"],
    # wrong types and values
    "--multirun": ["--multirun: a job trains one model"],
    "runtime.precision=fp16": ["runtime.precision=fp16:", "fp32", "bf16"],
    "optim.lr=${nowhere}": ["optim.lr=${nowhere}:", "nowhere"],
    # groups
    "model=lit": [
        "model=lit: there is no such option; did you mean lite?",
        "debug, lite, lite_slice, small, v2, v2_slice",
    ],
    "model=small,lite": ["model=small,lite: must name a file of conf/model, without .yaml"],
    "+model=small": ["+model=small: must name a file of conf/model, without .yaml"],
    "optim.lr=1e-3,2e-3": ["optim.lr=1e-3,2e-3: a job trains one model; start one job per value"],
    "experiment": ["experiment: must be written as name=value, such as experiment=quickstart"],
    "--experiment=quickstart": ["must be written without dashes, such as experiment=quickstart"],
    "--optim.lr": ["--optim.lr: must be written without dashes, such as optim.lr=VALUE"],
    "experiment=study/balanc": [
        "experiment=study/balanc: there is no such option; did you mean study/balance?"
    ],
    "experiment=nope": ["experiment=nope: there is no such option", "quickstart"],
    "rope_scaling=yan": ["rope_scaling=yan: there is no such option; did you mean yarn?", "none, yarn"],
    "rope_scaling=null": ["rope_scaling=null: must name a file of conf/rope_scaling"],
    "model.rope_scaling.factor=2": ["plain RoPE has no such field; choose rope_scaling=yarn too"],
    "model.rope_scaling.factor=40": ["plain RoPE has no such field; choose rope_scaling=yarn too"],
    "model.rope_scaling.factor=null": ["plain RoPE has no such field; choose rope_scaling=yarn too"],
    "model.rope_scaling={}": ["plain RoPE has no such field; choose rope_scaling=yarn too"],
    "model.rope_scaling={factor:2}": ["plain RoPE has no such field; choose rope_scaling=yarn too"],
    "optim=null": ["optim"],
    "experiment=long_context": ["data.path: must be given, as data.path=FOLDER with a folder that `python"],
    "data=local": [
        "data.path: must be given, as data.path=FOLDER with a folder that `python -m dsv2 prepare` wrote"
    ],
    # types
    "optim.lr=fast": ["error: optim.lr=fast: must be a number"],
    "learning_rate=1": ["learning_rate=1: there is no such field; did you mean optim.lr?"],
    # syntax
    "optim.lr": ["optim.lr"],
    "optim.lr=[1": ["[1"],
    # what validate() refuses
    "model.n_group=3": ["model.n_group=3: must divide model.n_routed_experts=16: one of 1, 2, 4, 8, 16"],
    "parallel.expert_parallel_size=2": [
        "parallel.expert_parallel_size=2: must be 1 with 1 process; or start another"
    ],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake, tmp_path):
    done = train(mistake, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert all(part in lines[0] for part in MISTAKES[mistake]), lines[0]
    assert done.stdout == ""
    assert not list(tmp_path.iterdir()), "nothing was made"


@pytest.mark.parametrize("show", [["--cfg", "job"], ["--cfg=job"], ["-c", "job"]])
def test_what_is_shown_has_only_fields_there_are(show, tmp_path):
    done = train(*show, "data=local", "+optim.lrr=1", cwd=tmp_path)
    message = "error: +optim.lrr=1: there is no such field; did you mean optim.lr?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.parametrize("mistake", ["optim.lrr=1", "model.n_group=3", "data=local"])
def test_other_ranks_keep_silent(mistake, tmp_path):
    """The first process that fails prints the line and tells torchrun; on this machine no other does."""

    def rank(number: int):
        error_file = tmp_path / "attempt_0" / str(number) / "error.json"
        ranks = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        return train(mistake, cwd=tmp_path, **ranks, TORCHELASTIC_ERROR_FILE=str(error_file)), error_file

    done, error_file = rank(0)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr == f"error: {json.loads(error_file.read_text())['message']}\n"
    done, error_file = rank(1)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    assert not error_file.exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--help"], "model: debug, lite, lite_slice, small, v2, v2_slice"),
        (["--cfg", "job"], "batch_size_start: null"),
        (["--cfg", "job", "experiment=quickstart"], "name: quickstart"),
        (["--cfg", "job", "data=local"], "path: ???"),
    ],
)
def test_help_is_quick_and_needs_no_torch(arguments, text, tmp_path):
    before = cpu_seconds_of_children()
    done = train(*arguments, cwd=tmp_path)
    used = cpu_seconds_of_children() - before
    assert done.returncode == 0, done.stderr
    assert text in done.stdout
    # CPU time of the command alone: 1 s, or 2 s on a slow machine, where importing torch would add 6 s.
    assert used < 4

    done = train(*arguments, cwd=tmp_path, python_options=("-X", "importtime"))
    # One line a module: "import time: self | cumulative | name".
    modules = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "hydra" in modules
    assert not modules & {"torch", "deepspeed", "numpy", "wandb", "transformers"}
    assert not list(tmp_path.iterdir())


def test_an_option_that_is_no_override_is_refused_in_words():
    with pytest.raises(
        UserError, match=r"^-x: must be written as name=value, such as experiment=quickstart$"
    ):
        compose_overrides(["experiment=quickstart", "-x"])


def test_a_moved_field_or_option_names_its_new_place():
    for old, new in FIELDS.items():
        with pytest.raises(UserError, match=f"^{old}=1: this field is now {new}$"):
            compose_config(f"{old}=1")
        assert new in field_types()
        assert old not in field_types()
    for old, new in OPTIONS.items():
        with pytest.raises(UserError, match=f"^{old}: this option is now {new}$"):
            compose_config(old)
        compose_config(new)


def test_a_configuration_saved_under_old_names_is_read():
    saved = to_plain(compose_config())
    parallel = {"expert_parallel_size": 2, "zero_stage": 3, "device": "cpu", "precision": "bf16"}
    parallel |= {"kernels": "fused", "micro_batch_size": 7, "activation_checkpointing": True}
    saved["parallel"] = parallel | {"optimizer_states": "bf16"}
    del saved["runtime"], saved["optim"]["name"], saved["optim"]["states"]
    config = from_plain(saved)
    assert config.runtime == RuntimeConfig(Device.cpu, Precision.bf16, "fused", True, 7)
    assert config.optim == OptimConfig(states=Precision.bf16)
    assert config.parallel == ParallelConfig(2, 3)
    assert differences(saved, to_plain(config)) == []
    assert "runtime" not in saved


@pytest.mark.parametrize(
    ("override", "right"),
    [
        ("optim.lr=fast", "must be a number"),
        ("optim.lr=null", "must be a number"),
        ("optim.batch_size=1.5", "must be a whole number"),
        ("seed=1.5", "must be a whole number"),
        ("stop_step=x", "must be a whole number or null"),
        ("optim.total_tokens=1e9", "must be a whole number; write it out: optim.total_tokens=1_000_000_000"),
        ("runtime.recompute=maybe", "must be true or false"),
        ("checkpoint.asynchronous=1", "must be true or false"),
        ("checkpoint.asynchronous=0.0", "must be true or false"),
        ("checkpoint.asynchronous=on", "must be true or false"),
        ("checkpoint.asynchronous=null", "must be true or false"),
        ("optim.decay_at=[soon]", "must be a list in brackets (each item a number)"),
        ("optim.decay_at=0.5", "must be a list in brackets (each item a number)"),
        ("data.data_files=5", "must be a list in brackets (each item a text) or null"),
        ("model.balance=3", "must be set field by field"),
        ("eval=3", "must be set field by field"),
        ("foo=1", "there is no such field; python -m dsv2 train --help lists all fields"),
        (
            "tokens=1",
            "there is no such field; python -m dsv2 train --help lists all fields",
        ),  # ends several comments
    ],
)
def test_a_value_of_another_kind_is_refused_in_words(override, right):
    with pytest.raises(UserError, match=f"^{re.escape(f'{override}: {right}')}$"):
        compose_config(override)


@pytest.mark.parametrize("name", [name for name, kind in field_types().items() if kind is bool])
def test_no_field_of_true_or_false_takes_a_number(name):
    section, _, field = name.rpartition(".")
    message = f"^{re.escape(f'{name}=3: must be true or false')}$"
    with pytest.raises(UserError, match=message):
        compose_config(f"{name}=3")
    nested: dict[str, Any] = {field: 3}
    for part in reversed(section.split(".") if section else []):
        nested = {part: nested}
    with pytest.raises(
        UserError, match=re.escape(f"a saved configuration does not fit this version: {name}=3")
    ):
        from_plain(nested)


def test_a_number_within_a_section_is_refused_too():
    with pytest.raises(UserError, match=r"^checkpoint\.asynchronous=3: must be true or false$"):
        compose_config("checkpoint={keep: 2, asynchronous: 3}")


@pytest.mark.parametrize("value", ["true", "True", "'true'", "${new_stage}", "false"])
def test_true_and_false_are_taken_in_every_spelling(value):
    assert compose_config(f"runtime.recompute={value}").runtime.recompute is (
        value.strip("'").lower() == "true"
    )
