"""The rules of docs and design that can be read off the sources."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.helpers import REPO

FOLDERS = ("dsv2", "data")
SOURCES = [*sorted(path for folder in FOLDERS for path in (REPO / folder).rglob("*.py")), REPO / "train.py"]
TESTS = sorted((REPO / "tests").rglob("*.py"))
PURE = [p for p in SOURCES if p.relative_to(REPO).parts[1:2] in [("model",), ("moe",), ("kernels",)]]
ZERO = REPO / "dsv2/parallel/zero"  # the only folder that touches DeepSpeed's private modules
ENGINE_LAYER = REPO / "dsv2/moe/engine_layer.py"  # is of the type that DeepSpeed recognises
PEER = REPO / "dsv2/benchmark/peers/deepspeed_autoep.py"  # runs DeepSpeed as another framework's user would


def relative(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def imports(path: Path, tree: ast.Module | None = None) -> Iterator[tuple[str, str | None]]:
    """(module, imported name or None) of every import, inside functions too."""
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: a relative import would escape this test"
            yield from ((node.module or "", alias.name) for alias in node.names)


def without_command_line(path: Path) -> ast.Module:
    """Its syntax tree but for `if __name__ == "__main__":`, which only ever starts a module elsewhere."""
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and "__main__" in ast.unparse(n.test))]
    return tree


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_there_is_something_to_read():
    assert len(PURE) > 12
    assert len(SOURCES) > 25
    assert len(TESTS) > 40


@pytest.mark.parametrize("path", [p for p in PURE if p != ENGINE_LAYER], ids=relative)
def test_the_model_knows_only_its_own_part_of_the_configuration(path):
    for module, name in imports(path, without_command_line(path)):
        for framework in ("deepspeed", "hydra", "omegaconf", "wandb", "data", "launch"):
            assert not is_within(module, framework), f"imports {module}"
        if is_within(module, "dsv2"):
            assert module.split(".")[1] in ("model", "moe", "parallel", "kernels", "config", "packages"), (
                f"imports {module}"
            )
        if module == "dsv2.config.schema":
            assert name is not None, "the whole module"
            assert name != "Config"


@pytest.mark.parametrize("path", [p for p in PURE if p.is_relative_to(REPO / "dsv2/kernels")], ids=relative)
def test_kernels_know_no_model(path):
    """Only the specs see sizes of a model, as plain fields."""
    allowed = ["dsv2.kernels"]
    if path.name == "specs.py":
        allowed += ["dsv2.config", "dsv2.packages"]
    for module, _ in imports(path):
        assert not is_within(module, "dsv2") or any(is_within(module, a) for a in allowed), (
            f"imports {module}"
        )


@pytest.mark.parametrize("path", [p for p in SOURCES if p != PEER], ids=relative)
def test_deepspeed_is_imported_in_few_places(path):
    touched = {module for module, _ in imports(path) if is_within(module, "deepspeed")}
    if path == ENGINE_LAYER:
        assert touched == {"deepspeed.module_inject.auto_ep_layer"}
    elif not path.is_relative_to(ZERO):
        assert not touched


def test_reading_a_checkpoint_needs_no_deepspeed():
    code = "import sys, dsv2.checkpoint.reader; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


@pytest.mark.parametrize(
    "name",
    ["config/schema.py", "training/validate.py", "config/compose.py", "errors.py", "kernels/specs.py"],
)
def test_the_configuration_needs_no_torch(name):
    assert not any(is_within(module, "torch") for module, _ in imports(REPO / "dsv2" / name))


def test_optimizers_and_zero_stages_are_known_without_torch():
    code = "import sys, dsv2.optimizers.rules, dsv2.parallel.zero.stages; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=relative)
def test_sizes_of_files_and_functions(path):
    """A function's decorators are not counted: a test's table of cases is data."""
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name} at line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_import_is_tried(path):
    """No silent fallback: `try: import x / except ImportError`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Try):
            assert not any(isinstance(child, ast.Import | ast.ImportFrom) for child in node.body)


TEXT_TESTS = {"startswith", "endswith", "removeprefix", "removesuffix", "find", "index", "count"}


def texts_of_errors(scope: ast.AST, error: str) -> set[str]:
    """Return the names that an expression with the error's text is assigned to."""
    names: set[str] = set()
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign | ast.NamedExpr) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if speaks_of(node.value, error, names):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def speaks_of(node: ast.AST, error: str, texts: set[str]) -> bool:
    """Whether an expression holds the text of this error, or one of the `texts` made of it."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and ast.unparse(part.func) in ("str", "repr"):
            if error in [ast.unparse(arg) for arg in part.args]:
                return True
        elif isinstance(part, ast.FormattedValue):
            if ast.unparse(part.value) == error:
                return True
        elif isinstance(part, ast.Name) and part.id in texts:
            return True
    return False


def decisions_by_text(tree: ast.AST) -> list[str]:
    """Return the expressions that look for something in the text of an exception.

    Exceptions are the names that `except` binds and the parameters whose annotation says Error or Exception.
    """
    scopes: list[tuple[ast.AST, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.name:
            scopes.append((node, node.name))
        elif isinstance(node, ast.FunctionDef):
            for argument in node.args.args:
                kind = ast.unparse(argument.annotation) if argument.annotation else ""
                if "Error" in kind or "Exception" in kind:
                    scopes.append((node, argument.arg))
    decisions = []
    for scope, error in scopes:
        names = texts_of_errors(scope, error)
        for node in ast.walk(scope):
            looked_at: list[ast.AST] = []
            if isinstance(node, ast.Compare):
                looked_at = [node.left, *node.comparators]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if ast.unparse(node.func.value) == "re":
                    looked_at = list(node.args)
                elif node.func.attr in TEXT_TESTS:
                    looked_at = [node.func.value]
            if any(speaks_of(part, error, names) for part in looked_at):
                decisions.append(ast.unparse(node))
    return decisions


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_is_decided_by_the_text_of_an_error(path):
    assert decisions_by_text(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "body",
    [
        "return 'full' in str(error)",
        "return str(error) == 'full'",
        "text = str(error); return 'full' != text",
        "return re.search('full', f'{error}')",
        "text = str(error).lower(); return 'full' not in text",
        "return str(error).removeprefix('disk ')",
        "text = str(error); first = text[:5]; return first.startswith('disk')",
    ],
)
def test_a_decision_by_text_is_noticed(body):
    for code in (f"def f():\n try: g()\n except OSError as error: {body}", f"def f(error: OSError): {body}"):
        assert len(decisions_by_text(ast.parse(code))) == 1
    assert decisions_by_text(ast.parse("def f(error: OSError): return str(error).splitlines()[0]")) == []


WAITS: set[str] = set()  # files that may sleep; a line here says why


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_patched_path_no_changed_class_no_sleep(path):
    """`time.sleep` waits for something that could be waited for itself, such as a process or a lock."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "sys.path", f"line {node.lineno}"
            assert not (node.attr == "__class__" and isinstance(node.ctx, ast.Store)), f"line {node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.sleep", "sleep"):
            assert relative(path) in WAITS, f"line {node.lineno}"
