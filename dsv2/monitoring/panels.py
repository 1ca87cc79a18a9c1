"""How a run's metrics are laid out for people: W&B's dashboard and the report page show the same sections.

The names are those of docs/metrics.md, and each stands here once.
"""

from typing import NamedTuple


class Panel(NamedTuple):
    title: str
    names: tuple[str, ...]  # metrics; `vio/L*` stands for one of every MoE layer
    unit: str = ""
    group: str = ""  # what the panel is about, within its section


class Section(NamedTuple):
    title: str
    panels: tuple[Panel, ...]


LAYER_SUFFIX = "/L*"  # ends the names of per-layer metrics: vio/L01, vio/L02, ...
EXPERT, DEVICE, COMMUNICATION = "Expert", "Device", "Communication"

SECTIONS = (
    Section(
        "Training",
        (
            Panel("Loss", ("train/loss", "train/loss_lm", "val/loss"), "nats a token"),
            Panel("Validation", ("val/bpb",), "bits a byte"),
            Panel("Gradient norm", ("train/grad_norm",), "before clipping"),
            Panel(
                "Balance losses in the loss",
                ("moe/add_expert", "moe/add_device", "moe/add_comm"),
                "nats a token, all layers",
            ),
            Panel("Learning rate", ("train/lr",)),
            Panel("Batch", ("train/batch_seqs",), "sequences"),
            Panel("Seen", ("train/tokens",), "tokens"),
        ),
    ),
    Section(
        "Balance",
        (
            Panel("Max violation", ("moe/max_vio", "moe/max_vio_max"), "largest / mean load - 1", EXPERT),
            Panel("Max violation by layer", ("vio/L*",), "largest / mean load - 1", EXPERT),
            Panel("Balance loss", ("moe/aux_expert",), "before alpha; 1 = balanced", EXPERT),
            Panel("Entropy", ("moe/ent_load", "moe/ent_tok"), "H / ln N", EXPERT),
            Panel("Top-1 affinity", ("moe/top1",), "0..1", EXPERT),
            Panel("Dead experts", ("moe/dead",), "experts, all layers", EXPERT),
            Panel("Dead experts by layer", ("dead/L*",), "experts", EXPERT),
            Panel("Load", ("dev/load_max_mean",), "max / mean over groups", DEVICE),
            Panel("Load variation", ("dev/cv",), "standard deviation / mean", DEVICE),
            Panel("Balance loss", ("moe/aux_device",), "before alpha; 1 = balanced", DEVICE),
            Panel("Dropped", ("moe/drop",), "share of routed pairs", DEVICE),
            Panel("Dropped by layer", ("drop/L*",), "share of routed pairs", DEVICE),
            Panel(
                "Received and sent",
                ("comm/recv_max_mean", "comm/send_max_mean", "comm/in_max_mean"),
                "max / mean",
                COMMUNICATION,
            ),
            Panel("Groups a token is sent to", ("comm/devs_per_tok",), "groups", COMMUNICATION),
            Panel("Balance loss", ("moe/aux_comm",), "before alpha; 1 = balanced", COMMUNICATION),
            Panel("Sent", ("comm/gib",), "GiB a step and rank", COMMUNICATION),
            Panel("Waiting for the exchange", ("comm/a2a_ms",), "ms a step", COMMUNICATION),
        ),
    ),
    Section(
        "Routing maps",
        (
            Panel("Expert load", ("map/expert_load",), "load / uniform load"),
            Panel("Device load", ("map/dev_load",), "load / uniform load"),
            Panel("Tokens sent to devices", ("map/dev_recv",), "tokens / mean"),
        ),
    ),
    Section(
        "Performance",
        (
            Panel("Speed", ("perf/tok_s", "perf/tok_s_gpu"), "tokens a second"),
            Panel("Arithmetic", ("perf/tflops",), "TFLOP/s of one rank"),
            Panel("Share of the GPU's peak", ("perf/mfu",), "0..1"),
            Panel("Time of a step", ("perf/step_s", "perf/data_s"), "seconds"),
            Panel("Peak memory", ("perf/mem_gib",), "GiB, rank 0"),
        ),
    ),
)
