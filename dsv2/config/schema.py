"""Typed configuration: what every field means.

Hydra composes `conf/` into these dataclasses once (dsv2/config/compose.py); dsv2/training/validate.py then
refuses impossible combinations. Neither imports torch or hydra, so that the model can use its part of this
and `train.py --help` answers at once.
"""

import enum
from dataclasses import dataclass, field
from pathlib import Path

from data.config import DataConfig


class Precision(enum.Enum):
    fp32 = "fp32"
    bf16 = "bf16"  # bf16 parameters and activations, fp32 master weights and gradient accumulation


class AttentionKind(enum.Enum):
    mla = "mla"  # Multi-head Latent Attention (section 2.1)
    # What the paper measures it against (appendix D): heads as wide as qk_nope_head_dim, RoPE on all of that.
    mha = "mha"  # a key and a value head for every query head
    gqa = "gqa"  # num_key_value_heads of them, each shared by as many query heads
    mqa = "mqa"  # one of each


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
class RopeScalingConfig:
    """YaRN (arXiv 2309.00071) as DeepSeek-V2 uses it to reach longer contexts (section 3.1.4)."""

    factor: float = 40.0  # s: the new longest context over the original one
    original_max_position_embeddings: int = 4096  # the context trained on before, tokens
    beta_fast: float = 32.0  # pairs that turn more often than this over the original context keep their speed
    beta_slow: float = 1.0  # pairs that turn less often are slowed down s times; a ramp lies between the two
    mscale: float = 0.707  # cos and sin are multiplied by m(mscale) / m(mscale_all_dim)
    mscale_all_dim: float = 0.707  # the softmax scale by m(mscale_all_dim)^2; m(x) = 0.1 x ln s + 1


@dataclass
class ModelConfig:
    """Sizes under their names in the published configuration."""

    vocab_size: int = 4096
    hidden_size: int = 192
    num_hidden_layers: int = 4
    attention: AttentionKind = AttentionKind.mla
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None  # gqa only, and given there
    q_lora_rank: int | None = None  # mla only; None: queries come straight from the hidden state
    kv_lora_rank: int = 64  # mla only
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16  # mla only
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
    rope_scaling: RopeScalingConfig | None = None  # None: plain RoPE
    max_position_embeddings: int = 4096  # longest sequence, tokens
    initializer_range: float = 0.006  # standard deviation of every weight matrix at the start
    balance: BalanceConfig = field(default_factory=BalanceConfig)


@dataclass
class OptimConfig:
    name: str = "adamw"  # the only optimizer so far
    # Precision of master weights and Adam's moments. With bf16 the model's weights are the only copy, and all
    # three are rounded stochastically. ZeRO-1 only.
    states: Precision = Precision.fp32
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
    """The layout: how ranks share the work."""

    expert_parallel_size: int = 1  # ranks that share one copy of the routed experts
    zero_stage: int = 1  # DeepSpeed ZeRO: 0, 1, 2 or 3


@dataclass
class RuntimeConfig:
    """How one rank computes its part."""

    device: Device = Device.auto
    precision: Precision = Precision.fp32
    kernels: str = "reference"  # how the costly operations are computed; dsv2/kernels/specs.py lists the sets
    recompute: bool = False  # recompute each layer's activations in the backward pass
    micro_batch_size: int = 4  # sequences per forward pass of a rank


@dataclass
class LoggingConfig:
    wandb: WandbMode = WandbMode.auto
    project: str = "dsv2"
    entity: str | None = None
    every: int = 10  # steps a window of routing statistics
    maps_every: int = 100  # steps between pictures of a window's routing, at the ends of windows
    # Alerts, on the console and through W&B, once an episode; a threshold of 0 or null turns one off.
    alert_max_vio: float | None = 5.0  # moe/max_vio_max above this ...
    alert_dead: float | None = 0.25  # or moe/dead above this share of all routed experts ...
    alert_windows: int = 5  # ... for so many windows in a row: routing collapses
    alert_spike: float | None = 6.0  # the loss above its running mean by so many standard deviations ...
    alert_spike_steps: int = 3  # ... for so many steps in a row


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
    init_from: str | None = None  # a Hugging Face folder to start from; a checkpoint that is found goes first
    resume: str = "auto"  # auto: newest whole checkpoint of this run; never; or the path of one, or of a run
    # With resume=PATH of another run: only its weights and Adam's moments are taken. Steps, tokens, schedule
    # and data start at the beginning, so all of them may be others, and so may model.rope_scaling.
    new_stage: bool = False
    stop_step: int | None = None  # save and stop after this step; the schedule stays that of the whole run
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def run_dir(self) -> Path:
        """Where the run's files go."""
        return Path(self.runs_dir) / self.name
