"""How tokens spread over experts and expert groups in a window.

All sums are complete, over the window's steps and all ranks, before any ratio is taken.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from dsv2.config.schema import ModelConfig
from dsv2.monitoring.metrics.base import Alert, Metric, Panel, Producer, Section, When, Window
from dsv2.parallel.plan import Dim

if TYPE_CHECKING:
    from torch import Tensor

    from dsv2.moe.stats import RoutingStats
    from dsv2.parallel.mesh import Mesh

VIOLATION_UNIT = "largest / mean load - 1"
VIOLATION = Panel(Section.balance, "Max violation", group="Expert")
ENTROPY_UNIT = "entropy / ln E, 0 to 1"
ENTROPY = Panel(Section.balance, "Entropy", group="Expert")
DROPPED_UNIT = "share of routed pairs"


class Routing(Producer[Window]):
    when = When.window
    metrics = (
        Metric(
            name="moe/max_vio",
            unit=VIOLATION_UNIT,
            meaning="the most loaded expert's excess over the mean load, mean over layers",
            panel=VIOLATION,
        ),
        Metric(
            name="moe/max_vio_max",
            unit=VIOLATION_UNIT,
            meaning="the same for the worst layer",
            panel=VIOLATION,
            alert=Alert(
                title="routing collapse",
                threshold="alert_max_vio",
                lasting="alert_windows",
                meaning="`moe/max_vio_max` exceeds `alert_max_vio` for `alert_windows` windows in a row",
            ),
        ),
        Metric(
            name="vio/L*",
            unit=VIOLATION_UNIT,
            meaning="the same for one layer",
            panel=Panel(Section.balance, "Max violation by layer", group="Expert"),
        ),
        Metric(
            name="moe/ent_load",
            unit=ENTROPY_UNIT,
            meaning="entropy of the load over experts; 1 = uniform",
            panel=ENTROPY,
        ),
        Metric(
            name="moe/ent_tok",
            unit=ENTROPY_UNIT,
            meaning="entropy of a token's affinities, mean over tokens",
            panel=ENTROPY,
        ),
        Metric(
            name="moe/top1",
            unit="0 to 1",
            meaning="a token's highest affinity, mean over tokens",
            panel=Panel(Section.balance, "Top-1 affinity", group="Expert"),
        ),
        Metric(
            name="moe/dead",
            unit="experts, all layers",
            meaning="experts without a token in the window",
            panel=Panel(Section.balance, "Dead experts", group="Expert"),
            alert=Alert(
                title="routing collapse",
                threshold="alert_dead",
                lasting="alert_windows",
                meaning="`moe/dead` exceeds the share `alert_dead` of all layers' routed experts, for "
                "`alert_windows` windows in a row",
                text_format="{:.0f}",
                share_of_experts=True,
            ),
        ),
        Metric(
            name="dead/L*",
            unit="experts",
            meaning="experts of one layer without a token in the window",
            panel=Panel(Section.balance, "Dead experts by layer", group="Expert"),
        ),
        Metric(
            name="dev/load_max_mean",
            unit="max / mean over groups",
            meaning="load over expert groups, mean over layers",
            panel=Panel(Section.balance, "Load", group="Device"),
        ),
        Metric(
            name="dev/cv",
            unit="standard deviation / mean",
            meaning="load over expert groups, mean over layers",
            panel=Panel(Section.balance, "Load variation", group="Device"),
        ),
        Metric(
            name="moe/drop",
            unit=DROPPED_UNIT,
            meaning="pairs dropped by the device budget, all layers",
            panel=Panel(Section.balance, "Dropped", group="Device"),
        ),
        Metric(
            name="drop/L*",
            unit=DROPPED_UNIT,
            meaning="pairs of one layer dropped by the device budget",
            panel=Panel(Section.balance, "Dropped by layer", group="Device"),
        ),
        Metric(
            name="comm/recv_max_mean",
            unit="max / mean",
            meaning="tokens sent to a group, over groups, mean over layers",
            panel=Panel(Section.balance, "Received and sent", group="Communication"),
        ),
        Metric(
            name="comm/devs_per_tok",
            unit="groups",
            meaning="groups that a token is sent to, at most `model.topk_group`",
            panel=Panel(Section.balance, "Groups a token is sent to", group="Communication"),
        ),
    )

    def values(self, seen: Window) -> dict[str, float]:
        return routing_values(sum_over_ranks(seen.stats, self.mesh), self.config.model)


class RoutingMaps(Producer[Window]):
    when = When.maps
    metrics = (
        Metric(
            name="map/expert_load",
            unit="load / uniform load",
            meaning="layer x expert: load",
            panel=Panel(Section.maps, "Expert load"),
        ),
        Metric(
            name="map/dev_load",
            unit="load / uniform load",
            meaning="layer x expert group: load",
            panel=Panel(Section.maps, "Device load"),
        ),
        Metric(
            name="map/dev_recv",
            unit="tokens / mean",
            meaning="layer x expert group: tokens sent to the group",
            panel=Panel(Section.maps, "Tokens sent to devices"),
        ),
    )

    def values(self, seen: Window) -> dict[str, np.ndarray]:
        return routing_maps(sum_over_ranks(seen.stats, self.mesh), self.config.model)


def sum_over_ranks(stats: "RoutingStats", mesh: "Mesh") -> "RoutingStats":
    """Return the sums over all ranks. Collective."""
    return type(stats)(*(mesh[Dim.world].sum(tensor) for tensor in stats))


def max_over_mean(load: "Tensor") -> "Tensor":
    """Return the largest over the mean load, along the last dimension; 1 = balanced."""
    return load.amax(dim=-1) / load.mean(dim=-1)


def routing_values(stats: "RoutingStats", model: ModelConfig) -> dict[str, float]:
    """Return the family's values from a window's complete sums, [L] leading.

    Per-layer values are named by the layer's index in the model, as in `vio/L07`.
    """
    import torch

    load_LE = stats.load_E
    dropped_LE = stats.dropped_E
    tokens_L = stats.tokens
    load_LG = group_load(stats, model)
    violation_L = max_over_mean(load_LE) - 1
    dead_L = (load_LE == 0).sum(dim=-1)
    dropped_L = dropped_LE.sum(dim=-1) / load_LE.sum(dim=-1)
    share_LE = load_LE / load_LE.sum(dim=-1, keepdim=True)
    log_experts = math.log(model.n_routed_experts) if model.n_routed_experts > 1 else 1.0
    values = {
        "moe/max_vio": violation_L.mean(),
        "moe/max_vio_max": violation_L.max(),
        "moe/dead": dead_L.sum(),
        "moe/ent_tok": (stats.token_entropy / tokens_L).mean() / log_experts,
        "moe/ent_load": torch.special.entr(share_LE).sum(dim=-1).mean() / log_experts,
        "moe/top1": (stats.top1 / tokens_L).mean(),
        "moe/drop": dropped_LE.sum() / load_LE.sum(),
        "dev/load_max_mean": max_over_mean(load_LG).mean(),
        "dev/cv": (load_LG.std(dim=-1, correction=0) / load_LG.mean(dim=-1)).mean(),
        "comm/recv_max_mean": max_over_mean(stats.sent_G).mean(),
        "comm/devs_per_tok": (stats.sent_G.sum(dim=-1) / tokens_L).mean(),
    }
    for index in range(len(tokens_L)):
        layer = f"L{model.first_k_dense_replace + index:02d}"
        values[f"vio/{layer}"] = violation_L[index]
        values[f"dead/{layer}"] = dead_L[index]
        values[f"drop/{layer}"] = dropped_L[index]
    return {name: float(value) for name, value in values.items()}


def routing_maps(stats: "RoutingStats", model: ModelConfig) -> dict[str, np.ndarray]:
    """Return a window's pictures, [L, E] and [L, G]: each load over the uniform one; 1 = balanced."""
    loads = {
        "map/expert_load": stats.load_E,
        "map/dev_load": group_load(stats, model),
        "map/dev_recv": stats.sent_G,
    }
    return {name: (load / load.mean(dim=-1, keepdim=True)).cpu().numpy() for name, load in loads.items()}


def group_load(stats: "RoutingStats", model: ModelConfig) -> "Tensor":
    """Return the load of every expert group, [L, G]."""
    return stats.load_E.unflatten(-1, (model.n_group, -1)).sum(dim=-1)
