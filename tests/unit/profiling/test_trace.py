"""The share of each part: real traces of small models on the CPU, and traces as a GPU would leave them."""

import gzip
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsv2.model.init import init_weights
from dsv2.model.transformer import DeepseekV2
from dsv2.moe import layer
from dsv2.moe.dispatch import ExchangedDispatch
from dsv2.moe.execution import Execution
from dsv2.profiling.ranges import PARTS, PREFIX, STEP, Ranges, methods_of_modules, parts_of_modules, record
from dsv2.profiling.trace import Breakdown, breakdown, read
from tests.unit.helpers import KINDS, tiny_config

BACKWARD = "autograd::engine::evaluate_function: "


class Trainer:
    """A model, with methods that get ranges as the engine's and the stream's do."""

    def __init__(self, recompute: bool = False, **changes: Any):
        config = tiny_config(**changes)
        self.model = DeepseekV2(config, Execution(recompute=recompute))
        init_weights(self.model, 0.02, seed=0)
        self.vocab_size = config.vocab_size
        self.adam = torch.optim.AdamW(self.model.parameters())

    def step(self) -> None:
        ids = self.fetch()
        out = self.model(ids[:, :-1], ids[:, 1:], torch.arange(2))
        out.loss.backward()
        self.optimize()

    def fetch(self) -> Tensor:
        return torch.randint(self.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))

    def optimize(self) -> None:
        self.adam.step()
        self.adam.zero_grad()


def methods_of(trainer: Trainer) -> list[tuple[Any, str, str]]:
    methods = [(trainer, "optimize", "optimizer"), (trainer, "fetch", "data")]
    return [*methods, *methods_of_modules(trainer.model)]


def profiled(trainer: Trainer, folder) -> Breakdown:
    with Ranges(parts_of_modules(trainer.model), methods_of(trainer)):
        record(trainer.step, folder / "trace.json", on_gpu=False)
    return read(folder / "trace.json")


@pytest.mark.parametrize("recompute", [False, True])
def test_every_part_has_a_share_and_they_add_up(tmp_path, recompute):
    found = profiled(Trainer(recompute), tmp_path)
    assert tuple(found.parts) == PARTS
    assert sum(found.parts.values()) == pytest.approx(found.step_ms, rel=1e-6)
    assert found.parts.pop("idle") == 0
    assert min(found.parts.values()) > 0
    assert found.share("other") < 0.3  # Python between modules is most of so small a step
    assert "routed experts" in found.table()
    backward = found.backward
    for part in ("data", "optimizer"):
        assert backward[part] == 0
    for part in ("attention", "routing", "routed experts", "head, loss"):
        assert 0 < backward[part] < found.parts[part]
    assert backward["gradients"] == found.parts["gradients"]


class Ending(nn.Module):
    """Its last operation keeps nothing for backward, so torch does not recompute it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


def test_recomputation_that_ends_early_leaves_no_range_open(monkeypatch):
    opened = []

    class Range:
        def __init__(self, name: str):
            self.name = name

        def __enter__(self) -> None:
            opened.append(self.name)

        def __exit__(self, *raised: Any) -> None:
            assert opened.pop() == self.name

    monkeypatch.setattr(torch.profiler, "record_function", Range)
    model = Ending(Ending(nn.Tanh()))
    with Ranges({model: "routing", model.inner: "dense FFN"}, []):
        x = torch.ones(3, requires_grad=True)
        checkpoint(model, x, use_reentrant=False).sum().backward()
    assert opened == []


@pytest.mark.parametrize("kind", KINDS)
def test_backward_counts_for_the_part_of_its_forward(tmp_path, kind):
    found = profiled(Trainer(**KINDS[kind]), tmp_path)
    parts_of: dict[str, set[str]] = {}
    for kernel in found.kernels:
        parts_of.setdefault(kernel.name.removeprefix(BACKWARD), set()).add(kernel.part)
    assert parts_of["EmbeddingBackward0"] == {"embedding"}
    assert parts_of["NllLossBackward0"] == {"head, loss"}
    assert parts_of["torch::autograd::AccumulateGrad"] == {"gradients"}
    attention = [name for name in parts_of if "DotProduct" in name and "Backward" in name]
    assert attention
    assert all(parts_of[name] == {"attention"} for name in attention)
    assert parts_of["SiluBackward0"] == {"routed experts", "shared experts", "dense FFN"}
    products = {"attention projections", "routed experts", "shared experts", "dense FFN", "head, loss"}
    assert products <= parts_of["MmBackward0"] <= products | {"routing"}
    assert parts_of["SoftmaxBackward0"] == {"routing"}
    assert parts_of["aten::argsort"] == {"dispatch"}


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return (x @ w).mul(2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad.mul(2) @ w.t(), x.t() @ grad.mul(2)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return Twice.apply(x.detach().requires_grad_() + torch.arange(4), self.w)


def test_an_autograd_function_of_ones_own(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), Own(), nn.Tanh())
    modules = {model[0]: "dense FFN", model[1]: "routed experts", model[2]: "attention"}
    with Ranges(modules, []):
        record(lambda: model(torch.ones(3, 4)).sum().backward(), tmp_path / "trace.json", on_gpu=False)
    parts = {kernel.name: kernel.part for kernel in read(tmp_path / "trace.json").kernels}
    assert parts["Twice"] == parts["TwiceBackward"] == parts[BACKWARD + "TwiceBackward"] == "routed experts"
    assert parts["TanhBackward0"] == "attention"
    assert parts["SumBackward0"] == "other"


def test_hooks_and_methods_are_gone_afterwards():
    trainer = Trainer()
    before = (layer.start_dispatch, ExchangedDispatch.arrive)
    with Ranges(parts_of_modules(trainer.model), methods_of(trainer)):
        assert "optimize" in vars(trainer)
        assert before != (layer.start_dispatch, ExchangedDispatch.arrive)
    assert "optimize" not in vars(trainer)
    assert before == (layer.start_dispatch, ExchangedDispatch.arrive)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())


def host(
    name: str, start: float, end: float, thread: int = 1, cat: str = "cpu_op", **args: Any
) -> dict[str, Any]:
    names = {"seq": "Sequence number", "ext": "External id", "types": "Input type"}
    arguments = {names.get(key, key): value for key, value in args.items()}
    event = {"ph": "X", "cat": cat, "name": name, "pid": 9, "tid": thread, "ts": start, "dur": end - start}
    return event | {"args": arguments}


def part(name: str, start: float, end: float) -> dict[str, Any]:
    return host(PREFIX + name, start, end, cat="user_annotation")


def launch(at: float, correlation: int, thread: int = 1, cat: str = "cuda_runtime") -> dict[str, Any]:
    return host("launch", at, at + 1, thread, cat, correlation=correlation)


def kernel(
    name: str, start: float, end: float, correlation: int, cat: str = "kernel", **args
) -> dict[str, Any]:
    return host(name, start, end, 7, cat, correlation=correlation, **args)


def gpu_trace() -> list[dict[str, Any]]:
    """A step of 1000 us; backward runs on a thread of its own, whose numbers start again."""
    forward = [
        host(STEP, 0, 1000, cat="user_annotation"),
        part("routing", 10, 100),
        host("aten::mm", 20, 30, seq=5),
        launch(25, 1),
        part("routed experts", 40, 90),
        host("aten::sort", 41, 45, seq=6, types=["long int", "Scalar"]),
        launch(42, 2),
        launch(46, 10, cat="cuda_driver"),  # Triton outside of any operation: the plan too
        host("_Experts", 50, 80, seq=6, types=["c10::BFloat16", "long int"], ext=77),
        launch(55, 3, cat="cuda_driver"),
        host("aten::detach", 81, 82, seq=7),  # makes no node: the next operation has its number too
        part("head, loss", 110, 150),
        host("aten::linear", 111, 149, seq=7),
        part("optimizer", 700, 800),
        launch(710, 8, cat="cuda_driver"),
        launch(900, 9),
    ]
    backward = [
        host(BACKWARD + "MmBackward0", 200, 240, 2, seq=7),
        launch(210, 4, 2),
        host(BACKWARD + "_ExpertsBackward", 250, 300, 2, seq=6),
        host("aten::mul", 255, 265, 2, types=["bool"]),
        launch(260, 5, 2, "cuda_driver"),
        host(BACKWARD + "MmBackward0", 310, 350, 2, seq=5),
        host("aten::mm", 312, 340, 2, seq=7),
        launch(320, 6, 2),
        host(BACKWARD + "torch::autograd::AccumulateGrad", 400, 440, 2),
        launch(410, 7, 2),
    ]
    return forward + backward


KERNELS = [
    kernel("gemm", 30, 40, 1),
    kernel("radix", 50, 70, 2),
    kernel("places", 70, 75, 10),
    kernel("experts", 100, 200, 3),
    kernel("head_backward", 220, 320, 4),
    kernel("experts_backward", 320, 420, 5),
    kernel("gemm", 400, 450, 6),  # 20 us of it at once with the one before
    kernel("Memset", 450, 455, 7, "gpu_memset"),
    kernel("adamw", 800, 900, 8),
    kernel("norm", 905, 910, 9),
    kernel("late", 990, 1010, 99, ext=77),  # no launch to be found; ends after the step
    kernel(STEP, 0, 1000, 0, "gpu_user_annotation"),
]


def test_kernels_belong_to_what_launched_them():
    found = breakdown(gpu_trace() + KERNELS)
    microseconds = {part: round(ms * 1e3, 6) for part, ms in found.parts.items() if ms}
    assert microseconds == {
        "routing": 10 + 30,
        "dispatch": 20 + 5,
        "routed experts": 100 + 100 + 10,
        "head, loss": 100,
        "gradients": 5,
        "optimizer": 100,
        "other": 5,
        "idle": 1000 - 485,
    }
    assert found.step_ms == 1
    assert found.share("routing") == pytest.approx(0.04)
    assert found.on_gpu
    assert {part: round(ms * 1e3, 6) for part, ms in found.backward.items() if ms} == {
        "routing": 30,
        "routed experts": 100,
        "head, loss": 100,
        "gradients": 5,
    }
    assert found.as_json()["idle"] == {"ms": pytest.approx(0.515), "share": pytest.approx(0.515)}


def shifted(events: list[dict[str, Any]], by: float, numbers: int) -> list[dict[str, Any]]:
    """The same events later, with sequence numbers and correlations that no other event has."""
    later = []
    for event in events:
        arguments = dict(event["args"])
        for name in arguments.keys() & {"Sequence number", "correlation", "External id"}:
            arguments[name] += numbers
        later.append(event | {"ts": event["ts"] + by, "args": arguments})
    return later


def test_several_steps_give_their_mean_and_what_runs_between_them_counts_for_none(tmp_path):
    one = gpu_trace() + KERNELS
    between = [launch(1100, 500), kernel("evaluation", 1100, 1900, 500)]
    two = breakdown(one + between + shifted(one, 2000, 1000))
    assert two.steps == 2
    alone = breakdown(one)
    assert two.step_ms == pytest.approx(alone.step_ms)
    assert two.parts == pytest.approx(alone.parts)
    assert two.backward == pytest.approx(alone.backward)
    assert "evaluation" not in {kernel.name for kernel in two.kernels}


def test_time_without_kernels_counts_as_data_while_the_host_fetches_them():
    trace = [
        host(STEP, 0, 1000, cat="user_annotation"),
        part("data", 10, 110),
        part("data", 200, 300),
        launch(210, 1),
        launch(120, 2),
        part("data", 400, 450),
        kernel("copy", 220, 240, 1, "gpu_memcpy"),
        kernel("gemm", 280, 420, 2),
    ]
    found = breakdown(trace)
    microseconds = {part: round(ms * 1e3, 6) for part, ms in found.parts.items() if ms}
    fetching = 100 + (100 - 20 - 20) + (50 - 20)
    assert microseconds == {"data": 20 + fetching, "other": 140, "idle": 1000 - 160 - fetching}


def test_a_compressed_trace_reads_the_same_and_half_a_trace_is_refused(tmp_path):
    content = json.dumps({"traceEvents": gpu_trace() + KERNELS})
    (tmp_path / "trace.json").write_text(content)
    (tmp_path / "trace.json.gz").write_bytes(gzip.compress(content.encode()))
    assert read(tmp_path / "trace.json.gz") == read(tmp_path / "trace.json")
    (tmp_path / "half.json").write_text(content[: len(content) // 2])
    with pytest.raises(json.JSONDecodeError):
        read(tmp_path / "half.json")
    with pytest.raises(ValueError, match="no step is marked"):
        breakdown(KERNELS[:-1])


def test_the_top_kernels_name_their_part():
    lines = breakdown(gpu_trace() + KERNELS).top_kernels(3).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["0.100", "1", "routed", "experts", "experts"],
        ["0.100", "1", "head,", "loss", "head_backward"],
        ["0.100", "1", "routed", "experts", "experts_backward"],
    ]
