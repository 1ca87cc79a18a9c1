"""The metrics of a run: two processes tell what one tells, and docs/metrics.md names them all."""

import re
from collections import Counter
from pathlib import Path

import pytest

from dsv2.config.schema import ModelConfig, OptimConfig
from dsv2.model.sizes import flops_per_token
from dsv2.monitoring.tracker import read_metrics
from dsv2.training.schedule import plan_steps
from tests.dist.end_to_end import ROOT, TORCHRUN, TWO, run

pytestmark = pytest.mark.timeout(1800)
BATCH, LENGTH, STEPS = 8, 32, 8
OPTIM = OptimConfig(lr=3e-3, total_tokens=BATCH * LENGTH * STEPS, batch_size=BATCH, warmup_steps=3)
OVERRIDES = [
    f"optim.total_tokens={OPTIM.total_tokens}",
    f"optim.warmup_steps={OPTIM.warmup_steps}",
    "model.num_hidden_layers=3",
    "model.initializer_range=0.2",  # experts far apart: the last bit of an affinity changes no choice
    "model.balance.token_dropping=true",
    "logging.every=3",  # windows of 3, 3 and 2 steps
    "logging.maps_every=6",
    "eval.every=6",
    "eval.sample_tokens=0",
    "checkpoint.every=0",
]
WINDOWS, MAPS, EVALUATIONS = [3, 6, 8], [6, 8], [6, 8]


@pytest.fixture(scope="module")
def documented() -> dict[str, set[str]]:
    """The names in the tables of docs/metrics.md, by the first words of their section."""
    names: dict[str, set[str]] = {}
    section = ""
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        if line.startswith("## "):
            section = " ".join(line.split()[1:3])
        elif line.startswith("| `"):
            names.setdefault(section, set()).update(re.findall(r"`(\w+/\w+)`", line.split("|")[1]))
    assert list(names) == [
        "Every step",
        "Every `logging.every`",
        "Every `logging.maps_every`",
        "At evaluation",
    ]
    return names


@pytest.fixture(scope="module")
def runs_dir(run_command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs "1" and "2" of so many processes; a dispatch has 4 sequences in both."""
    folder = tmp_path_factory.mktemp("metrics")
    run(run_command(folder, "1", *OVERRIDES, "runtime.micro_batch_size=4", "logging.wandb=disabled"))
    run(run_command(folder, "2", *OVERRIDES, *TWO, "runtime.micro_batch_size=2", launcher=TORCHRUN))
    return folder


@pytest.fixture(scope="module")
def rows(runs_dir: Path) -> dict[int, dict[int, dict[str, float]]]:
    """For 1 and 2 processes: what metrics.jsonl holds of every step."""
    found = {world: read_metrics(runs_dir / str(world)) for world in (1, 2)}
    return {world: {int(row.pop("step")): row for row in table} for world, table in found.items()}


def test_the_documented_pictures_are_there_and_no_other(runs_dir, documented):
    pictures = (runs_dir / "2").glob("wandb/offline-run-*/files/media/images/map/*.png")
    found = Counter("map/" + re.sub(r"_\d+_\w+\.png$", "", path.name) for path in pictures)
    assert found == dict.fromkeys(documented["Every `logging.maps_every`"], len(MAPS))


def test_every_documented_name_is_there_when_it_should_be_and_no_other(rows, documented):
    due = [range(1, STEPS + 1), WINDOWS, [], EVALUATIONS]
    for step in range(1, STEPS + 1):
        want = {n for names, at in zip(documented.values(), due, strict=True) if step in at for n in names}
        found = {re.sub(r"/L\d\d$", "/L07", name) for name in rows[2][step]}
        assert found == want - {"perf/mfu"}, f"step {step}: mfu is for GPUs"
    assert {name for name in rows[2][3] if name.startswith("vio/")} == {"vio/L01", "vio/L02"}


@pytest.mark.parametrize("world", [1, 2])
def test_the_plan_and_the_clock(rows, world):
    model = ModelConfig(
        vocab_size=600,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
    )
    plans = {plan.step + 1: plan for plan in plan_steps(OPTIM, LENGTH)}
    assert sorted(rows[world]) == sorted(plans) == list(range(1, STEPS + 1))
    assert len({plan.lr for plan in plans.values()}) == 4, "warm-up and a decay"
    for step, row in rows[world].items():
        assert row["train/tokens"] == step * BATCH * LENGTH
        assert row["train/batch_seqs"] == BATCH
        assert row["train/lr"] == plans[step].lr
        assert row["perf/tok_s"] * row["perf/step_s"] == pytest.approx(BATCH * LENGTH, rel=1e-9)
        assert row["perf/tok_s_gpu"] * world == pytest.approx(row["perf/tok_s"], rel=1e-9)
        flops = row["perf/tok_s_gpu"] * flops_per_token(model, LENGTH)
        assert row["perf/tflops"] * 1e12 == pytest.approx(flops, rel=1e-9)
        assert 0 < row["perf/data_s"] < row["perf/step_s"]
        assert 0.05 < row["perf/mem_gib"] < 10


@pytest.mark.parametrize("world", [1, 2])
def test_the_loss_is_the_sum_of_what_is_told(rows, world):
    for row in rows[world].values():
        added = sum(row[f"moe/add_{name}"] for name in ("expert", "device", "comm"))
        assert row["train/loss_lm"] + added == pytest.approx(row["train/loss"], rel=1e-6)
        assert added > 0.05, "or the losses' part could be missing"


def test_two_processes_tell_what_one_tells(rows):
    """Sums over ranks come before ratios; had rank 0 spoken for itself, no window would agree."""
    for step in range(1, STEPS + 1):
        one, two = rows[1][step], rows[2][step]
        shared = {name for name in one if not name.startswith("perf/")}
        assert {name: two[name] for name in shared} == pytest.approx(
            {name: one[name] for name in shared}, rel=1e-5
        )
    assert all(rows[2][step]["moe/drop"] > 0.01 for step in WINDOWS), "something was dropped"
    assert len({rows[2][step]["moe/top1"] for step in WINDOWS}) == 3
