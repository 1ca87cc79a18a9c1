"""Every field of the configuration with its type and default; the only place where defaults are written.

`python -m dsv2 train --help` prints the comments directly above a field and after it on its line. Hydra
composes `conf/` into these dataclasses (dsv2/config/compose.py). Then dsv2/training/validate.py refuses
impossible combinations. This module imports neither torch nor Hydra.
"""

import enum
from dataclasses import dataclass, field
from pathlib import Path

from data.config import DataConfig


class Precision(enum.Enum):
    fp32 = "fp32"
    bf16 = "bf16"  # bf16 parameters and activations, fp32 master weights and gradient accumulation


class WandbMode(enum.Enum):
    auto = "auto"  # as WANDB_MODE says, else online if logged in, else offline; never a prompt
    offline = "offline"
    disabled = "disabled"  # metrics.jsonl only


class SpikePolicy(enum.Enum):
    off = "off"  # every step's update is applied
    skip = "skip"  # a spike's update is not applied
    rewind = "rewind"  # the run goes back to its newest checkpoint and leaves out the batches since then


class ExpertExchange(enum.Enum):
    collective = "collective"
    symmetric = "symmetric"


class Device(enum.Enum):
    auto = "auto"  # CUDA if there is a GPU
    cpu = "cpu"
    cuda = "cuda"


@dataclass
class BalanceConfig:
    """Load balance (arXiv 2405.04434, sections 2.2.3 and 2.2.4)."""

    alpha_expert: float = 0.003  # weight of the expert-level loss: alpha_1 of eq. 23
    alpha_device: float = 0.05  # weight of the device-level loss: alpha_2 of eq. 26
    alpha_comm: float = 0.02  # weight of the communication loss: alpha_3 of eq. 29
    token_dropping: bool = False  # drop tokens beyond a device's capacity, in training only
    capacity_factor: float = 1.0  # a device's capacity divided by its average load
    exempt_fraction: float = 0.1  # share of sequences whose tokens are never dropped, 0 to 1
    exempt_seed: int = 0  # seed that chooses the exempt sequences


@dataclass
class RopeScalingConfig:
    """YaRN (arXiv 2309.00071) as DeepSeek-V2 uses it to reach longer contexts (section 3.1.4)."""

    factor: float = 40.0  # s: the longest new context divided by the original one
    original_max_position_embeddings: int = 4096  # the context of earlier training, tokens
    # pairs that rotate more often than this over the original context keep their speed
    beta_fast: float = 32.0
    # pairs that rotate less often than this are slowed down s times; between the two limits lies a ramp
    beta_slow: float = 1.0
    mscale: float = 0.707  # cos and sin are multiplied by m(mscale) / m(mscale_all_dim)
    # the softmax scale is multiplied by m(mscale_all_dim)^2; m(x) = 0.1 x ln s + 1
    mscale_all_dim: float = 0.707


@dataclass
class ModelConfig:
    """Sizes under their names in the published configuration."""

    vocab_size: int = 4096  # token ids that the model knows; at least the tokenizer's pieces
    hidden_size: int = 192  # width of the residual stream
    num_hidden_layers: int = 4  # layers, dense and MoE
    # kind of attention, such as mla (section 2.1); dsv2/model/attention/kinds.py lists the kinds
    attention: str = "mla"
    num_attention_heads: int = 4  # query heads
    # key and value heads; must be given for gqa and must be null otherwise
    num_key_value_heads: int | None = None
    q_lora_rank: int | None = None  # mla only: width of the compressed queries; null: no compression
    kv_lora_rank: int = 64  # mla only: width of the compressed keys and values
    # width of a query or key head without RoPE; for mha, gqa and mqa the whole width
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16  # mla only: width of the part of a head with RoPE
    v_head_dim: int = 32  # width of a value head
    intermediate_size: int = 512  # width of the FFN in dense layers
    moe_intermediate_size: int = 96  # width of one expert
    # how a token's experts are chosen; dsv2/moe/routers/kinds.py lists the routers
    router: str = "softmax_topk"
    n_routed_experts: int = 16  # routed experts per MoE layer
    n_shared_experts: int = 1  # experts per MoE layer that every token uses
    num_experts_per_tok: int = 4  # routed experts per token
    n_group: int = 4  # expert groups ("devices" in the paper), independent of the layout
    topk_group: int = 2  # groups that one token may reach
    first_k_dense_replace: int = 1  # number of first layers with a dense FFN
    routed_scaling_factor: float = 1.0  # the routed experts' sum is multiplied by this
    rms_norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    rope_theta: float = 10000.0  # base of RoPE's frequencies
    rope_scaling: RopeScalingConfig | None = None  # YaRN, with rope_scaling=yarn; null: plain RoPE
    max_position_embeddings: int = 4096  # the longest sequence, tokens
    initializer_range: float = 0.006  # standard deviation of every initial weight matrix
    balance: BalanceConfig = field(default_factory=BalanceConfig)


@dataclass
class OptimConfig:
    name: str = "adamw"  # the optimizer; dsv2/optimizers/rules.py lists them
    # precision of the master weights and of Adam's moments. bf16 needs ZeRO-1 and has no separate master
    # weights; weights and moments are then rounded stochastically
    states: Precision = Precision.fp32
    lr: float = 4.2e-4  # peak learning rate
    beta1: float = 0.9  # decay per step of the mean of gradients
    beta2: float = 0.95  # decay per step of the mean of squared gradients
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decay of matrices per step, times the learning rate; norms are not decayed
    grad_clip: float = 1.0  # limit of the gradient's global norm; a larger gradient is scaled down to it
    total_tokens: int = 1_000_000  # tokens of the whole run
    warmup_steps: int = 20  # linear warm-up, optimizer steps
    decay_factor: float = 0.316  # the learning rate is multiplied by this at each share in decay_at
    decay_at: list[float] = field(default_factory=lambda: [0.6, 0.9])  # shares of the tokens, rising, 0 to 1
    batch_size: int = 16  # sequences per optimizer step, over all ranks
    batch_size_start: int | None = None  # the ramp's first batch, sequences; null: no ramp
    batch_ramp_tokens: int = 0  # tokens over which the batch grows
    batch_ramp_increment: int = 1  # the batch grows in steps of this many sequences


@dataclass
class ParallelConfig:
    """The layout: how ranks share the work."""

    expert_parallel_size: int = 1  # ranks that share one copy of the routed experts
    zero_stage: int = 1  # DeepSpeed ZeRO's stage; dsv2/parallel/zero/stages.py lists them
    # how rows reach their experts. collective: by all-to-all. symmetric: straight into the memory of the
    # other GPUs, which needs fused kernels, and each expert-parallel group on one machine
    expert_exchange: ExpertExchange = ExpertExchange.collective


@dataclass
class RuntimeConfig:
    """How one rank computes its part."""

    device: Device = Device.auto  # auto: GPUs if there are any, else the CPU
    precision: Precision = Precision.fp32  # parameters and activations; bf16 accumulates gradients in fp32
    kernels: str = "reference"  # how the costly operations are computed; dsv2/kernels/specs.py lists the sets
    recompute: bool = False  # recompute each layer's activations in the backward pass
    micro_batch_size: int = 4  # sequences per forward pass of a rank
    check_memory: bool = True  # refuse a run that needs more memory than is free, before it starts


@dataclass
class SpikeConfig:
    """What happens to a step whose total loss, with the balance losses, is a spike or not finite."""

    # off: nothing; skip: the step has no update; rewind: training returns to the newest checkpoint of the
    # run and leaves out the batches since then
    policy: SpikePolicy = SpikePolicy.off
    # a spike exceeds the total loss's running mean (about 100 steps) by this many running standard deviations
    deviations: float = 6.0
    attempts: int = 10  # the run ends as diverged after this many spikes without progress


@dataclass
class LoggingConfig:
    # auto: as WANDB_MODE says, else online if logged in, else offline; disabled: metrics.jsonl only
    wandb: WandbMode = WandbMode.auto
    project: str | None = None  # the W&B project; null: WANDB_PROJECT, or dsv2
    entity: str | None = None  # the owner of the W&B project; null: the account's own
    every: int = 10  # length of a window of routing statistics, optimizer steps
    maps_every: int = 100  # optimizer steps between pictures of a window's routing
    # alert if moe/max_vio_max is above this for alert_windows windows; 0 or null: no alert
    alert_max_vio: float | None = 5.0
    # alert if moe/dead is above this share of the experts; 0 or null: no alert
    alert_dead: float | None = 0.25
    # alert if a rank's own time is above this many times that of the others; 0 or null: no alert
    alert_slow_rank: float | None = 1.5
    alert_windows: int = 5  # consecutive windows before an alert about routing or a slow rank
    # alert if train/loss_total exceeds its mean by this many deviations; 0 or null: no alert
    alert_spike: float | None = 6.0
    alert_spike_steps: int = 3  # consecutive steps before an alert about the loss


@dataclass
class ProfileConfig:
    """A profile of some steps of training; docs/performance.md explains what it holds."""

    # first and last profiled step, both included and counted from 1, such as [100,103]; null: none
    steps: list[int] | None = None
    # ranks that write a trace, counted from 0; null: every rank
    ranks: list[int] | None = field(default_factory=lambda: [0])


@dataclass
class WatchdogConfig:
    """When a job without progress is ended; docs/guide.md explains what it leaves behind."""

    # longest time that a micro-batch, an update or fetching a step's data may take, seconds; 0: no limit
    limit_s: float = 300.0
    # the same for the start, a session's first step, a batch of an evaluation, a save, and writing a profile
    slow_limit_s: float = 1800.0


@dataclass
class EvalConfig:
    every: int = 200  # optimizer steps between evaluations; one always runs at the end; 0: only that one
    sequences: int = 64  # sequences per evaluation: the first ones of the validation split
    sample_prompt: str = ""  # text that the final sample continues
    sample_tokens: int = 64  # length of the final sample, tokens; 0: no sample


@dataclass
class CheckpointConfig:
    every: int = 200  # optimizer steps between checkpoints; 0: only at the end and on a signal
    keep: int = 2  # number of newest complete checkpoints that are kept
    keep_every: int = 0  # checkpoints of steps that this number divides are kept for good; 0: none
    # write checkpoints from a copy in host memory while training continues; false: training waits
    asynchronous: bool = True


@dataclass
class Config:
    name: str = "run"  # name of the run; its files go to runs_dir/name
    runs_dir: str = "runs"  # the folder of all runs
    seed: int = 0  # seed of the initial weights
    # a Hugging Face folder with the first weights; a checkpoint of the run takes precedence
    init_from: str | None = None
    # auto: this run's newest whole checkpoint; never: none; or the path of a checkpoint or run
    resume: str = "auto"
    # with resume=PATH of another run: take only its weights and the optimizer's states. Steps, tokens,
    # schedule and data start from the beginning. They and model.rope_scaling may differ from that run's
    new_stage: bool = False
    # save and stop after this optimizer step; the schedule stays that of the whole run
    stop_step: int | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def run_dir(self) -> Path:
        """Return the folder of the run's files."""
        return Path(self.runs_dir) / self.name
