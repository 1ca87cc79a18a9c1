"""The family of the balance losses."""

import torch

from dsv2.config.schema import BalanceConfig
from dsv2.moe.balance import BalanceLosses
from dsv2.monitoring.metrics.balance import balance_values


def test_balance_losses_raw_and_as_they_are_added_to_the_loss():
    losses = BalanceLosses(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.5]), torch.tensor([0.5, 1.5]))
    recipe = BalanceConfig(alpha_expert=0.25, alpha_device=0.5, alpha_comm=2.0)
    assert balance_values(losses, recipe) == {
        "moe/aux_expert": 2.0, "moe/aux_device": 2.25, "moe/aux_comm": 1.0,
        "moe/add_expert": 1.0, "moe/add_device": 2.25, "moe/add_comm": 4.0,
    }  # fmt: skip
