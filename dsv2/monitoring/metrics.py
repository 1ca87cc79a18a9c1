"""From a step's results to named numbers (the table of names is in docs/metrics.md).

Shapes: L MoE layers, E routed experts, G groups, W ranks of the job. Sums are complete (over ranks and
the window's steps) before any ratio is taken.
"""

import math

import numpy as np
import torch
from torch import Tensor

from dsv2.config.schema import BalanceConfig, ModelConfig
from dsv2.moe.balance import BalanceLosses
from dsv2.moe.stats import RoutingStats


def balance_metrics(balance: BalanceLosses, recipe: BalanceConfig) -> dict[str, float]:
    """The balance losses: raw, averaged over layers, and as they are added to the loss."""
    return {
        "moe/aux_expert": float(balance.expert.mean()),
        "moe/aux_device": float(balance.device.mean()),
        "moe/aux_comm": float(balance.comm.mean()),
        "moe/add_expert": recipe.alpha_expert * float(balance.expert.sum()),
        "moe/add_device": recipe.alpha_device * float(balance.device.sum()),
        "moe/add_comm": recipe.alpha_comm * float(balance.comm.sum()),
    }


def _max_over_mean(load: Tensor) -> Tensor:
    """Largest load over the mean load, along the last dimension; 1 = balanced."""
    return load.amax(dim=-1) / load.mean(dim=-1)


def routing_metrics(stats: RoutingStats, model: ModelConfig) -> dict[str, float]:
    """Statistics of a window: `stats` is summed over its steps and all ranks, [L] leading.

    Per-layer values are named by the layer's index in the model, as in `vio/L07`.
    """
    load_LE, dropped_LE, tokens_L = stats.load_E, stats.dropped_E, stats.tokens
    load_LG = load_LE.unflatten(-1, (model.n_group, -1)).sum(dim=-1)
    violation_L = _max_over_mean(load_LE) - 1
    dead_L = (load_LE == 0).sum(dim=-1)
    dropped_L = dropped_LE.sum(dim=-1) / load_LE.sum(dim=-1)
    share_LE = load_LE / load_LE.sum(dim=-1, keepdim=True)
    log_experts = math.log(model.n_routed_experts) if model.n_routed_experts > 1 else 1.0
    metrics = {
        "moe/max_vio": violation_L.mean(),
        "moe/max_vio_max": violation_L.max(),
        "moe/dead": dead_L.sum(),
        "moe/ent_tok": (stats.token_entropy / tokens_L).mean() / log_experts,
        "moe/ent_load": torch.special.entr(share_LE).sum(dim=-1).mean() / log_experts,
        "moe/top1": (stats.top1 / tokens_L).mean(),
        "moe/drop": dropped_LE.sum() / load_LE.sum(),
        "dev/load_max_mean": _max_over_mean(load_LG).mean(),
        "dev/cv": (load_LG.std(dim=-1, correction=0) / load_LG.mean(dim=-1)).mean(),
        "comm/recv_max_mean": _max_over_mean(stats.sent_G).mean(),
        "comm/devs_per_tok": (stats.sent_G.sum(dim=-1) / tokens_L).mean(),
    }
    for index in range(len(tokens_L)):
        layer = f"L{model.first_k_dense_replace + index:02d}"
        metrics[f"vio/{layer}"] = violation_L[index]
        metrics[f"dead/{layer}"] = dead_L[index]
        metrics[f"drop/{layer}"] = dropped_L[index]
    return {name: float(value) for name, value in metrics.items()}


def exchange_metrics(
    rows_out_WL: Tensor, rows_in_WL: Tensor, wait_ms_W: Tensor, bytes_a_row: int, steps: int
) -> dict[str, float]:
    """What the experts' exchange of a window of `steps` steps cost, by rank; empty if nothing crossed.

    Args:
        rows_out_WL: rows sent to other ranks.
        rows_in_WL: rows received from other ranks.
        wait_ms_W: milliseconds of standing still.
        bytes_a_row: see `bytes_per_row`.
    """
    if rows_out_WL.sum() == 0:
        return {}
    return {
        # A layer all of whose tokens stay at home has no ratio.
        "comm/send_max_mean": float(_max_over_mean(rows_out_WL.T).nanmean()),
        "comm/in_max_mean": float(_max_over_mean(rows_in_WL.T).nanmean()),
        "comm/gib": float(rows_out_WL.sum(dim=1).mean()) * bytes_a_row / steps / 2**30,
        "comm/a2a_ms": float(wait_ms_W.mean()) / steps,
    }


def routing_maps(stats: RoutingStats, model: ModelConfig) -> dict[str, np.ndarray]:
    """Pictures of a window, [L, E] and [L, G]: each load over the uniform one, so that 1 = balanced."""
    load_LG = stats.load_E.unflatten(-1, (model.n_group, -1)).sum(dim=-1)
    loads = {"map/expert_load": stats.load_E, "map/dev_load": load_LG, "map/dev_recv": stats.sent_G}
    return {name: (load / load.mean(dim=-1, keepdim=True)).cpu().numpy() for name, load in loads.items()}


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """The summed cross-entropy of a text, in bits for each of its UTF-8 bytes."""
    return nats / math.log(2) / n_bytes
