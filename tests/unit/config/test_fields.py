"""Defaults and comments of the configuration: each is written once, and `--help` shows them."""

import subprocess
import sys
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from dsv2.config.compose import to_plain
from dsv2.config.fields import GROUPS, field_docs, field_types, options_of
from dsv2.config.schema import Config
from tests.unit.helpers import REPO, compose_config, cpu_seconds_of_children

DOCS = {doc.name: doc for doc in field_docs()}
FILES = sorted(path.relative_to(REPO / "conf").as_posix() for path in (REPO / "conf").rglob("*.yaml"))
RESTATED = {  # equal to the default, but another option that may be chosen with it says otherwise
    ("experiment/quickstart.yaml", "runtime.micro_batch_size"),  # runtime=gpu has 1
}


@pytest.mark.parametrize("name", DOCS)
def test_every_field_has_a_comment(name):
    assert len(DOCS[name].text) > 8, f"{name}: write a comment with its unit behind or above the field"


def test_every_value_is_listed():
    sections = {name for name, hint in field_types().items() if name not in DOCS}
    assert sections == {
        "model", "model.balance", "data", "optim", "parallel", "runtime",
        "spike", "logging", "profile", "watchdog", "eval", "checkpoint",
    }  # fmt: skip


def test_type_default_and_comment():
    lr = DOCS["optim.lr"]
    assert (lr.type, lr.default, lr.text) == ("float", "0.00042", "peak learning rate")
    assert DOCS["runtime.precision"].type == "fp32 | bf16"
    assert (DOCS["stop_step"].type, DOCS["stop_step"].default) == ("int or null", "null")
    assert DOCS["optim.decay_at"].default == "[0.6, 0.9]"
    assert DOCS["data.path"].default == "must be given"
    assert DOCS["new_stage"].text.startswith("with resume=PATH of another run"), "the lines above the field"


def test_help_lists_every_field_and_option_quickly_and_without_torch():
    command = [sys.executable, "-X", "importtime", "-m", "dsv2", "train", "--help"]
    before = cpu_seconds_of_children()
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60, check=True)
    used = cpu_seconds_of_children() - before
    assert used < 2
    lines = done.stdout.splitlines()
    for doc in DOCS.values():
        assert f"  {doc.name}  {doc.type} = {doc.default}" in lines
    words = " ".join(done.stdout.split())
    for doc in DOCS.values():
        assert " ".join(doc.text.split()) in words
    for group in GROUPS:
        assert f"  {group}" in lines
        assert all(f"    {option}: " in done.stdout for option in options_of(group))
    modules = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not modules & {"torch", "deepspeed", "numpy", "wandb", "transformers"}


def values_of(file: str) -> dict[str, Any]:
    """Return the values that a file of conf/ sets, by dotted name."""
    text = (REPO / "conf" / file).read_text()
    group = file.split("/")[0]
    package = f"{group}." if "/" in file else ""
    if "# @package" in text:
        named = text.split("# @package ")[1].split()[0]
        package = "" if named == "_global_" else f"{named}."
    content = OmegaConf.create(text) if text.strip() else OmegaConf.create()
    assert isinstance(content, DictConfig)

    def walk(node: DictConfig, prefix: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key in node:
            name = f"{prefix}{key}"
            child = node._get_node(key)
            is_section = isinstance(child, DictConfig) and len(child) > 0
            values |= walk(child, f"{name}.") if is_section else {name: OmegaConf.to_container(node)[key]}
        return values

    return {
        name: value for name, value in walk(content, package).items()
        if not name.startswith("hydra.") and name.split(".")[-1] != "defaults"
    }  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_conf_holds_only_what_differs_from_the_defaults(file):
    defaults: Any = to_plain(Config())
    for name, value in values_of(file).items():
        default: Any = defaults
        for part in name.split("."):
            default = default[part] if isinstance(default, dict) else None
        assert (value != default) != ((file, name) in RESTATED), f"{name}: {value} is the default"


def test_chosen_options_are_complete():
    yarn = compose_config("rope_scaling=yarn").model
    assert yarn.rope_scaling is not None
    assert (yarn.rope_scaling.factor, yarn.max_position_embeddings) == (40.0, 163840)
    assert compose_config("rope_scaling=none").model.rope_scaling is None
