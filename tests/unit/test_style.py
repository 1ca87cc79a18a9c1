"""The style sheet of CONTRIBUTING.md, as far as a program can check it: prose, assignments, calls."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.unit.helpers import REPO

LONGEST = 25  # words of a sentence
LONGEST_MESSAGE = 30  # words of a sentence of an error message
PAGE_WIDTH = 120  # characters of a line
POSITIONAL = 5  # arguments of a call
PYTHON = [REPO / "train.py", *sorted((REPO / "data").rglob("*.py")), *sorted((REPO / "dsv2").rglob("*.py"))]
PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")])
COUNTED = (
    r"(experts?|slots?|tokens?|bytes|elements|nats|bits|steps?|seconds|pairs|rows?|copies|sequences?|numbers|"
    r"hours|files?|lines?|process(es)?|active|parameters|kernels|groups|ranks|heads?|GiB|GB|ms|micro-batch(es)?)"
)
UNIT = (
    r"(token|row|step|layer|rank|expert|sequence|head|group|GPU|byte|second|window|parameter|file|"
    r"folder|line)"
)
PHRASES = {  # what not to write: what to write
    rf"\b{COUNTED} an? {UNIT}\b": "per",
    r"\bthere already\b": "already exists",
    r"\bbut (for|with)\b": "except, unless",
    r"\bin place of\b": "instead of",
    r"\bof (its|their|his) own\b": "separate, its own",
    r"\bhas not\b(?! (been|yet|to))": "lacks, has no",
    r"\bat the most\b": "at most",
    r"\b(an?|no|the|its|their|each|every|this) places?\b": "position, slot; name the thing",
    r"\bturned (keys?|queries|pairs?|by|half)\b": "rotated",
    r"\bRoPE turns\b": "rotates",
    r"\banew\b": "again, recomputed",
    r"\b(adds?|added|adding) up\b": "sums, summed",
    r"\b(stands?|stood|standing) still\b": "waits, is idle",
    r"\b(goes|go|went|going) on\b": "continues, resumes",
    r"\bfullest\b": "peak",
    r"\bspeaks?\b": "prints",
    r"\b(is|are|was|were) not there\b": "missing",
}


class Text(NamedTuple):
    where: str
    words: str  # without code and tables


def _where(path: Path, line: int) -> str:
    return f"{path.relative_to(REPO)}:{line}"


def _without_code(text: str) -> str:
    return re.sub(r"``[^`]*``|`[^`]*`", "X", text)


def page_texts(path: Path) -> Iterator[Text]:
    """Paragraphs and list items of a page, without code blocks and tables."""
    text = re.sub(
        r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), path.read_text(), flags=re.S | re.M
    )
    paragraph: list[str] = []
    start = 1
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if re.match(r"\s*([-*]|\d+\.)\s", line) or not line.strip() or line.startswith(("|", "#", "![")):
            if paragraph:
                yield Text(_where(path, start), _without_code(" ".join(paragraph)))
            paragraph = []
            start = number
        if line.strip() and not line.startswith(("|", "#", "![")):
            paragraph.append(re.sub(r"^\s*([-*]|\d+\.)\s+", "", line).strip())


def python_texts(path: Path) -> Iterator[Text]:
    """Docstrings by paragraph, and comments: neighbouring comment lines are one text."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        line = getattr(node, "lineno", 1)
        for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
            for item in re.split(r"\n\s*(?=- |\w+: )", paragraph):
                if not item.startswith("    "):  # an example
                    yield Text(_where(path, line), _without_code(" ".join(item.split())))
    comment: list[str] = []
    last = 0  # line of the previous comment, if it had a line to itself
    where = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        own_line = token.line.strip().startswith("#")
        if comment and not (own_line and token.start[0] == last + 1):
            yield Text(where, _without_code(" ".join(comment)))
            comment = []
        comment.append(token.string.lstrip("# "))
        where = _where(path, token.start[0])
        last = token.start[0] if own_line else 0
    if comment:
        yield Text(where, _without_code(" ".join(comment)))


def string_texts(path: Path) -> Iterator[Text]:
    """Strings of several words: messages and help."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count(" ") >= 3:
            yield Text(_where(path, node.lineno), " ".join(node.value.split()))


def _text(node: ast.expr) -> str | None:
    """Return a string with each placeholder as one word; None if the expression is no string."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) or "X" for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return f"{_text(left) or 'X'}{_text(right) or 'X'}"
    return None


def error_messages(path: Path) -> Iterator[Text]:
    """Strings passed to an error that is raised, or to `refuse`."""
    for node in ast.walk(ast.parse(path.read_text())):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call):
            continue
        if call is node and ast.unparse(call.func).split(".")[-1] != "refuse":
            continue
        for argument in call.args:
            if (text := _text(argument)) is not None:
                yield Text(_where(path, argument.lineno), text)


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+|(?<=:)\s+(?=[A-Z])", text)


def long_sentences(texts: Iterator[Text], limit: int = LONGEST) -> list[str]:
    return [
        f"{text.where}: {len(sentence.split())} words: {sentence[:90]}"
        for text in texts
        for sentence in sentences(text.words)
        if len(sentence.split()) > limit
    ]


def phrases(texts: Iterator[Text]) -> list[str]:
    return [
        f"{text.where}: '{found[0]}'; write: {better}"
        for text in texts
        for phrase, better in PHRASES.items()
        if (found := re.search(phrase, text.words))
    ]


def relative(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_lines_of_pages_are_short(path):
    """Tables and code blocks cannot be wrapped."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("|")]
    assert [line for line in lines if len(line) > PAGE_WIDTH] == []


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_pages_are_plain_english(path):
    assert long_sentences(page_texts(path)) == []
    assert phrases(page_texts(path)) == []


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_docstrings_comments_and_messages_are_plain_english(path):
    assert long_sentences(python_texts(path)) == []
    assert phrases(python_texts(path)) == []
    assert phrases(string_texts(path)) == []
    assert long_sentences(error_messages(path), LONGEST_MESSAGE) == []


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_shapes_have_one_legend(path):
    for text in python_texts(path):
        assert not text.words.startswith("Shapes:"), f"{text.where}: the legend is docs/shapes.md"


def tuple_assignments(tree: ast.AST) -> list[int]:
    """Lines that assign several values to several names at once."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    ]


def is_triton(function: ast.expr) -> bool:
    """Is it one of Triton's own operations, such as tl.load?"""
    return ast.unparse(function).startswith("tl.")


def long_calls(tree: ast.AST) -> list[int]:
    """Lines of calls with too many positional arguments."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and len(node.args) > POSITIONAL and not is_triton(node.func)
    ]


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_one_assignment_per_line_and_few_positional_arguments(path):
    tree = ast.parse(path.read_text())
    assert tuple_assignments(tree) == []
    assert long_calls(tree) == []


def text_without_encoding(tree: ast.AST) -> list[int]:
    """Lines that read or write text in whatever encoding the machine's locale has."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        function = ast.unparse(node.func).rpartition(".")
        modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        is_binary = any(isinstance(mode, str) and re.fullmatch("[rwa]b", mode) for mode in modes)
        is_text = function[2] in ("read_text", "write_text") and function[0]
        if is_text or (function[2] == "open" and function[0] != "os" and not is_binary):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_files_do_not_depend_on_the_locale(path):
    assert text_without_encoding(ast.parse(path.read_text())) == []


def test_the_checks_find_what_they_look_for():
    assert tuple_assignments(ast.parse("a, b = 1, 2\nc, d = pair\ne = 1, 2")) == [1]
    assert long_calls(ast.parse("f(1, 2, 3, 4, 5, 6)\nf(1, 2, 3, 4, 5, x=6)\ntl.f(1, 2, 3, 4, 5, 6)")) == [1]
    long_text = Text("x", "word " * 25 + "end. Short one.")
    assert len(long_sentences(iter([long_text]))) == 1
    assert phrases(iter([Text("x", "It uses six experts a token.")])) == ["x: 'experts a token'; write: per"]
    assert phrases(iter([Text("x", "It uses six experts per token.")])) == []
    calls = 'p.read_text()\nopen(p)\np.open("w")\np.open("ab")\nos.open(p, 0)\np.read_text(encoding="utf-8")'
    assert text_without_encoding(ast.parse(calls)) == [1, 2, 3]


def test_error_messages_are_found_with_placeholders_as_words(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.REPO", tmp_path)
    path = tmp_path / "x.py"
    path.write_text(
        'raise E(f"a {b} c" + d) from e\nrules.refuse("f", v, f"{x} y")\nprint("no error")\nraise E'
    )
    assert [text.words for text in error_messages(path)] == ["a X cX", "f", "X y"]
