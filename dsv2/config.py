"""Typed configuration: what every field means, and what is refused before anything starts.

Hydra composes `conf/` into these dataclasses once (dsv2/compose.py); `validate` then refuses
impossible combinations. This module imports neither torch nor hydra, so that the model can use its
part of it and `train.py --help` answers at once.
"""

import enum
import math
from dataclasses import dataclass, field

from dsv2.errors import UserError


class Precision(enum.Enum):
    fp32 = "fp32"
    bf16 = "bf16"  # bf16 parameters and activations, fp32 master weights and gradient accumulation


class DataSource(enum.Enum):
    stdlib = "stdlib"  # the running Python's standard library sources, prepared on first use
    local = "local"  # a folder written by `python -m data.prepare`
    hf_stream = "hf_stream"  # a Hugging Face hub dataset, streamed and tokenised on the fly


class WandbMode(enum.Enum):
    auto = "auto"  # online if logged in, else offline; never a prompt
    offline = "offline"
    disabled = "disabled"  # metrics.jsonl only


class Device(enum.Enum):
    auto = "auto"  # CUDA if there is a GPU
    cpu = "cpu"
    cuda = "cuda"


@dataclass
class BalanceConfig:
    """Load balance (arXiv 2405.04434, sections 2.2.3 and 2.2.4)."""

    alpha_expert: float = 0.003  # alpha_1 of eq. 23
    alpha_device: float = 0.05  # alpha_2 of eq. 26
    alpha_comm: float = 0.02  # alpha_3 of eq. 29
    token_dropping: bool = False  # device-level dropping, training only
    capacity_factor: float = 1.0  # a device's budget over its average load
    exempt_fraction: float = 0.1  # share of sequences whose tokens are never dropped
    exempt_seed: int = 0  # which sequences these are


@dataclass
class ModelConfig:
    """Sizes under their names in the published configuration."""

    vocab_size: int = 4096
    hidden_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    q_lora_rank: int | None = None  # None: queries come straight from the hidden state
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    intermediate_size: int = 512  # width of the dense FFN
    moe_intermediate_size: int = 96  # width of one expert
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4  # K
    n_group: int = 4  # D: expert groups ("devices" in the paper), independent of the layout
    topk_group: int = 2  # M: groups that one token may reach
    first_k_dense_replace: int = 1  # this many first layers have a dense FFN
    routed_scaling_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096
    initializer_range: float = 0.006  # standard deviation of every weight matrix at the start
    balance: BalanceConfig = field(default_factory=BalanceConfig)


@dataclass
class DataConfig:
    source: DataSource = DataSource.stdlib
    sequence_length: int = 256  # tokens a sequence
    seed: int = 0  # order of the training sequences
    path: str = "???"  # the prepared folder (stdlib, local); ??? is Hydra's word for "must be given"
    # stdlib only
    vocab_size: int = 4096  # pieces of the tokenizer trained on it
    # hf_stream only
    dataset: str | None = None  # name on the hub, or a builder such as "json" with data_files
    subset: str | None = None
    data_files: list[str] | None = None
    split: str = "train"
    val_split: str = "validation"  # equal to split: one document in 100, by a hash of its text, is held out
    text_column: str = "text"
    tokenizer: str | None = None  # a sentencepiece .model or a tokenizer.json
    lanes: int = 8  # independent sub-streams; at most the number of the dataset's files
    shuffle_window: int = 64  # sequences shuffled together within a lane


@dataclass
class OptimConfig:
    lr: float = 4.2e-4  # peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; norms are not decayed
    grad_clip: float = 1.0  # largest global gradient norm
    total_tokens: int = 1_000_000  # tokens of the whole run
    warmup_steps: int = 20  # optimizer steps of linear warm-up
    decay_factor: float = 0.316  # the rate is multiplied by this ...
    decay_at: list[float] = field(default_factory=lambda: [0.6, 0.9])  # ... at these shares of the tokens
    batch_size: int = 16  # sequences an optimizer step, over all ranks
    batch_size_start: int | None = None  # the ramp's first batch; None: no ramp
    batch_ramp_tokens: int = 0  # tokens over which the batch grows
    batch_ramp_increment: int = 1  # the batch grows by multiples of this many sequences


@dataclass
class ParallelConfig:
    expert_parallel_size: int = 1  # ranks that share one copy of the routed experts
    zero_stage: int = 1  # DeepSpeed ZeRO: 0, 1, 2 or 3
    micro_batch_size: int = 4  # sequences a rank runs forward at once
    precision: Precision = Precision.fp32
    activation_checkpointing: bool = False  # recompute each layer in backward
    device: Device = Device.auto


@dataclass
class LoggingConfig:
    wandb: WandbMode = WandbMode.auto
    project: str = "dsv2"
    entity: str | None = None
    every: int = 10  # steps a window of routing statistics
    maps_every: int = 100  # steps between pictures of a window's routing, at the ends of windows


@dataclass
class EvalConfig:
    every: int = 200  # optimizer steps; evaluation also runs at the end
    sequences: int = 64  # the first ones of the validation split
    sample_prompt: str = ""  # text the final sample continues
    sample_tokens: int = 64  # its length; 0: no sample


@dataclass
class CheckpointConfig:
    every: int = 200  # optimizer steps; 0: only at the end and on a signal
    keep: int = 2  # newest complete checkpoints kept


@dataclass
class Config:
    name: str = "run"  # the run's files go to runs_dir/name
    runs_dir: str = "runs"
    seed: int = 0  # initial weights
    resume: str = "auto"  # auto: newest complete checkpoint of this run; never; or a checkpoint's path
    stop_step: int | None = None  # save and stop after this step; the schedule stays that of the whole run
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def _refuse(field_name: str, value: object, right: str) -> None:
    raise UserError(f"{field_name}={value}: {right}")


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def _require_positive(section: str, values: object, names: list[str], least: float = 1) -> None:
    for name in names:
        value = getattr(values, name)
        if not least <= value < math.inf:
            _refuse(f"{section}.{name}", value, f"must be at least {least}")


def _require_above_0(section: str, values: object, names: list[str]) -> None:
    for name in names:
        value = getattr(values, name)
        if not 0 < value < math.inf:
            _refuse(f"{section}.{name}", value, "must be above 0")


def _require_fraction(section: str, values: object, names: list[str]) -> None:
    for name in names:
        if not 0 <= (value := getattr(values, name)) <= 1:
            _refuse(f"{section}.{name}", value, "must lie between 0 and 1")


def validate(config: Config, world_size: int) -> None:
    """Refuse what cannot run, before any process group or model is made.

    Args:
        config: the whole configuration.
        world_size: number of processes of the job.

    Raises:
        UserError: names the field, its value and what would be right.
    """
    _validate_model(config.model)
    _validate_moe(config.model)
    _validate_optim(config.optim)
    _validate_parallel(config, world_size)
    _require_positive("data", config.data, ["sequence_length", "lanes", "shuffle_window", "vocab_size"])
    _require_positive("data", config.data, ["seed"], least=0)
    if config.data.source is DataSource.hf_stream:
        for name in ("dataset", "tokenizer"):
            if not getattr(config.data, name):
                _refuse(f"data.{name}", getattr(config.data, name), "must be given for data=hf_stream")
    if config.data.sequence_length > config.model.max_position_embeddings:
        _refuse(
            "data.sequence_length",
            config.data.sequence_length,
            f"must be at most model.max_position_embeddings={config.model.max_position_embeddings}",
        )
    _require_positive("logging", config.logging, ["every", "maps_every"])
    _require_positive("eval", config.eval, ["every", "sequences"])
    _require_positive("eval", config.eval, ["sample_tokens"], least=0)
    _require_positive("checkpoint", config.checkpoint, ["every"], least=0)
    _require_positive("checkpoint", config.checkpoint, ["keep"])
    if not config.name or "/" in config.name or config.name.startswith("."):
        _refuse("name", repr(config.name), "must be a plain folder name, such as my-run")
    if config.stop_step is not None and config.stop_step < 1:
        _refuse("stop_step", config.stop_step, "must be at least 1, or null")


def _validate_model(model: ModelConfig) -> None:
    sizes = [
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "intermediate_size",
        "moe_intermediate_size",
        "num_experts_per_tok",
        "max_position_embeddings",
    ]
    _require_positive("model", model, sizes)
    _require_positive("model", model, ["n_shared_experts"], least=0)
    if model.q_lora_rank is not None and model.q_lora_rank < 1:
        _refuse("model.q_lora_rank", model.q_lora_rank, "must be at least 1, or null for none")
    if model.qk_rope_head_dim % 2:
        _refuse("model.qk_rope_head_dim", model.qk_rope_head_dim, "must be even: RoPE turns pairs")
    above_0 = ["rms_norm_eps", "rope_theta", "initializer_range", "routed_scaling_factor"]
    _require_above_0("model", model, above_0)
    if not 0 <= model.first_k_dense_replace < model.num_hidden_layers:
        _refuse(
            "model.first_k_dense_replace",
            model.first_k_dense_replace,
            f"must leave at least one MoE layer of model.num_hidden_layers={model.num_hidden_layers}",
        )


def _validate_moe(model: ModelConfig) -> None:
    experts, groups, limit = model.n_routed_experts, model.n_group, model.topk_group
    _require_positive("model", model, ["n_routed_experts", "n_group", "topk_group"])
    if experts % groups:
        _refuse(
            "model.n_group",
            groups,
            f"must divide model.n_routed_experts={experts}: one of {_divisors(experts)}",
        )
    if limit > groups:
        _refuse("model.topk_group", limit, f"must be at most model.n_group={groups}")
    if model.num_experts_per_tok > limit * experts // groups:
        _refuse(
            "model.num_experts_per_tok",
            model.num_experts_per_tok,
            f"must be at most {limit * experts // groups}, the experts that model.topk_group={limit} of "
            f"model.n_group={groups} groups hold",
        )
    balance = model.balance
    _require_positive("model.balance", balance, ["alpha_expert", "alpha_device", "alpha_comm"], least=0)
    _require_fraction("model.balance", balance, ["exempt_fraction"])
    _require_above_0("model.balance", balance, ["capacity_factor"])


def _validate_optim(optim: OptimConfig) -> None:
    _require_positive("optim", optim, ["total_tokens", "batch_size", "batch_ramp_increment"])
    _require_positive("optim", optim, ["warmup_steps", "weight_decay", "batch_ramp_tokens"], least=0)
    _require_fraction("optim", optim, ["beta1", "beta2", "decay_factor"])
    for name in ("beta1", "beta2"):
        if getattr(optim, name) == 1:
            _refuse(f"optim.{name}", getattr(optim, name), "must be below 1")
    _require_above_0("optim", optim, ["lr", "eps", "grad_clip"])
    if optim.decay_at != sorted(set(optim.decay_at)) or not all(0 < f < 1 for f in optim.decay_at):
        _refuse("optim.decay_at", optim.decay_at, "must be rising shares of the tokens, such as [0.6, 0.9]")
    start = optim.batch_size_start
    if start is not None and not 1 <= start <= optim.batch_size:
        _refuse("optim.batch_size_start", start, f"must be from 1 to optim.batch_size={optim.batch_size}")
    if start is not None and optim.batch_ramp_tokens == 0:
        _refuse("optim.batch_ramp_tokens", 0, "must be above 0 when optim.batch_size_start is given")


def _validate_parallel(config: Config, world_size: int) -> None:
    parallel, model, optim = config.parallel, config.model, config.optim
    ep, stage = parallel.expert_parallel_size, parallel.zero_stage
    _require_positive("parallel", parallel, ["expert_parallel_size", "micro_batch_size"])
    if world_size % ep:
        _refuse(
            "parallel.expert_parallel_size",
            ep,
            f"must divide the number of processes, {world_size}: one of {_divisors(world_size)}",
        )
    if model.n_routed_experts % ep:
        _refuse(
            "parallel.expert_parallel_size",
            ep,
            f"must divide model.n_routed_experts={model.n_routed_experts}: "
            f"one of {_divisors(model.n_routed_experts)}",
        )
    if ep % model.n_group and model.n_group % ep:
        _refuse(
            "parallel.expert_parallel_size",
            ep,
            f"must divide model.n_group={model.n_group} or be a multiple of it, so that a group lives on "
            "whole ranks",
        )
    if stage not in (0, 1, 2, 3):
        _refuse("parallel.zero_stage", stage, "must be 0, 1, 2 or 3")
    if stage == 0 and parallel.precision is Precision.bf16:
        _refuse(
            "parallel.zero_stage",
            stage,
            "bf16 needs stage 1, 2 or 3, which keep fp32 master weights; or use parallel.precision=fp32",
        )
    share = parallel.micro_batch_size * world_size
    sizes = {"optim.batch_size": optim.batch_size}
    if optim.batch_size_start is not None:
        sizes["optim.batch_size_start"] = optim.batch_size_start
        sizes["optim.batch_ramp_increment"] = optim.batch_ramp_increment
    for name, size in sizes.items():
        if size % share:
            _refuse(
                name,
                size,
                f"must be a multiple of {share} = parallel.micro_batch_size={parallel.micro_batch_size} x "
                f"{world_size} processes",
            )
