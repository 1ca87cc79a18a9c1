"""What several test files share: property settings and configurations."""

import json
import resource
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, settings

from dsv2.__main__ import VERBS
from dsv2.checkpoint.files import FORMAT, checksum
from dsv2.cli.base import main
from dsv2.config import compose
from dsv2.config.schema import BalanceConfig, Config, ModelConfig, RopeScalingConfig
from dsv2.kernels.reference.router import sequence_sums
from dsv2.kernels.types import Choice
from dsv2.model.transformer import DeepseekV2
from dsv2.moe.balance import BalanceLosses, balance_losses
from dsv2.moe.layer import MoEOutput
from dsv2.moe.stats import RoutingStats, routing_stats, stack_sums
from dsv2.parallel.buffers import persistent_buffers

REPO = Path(__file__).parents[2]

# No deadline, nor one for making examples: the machine is shared. Derandomized: no commit fails by luck.
properties = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


# With 6 rotary dimensions and theta 100: one pair keeps its speed, one lies on the ramp, one is slowed down.
YARN = RopeScalingConfig(
    factor=3.0,
    original_max_position_embeddings=64,
    beta_fast=4.0,
    beta_slow=1.0,
    mscale=2.0,
    mscale_all_dim=0.5,
)


# Every kind of attention, as changes to `tiny_config`. gqa: 2 keys for 6 heads, so 2 groups of 3.
KINDS: dict[str, dict[str, Any]] = {
    "mla": {},
    "mla without query compression": {"q_lora_rank": None},
    "mha": {"attention": "mha", "v_head_dim": 8},
    "gqa": {
        "attention": "gqa",
        "v_head_dim": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "mqa": {"attention": "mqa", "v_head_dim": 8},
}


def balance_of(choice: Choice, n_sequences: int, n_group: int, topk_group: int) -> BalanceLosses:
    """The losses of `n_sequences` sequences whose tokens stand one sequence after another."""
    n_tokens, top_k = len(choice.affinity_TE) // n_sequences, choice.expert_ids_TK.shape[1]
    sums = sequence_sums(choice, n_sequences, n_group)
    return balance_losses(sums, n_tokens, top_k, n_group, topk_group)


def report_of(config: ModelConfig, out: MoEOutput, n_tokens: int) -> tuple[BalanceLosses, RoutingStats]:
    """The losses and the statistics of one layer, with a leading dimension of 1."""
    sums = stack_sums([out.routing])
    top_k = config.num_experts_per_tok
    losses = balance_losses(sums, n_tokens, top_k, config.n_group, config.topk_group)
    return losses, routing_stats([out.routing], sums, n_tokens)


def tiny_config(**changes: Any) -> ModelConfig:
    """Everything on, every size different, and small enough for loops in Python."""
    config = ModelConfig(
        vocab_size=31,
        hidden_size=20,
        num_hidden_layers=3,
        num_attention_heads=3,
        q_lora_rank=14,
        kv_lora_rank=10,
        qk_nope_head_dim=8,
        qk_rope_head_dim=6,
        v_head_dim=5,
        intermediate_size=22,
        moe_intermediate_size=7,
        n_routed_experts=12,
        n_shared_experts=2,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        balance=BalanceConfig(alpha_expert=0.3, alpha_device=0.5, alpha_comm=0.7),
    )
    return replace(config, **changes)


def compose_config(*overrides: str) -> Config:
    """The shipped configuration under these overrides."""
    return compose.compose_config(list(overrides))


def run_verb(verb: str, *words: object) -> int:
    """Run `python -m dsv2 VERB ...` in this process; return its exit code."""
    return main([verb, *map(str, words)], VERBS)


def cpu_seconds_of_children() -> float:
    """CPU time of the finished processes that this one started; a busy machine does not change it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def wandb_history(printed: str) -> dict[int, dict[str, Any]]:
    """step -> metrics, out of what `wandb leet inspect --json` prints of a session."""
    records = [json.loads(line) for line in printed.splitlines()]
    return {r["history"]["step"]["num"]: r["history"]["item"] for r in records if r["type"] == "history"}


def save_checkpoint(path: Path, model: DeepseekV2, config: Config) -> Path:
    """What a run that ended with these weights would have left, without Adam's moments."""
    path.mkdir(parents=True)
    tensors = {f"fp32/{name}": p.detach().float().flatten() for name, p in model.named_parameters()}
    tensors |= {f"buffer/{name}": buffer.flatten() for name, buffer in persistent_buffers(model).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    content = {
        "format": FORMAT,
        "run": {"step": 7, "tokens": 0, "data": None, "wandb_id": None},
        "adam_step": 7,
        "config": compose.to_plain(config),
        "files": {file.name: file.stat().st_size for file in path.iterdir()},
        "crc32": {file.name: checksum(file) for file in path.iterdir()},
    }
    (path / "state.json").write_text(json.dumps(content))
    return path
