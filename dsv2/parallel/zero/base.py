"""The interface of a ZeRO stage: its rules, DeepSpeed's settings, a rank's bytes, its traffic and shards.

`wrap` puts a model under DeepSpeed. Validation and the planner use the rest without torch, so this module
imports torch only inside functions. The byte counts hold for DeepSpeed 0.19.8 with these settings;
tests/dist/test_plan_memory.py compares them with real engines.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from dsv2.config.rules import refuse
from dsv2.config.schema import OptimConfig, Precision, RuntimeConfig
from dsv2.optimizers.base import GroupSizes, Optimizer, RankParameters, Shard
from dsv2.parallel.plan import Dim

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dsv2.kernels.sets import KernelSet
    from dsv2.parallel.mesh import Mesh

FP32 = 4  # bytes
BUCKET = 500_000_000  # elements; zero_optimization.reduce_bucket_size


class Job(NamedTuple):
    """The tensors that one rank holds, and their data types."""

    parameters: RankParameters
    optimizer: Optimizer
    weight_bytes: int  # of one weight of the model
    state_bytes: int  # of one master weight, and of one element of an optimizer state
    several_micro_batches: bool  # is a step's gradient a sum over micro-batches?
    fused: bool  # are the kernels fused, as runtime.kernels says?
    bucket: int = BUCKET  # elements of the reduction bucket that take memory


class States(NamedTuple):
    """Bytes that a rank holds between steps."""

    weights: int
    gradients: int
    masters: int  # weights beside the model's own
    moments: int  # the optimizer's states
    buffers: int

    @property
    def total(self) -> int:
        return sum(self)


class ActivationBytes(Protocol):
    """Bytes of one micro-batch; planner/activations.py explains the fields."""

    @property
    def kept(self) -> float: ...
    @property
    def logits(self) -> float: ...
    @property
    def layers(self) -> float: ...
    @property
    def single(self) -> float: ...
    @property
    def peak(self) -> float: ...


def flat(group: GroupSizes) -> int:
    """Return the elements of a group's flat buffer under ZeRO-1 and 2, padded for its partitions."""
    unit = 2 * group.copies
    return -(-group.elements // unit) * unit


def copied_into_buckets(job: Job) -> float:
    """Return the bytes of gradients copied for one reduction: at most a bucket, or one larger tensor."""
    parameters = job.parameters
    largest = max(*parameters.decay.sizes, *parameters.experts.sizes)
    elements = min(max(parameters.dense, parameters.experts.elements), max(BUCKET, largest))
    return job.weight_bytes * elements


class Range(NamedTuple):
    """One rank's contiguous range of one parameter, inside the optimizer's own parameter."""

    name: str  # in the model
    offset: int  # of its first element, in the whole parameter with all experts
    total: int  # elements of the whole parameter
    group: int  # index of the optimizer's group
    owner: "Tensor"  # the optimizer's parameter; the key of its state
    start: int  # first element within `owner`
    length: int

    def view(self, tensor: "Tensor") -> "Tensor":
        """Return a 1-D view of this range in `tensor`, which is `owner` or has its shape."""
        return tensor.detach().view(-1).narrow(0, self.start, self.length)


def shards_of(
    ranges: "Iterable[Range]", built: "torch.optim.Optimizer", optimizer: Optimizer
) -> Iterator[Shard]:
    """Yield each range with its fp32 weights and states. Create missing states as zeros, as at the start."""
    for part in ranges:
        tensors = {"fp32": part.view(part.owner)}
        state = built.state[part.owner]
        for key in optimizer.state_names(built.param_groups[part.group]["rule"]):
            if key not in state:
                state[key] = part.owner.detach().new_zeros(part.owner.shape)
            tensors[key] = part.view(state[key])
        yield Shard(part.name, part.offset, part.total, tensors)


@contextmanager
def _without_update(built: "torch.optim.Optimizer") -> Iterator[None]:
    """Make the optimizer's step do nothing. DeepSpeed does the rest of its step as always."""
    built.step = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del built.step


class Sharded(ABC):
    """One rank's part of a model under DeepSpeed, with its optimizer. `ZeroStage.wrap` makes it.

    Args:
        engine: DeepSpeed's engine, which holds the model.
    """

    def __init__(self, engine: Any, optimizer: Optimizer, mesh: "Mesh", optim: OptimConfig):
        self.engine = engine
        self.optimizer = optimizer
        self.mesh = mesh
        self.grad_clip = optim.grad_clip

    @abstractmethod
    def ranges(self) -> Iterator[Range]:
        """Yield every range of fp32 weights that this rank updates."""

    @abstractmethod
    def refresh(self) -> None:
        """Copy the fp32 weights into the model's weights after they were written to. Collective."""

    def shards(self) -> Iterator[Shard]:
        """Yield this rank's ranges of weights and states, and all buffers, as views.

        Every rank has the same buffers.
        """
        from dsv2.parallel.buffers import persistent_buffers

        yield from shards_of(self.ranges(), self.torch_optimizer, self.optimizer)
        for name, buffer in persistent_buffers(self.engine.module).items():
            yield Shard(name, 0, buffer.numel(), {"buffer": buffer.detach().view(-1)})

    def shard_bytes(self) -> list[int]:
        """Return the bytes of each tensor in `shards`. The tensors need not exist yet."""
        from dsv2.parallel.buffers import persistent_buffers

        sizes = []
        for part in self.ranges():
            states = self.optimizer.state_names(self.torch_optimizer.param_groups[part.group]["rule"])
            sizes += [part.length * part.owner.element_size()] * (1 + len(states))
        return sizes + [buffer.nbytes for buffer in persistent_buffers(self.engine.module).values()]

    def forward(self, *inputs: Any) -> Any:
        """Return the model's output."""
        return self.engine(*inputs)

    def backward(self, loss: "Tensor", *, last: bool) -> None:
        """Add the gradients of one micro-batch. The last micro-batch of a step also reduces them."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # only counts the micro-batch

    def step(self, lr: float, *, apply: bool = True) -> float:
        """Clip the gradient and update the weights. Return the gradient's norm before clipping.

        Args:
            apply: False: weights, states and the step count stay as they are.
        """
        self.update(lr, apply=apply)
        return float(self.engine.get_global_grad_norm())

    def update(self, lr: float, *, apply: bool) -> None:
        """Let DeepSpeed update the weights. With `apply=False` it only clears the gradients."""
        for group in self.torch_optimizer.param_groups:
            group["lr"] = lr
        with nullcontext() if apply else _without_update(self.torch_optimizer):
            self.engine.step()

    @property
    def torch_optimizer(self) -> Any:
        """Return torch's optimizer; its state is keyed by `Range.owner`."""
        return getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)

    @property
    def names(self) -> dict[int, str]:
        """Return the parameters' names by `id`."""
        return {id(parameter): name for name, parameter in self.engine.module.named_parameters()}

    @property
    def steps_done(self) -> float:
        """Return how many steps the optimizer has counted."""
        return self.optimizer.steps_done(self.torch_optimizer)

    @steps_done.setter
    def steps_done(self, count: float) -> None:
        self.optimizer.set_steps_done(self.torch_optimizer, count)


class ZeroStage(ABC):
    """One stage; parallel/zero/stages.py lists them by number and precision."""

    number: int
    sharded: ClassVar[type[Sharded]]
    reduces_in_backward = False  # are gradients reduced while the backward pass runs?

    def check(self, optim: OptimConfig, runtime: RuntimeConfig) -> None:
        """Refuse settings that this stage cannot use.

        Raises:
            UserError: names the field, its value and what would be right.
        """
        if optim.states is Precision.bf16:
            refuse(
                "optim.states",
                "bf16",
                f"needs parallel.zero_stage=1 and runtime.precision=bf16, not {self.number} and "
                f"{runtime.precision.value}; or use fp32",
            )

    def settings(self, optim: OptimConfig, runtime: RuntimeConfig, ranks: int) -> dict[str, Any]:
        """Return DeepSpeed's configuration for `ranks` data-parallel ranks."""
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": runtime.micro_batch_size,
            # `Sharded` marks the last micro-batch itself, as the batch may grow during a run.
            "gradient_accumulation_steps": 1,
            "train_batch_size": runtime.micro_batch_size * ranks,
            "gradient_clipping": optim.grad_clip,
            "zero_optimization": {
                "stage": self.number,
                "contiguous_gradients": True,
                "reduce_scatter": True,
            },
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if runtime.precision is Precision.bf16:
            settings["bf16"] = {"enabled": True, "immediate_grad_update": False}
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        return settings

    @abstractmethod
    def owned(self, group: GroupSizes) -> int:
        """Return the elements of a group whose optimizer state this rank keeps."""

    @abstractmethod
    def states(self, job: Job) -> States:
        """Return the bytes held between steps, when there are no activations or temporaries."""

    @abstractmethod
    def traffic(self, micro_batches: int, weight_bytes: int) -> float:
        """Return the bytes moved per step and element.

        A gather or a scatter moves each byte once, a sum twice.
        """

    def moments(self, job: Job) -> int:
        """Return the bytes of the optimizer's states."""
        return job.state_bytes * sum(
            len(job.optimizer.state_names(name)) * self.owned(group)
            for name, group in job.parameters._asdict().items()
        )

    def all_owned(self, job: Job) -> int:
        """Return the elements of all groups whose optimizer state this rank keeps."""
        return sum(self.owned(group) for group in job.parameters)

    def saved(self, job: Job) -> int:
        """Return the bytes that this rank writes to a checkpoint, without buffers."""
        return job.state_bytes * self.all_owned(job) + self.moments(job)

    def step_gradients(self, job: Job) -> float:
        """Return the bytes of gradients that exist, besides `states`, while a step accumulates them."""
        return job.weight_bytes * job.parameters.elements

    def gradients_after_backward(self, job: Job) -> float:
        """Return the bytes of `step_gradients` that still exist after the last backward pass."""
        return self.step_gradients(job)

    def step_buffers(self, job: Job) -> float:
        """Return the bytes of buffers that exist from a step's first backward pass on."""
        return 0

    def reduction(self, job: Job) -> float:
        """Return the peak of the bytes copied while gradients are reduced."""
        return 0

    def stepping(self, job: Job) -> float:
        """Return the bytes of temporaries in the optimizer step: by default, of one flat fp32 gradient.

        torch's fused optimizer has no temporaries.
        """
        return FP32 * max(self.owned(group) for group in job.parameters)

    def building(self, job: Job) -> float:
        """Return the bytes of the model as built, before ZeRO partitions it.

        The initial values of a matrix are drawn in fp32 and scaled out of place.
        """
        parameters = job.parameters
        return job.weight_bytes * parameters.elements + 2 * FP32 * max(parameters.decay.sizes)

    def forward_and_backward(self, job: Job, activations: ActivationBytes) -> float:
        """Return the peak of the bytes of activations and `step_gradients` together."""
        return self.step_gradients(job) + activations.peak

    def wrap(
        self,
        model: "nn.Module",
        optimizer: Optimizer,
        *,
        optim: OptimConfig,
        runtime: RuntimeConfig,
        mesh: "Mesh",
        kernels: "KernelSet",
    ) -> Sharded:
        """Put a freshly built model under DeepSpeed. Collective.

        Args:
            kernels: the model's operations, for stages that replace DeepSpeed's optimizer step.
        """
        from dsv2.parallel.zero.deepspeed_engine import deepspeed_engine, make_engine

        settings = self.settings(optim, runtime, mesh[Dim.dp].size)
        engine = make_engine(model, optimizer, optim, deepspeed_engine, settings)
        return self.sharded(engine, optimizer, mesh, optim)
