"""What validate() refuses and allows, and that every field is looked at."""

import dataclasses
import typing
from functools import reduce
from typing import Any

import pytest

from dsv2.config.compose import to_plain, to_yaml
from dsv2.config.fields import field_types
from dsv2.config.schema import Config, ExpertExchange, Precision, RopeScalingConfig
from dsv2.errors import UserError
from dsv2.training.validate import validate
from tests.unit.helpers import compose_config

AT_LEAST_ONE = [
    "model.vocab_size",
    "model.hidden_size",
    "model.num_attention_heads",
    "model.q_lora_rank",
    "model.kv_lora_rank",
    "model.qk_nope_head_dim",
    "model.qk_rope_head_dim",
    "model.v_head_dim",
    "model.intermediate_size",
    "model.moe_intermediate_size",
    "model.n_routed_experts",
    "model.num_experts_per_tok",
    "model.n_group",
    "model.topk_group",
    "model.max_position_embeddings",
    "model.rope_scaling.factor",
    "data.vocab_size",
    "data.lanes",
    "data.shuffle_window",
    "optim.total_tokens",
    "optim.batch_size",
    "optim.batch_ramp_increment",
    "parallel.expert_parallel_size",
    "runtime.micro_batch_size",
    "logging.every",
    "logging.maps_every",
    "logging.alert_windows",
    "logging.alert_spike_steps",
    "spike.attempts",
    "eval.sequences",
    "checkpoint.keep",
    "stop_step",
]
AT_LEAST_ZERO = [
    "model.n_shared_experts",
    "model.balance.alpha_expert",
    "model.balance.alpha_device",
    "model.balance.alpha_comm",
    "optim.warmup_steps",
    "optim.weight_decay",
    "optim.batch_ramp_tokens",
    "eval.every",
    "eval.sample_tokens",
    "checkpoint.every",
    "checkpoint.keep_every",
]
ABOVE_ZERO = [
    "model.rms_norm_eps",
    "model.rope_theta",
    "model.initializer_range",
    "model.routed_scaling_factor",
    "model.rope_scaling.beta_slow",
    "model.rope_scaling.mscale",
    "model.rope_scaling.mscale_all_dim",
    "model.balance.capacity_factor",
    "optim.lr",
    "optim.eps",
    "optim.grad_clip",
    "spike.deviations",
]
SEEDS = ["seed", "data.seed", "model.balance.exempt_seed"]
FRACTIONS = ["model.balance.exempt_fraction", "optim.beta1", "optim.beta2", "optim.decay_factor"]

PLAIN_NAME = "must be a plain folder name, such as my-run: at most 100 letters, digits, '.', '_' and '-'"


def changed(*changes: tuple[str, Any]) -> Config:
    """The default configuration with these fields set."""
    config = Config()
    for name, value in changes:
        *sections, field = name.split(".")
        if "rope_scaling" in sections and config.model.rope_scaling is None:
            config.model.rope_scaling = RopeScalingConfig()
        section = reduce(getattr, sections, config)
        assert hasattr(section, field), name
        setattr(section, field, value)
    return config


def refusal(*changes: tuple[str, Any], world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        validate(changed(*changes), world_size)
    return str(caught.value)


def test_defaults_are_valid():
    validate(Config(), 1)


@pytest.mark.parametrize(("name", "low"), [(n, 0) for n in AT_LEAST_ONE] + [(n, -1) for n in AT_LEAST_ZERO])
def test_too_small(name, low):
    message = refusal((name, low))
    assert message.startswith(f"{name}={low}: must be at least {low + 1}")


@pytest.mark.parametrize("name", ABOVE_ZERO)
@pytest.mark.parametrize("value", [0.0, -1.5])
def test_must_be_above_zero(name, value):
    assert refusal((name, value)) == f"{name}={value}: must be above 0 and finite"


@pytest.mark.parametrize("name", FRACTIONS)
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_must_be_a_fraction(name, value):
    assert refusal((name, value)) == f"{name}={value}: must lie between 0 and 1"


FLOATS = [name for name, hint in field_types().items() if hint is float]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, float(value)) for name in FLOATS for value in ("nan", "inf")],
)
def test_not_a_finite_number(name, value):
    """NaN passes every comparison written the wrong way round."""
    assert refusal((name, value)).startswith(f"{name}={value}: must ")


@pytest.mark.parametrize("name", ["optim.beta1", "optim.beta2"])
def test_a_moment_that_never_moves(name):
    """Adam divides by 1 - beta; torch refuses it, but seconds later and with a traceback."""
    assert refusal((name, 1.0)).startswith(f"{name}=1.0: must ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("model.qk_rope_head_dim", 15)], "model.qk_rope_head_dim=15: must be even: RoPE rotates pairs"),
        (
            [("model.q_lora_rank", 0)],
            "model.q_lora_rank=0: must be at least 1, or null for no compression",
        ),
        (
            [("model.first_k_dense_replace", 4)],
            "model.first_k_dense_replace=4: must leave at least one MoE layer of model.num_hidden_layers=4",
        ),
        (
            [("model.first_k_dense_replace", -1)],
            "model.first_k_dense_replace=-1: must leave at least one MoE layer of model.num_hidden_layers=4",
        ),
        (
            [("model.n_group", 5)],
            "model.n_group=5: must divide model.n_routed_experts=16: one of 1, 2, 4, 8, 16",
        ),
        ([("model.topk_group", 5)], "model.topk_group=5: must be at most model.n_group=4"),
        (
            [("model.num_experts_per_tok", 9)],
            "model.num_experts_per_tok=9: must be at most 8, the experts that model.topk_group=2 of "
            "model.n_group=4 groups hold",
        ),
        (
            [("data.sequence_length", 4097)],
            "data.sequence_length=4097: must be at most model.max_position_embeddings=4096",
        ),
        (
            [("model.attention", "gqa")],
            "model.num_key_value_heads=null: must divide model.num_attention_heads=4 with "
            "model.attention=gqa: one of 1, 2, 4",
        ),
        (
            [("model.attention", "gqa"), ("model.num_key_value_heads", 3)],
            "model.num_key_value_heads=3: must divide model.num_attention_heads=4 with "
            "model.attention=gqa: one of 1, 2, 4",
        ),
        (
            [("model.attention", "gqa"), ("model.num_key_value_heads", 0)],
            "model.num_key_value_heads=0: must divide model.num_attention_heads=4 with "
            "model.attention=gqa: one of 1, 2, 4",
        ),
        (
            [("model.attention", "mqa"), ("model.num_key_value_heads", 2)],
            "model.num_key_value_heads=2: must be null with model.attention=mqa",
        ),
        (
            [("model.attention", "mha"), ("model.v_head_dim", 16)],
            "model.v_head_dim=16: must be model.qk_nope_head_dim=32 with model.attention=mha: keys and "
            "values have the same width",
        ),
        (
            [
                ("model.attention", "mha"),
                ("model.v_head_dim", 7),
                ("model.qk_nope_head_dim", 7),
            ],
            "model.qk_nope_head_dim=7: must be even with model.attention=mha: RoPE rotates pairs of the "
            "whole head",
        ),
        (
            [("model.rope_scaling.beta_fast", 1.0)],
            "model.rope_scaling.beta_fast=1.0: must be above beta_slow=1.0",
        ),
        (
            [("model.rope_scaling.original_max_position_embeddings", 6)],
            "model.rope_scaling.original_max_position_embeddings=6: must be at least 7: the fastest pair "
            "must rotate beta_slow=1.0 times",
        ),
        (
            [("model.rope_scaling.factor", 2.0), ("model.max_position_embeddings", 8193)],
            "model.max_position_embeddings=8193: must be at most 8192 = model.rope_scaling.factor x "
            "original_max_position_embeddings",
        ),
        (
            [("model.rope_scaling.factor", 2.0), ("model.rope_theta", 1.0)],
            "model.rope_theta=1.0: must be above 1 with model.rope_scaling",
        ),
        (
            [("optim.decay_at", [0.9, 0.6])],
            "optim.decay_at=[0.9, 0.6]: must be rising shares of the tokens, such as [0.6, 0.9]",
        ),
        (
            [("optim.decay_at", [0.6, 1.0])],
            "optim.decay_at=[0.6, 1.0]: must be rising shares of the tokens, such as [0.6, 0.9]",
        ),
        (
            [("optim.batch_size_start", 32), ("optim.batch_ramp_tokens", 9)],
            "optim.batch_size_start=32: must be from 1 to optim.batch_size=16",
        ),
        (
            [("optim.batch_size_start", 0), ("optim.batch_ramp_tokens", 9)],
            "optim.batch_size_start=0: must be from 1 to optim.batch_size=16",
        ),
        (
            [("optim.batch_size_start", 4)],
            "optim.batch_ramp_tokens=0: must be above 0 when optim.batch_size_start is given",
        ),
        (
            [("optim.batch_ramp_tokens", 9)],
            "optim.batch_size_start=null: must be given when optim.batch_ramp_tokens is above 0",
        ),
        ([("parallel.zero_stage", 4)], "parallel.zero_stage=4: must be 0, 1, 2 or 3"),
        (
            [("parallel.expert_exchange", ExpertExchange.symmetric)],
            "parallel.expert_exchange=symmetric: needs GPUs and fused kernels, not runtime.device=auto and "
            "runtime.kernels=reference; use collective",
        ),
        (
            [("optim.states", Precision.bf16)],
            "optim.states=bf16: needs parallel.zero_stage=1 and runtime.precision=bf16, not 1 "
            "and fp32; or use fp32",
        ),
        (
            [("parallel.zero_stage", 0), ("runtime.precision", Precision.bf16)],
            "parallel.zero_stage=0: must be 1, 2 or 3 with runtime.precision=bf16, for fp32 master weights; "
            "or use runtime.precision=fp32",
        ),
        (
            [("optim.batch_size", 18)],
            "optim.batch_size=18: must be a multiple of 4 = runtime.micro_batch_size=4 x 1 processes",
        ),
        (
            [("logging.alert_max_vio", -1.0)],
            "logging.alert_max_vio=-1.0: must be at least 0 and finite; 0 or null turns the alert off",
        ),
        (
            [("logging.alert_spike", float("nan"))],
            "logging.alert_spike=nan: must be at least 0 and finite; 0 or null turns the alert off",
        ),
        (
            [("logging.alert_dead", 1.5)],
            "logging.alert_dead=1.5: must be a share of the experts, at most 1",
        ),
        (
            [("watchdog.limit_s", -1.0)],
            "watchdog.limit_s=-1.0: must be at least 0 and at most 3600 s; 0 means no limit",
        ),
        (
            [("watchdog.slow_limit_s", 3601.0)],
            "watchdog.slow_limit_s=3601.0: must be at least 0 and at most 3600 s; 0 means no limit",
        ),
        ([("data.sequence_length", 1)], "data.sequence_length=1: must be at least 2"),
        (
            [("model.rms_norm_eps", 1e300)],
            "model.rms_norm_eps=1e+300: must lie between 1.2e-38 and 3.4e+38, as in fp32",
        ),
        (
            [("model.rms_norm_eps", 1.0)],
            "model.rms_norm_eps=1.0: must be below 1: it is added to a mean square of about 1",
        ),
        (
            [("optim.batch_size", 3908)],
            "optim.batch_size=3908: must be at most 3906: a step of data.sequence_length=256 may not see "
            "more than optim.total_tokens=1000000",
        ),
        (
            [("optim.warmup_steps", 246)],
            "optim.warmup_steps=246: must be at most 245, the steps of the run; optim.warmup_steps=24 suits "
            "its optim.total_tokens=1000000",
        ),
        (
            [("optim.total_tokens", 8192)],  # 2 steps, with the default warm-up
            "optim.warmup_steps=20: must be at most 2, the steps of the run; optim.warmup_steps=0 suits its "
            "optim.total_tokens=8192",
        ),
        ([("runs_dir", "")], "runs_dir='': must be a folder, such as runs"),
        ([("runs_dir", "  ")], "runs_dir='  ': must be a folder, such as runs"),
        ([("stop_step", 0)], "stop_step=0: must be at least 1, or null"),
        ([("name", "")], f"name='': {PLAIN_NAME}"),
        ([("name", "a/b")], f"name='a/b': {PLAIN_NAME}"),
        ([("name", "..")], f"name='..': {PLAIN_NAME}"),
    ],
)
def test_impossible_combinations(changes, message):
    assert refusal(*changes) == message


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (8, [("parallel.expert_parallel_size", 8), ("optim.batch_size", 32)]),  # two ranks a group
        (2, [("parallel.expert_parallel_size", 2)]),  # two groups a rank
        (1, [("model.n_group", 1), ("model.topk_group", 1)]),
        (1, [("model.num_experts_per_tok", 8)]),
        (1, [("model.n_shared_experts", 0), ("model.first_k_dense_replace", 0), ("checkpoint.every", 0)]),
        (1, [("optim.decay_at", []), ("optim.warmup_steps", 0), ("eval.sample_tokens", 0)]),
        (1, [("optim.total_tokens", 4096), ("optim.warmup_steps", 1), ("eval.every", 0)]),
        (1, [("seed", 2**63 - 1), ("model.balance.exempt_seed", 0), ("data.seed", 2**63 - 1)]),
        (
            1,
            [
                ("data.sequence_length", 4096),
                ("optim.warmup_steps", 15),
                ("stop_step", 1),
                ("name", "my.run-1_b"),
            ],
        ),
        (1, [("parallel.zero_stage", 0)]),
        (1, [("logging.alert_max_vio", None), ("logging.alert_dead", None), ("logging.alert_spike", 0.0)]),
        (1, [("model.rope_scaling.factor", 2.0), ("model.max_position_embeddings", 8192)]),
        (1, [("model.rope_scaling.factor", 1.0)]),
        (1, [("model.attention", "gqa"), ("model.num_key_value_heads", 2)]),
        (1, [("model.attention", "mqa"), ("model.q_lora_rank", None)]),
    ],
)
def test_limits_are_allowed(world_size, changes):
    validate(changed(*changes), world_size)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_new_stage_needs_a_checkpoint(resume):
    """Else it would train random weights for a long context."""
    message = refusal(("new_stage", True), ("resume", resume))
    assert message.startswith(f"resume={resume}: must be the path of a checkpoint")


def test_plain_and_yaml_forms_hold_every_field():
    config = compose_config("runtime.precision=bf16", "rope_scaling=yarn")
    plain = to_plain(config)
    assert plain["runtime"]["precision"] == "bf16"
    assert plain["model"]["balance"]["alpha_expert"] == 0.003
    assert plain["optim"]["decay_at"] == [0.6, 0.9]
    leaves = [name for name, hint in field_types().items() if not dataclasses.is_dataclass(hint)]
    for name in leaves:
        reduce(lambda node, key: node[key], name.split("."), plain)
    assert to_yaml(config).count("\n") >= len(leaves)


def test_every_number_is_checked():
    """A field added to the dataclasses must come with a refusal, or be listed as free here."""
    free = {"parallel.zero_stage", "optim.batch_size_start"}
    covered = {*AT_LEAST_ONE, *AT_LEAST_ZERO, *ABOVE_ZERO, *FRACTIONS, *free}
    covered |= {"model.num_hidden_layers", "model.first_k_dense_replace"}
    covered |= {"model.num_key_value_heads", "data.sequence_length", *SEEDS}
    covered |= {"watchdog.limit_s", "watchdog.slow_limit_s"}
    covered |= {f"logging.alert_{name}" for name in ("max_vio", "dead", "spike", "slow_rank")}
    covered |= {f"model.rope_scaling.{name}" for name in ("beta_fast", "original_max_position_embeddings")}
    numbers = {
        name
        for name, hint in field_types().items()
        if {int, float} & {hint, *typing.get_args(hint)} and hint != list[float]
    }
    assert numbers == covered
