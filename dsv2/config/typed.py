"""Texts on the command line arrive as they were typed.

If it can, Hydra's grammar reads an unquoted value as a number, a bool, null, a list or an interpolation. A
text field then gets the spelling of that value: `name=12e5678` would become `inf`. So the value of a text
field is put in quotes before Hydra reads it. A value that is typed in quotes follows Hydra's own rules.
"""

import re
from functools import cache
from typing import get_args

from hydra.core.override_parser.types import Quote, QuotedString

from dsv2.config.fields import field_types

_OVERRIDE = re.compile(r"(\+{0,2}([\w.]+)=)(.*)", re.DOTALL)
_QUOTED = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*""", re.DOTALL)
_ITEM = re.compile(r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^,])+""", re.DOTALL)


def as_typed(word: str) -> str:
    """Return an override in which Hydra's grammar reads every text as it was typed.

    A word that sets no text field is returned unchanged. For a field that may be null, `null` means null.
    """
    match = _OVERRIDE.fullmatch(word)
    if match is None:
        return word
    start, key, value = match.groups()
    kind = _text_fields().get(key)
    if kind is None or (value == "null" and type(None) in kind):
        return word
    if str in kind:
        return start + _quoted(value)
    if value.startswith("[") and value.endswith("]"):
        return f"{start}[{','.join(_quoted(item.strip()) for item in _ITEM.findall(value[1:-1]))}]"
    return word


def literal(text: str) -> str:
    """Return a text that OmegaConf resolves to `text`, whatever interpolations it seems to contain."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _quoted(value: str) -> str:
    return value if _QUOTED.fullmatch(value) else QuotedString(literal(value), Quote.double).with_quotes()


@cache
def _text_fields() -> dict[str, tuple[type, ...]]:
    """Return the types that each field of text, or of a list of texts, may have."""
    kinds = {name: get_args(hint) or (hint,) for name, hint in field_types().items()}
    return {name: kind for name, kind in kinds.items() if str in kind or list[str] in kind}
