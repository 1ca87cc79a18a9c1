"""Twenty steps whose losses are in git: a refactor that is one reproduces them.

After a change that is meant to change them: python -m tests.golden.test_loss_curve
"""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.dist.jobs import Trace, reference

CURVES = Path(__file__).with_name("loss_curves.json")
STEPS = 20
RUNS = {
    "plain": {},
    "dropping": {"token_dropping": True, "capacity_factor": 0.8},
    "no query compression, no groups": {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
}


def curve(trace: Trace) -> dict[str, list[float]]:
    return {
        "loss": trace.losses,
        "loss_lm": trace.lm_losses,
        "grad_norm": trace.grad_norms,
        "aux_expert": [float(b[0].mean()) for b in trace.balance],
        "aux_device": [float(b[1].mean()) for b in trace.balance],
        "aux_comm": [float(b[2].mean()) for b in trace.balance],
    }


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_in_git(name):
    recorded = json.loads(CURVES.read_text())[name]
    for metric, got in curve(reference(STEPS, eps=1e-8, **RUNS[name])).items():
        # Other CPUs sum in another order, and 20 steps enlarge it.
        np.testing.assert_allclose(got, recorded[metric], rtol=1e-4, err_msg=metric)


if __name__ == "__main__":
    curves = {name: curve(reference(STEPS, eps=1e-8, **changes)) for name, changes in RUNS.items()}
    CURVES.write_text(json.dumps(curves, indent=1) + "\n")
