"""The house: a package imports only packages below it, and nothing imports in a circle."""

import ast
from pathlib import Path

import pytest

from tests.unit.helpers import REPO

LAYERS = (  # a package imports only from entries before its own
    "dsv2.formats dsv2.packages",
    "data",
    "dsv2.errors",
    "dsv2.config",
    "dsv2.kernels",
    "dsv2.optimizers",
    "dsv2.parallel",
    "dsv2.moe dsv2.checkpoint",
    "dsv2.model",
    "dsv2.inference dsv2.hf",
    "dsv2.training",
    "dsv2.profiling",
    "dsv2.monitoring dsv2.planner",
    "dsv2.benchmark dsv2.studies",
    "dsv2.cli",
    "dsv2.__main__ train",
)
FLOOR = {name: floor for floor, names in enumerate(LAYERS) for name in names.split()}
FILES = [REPO / "train.py", *sorted((REPO / "data").rglob("*.py")), *sorted((REPO / "dsv2").rglob("*.py"))]
MODULES = {".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__") for path in FILES}
BESIDE_PACKAGES = {"__init__.py", "__main__.py", "errors.py", "formats.py", "packages.py"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


def package_of(module: str) -> str:
    return module.split(".")[0] if not module.startswith("dsv2.") else ".".join(module.split(".")[:2])


def imported(path: Path) -> set[str]:
    """Return the project's modules that a file imports, also inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import would escape this test"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else node.module)
    return found & MODULES


def test_every_import_goes_down():
    upward = set()
    for path in FILES:
        own = package_of(module_of(path))
        for name in {package_of(module) for module in imported(path)} - {own, "dsv2"}:
            if FLOOR[name] >= FLOOR.get(own, -1):
                upward.add(f"{module_of(path)}: {name}")
    assert upward == set()


def test_no_circle_of_files():
    arrows = {module_of(path): imported(path) - {module_of(path)} for path in FILES}
    finished: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module in finished:
            return
        for other in sorted(arrows[module]):
            visit(other, (*way, module))
        finished.add(module)

    for module in sorted(arrows):
        visit(module, ())


def test_dsv2_is_no_pile():
    assert {path.name for path in (REPO / "dsv2").glob("*.py")} == BESIDE_PACKAGES


@pytest.mark.parametrize(
    "package", sorted(p.name for p in (REPO / "dsv2").iterdir() if (p / "__init__.py").is_file())
)
def test_every_package_has_its_floor(package):
    assert f"dsv2.{package}" in FLOOR
