"""The metrics of a run: every declared one appears when it should, two processes log what one logs, and
every value is what the ranks' own numbers give by hand.
"""

import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dsv2.config.schema import ModelConfig, OptimConfig
from dsv2.model.sizes import flops_per_token
from dsv2.monitoring.metrics.base import When
from dsv2.monitoring.metrics.producers import PRODUCERS
from dsv2.monitoring.records import read_metrics
from dsv2.training.schedule import plan_steps
from tests.dist.end_to_end import OFFLINE, TORCHRUN, TWO, run

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
    "spike.policy=skip",  # no step is a spike; the counts are metrics
]
WINDOWS, MAPS, EVALUATIONS = [3, 6, 8], [6, 8], [6, 8]


def declared(when: When) -> set[str]:
    """Return the declared names; `vio/L07` for `vio/L*`, and each rank's for `work/R*`."""
    metrics = [metric for producer in PRODUCERS if producer.when is when for metric in producer.metrics]
    names = {metric.name.replace("/L*", "/L07") for metric in metrics}
    return {name.replace("R*", f"R{rank}") for name in names for rank in range(2)}


@pytest.fixture(scope="module")
def runs_dir(run_command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs "1" and "2" of so many processes, a dispatch having 4 sequences in both; the record of "2"."""
    folder = tmp_path_factory.mktemp("metrics")
    run(run_command(folder, "1", *OVERRIDES, "runtime.micro_batch_size=4"))
    two = [*TWO, "runtime.micro_batch_size=2", OFFLINE]
    command = run_command(folder, "2", *OVERRIDES, *two, launcher=TORCHRUN)
    script = command.index("train.py")
    command[script : script + 1] = ["-m", "tests.dist.recorded_train"]
    run(command, env=os.environ | {"RECORD": str(folder)})
    return folder


@pytest.fixture(scope="module")
def rows(runs_dir: Path) -> dict[int, dict[int, dict[str, float]]]:
    """For 1 and 2 processes: what metrics.jsonl holds of every step."""
    found = {world: read_metrics(runs_dir / str(world)) for world in (1, 2)}
    return {
        world: {int(row.pop("step")): row for row in table if row.pop("time")}
        for world, table in found.items()
    }


def test_the_declared_pictures_are_there_and_no_other(runs_dir):
    pictures = (runs_dir / "2").glob("wandb/offline-run-*/files/media/images/map/*.png")
    found = Counter("map/" + re.sub(r"_\d+_\w+\.png$", "", path.name) for path in pictures)
    assert found == dict.fromkeys(declared(When.maps), len(MAPS))


def test_every_declared_name_is_there_when_it_should_be_and_no_other(rows):
    due = {When.step: range(1, STEPS + 1), When.window: WINDOWS, When.evaluation: EVALUATIONS}
    due[When.save] = [STEPS]  # the last step alone is saved
    for step in range(1, STEPS + 1):
        want = {name for when, steps in due.items() if step in steps for name in declared(when)}
        found = {re.sub(r"/L\d\d$", "/L07", name) for name in rows[2][step]}
        assert found == want - {"perf/mfu"}, f"step {step}: mfu is for GPUs"
    assert {name for name in rows[2][3] if name.startswith("vio/")} == {"vio/L01", "vio/L02"}


def test_each_rank_has_its_own_times(rows):
    for step in WINDOWS:
        row = rows[2][step]
        own = [row[f"work/R{rank}"] + row[f"data/R{rank}"] for rank in range(2)]
        for rank in range(2):
            assert 0 < row[f"work/R{rank}"] < row[f"step/R{rank}"]
            assert 0 < row[f"data/R{rank}"] < row[f"step/R{rank}"]
        assert row["ranks/slowest"] == np.argmax(own)
        assert row["ranks/slow"] == pytest.approx(max(own) / min(own))
        since = [s for s in rows[2] if step - (2 if step == 8 else 3) < s <= step]
        mean = np.mean([rows[2][s]["perf/step_s"] for s in since])
        assert row["step/R0"] == pytest.approx(mean), "rank 0 writes perf/step_s"
    assert not any(name.startswith("ranks/") for row in rows[1].values() for name in row)


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
        assert row["train/loss_lm"] + added == pytest.approx(row["train/loss_total"], rel=1e-6)
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


BY_HAND = [
    "train/loss_total",
    "train/loss_lm",
    "moe/aux_expert",
    "moe/aux_device",
    "moe/aux_comm",
    "moe/add_expert",
    "moe/add_device",
    "moe/add_comm",
    "moe/max_vio",
    "moe/max_vio_max",
    "moe/dead",
    "moe/drop",
    "moe/ent_tok",
    "moe/ent_load",
    "moe/top1",
    "vio/L07",
    "dead/L07",
    "drop/L07",
    "dev/load_max_mean",
    "dev/cv",
    "comm/recv_max_mean",
    "comm/devs_per_tok",
    "comm/send_max_mean",
    "comm/in_max_mean",
    "comm/gib",
    "comm/a2a_ms",
    "val/loss",
    "val/bpb",
]
ELSEWHERE = [
    "train/grad_norm",
    "train/lr",
    "train/batch_seqs",
    "train/tokens",
    "perf/tok_s",
    "perf/tok_s_gpu",
    "perf/tflops",
    "perf/mfu",
    "perf/step_s",
    "perf/data_s",
    "perf/mem_gib",
]  # the plan, the clock; against one process


@pytest.fixture(scope="module")
def ranks(runs_dir: Path) -> list[dict[str, Any]]:
    """Each rank's own numbers in the run of two processes."""
    return [torch.load(runs_dir / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def model(runs_dir: Path) -> dict[str, Any]:
    return yaml.safe_load((runs_dir / "2" / "config.yaml").read_text())["model"]


def of_steps(ranks: list[dict[str, Any]], first: int, last: int) -> list[list[dict[str, np.ndarray]]]:
    """What every rank computed in steps first..last: two micro-batches of two sequences each."""
    return [rank["passes"][2 * (first - 1) : 2 * last] for rank in ranks]


def test_the_metrics_checked_by_hand_are_declared():
    names = declared(When.step) | declared(When.window) | declared(When.evaluation)
    assert names >= {*BY_HAND, *ELSEWHERE}


def test_losses_are_means_of_the_ranks_own(rows, ranks, model):
    balance = model["balance"]
    for step in range(1, STEPS + 1):
        every = [output for rank in of_steps(ranks, step, step) for output in rank]
        assert len(every) == 4
        want = {
            "train/loss_total": np.mean([output["loss"] for output in every]),
            "train/loss_lm": np.mean([output["lm_loss"] for output in every]),
        }
        for name in ("expert", "device", "comm"):
            raw_L = np.mean([output[name] for output in every], axis=0)
            want[f"moe/aux_{name}"] = raw_L.mean()
            want[f"moe/add_{name}"] = balance[f"alpha_{name}"] * raw_L.sum()
        assert {name: rows[2][step][name] for name in want} == pytest.approx(want, rel=1e-6)


def window_by_hand(own: list[list[dict[str, np.ndarray]]], model: dict[str, Any]) -> dict[str, float]:
    """Routing metrics of a window from every rank's own statistics, layer by layer."""
    every = [output for rank in own for output in rank]
    groups = model["n_group"]
    columns: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        columns.setdefault(name, []).append(float(value))

    for layer in range(2):
        load = sum(output["load_E"][layer] for output in every)
        dropped = sum(output["dropped_E"][layer] for output in every)
        sent = sum(output["sent_G"][layer] for output in every)
        tokens = sum(output["tokens"][layer] for output in every)
        of_group = [sum(part) for part in np.split(load, groups)]
        share = [pairs / sum(load) for pairs in load if pairs > 0]
        add("vio", max(load) / np.mean(load) - 1)
        add("dead", sum(pairs == 0 for pairs in load))
        add("drop", sum(dropped) / sum(load))
        add("pairs", sum(load))
        add("pairs dropped", sum(dropped))
        add("ent_tok", sum(output["token_entropy"][layer] for output in every) / tokens)
        add("ent_load", -sum(p * math.log(p) for p in share))
        add("top1", sum(output["top1"][layer] for output in every) / tokens)
        add("group load", max(of_group) / np.mean(of_group))
        add("group cv", np.std(of_group) / np.mean(of_group))
        add("received", max(sent) / np.mean(sent))
        add("groups", sum(sent) / tokens)
    mean = {name: np.mean(values) for name, values in columns.items()}
    log_experts = math.log(model["n_routed_experts"])
    by_layer = {
        f"{name}/L{layer + 1:02d}": columns[name][layer]
        for name in ("vio", "dead", "drop")
        for layer in range(2)
    }
    return by_layer | {
        "moe/max_vio": mean["vio"],
        "moe/max_vio_max": max(columns["vio"]),
        "moe/dead": sum(columns["dead"]),
        "moe/drop": sum(columns["pairs dropped"]) / sum(columns["pairs"]),
        "moe/ent_tok": mean["ent_tok"] / log_experts,
        "moe/ent_load": mean["ent_load"] / log_experts,
        "moe/top1": mean["top1"],
        "dev/load_max_mean": mean["group load"],
        "dev/cv": mean["group cv"],
        "comm/recv_max_mean": mean["received"],
        "comm/devs_per_tok": mean["groups"],
    }


@pytest.mark.parametrize(("first", "last"), [(1, 3), (4, 6), (7, 8)])
def test_a_window_is_what_the_ranks_own_numbers_give(rows, ranks, model, first, last):
    own = of_steps(ranks, first, last)
    want = window_by_hand(own, model)
    assert {name: rows[2][last][name] for name in want} == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(("first", "last"), [(1, 3), (4, 6), (7, 8)])
def test_the_exchange_is_what_each_rank_sent(rows, ranks, model, first, last):
    """Rows by rank come before their ratio: were they summed over ranks first, it would always be 1."""
    own = of_steps(ranks, first, last)
    steps = last - first + 1
    out_WL, in_WL = (
        np.array([sum(output[name] for output in rank) for rank in own]) for name in ("rows_out", "rows_in")
    )
    assert (out_WL == in_WL[::-1]).all(), "two ranks: what one sends the other receives"
    # The hidden state crosses 4 times; choice, weights and their gradients once each; all in fp32.
    row = 4 * (4 * model["hidden_size"] + 3 * model["num_experts_per_tok"])
    want = {
        "comm/send_max_mean": np.mean([max(rows_W) / np.mean(rows_W) for rows_W in out_WL.T]),
        "comm/in_max_mean": np.mean([max(rows_W) / np.mean(rows_W) for rows_W in in_WL.T]),
        "comm/gib": np.mean([sum(rows_L) for rows_L in out_WL]) * row / steps / 2**30,
        "comm/a2a_ms": np.mean([sum(rank["waits"][first - 1 : last]) for rank in ranks]) / steps,
    }
    assert {name: rows[2][last][name] for name in want} == pytest.approx(want, rel=1e-9)
    assert want["comm/send_max_mean"] > 1.001, "the ranks differ"


def test_maps_are_the_ranks_own_loads(runs_dir, ranks, model):
    lines = [json.loads(line) for line in (runs_dir / "2" / "maps.jsonl").read_text().splitlines()]
    maps = {line["step"]: line for line in lines if len(line) > 1}
    assert sorted(maps) == MAPS
    for step, first in ((6, 4), (8, 7)):
        every = [output for rank in of_steps(ranks, first, step) for output in rank]
        load = sum(output["load_E"] for output in every)
        sent = sum(output["sent_G"] for output in every)
        of_group = load.reshape(2, model["n_group"], -1).sum(axis=-1)
        for name, want in (("expert_load", load), ("dev_load", of_group), ("dev_recv", sent)):
            uniform = want.mean(axis=1, keepdims=True)
            np.testing.assert_allclose(maps[step][f"map/{name}"], want / uniform, atol=6e-4)


def test_an_evaluation_is_the_ranks_own_losses(rows, ranks, corpus):
    token_bytes = np.load(corpus / "token_bytes.npy")
    for index, step in enumerate(EVALUATIONS):
        nats: dict[int, np.ndarray] = {}
        labels: dict[int, np.ndarray] = {}
        for rank in ranks:
            for part in rank["evaluated"][2 * index : 2 * index + 2]:
                for sequence, losses, tokens in zip(part["ids"], part["nats"], part["labels"], strict=True):
                    if sequence < 5:  # the rest fill up a rank's micro-batch
                        nats[int(sequence)] = losses.astype(np.float64)
                        labels[int(sequence)] = tokens
        assert sorted(nats) == list(range(5))
        total = sum(losses.sum() for losses in nats.values())
        n_bytes = sum(token_bytes[tokens].sum() for tokens in labels.values())
        assert rows[2][step]["val/loss"] == pytest.approx(total / (5 * LENGTH), rel=1e-9)
        assert rows[2][step]["val/bpb"] == pytest.approx(total / math.log(2) / n_bytes, rel=1e-9)
