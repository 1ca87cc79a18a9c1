"""The model and the engine on a GPU follow the CPU."""

import json
import subprocess

import numpy as np
import pytest
import torch

from dsv2.model.init import init_weights
from dsv2.model.transformer import DeepseekV2
from dsv2.monitoring.records import read_metrics
from tests.dist.jobs import global_batch, model_config
from tests.gpu.process import ROOT, train_command

pytestmark = pytest.mark.gpu


def test_fp32_loss_and_gradients_equal_the_cpus():
    config = model_config(token_dropping=True, capacity_factor=0.8)
    reference = DeepseekV2(config)
    init_weights(reference, config.initializer_range, seed=0)
    model = DeepseekV2(config).cuda()
    model.load_state_dict(reference.state_dict())
    batch = global_batch(0)
    want = reference(batch.input_ids, batch.labels, batch.sequence_ids)
    got = model(batch.input_ids.cuda(), batch.labels.cuda(), batch.sequence_ids.cuda())
    want.loss.backward()
    got.loss.backward()
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)
    assert torch.equal(got.stats.dropped_E.cpu(), want.stats.dropped_E)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad.cpu() - q.grad).norm() / q.grad.norm() < 1e-4, name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_run_learns_stops_and_resumes(tmp_path, stage):
    """NCCL, bf16, recomputed layers and dropping, through train.py; a resumed run goes on as before."""
    command = train_command(tmp_path)
    command += ["model.balance.token_dropping=true", "runtime.recompute=true"]
    command += [f"parallel.zero_stage={stage}"]
    subprocess.run([*command, "name=whole"], cwd=ROOT, check=True)
    subprocess.run([*command, "name=stopped", "stop_step=20"], cwd=ROOT, check=True)
    subprocess.run([*command, "name=stopped"], cwd=ROOT, check=True)
    whole, stopped = (
        {m["step"]: m["train/loss_lm"] for m in read_metrics(tmp_path / name)}
        for name in ("whole", "stopped")
    )
    assert sorted(whole) == sorted(stopped) == list(range(1, 51))
    assert whole[50] < 0.6 * whole[1]
    # Atomic sums on the GPU round differently from run to run.
    np.testing.assert_allclose(list(stopped.values()), list(whole.values()), rtol=2e-2)
    assert json.loads((tmp_path / "stopped" / "status.json").read_text())["state"] == "finished"
    assert all(0 < m["perf/mfu"] < 1 for m in read_metrics(tmp_path / "whole") if "perf/mfu" in m)
