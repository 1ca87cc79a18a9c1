"""What the pages name exists: paths, modules, functions, links. Examples of extending.md are complete."""

import ast
import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.helpers import REPO

PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")])
PLACEHOLDER = re.compile(r"NAME|FAMILY|stageN|\*|VERB")


def relative(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def defined(module: Path) -> set[str]:
    """Return the names that a module's top level defines, and the methods as `Class.method`."""
    names = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def exists(dotted: str) -> bool:
    """Does `data.prepare.corpus.prepare` name a package, a module, or a name in one?"""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        path = REPO.joinpath(*parts[:count])
        if path.is_dir() and count == len(parts):
            return True
        if path.with_suffix(".py").is_file():
            rest = ".".join(parts[count:])
            return not rest or rest in defined(path.with_suffix(".py"))
    return False


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_paths_and_names_in_code_marks_exist(page):
    for mark in re.findall(r"`([^`\n]+)`", page.read_text()):
        if PLACEHOLDER.search(mark):
            continue
        if re.fullmatch(r"(dsv2|data|tests|conf|launch)/[\w./-]+", mark):
            assert (REPO / mark).exists(), mark
        elif re.fullmatch(r"(dsv2|data)(\.\w+){2,}(\(\))?", mark):
            name = mark.removesuffix("()")
            is_field = name.startswith("data.") and name.count(".") == 1
            assert is_field or exists(name), mark


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def examples() -> list[tuple[str, str]]:
    """The new files of extending.md: path and code of each Python block whose first line is a path."""
    page = (REPO / "docs/extending.md").read_text()
    return re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```", page, flags=re.S | re.M)


@pytest.mark.parametrize(("path", "code"), examples(), ids=[path for path, _ in examples()])
def test_an_example_can_be_pasted(path, code, tmp_path):
    """It imports all that it uses, its imports exist, and its classes lack no method."""
    file = tmp_path / Path(path).name
    file.write_text(code)
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F", str(file)]
    checked = subprocess.run(ruff, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    names = runpy.run_path(str(file))
    made = [value for value in names.values() if getattr(value, "__module__", "") == names["__name__"]]
    assert any(inspect.isclass(value) for value in made)
    assert [value for value in made if inspect.isabstract(value)] == []


def test_every_seam_with_new_files_has_an_example():
    assert len(examples()) == 9
