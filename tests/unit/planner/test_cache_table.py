"""Elements cached per token, against the paper's figures."""

import subprocess
import sys

import pytest

from dsv2.planner.cache_table import rows
from tests.unit.helpers import REPO, compose_config, run_verb


def counts(*overrides: str) -> dict[str, int]:
    return dict(rows(compose_config(*overrides).model))


def test_table_9():
    """15.6K against 110.6K for the small model, 34.6K against 860.2K for the large one."""
    lite, v2 = counts("model=lite"), counts("model=v2")
    assert lite["MLA"] == 15_552
    assert lite["MHA, same heads (16)"] == 110_592
    assert round(15_552 / 110_592, 2) == 0.14
    assert v2["MLA"] == 34_560
    assert v2["MHA, as many attention parameters as MLA (56 heads)"] == 860_160
    assert round(34_560 / 860_160, 2) == 0.04


def test_table_1():
    """Per layer 2 n_h d_h, 2 n_g d_h, 2 d_h and d_c + d_h^R, which is 9/2 d_h."""
    v2 = counts("model=v2")
    published = {
        "MHA, same heads (128)": 60 * 2 * 128 * 128,
        "MHA, as many attention parameters as MLA (56 heads)": 60 * 2 * 56 * 128,
        "GQA, 8 groups": 60 * 2 * 8 * 128,
        "MQA": 60 * 2 * 128,
        "MLA": 60 * 9 * 128 // 2,
    }
    assert {name: v2[name] for name in published} == published


@pytest.mark.parametrize("kind", ["mha", "mqa", "gqa"])
def test_the_kind_in_the_configuration_changes_no_row(kind):
    groups = ["model.num_key_value_heads=8"] if kind == "gqa" else []
    assert counts("model=lite", f"model.attention={kind}", *groups) == counts("model=lite")


def test_the_configurations_own_groups():
    own = counts("model=lite", "model.attention=gqa", "model.num_key_value_heads=4")
    assert own["GQA, 4 groups"] == 27 * 2 * 4 * 128


def test_command_line():
    """As a user runs it; it needs no torch."""
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "dsv2",
        "cache",
        "model=v2",
        "model.v_head_dim=128",
    ]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    modules = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "hydra" in modules
    assert "torch" not in modules
    lines = done.stdout.splitlines()
    mha = next(line for line in lines if line.startswith("MHA, as many"))
    mla = next(line for line in lines if line.startswith("MLA"))
    assert mha.split()[-3:] == ["860.2K", "44%", "100%"]
    assert mla.split() == ["MLA", "34.6K", "2%", "4%"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("model=lit", "error: model=lit: there is no such option; did you mean lite?"),
        ("model.hidden_sze=3", "error: model.hidden_sze=3: there is no such field"),
        ("model.kv_lora_rank=0", "error: model.kv_lora_rank=0: must be at least 1"),
        ("model=null", "error: model=null: must name a file of conf/model"),
    ],
)
def test_mistakes(mistake, message, capsys):
    assert run_verb("cache", mistake) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(message)
