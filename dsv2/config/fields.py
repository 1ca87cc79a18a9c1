"""List the configuration: every field with its type, default and comment, and the groups of conf/.

The comments are read from the source of the dataclasses, so they are written once. This module imports no
Hydra.
"""

import ast
import dataclasses
import enum
import inspect
import io
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dsv2.config.schema import Config

CONF = Path(__file__).parents[2] / "conf"
GROUPS = ("experiment", "model", "rope_scaling", "data", "optim", "runtime", "logging")


class FieldDoc(NamedTuple):
    """One field, as `--help` shows it."""

    name: str  # dotted, as on the command line
    type: str
    default: str  # as on the command line
    text: str  # the comment, with its unit


def field_types() -> dict[str, Any]:
    """Return every field's dotted name and its type; sections are included."""

    def walk(cls: type, prefix: str) -> dict[str, Any]:
        types: dict[str, Any] = {}
        for name, hint in typing.get_type_hints(cls).items():
            types[prefix + name] = hint
            if (section := _section(hint)) is not None:
                types |= walk(section, f"{prefix}{name}.")
        return types

    return walk(Config, "")


def _section(hint: Any) -> type | None:
    """Return a section's dataclass, even if the section may be null; return None for any other field."""
    parts = [part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)]
    return typing.cast(type, parts[0]) if parts else None


def field_docs(cls: type = Config, prefix: str = "") -> Iterator[FieldDoc]:
    """Yield every field of a dataclass and its sections. A section that may be null is itself a field."""
    hints = typing.get_type_hints(cls)
    texts = comments(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        section = _section(hint)
        if section is None or type(None) in typing.get_args(hint):
            yield FieldDoc(prefix + field.name, type_text(hint), _default(field), texts.get(field.name, ""))
        if section is not None:
            yield from field_docs(section, f"{prefix}{field.name}.")


def comments(cls: type) -> dict[str, str]:
    """Return each field's comment: the lines directly above it, then the comment after it on its line."""
    source = textwrap.dedent(inspect.getsource(cls))
    by_line: dict[int, str] = {}
    comment_lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            by_line[token.start[0]] = token.string.lstrip("# ")
            if not token.line[: token.start[1]].strip():
                comment_lines.add(token.start[0])
    texts: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        assert node.end_lineno is not None
        first = node.lineno
        while first - 1 in comment_lines:
            first -= 1
        lines = [by_line[line] for line in range(first, node.end_lineno + 1) if line in by_line]
        if lines:
            texts[node.target.id] = " ".join(lines)
    return texts


def type_text(hint: Any) -> str:
    """Return a type as a user reads it: `int`, `float or null`, `fp32 | bf16`."""
    parts = typing.get_args(hint)
    if type(None) in parts:
        return " or ".join([*(type_text(part) for part in parts if part is not type(None)), "null"])
    if parts:
        return f"list of {', '.join(type_text(part) for part in parts)}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " | ".join(str(member.value) for member in hint)
    return hint.__name__


def _default(field: "dataclasses.Field[Any]") -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return {"???": "must be given", "": '""'}.get(str(value), str(value))


def options_of(group: str) -> list[str]:
    """Return a group's options, also those in subfolders. `common.yaml` is not one: options share it."""
    files = sorted((CONF / group).rglob("*.yaml"))
    return [f.relative_to(CONF / group).with_suffix("").as_posix() for f in files if f.stem != "common"]


def option_text(group: str, option: str) -> str:
    """Return the first sentence of the comment that an option's file begins with."""
    lines = []
    for line in (CONF / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# "))
    text = " ".join(lines)
    return text.split(". ")[0].rstrip(".")


def help_text() -> str:
    """Return the groups and every field, for `python -m dsv2 train --help`."""
    lines = ["groups of options, written group=option:"]
    for group in GROUPS:
        lines.append(f"  {group}")
        for option in options_of(group):
            lines += _wrapped(f"{option}: {option_text(group, option)}.", "    ", "        ")
    lines += ["", "fields, written name=value, with type and default; a group's option may change a default:"]
    for doc in field_docs():
        lines.append(f"  {doc.name}  {doc.type} = {doc.default}")
        lines += _wrapped(doc.text, "      ", "      ")
    return "\n".join(lines)


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=first, subsequent_indent=rest)
