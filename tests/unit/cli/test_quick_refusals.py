"""A mistake that needs no tensors to be found is told before torch is imported, which takes seconds."""

import json
import subprocess
import sys

from tests.unit.checkpoint.test_files import make as make_checkpoint
from tests.unit.helpers import REPO, cpu_seconds_of_children

PROGRAM = """
import json, sys
from dsv2.__main__ import VERBS
from dsv2.cli.base import main
codes = []
for words in json.loads(sys.argv[1]):
    codes.append(int(main(words, VERBS)))
print(json.dumps([codes, "torch" in sys.modules]))
"""


def test_refusals_that_need_no_tensors_are_quick(tmp_path, jsonl):
    data = tmp_path / "data"
    prepare = ["prepare", "jsonl", str(jsonl), "--out", str(data), "--vocab-size", "320", "--quiet"]
    good = ["data=local", f"data.path='{data}'", f"runs_dir='{tmp_path / 'runs'}'", "optim.warmup_steps=1"]
    good += ["data.sequence_length=32", "eval.sequences=1", "runtime.device=cpu"]
    check = ["check", 1, *good]
    metrics = tmp_path / "runs" / "folders" / "metrics.jsonl"
    metrics.mkdir(parents=True)
    (tmp_path / "plain").write_text("")
    other = make_checkpoint(tmp_path / "runs" / "other" / "checkpoints", 7, {"hidden_size": 16})
    missing = tmp_path / "missing"
    cases = {
        f"checkpoint {missing}: there is no such folder": ["generate", missing, "--prompt", "x"],
        f"out={tmp_path}: already exists; remove it": ["export", missing, tmp_path],
        f"checkpoint {missing}: there is no such": ["export", missing, tmp_path / "out"],
        f"data.path={missing}: that folder does not exist": [*check, f"data.path='{missing}'"],
        f"data.path={missing}: holds no finished": [*check, "data=stdlib", f"data.path='{missing}'"],
        f"resume={missing}: there is no such folder": [*check, f"resume='{missing}'"],
        f"init_from={missing}: there is no such folder": [*check, f"init_from='{missing}'"],
        f"model.hidden_size=192: the checkpoint {other} was saved with 16": [*check, "name=other"],
        f"resume=never: {other.parent} already holds {other.name}": [*check, "name=other", "resume=never"],
        f"runs_dir={tmp_path}/runs: {metrics} cannot be written (Is a dir": [*check, "name=folders"],
        f"runs_dir={tmp_path / 'plain'}: ": [*check, f"runs_dir='{tmp_path / 'plain'}'"],
        "runtime.check_memory=true: the process needs about ": [*check, "model=v2"],
        "optim.batch_size=1000000000000: must be": [*check, "optim.batch_size=1000000000000"],
    }
    commands = [prepare, *([str(word) for word in words] for words in cases.values())]
    before = cpu_seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    used = cpu_seconds_of_children() - before
    codes = [0, *[2] * len(cases)]
    assert json.loads(done.stdout.splitlines()[-1]) == [codes, False], done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(cases)
    for line, start in zip(lines, cases, strict=True):
        assert line.startswith(f"error: {start}"), line
    assert used < 12, "of the preparation and of all refusals together"
    assert not missing.exists()
