"""The page of a run from someone else: its texts stay text, and its configuration runs and reads nothing."""

import base64
import hashlib
import json
import re

import pytest
import yaml

from data.config import DataConfig
from dsv2.config.compose import to_yaml
from dsv2.config.schema import Config
from tests.unit.helpers import compose_config, run_verb
from tests.unit.monitoring.report.runs import MARKUP, Parsed, write_page


def test_no_text_of_the_run_becomes_markup(run_dir):
    """Names of metrics and layers, the state, the run's name and file names come from the run's files."""
    clean = [tag for tag, _ in Parsed(write_page(run_dir)).elements]
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    hostile = {"step": 100, f"train/{MARKUP}": 1.5, f"vio/L{MARKUP.replace('/', '')}": 2.5}
    (run_dir / "metrics.jsonl").write_text("".join(lines) + json.dumps(hostile) + "\n")
    (run_dir / "status.json").write_text(json.dumps({"state": MARKUP, "step": 100, "total_steps": 100}))
    (run_dir / "config.0.yaml").rename(run_dir / f"config.{MARKUP.replace('/', '')}.yaml")
    config = Config(name=MARKUP, data=DataConfig(path="x"), model=compose_config().model)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    page = Parsed(write_page(run_dir))
    rows = {"tr", "td"}  # the two metrics are further rows of the tables
    assert [tag for tag, _ in page.elements if tag not in rows] == [tag for tag in clean if tag not in rows]
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
    assert f"train/{MARKUP}" in page.sections["final-values"]


def test_the_policy_allows_the_pages_own_script_and_style_alone(run_dir):
    text = write_page(run_dir)
    page = Parsed(text)
    metas = [attributes for tag, attributes in page.elements if tag == "meta"]
    (policy,) = [meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in (policy or "").split(";"))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    assert rules.pop("img-src") == "data:", "the maps, which the script draws"
    for kind in ("script", "style"):
        (own,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert rules.pop(f"{kind}-src") == f"'sha256-{digest}'"
    assert not rules
    assert text.index("Content-Security-Policy") < text.index("<style>"), "it counts from there on"
    assert not [attributes for _, attributes in page.elements if "style" in attributes]
    assert "style: `" not in text, "the script sets no style attribute"


CONFIGS = {
    "tag": ("name: !!python/object/apply:os.system ['touch {marker}']\n", "is not the configuration"),
    "tuple": ("!!python/tuple [1]\n", "is not the configuration"),
    "path": ("data: {{path: !!python/object/apply:pathlib.PosixPath [x]}}\n", "is not the configuration"),
    "list": ("[1, 2]\n", "is not the configuration"),
    "bytes": ("\udcff", "is not the configuration"),
    "open": ("model: {{", "is not the configuration"),
    "number": ("data: {{path: x}}\noptim: {{lr: '${{oc.env:DSV2_SECRET}}'}}\n", "optim.lr"),
    "section": ("model: 3\n", "does not fit this version"),
    "newer": ("model: {{n_predict: 3}}\n", "config.yaml does not fit this version: model.n_predict"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_strange_configuration_is_one_line(tmp_path, run_dir, capsys, monkeypatch, name):
    monkeypatch.setenv("DSV2_SECRET", "12.5")
    text, message = CONFIGS[name]
    marker = tmp_path / "marker"
    (run_dir / "config.yaml").write_bytes(text.format(marker=marker).encode(errors="surrogateescape"))
    assert run_verb("report", run_dir) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run_dir}/config.yaml")
    assert message in error
    assert error.count("\n") == 1
    assert "12.5" not in error
    assert not marker.exists()


def test_a_stored_configuration_reads_nothing_of_this_machine(run_dir, monkeypatch):
    monkeypatch.setenv("DSV2_SECRET", "a secret of this machine")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["name"] = "${oc.env:DSV2_SECRET}"
    config["eval"]["sample_prompt"] = "${oc.env:DSV2_SECRET}"
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    text = write_page(run_dir)
    assert "a secret" not in text
    assert "<title>${oc.env:DSV2_SECRET}</title>" in text
