"""Every collective is a method of the mesh; no other module calls torch.distributed for one."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dsv2.errors import PeerLost
from dsv2.parallel.mesh import ALONE, Mesh, peers_watched
from dsv2.parallel.plan import Dim
from tests.unit.helpers import REPO

# The mesh and its start; DeepSpeed's boundary, which names groups; the checkpoint's file format. The launcher
# and the watchdog use the store alone.
ALLOWED = {
    "dsv2/parallel/mesh.py": {"torch.distributed"},
    "dsv2/parallel/start.py": {"torch.distributed"},
    "dsv2/parallel/zero/": {"torch.distributed", "deepspeed.runtime.utils"},
    "dsv2/checkpoint/": {"torch.distributed.checkpoint"},
    "dsv2/cli/machines.py": {"torch.distributed"},
    "dsv2/parallel/watchdog.py": {"torch.distributed"},
}
MODULES = {"torch.distributed", "torch.distributed.checkpoint", "deepspeed.comm", "deepspeed.runtime.utils"}
FILES = [REPO / "train.py", *sorted((REPO / "data").rglob("*.py")), *sorted((REPO / "dsv2").rglob("*.py"))]


def collective_modules(path: Path) -> set[str]:
    """Return what a file imports of the modules with collectives, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names & MODULES


def test_no_other_module_imports_collectives():
    strangers = {}
    for path in FILES:
        name = str(path.relative_to(REPO))
        allowed = [modules for prefix, modules in ALLOWED.items() if name.startswith(prefix)]
        if rest := collective_modules(path).difference(*allowed):
            strangers[name] = rest
    assert strangers == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_one_rank_gets_its_own_values_and_its_argument_stays(dtype):
    x = torch.tensor([[1, 0], [0, 1]]).to(dtype)
    before = x.clone()
    for got in (ALONE.sum(x), ALONE.from_main(x)):
        assert torch.equal(got, x)
        got.zero_()  # the caller may write
        assert torch.equal(x, before)
    assert torch.equal(ALONE.gather(x), x[None])
    assert torch.equal(ALONE.start_gather(x).wait(), x[None])
    assert torch.equal(ALONE.scatter_sum_in_place(x.flatten()).wait(), x.flatten())
    assert torch.equal(ALONE.gather_in_place(x.flatten()).wait(), x.flatten())
    assert torch.equal(ALONE.exchange(x, [2], [2]).wait(), x)
    assert ALONE.objects("value") == ["value"]
    assert [ALONE.agree(flag) for flag in (False, True)] == [False, True]


def test_a_mesh_of_one_rank():
    mesh = Mesh(torch.device("cpu"))
    assert mesh.is_main
    assert {(mesh[dim].rank, mesh[dim].size) for dim in Dim} == {(0, 1)}
    norm = mesh.gradient_norm(torch.tensor(9.0), torch.tensor(16.0))
    assert norm.item() == 5.0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (dist.DistBackendError("NCCL"), PeerLost),
        (dist.DistNetworkError("socket"), PeerLost),
        (RuntimeError("shapes differ"), RuntimeError),
        (ValueError("lr"), ValueError),
    ],
)
def test_an_error_of_distribution_is_a_lost_peer_and_no_other_is(error, expected):
    @peers_watched()
    def step() -> None:
        raise error

    for _ in range(2):  # a method is called every step
        with pytest.raises(expected) as raised:
            step()
        assert type(raised.value) is expected
        assert error in (raised.value, raised.value.__cause__)


def test_a_lost_peer_is_told_from_other_errors_by_where_the_error_was_raised():
    """gloo raises a plain RuntimeError inside a collective that DeepSpeed called."""
    collective: dict[str, Any] = {"__name__": "torch.distributed.distributed_c10d"}
    exec("def fail():\n    raise RuntimeError('reset by peer')", collective)
    with pytest.raises(PeerLost, match="reset by peer"), peers_watched():
        collective["fail"]()
    with pytest.raises(RuntimeError, match="shapes") as caught, peers_watched():
        raise RuntimeError("shapes")
    assert type(caught.value) is RuntimeError
