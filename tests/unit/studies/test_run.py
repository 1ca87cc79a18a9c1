"""Studies: what their arms have in common, and the driver on made-up runs and on a small real one."""

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from dsv2.config.compose import compose_config as compose
from dsv2.config.compose import to_yaml
from dsv2.model.sizes import attention_matrices, cached_elements, count_parameters
from dsv2.studies import jobs
from dsv2.studies.arms import STUDIES
from dsv2.studies.jobs import Job
from dsv2.studies.table import COLUMNS
from tests.unit.helpers import REPO, run_verb

ARMS = [(name, arm) for name, arms in STUDIES.items() for arm in arms]


def arm_config(name: str, arm: str):
    return compose([f"experiment=study/{name}", *STUDIES[name][arm]])


def test_every_study_has_its_experiment():
    files = {path.stem for path in (REPO / "conf/experiment/study").glob("*.yaml")}
    assert files == {*STUDIES, "common"}


@pytest.mark.parametrize("name", STUDIES)
def test_arms_are_of_equal_size(name):
    """In total and active, within 1 %; and as large as the studies are said to be."""
    counts = [count_parameters(arm_config(name, arm).model) for arm in STUDIES[name]]
    for sizes in ([c.total for c in counts], [c.active for c in counts]):
        assert max(sizes) / min(sizes) < 1.01
        assert len(sizes) == (8 if name == "granularity" else 4)
    assert all(49e6 < count.total < 53e6 for count in counts)
    assert all(23e6 < count.active < 25e6 for count in counts)


def test_balance_arms_differ_in_balance_alone():
    alphas = {"off": (0, 0, 0), "expert": (0.003, 0, 0), "all": (0.003, 0.05, 0.02)}
    alphas["all-dropping"] = alphas["all"]
    plain = arm_config("balance", "all")
    for arm, values in alphas.items():
        config = arm_config("balance", arm)
        balance = config.model.balance
        assert (balance.alpha_expert, balance.alpha_device, balance.alpha_comm) == values
        assert balance.token_dropping == (arm == "all-dropping")
        config.model.balance = plain.model.balance
        assert config == plain


@pytest.mark.parametrize("split", [1, 2, 4, 8])
def test_granularity_arms_use_a_quarter_of_one_total_width(split):
    for arm in (f"{split}x", f"{split}x-shared"):
        model = arm_config("granularity", arm).model
        width, shared = model.moe_intermediate_size, model.n_shared_experts
        assert width == 704 / split
        assert (model.n_routed_experts + shared) * width == 8 * 704
        assert (model.num_experts_per_tok + shared) * width == 2 * 704
        assert shared == (split if arm.endswith("shared") else 0)


def test_attention_arms_differ_in_attention_alone():
    models = {arm: arm_config("attention", arm).model for arm in STUDIES["attention"]}
    assert [model.attention for model in models.values()] == ["mla", "mha", "gqa", "mqa"]
    sizes = {arm: attention_matrices(model) for arm, model in models.items()}
    assert sizes["mha"] == sizes["gqa"] == sizes["mqa"] == 2**20
    assert sizes["mla"] == pytest.approx(2**20, rel=0.02)
    cached = {arm: cached_elements(model) for arm, model in models.items()}
    assert cached == {"mla": 5 * 160, "mha": 5 * 1024, "gqa": 5 * 512, "mqa": 5 * 128}


def made_up(job: Job, loss: float) -> int:
    """A finished run: 10 windows of 2 steps, of which the last two count."""
    (job.run_dir / "checkpoints").mkdir(parents=True)
    lines = []
    for step in range(1, 21):
        row = {"step": step, "perf/tok_s": 100.0 if step > 1 else 1.0}
        if step % 2 == 0:
            names = [c.metric for c in COLUMNS if c.metric.split("/")[0] in ("moe", "dev", "comm")]
            row |= dict.fromkeys(names, {18: 1.0, 20: 3.0}.get(step, 99.0))
        lines.append(row)
    lines += [{"step": 10, "val/loss": 9.0, "val/bpb": 9.0}, {"step": 20, "val/loss": loss, "val/bpb": 1.5}]
    lines.sort(key=lambda row: row["step"])
    (job.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (job.run_dir / "status.json").write_text('{"state": "finished", "step": 20, "total_steps": 20}\n')
    (job.run_dir / "config.yaml").write_text(to_yaml(job.config))
    return 0


def trains_as(monkeypatch: pytest.MonkeyPatch, run: Callable[..., int]) -> None:
    """Jobs run so, and nothing about them is refused before."""
    monkeypatch.setattr(jobs, "run", run)
    monkeypatch.setattr(jobs, "refused", lambda job: 0)


def test_tables_have_mean_and_spread_over_seeds(tmp_path, monkeypatch, capsys):
    losses = {"off": [3.0, 3.5, 4.0], "expert": [2.0] * 3, "all": [1.0, 1.1, 1.2], "all-dropping": [1.0] * 3}
    ran = []

    def train(job: Job, gpu: str | None) -> int:
        ran.append(job.config.name)
        if job.config.name == "expert-s1":
            return 3
        return made_up(job, losses[job.arm][job.seed])

    trains_as(monkeypatch, train)
    out = tmp_path / "out"
    assert run_verb("study", "balance", "--out", out, "runtime.device=cpu", "optim.lr=1e-3") == 1
    assert ran == [f"{arm}-s{seed}" for seed in range(3) for arm in losses]
    assert capsys.readouterr().err == "error: 1 of 12 runs failed: expert-s1\n"
    result = json.loads((out / "table.json").read_text())
    off = result["arms"]["off"]["metrics"]
    assert off["val/loss"] == {"mean": 3.5, "std": 0.5, "values": [3.0, 3.5, 4.0]}
    assert off["moe/max_vio"]["mean"] == 2.0  # the last fifth: 1 and 3
    assert off["perf/tok_s"]["mean"] == 100.0
    assert (result["arms"]["expert"]["seeds"], result["lr"]) == ([0, 2], 1e-3)
    assert not list(out.glob("*/checkpoints"))
    rows = [line.split(" | ") for line in (out / "table.md").read_text().splitlines() if line[:2] == "| "]
    assert [row[3] for row in rows] == [
        "validation loss",
        "3.5000 ± 0.5000",
        "2.0000 ± 0.0000",
        f"1.1000 ± {statistics.stdev([1.0, 1.1, 1.2]):.4f}",
        "1.0000 ± 0.0000",
    ]
    # Again: what failed is run once more, nothing else.
    ran.clear()
    trains_as(monkeypatch, lambda job, gpu: ran.append(job.config.name) or made_up(job, 2.0))
    shutil.move(out, tmp_path / "moved")
    again = ["balance", "--out", str(tmp_path / "moved"), "runtime.device=cpu", "optim.lr=1e-3"]
    assert run_verb("study", *again) == 0
    assert ran == ["expert-s1"]


def test_runs_at_once(tmp_path, monkeypatch):
    """Three runs wait for each other: with fewer at once none would end."""
    together = threading.Barrier(3, timeout=60)

    def train(job: Job, gpu: str | None) -> int:
        together.wait()
        return made_up(job, 1.0 + job.seed)

    trains_as(monkeypatch, train)
    arguments = ["attention", "--at-once", "3", "--out", str(tmp_path), "runtime.device=cpu"]
    assert run_verb("study", *arguments) == 0
    result = json.loads((tmp_path / "table.json").read_text())
    assert result["runs_at_once"] == 3
    assert all(arm["metrics"]["val/loss"]["values"] == [1.0, 2.0, 3.0] for arm in result["arms"].values())


def test_each_run_has_a_gpu_in_turns(tmp_path, monkeypatch):
    taken = {}

    def train(job: Job, gpu: str | None) -> int:
        taken[job.config.name] = gpu
        return made_up(job, 1.0)

    trains_as(monkeypatch, train)
    monkeypatch.setattr(jobs, "gpus", lambda config: ["0", "1"])
    assert run_verb("study", "attention", "--seeds", "1", "--out", str(tmp_path), "runtime.device=cpu") == 0
    assert list(taken.values()) == ["0", "1", "0", "1"]


def test_a_run_sees_its_gpu_alone(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        jobs.subprocess, "run", lambda *a, env, **k: seen.append(env) or subprocess.CompletedProcess(a, 0)
    )
    job = jobs.plan("attention", 1, tmp_path, ["runtime.device=cpu"])[0]
    assert jobs.run(job, "1") == jobs.run(job, None) == 0
    assert seen[0]["CUDA_VISIBLE_DEVICES"] == "1"
    assert seen[1].get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")


def test_runs_of_another_configuration_are_not_mixed_in(tmp_path, monkeypatch, capsys):
    trains_as(monkeypatch, lambda job, gpu: made_up(job, 1.0))
    arguments = ["attention", "--seeds", "1", "--out", str(tmp_path), "runtime.device=cpu"]
    assert run_verb("study", *arguments) == 0
    assert "| mla | 52.7M | 24.6M | 800 | 1.0000 | " in (tmp_path / "table.md").read_text()
    capsys.readouterr()
    assert run_verb("study", *arguments, "optim.lr=1e-4") == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: {tmp_path}/mla-s0: finished with another configuration than this command's"
    )
    assert error.count("\n") == 1


def test_what_every_run_would_refuse_is_said_once(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(jobs, "run", lambda job, gpu: pytest.fail("something ran"))
    assert run_verb("study", "balance", "--out", str(tmp_path / "out")) == 2
    refusal = "error: runtime.device=cuda: there is no GPU on this machine; use runtime=default\n"
    assert capfd.readouterr() == ("", refusal)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["balanc"], "balanc: there is no such study; one of balance, granularity, attention"),
        (["balance", "--seeds", "0"], "--seeds 0: must be at least 1"),
        (["balance", "--at-once", "0"], "--at-once 0: must be at least 1"),
        (["balance", "optim.lrr=1"], "optim.lrr=1: there is no such field; did you mean optim.lr?"),
        (["balance", "optim.batch_size=80"], "optim.batch_size=80: must be a multiple of 32"),
        (
            ["balance", "stop_step=1"],
            "stop_step=1: a study's runs end with optim.total_tokens",
        ),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path, capsys, arguments, message):
    assert run_verb("study", *arguments, "--out", str(tmp_path / "out")) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}")
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


SMALL = [
    "runtime.device=cpu",
    "runtime.precision=fp32",
    "runtime.micro_batch_size=4",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "runtime.kernels=reference",
    "model.intermediate_size=48",
    "model.vocab_size=300",
    "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=8",
    "model.qk_rope_head_dim=8",
    "model.v_head_dim=8",
    "data=local",
    "data.sequence_length=32",
    "optim.batch_size=4",
    "optim.total_tokens=1024",
    "optim.warmup_steps=2",
    "eval.sequences=2",
    "logging.every=4",
]


@pytest.mark.timeout(600)
def test_a_small_study_from_training_to_table(tmp_path, monkeypatch, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(30):
        (texts / f"{index}.txt").write_text(f"def f{index}(x): return x + {index}\n" * 20)
    data = tmp_path / "data"
    prepare = [sys.executable, "-m", "data.prepare", "files", str(texts), "--out", str(data)]
    prepare += ["--vocab-size", "290", "--val-fraction", "0.3", "--quiet"]
    subprocess.run(prepare, cwd=REPO, check=True, timeout=120)
    out = tmp_path / "out"
    arms = {arm: STUDIES["attention"][arm] for arm in ("mla", "gqa")}
    monkeypatch.setitem(STUDIES, "attention", arms)
    arguments = ["attention", "--seeds", "1", "--out", str(out), *SMALL, f"data.path={data}"]
    assert run_verb("study", *arguments) == 0, "".join(path.read_text() for path in out.glob("*.log"))
    result = json.loads((out / "table.json").read_text())
    losses = {arm: entry["metrics"]["val/loss"]["values"][0] for arm, entry in result["arms"].items()}
    assert list(losses) == ["mla", "gqa"]
    assert losses["mla"] != losses["gqa"]
    assert all(3 < loss < 1.1 * math.log(300) for loss in losses.values())
    assert re.search(r"\d CPU cores, fp32, 1 at once; 1\.0K tokens per run", (out / "table.md").read_text())
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["gqa-s0", "mla-s0"]
    capsys.readouterr()
    assert run_verb("study", *arguments) == 0  # again: nothing is trained
    assert capsys.readouterr().out.count("already finished") == 2


def test_as_a_command():
    command = [sys.executable, "-m", "dsv2", "study", "balanc"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: balanc: there is no such study; one of balance, granularity, attention\n"
