"""The fused kernels fit their protocols, and every Triton launch names exactly its kernel's parameters."""

import ast
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv2.kernels.base import PROTOCOLS, KernelSet
from dsv2.kernels.reference.rows import map_rows
from dsv2.kernels.sets import REFERENCE
from dsv2.kernels.types import AdamWStep
from tests.idle_triton import Idle, idle_triton
from tests.unit.helpers import REPO

FUSED = sorted((REPO / "dsv2/kernels/fused").glob("*.py"))
CALLED_BY_KERNELS = {"_rotate", "_rounded", "_key"}  # these are never launched


def tensor(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)


def backward(*results: Tensor) -> None:
    sum(result.float().sum() for result in results).backward()


def use_everything(kernels: KernelSet) -> None:
    """Call every function of a set, and the backward pass of each."""
    x = tensor(6, 16)
    norm = tensor(16)
    backward(kernels.rms_norm(x, norm, 1e-6))
    backward(*kernels.add_rms_norm(x, tensor(6, 16), norm, 1e-6))
    backward(*kernels.add_rms_norm(x, None, norm, 1e-6))
    backward(kernels.add_up(x, tensor(6, 16), tensor(6, 16)))
    backward(*kernels.linears(x, tensor(8, 16), tensor(24, 16)))
    backward(kernels.swiglu(x, tensor(24, 16), tensor(24, 16), tensor(16, 24)))
    angles = torch.zeros(3, 4)
    queries = tensor(2, 3, 2, 16)
    keys_values = tensor(2, 3, 2, 8 + 16)
    backward(kernels.latent_attention(queries, keys_values, tensor(2, 3, 8), angles, angles, scale=1.0))
    routing = kernels.route(x, tensor(8, 16), 2, 4, 2)
    sums = kernels.sequence_sums(routing, 2, 4)
    backward(routing.affinity_TK, sums.affinity_BE)
    ids = routing.expert_ids_TK
    matrices = {"w13_E2FD": tensor(8, 2 * 8, 16), "w2_EDF": tensor(8, 16, 8)}
    for n_pairs in (ids.numel(), 0):
        chosen = ids if n_pairs else torch.full_like(ids, -1)
        counts = torch.bincount(chosen[chosen >= 0], minlength=8)
        weights = torch.ones(ids.shape, requires_grad=True)
        options = {"n_pairs": n_pairs, "first_expert": 0}
        backward(kernels.routed_experts(x, chosen, weights, counts, **options, **matrices))
    kernels.rows_by_rank(ids, 4, 2)
    rows = map_rows(torch.tensor([[2, 0], [1, 9], [0, 2]]), 5)
    kernels.copy_rows(x, rows)
    kernels.sum_rows(tensor(3, 16), rows, 6)
    backward(kernels.head_loss(x, tensor(32, 16), torch.zeros(6, dtype=torch.int64)))
    hyper = AdamWStep(lr=1.0, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.1, step=1, seed=0)
    for weight in (None, torch.zeros(5, dtype=torch.bfloat16)):
        states = [torch.zeros(5) for _ in range(4)]
        kernels.adamw(*states, scale=torch.tensor(1.0), weight=weight, hyper=hyper, first=0)
    kernels.sum_of_squares([torch.ones(5), torch.ones(0)])


@pytest.mark.parametrize("name", ["fused", "fused_cute"])
def test_every_kernel_is_launched_with_its_parameters(name):
    with idle_triton(name, chunk=4) as kernels:
        use_everything(kernels)
    functions = [getattr(function, "func", function) for function in vars(kernels).values()]
    idle = [value for f in functions for value in f.__globals__.values() if isinstance(value, Idle)]
    assert {kernel.name for kernel in idle if not kernel.is_launched} == CALLED_BY_KERNELS


@pytest.mark.parametrize(
    "arguments", [{"x": 1}, {"x": 1, "BLOCK": 2, "count": 3}, {"out": 1, "BLOCK": 2}], ids=str
)
def test_a_wrong_launch_fails(arguments):
    def kernel(x: Any, BLOCK: int) -> None: ...

    Idle(kernel)[(1,)](x=1, BLOCK=2, num_warps=8)
    with pytest.raises(TypeError):
        Idle(kernel)[(1,)](**arguments)
    with pytest.raises(TypeError):
        Idle(kernel)[(1,)](1, x=1, BLOCK=2)


@pytest.mark.parametrize("path", FUSED, ids=lambda path: path.name)
def test_launches_name_their_arguments(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            assert not node.args, f"{path.name}, line {node.lineno}"


def parameters(function: Any, skip: int = 0) -> list[tuple[str, Any]]:
    """Names and kinds; a parameter with a default is an extra that a protocol need not have."""
    all_of_them = list(inspect.signature(function).parameters.values())[skip:]
    return [(p.name, p.kind) for p in all_of_them if p.default is p.empty]


@pytest.mark.parametrize("name", ["reference", "fused", "fused_cute"])
def test_a_set_fits_the_protocols(name):
    if name == "reference":
        kernels = REFERENCE
    else:
        with idle_triton(name, chunk=4) as kernels:
            pass
    members = [
        (function_name, function)
        for protocol in PROTOCOLS
        for function_name, function in vars(protocol).items()
        if inspect.isfunction(function) and not function_name.startswith("_")
    ]
    assert {function_name for function_name, _ in members} == set(vars(kernels))
    for function_name, function in members:
        got = parameters(getattr(kernels, function_name))
        assert got == parameters(function, skip=1), function_name
