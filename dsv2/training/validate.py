"""Refuse values and combinations that cannot run, before anything starts."""

import math

from dsv2.config.rules import divisors, refuse, require_above_0, require_fraction, require_positive
from dsv2.config.schema import (
    Config,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    RopeScalingConfig,
    RuntimeConfig,
)
from dsv2.kernels.specs import find_spec
from dsv2.model.attention.kinds import attention_kind
from dsv2.moe.routers.kinds import router_of
from dsv2.optimizers.rules import find_optimizer
from dsv2.parallel.zero.stages import find_stage


def validate(config: Config, world_size: int) -> None:
    """Refuse a configuration that cannot run, before any process group or model exists.

    Args:
        config: the whole configuration.
        world_size: number of processes of the job.

    Raises:
        UserError: names the field, its value and what would be right.
    """
    from data.streams.sources import check_config  # not above: it imports numpy, which --help does not need

    _validate_model(config.model)
    _validate_moe(config.model)
    _validate_optim(config.optim)
    _validate_parallel(config, world_size)
    check_config(config.data)
    if config.data.sequence_length > config.model.max_position_embeddings:
        refuse(
            "data.sequence_length",
            config.data.sequence_length,
            f"must be at most model.max_position_embeddings={config.model.max_position_embeddings}",
        )
    _validate_logging(config.logging)
    require_positive("eval", config.eval, ["every", "sequences"])
    require_positive("eval", config.eval, ["sample_tokens"], least=0)
    require_positive("checkpoint", config.checkpoint, ["every"], least=0)
    require_positive("checkpoint", config.checkpoint, ["keep"])
    if not config.name or "/" in config.name or config.name.startswith("."):
        refuse("name", repr(config.name), "must be a plain folder name, such as my-run")
    if config.new_stage and config.resume in ("auto", "never"):
        refuse("resume", config.resume, "must be the path of a checkpoint to start from with new_stage=true")
    if config.stop_step is not None and config.stop_step < 1:
        refuse("stop_step", config.stop_step, "must be at least 1, or null")


def _validate_logging(logging: LoggingConfig) -> None:
    names = ["every", "maps_every", "alert_windows", "alert_spike_steps"]
    require_positive("logging", logging, names)
    for name in ("alert_max_vio", "alert_dead", "alert_spike"):
        value = getattr(logging, name)
        if value is not None and not 0 <= value < math.inf:
            refuse(f"logging.{name}", value, "must be at least 0 and finite; 0 or null turns the alert off")
    if logging.alert_dead is not None and logging.alert_dead > 1:
        refuse("logging.alert_dead", logging.alert_dead, "must be a share of the experts, at most 1")


def _validate_model(model: ModelConfig) -> None:
    sizes = [
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "moe_intermediate_size",
        "max_position_embeddings",
    ]
    require_positive("model", model, sizes)
    require_positive("model", model, ["n_shared_experts"], least=0)
    above_0 = ["rms_norm_eps", "rope_theta", "initializer_range", "routed_scaling_factor"]
    require_above_0("model", model, above_0)
    if not 0 <= model.first_k_dense_replace < model.num_hidden_layers:
        refuse(
            "model.first_k_dense_replace",
            model.first_k_dense_replace,
            f"must leave at least one MoE layer of model.num_hidden_layers={model.num_hidden_layers}",
        )
    attention_kind(model).check(model)
    if model.rope_scaling is not None:
        _validate_rope_scaling(model, model.rope_scaling)


def _validate_rope_scaling(model: ModelConfig, scaling: RopeScalingConfig) -> None:
    section = "model.rope_scaling"
    original = scaling.original_max_position_embeddings
    require_positive(section, scaling, ["factor"])
    require_above_0(section, scaling, ["beta_slow", "mscale", "mscale_all_dim"])
    if not scaling.beta_slow < scaling.beta_fast < math.inf:
        refuse(f"{section}.beta_fast", scaling.beta_fast, f"must be above beta_slow={scaling.beta_slow}")
    if original < (least := math.ceil(2 * math.pi * scaling.beta_slow)):
        refuse(
            f"{section}.original_max_position_embeddings",
            original,
            f"must be at least {least}: the fastest pair must rotate beta_slow={scaling.beta_slow} times",
        )
    if model.rope_theta <= 1:
        refuse("model.rope_theta", model.rope_theta, "must be above 1 with model.rope_scaling")
    if model.max_position_embeddings > scaling.factor * original:
        refuse(
            "model.max_position_embeddings",
            model.max_position_embeddings,
            f"must be at most {scaling.factor * original:g} = {section}.factor x "
            "original_max_position_embeddings",
        )


def _validate_moe(model: ModelConfig) -> None:
    require_positive("model", model, ["n_routed_experts"])
    router_of(model).check(model)
    balance = model.balance
    require_positive("model.balance", balance, ["alpha_expert", "alpha_device", "alpha_comm"], least=0)
    require_fraction("model.balance", balance, ["exempt_fraction"])
    require_above_0("model.balance", balance, ["capacity_factor"])


def _validate_optim(optim: OptimConfig) -> None:
    find_optimizer(optim.name).check(optim)
    require_positive("optim", optim, ["total_tokens", "batch_size", "batch_ramp_increment"])
    require_positive("optim", optim, ["warmup_steps", "weight_decay", "batch_ramp_tokens"], least=0)
    require_fraction("optim", optim, ["decay_factor"])
    require_above_0("optim", optim, ["lr", "grad_clip"])
    if optim.decay_at != sorted(set(optim.decay_at)) or not all(0 < f < 1 for f in optim.decay_at):
        refuse("optim.decay_at", optim.decay_at, "must be rising shares of the tokens, such as [0.6, 0.9]")
    start = optim.batch_size_start
    if start is not None and not 1 <= start <= optim.batch_size:
        refuse("optim.batch_size_start", start, f"must be from 1 to optim.batch_size={optim.batch_size}")
    if start is None and optim.batch_ramp_tokens > 0:
        refuse("optim.batch_size_start", None, "must be given when optim.batch_ramp_tokens is above 0")
    if start is not None and optim.batch_ramp_tokens == 0:
        refuse("optim.batch_ramp_tokens", 0, "must be above 0 when optim.batch_size_start is given")


def _validate_kernels(model: ModelConfig, runtime: RuntimeConfig) -> None:
    spec = find_spec(runtime.kernels)
    spec.check(model, runtime.precision)
    if heads := attention_kind(model).latent_heads(model):
        spec.check_heads(heads)


def _validate_parallel(config: Config, world_size: int) -> None:
    parallel = config.parallel
    model = config.model
    optim = config.optim
    ep = parallel.expert_parallel_size
    require_positive("parallel", parallel, ["expert_parallel_size"])
    require_positive("runtime", config.runtime, ["micro_batch_size"])
    if world_size % ep:
        refuse(
            "parallel.expert_parallel_size",
            ep,
            f"must divide the number of processes, {world_size}: one of {divisors(world_size)}; "
            "or start another number (NPROC=N launch/local.sh, torchrun --nproc_per_node=N; a plan: gpus=N)",
        )
    if model.n_routed_experts % ep:
        refuse(
            "parallel.expert_parallel_size",
            ep,
            f"must divide model.n_routed_experts={model.n_routed_experts}: "
            f"one of {divisors(model.n_routed_experts)}",
        )
    if ep % model.n_group and model.n_group % ep:
        refuse(
            "parallel.expert_parallel_size",
            ep,
            f"must divide model.n_group={model.n_group} or be a multiple of it, so that no rank holds "
            "parts of two groups",
        )
    find_stage(parallel.zero_stage, config.runtime.precision).check(optim, config.runtime)
    _validate_kernels(config.model, config.runtime)
    micro_batch_size = config.runtime.micro_batch_size
    share = micro_batch_size * world_size
    sizes = {"optim.batch_size": optim.batch_size}
    if optim.batch_size_start is not None:
        sizes["optim.batch_size_start"] = optim.batch_size_start
        sizes["optim.batch_ramp_increment"] = optim.batch_ramp_increment
    for name, size in sizes.items():
        if size % share:
            refuse(
                name,
                size,
                f"must be a multiple of {share} = runtime.micro_batch_size={micro_batch_size} x "
                f"{world_size} processes",
            )
