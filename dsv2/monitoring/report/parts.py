"""What the report's pages share: numbers as text, cards that report.js fills, and the document itself.

A run's files may come from someone else, so every text is escaped. The document's policy also lets a browser
run the document's own script and nothing else.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from dsv2.errors import UserError
from dsv2.formats import fmt_count

ASSETS = Path(__file__).parent
ABSENT = "\N{EN DASH}"  # in the cell of a value that does not exist


def number(value: float | None) -> str:
    """Return a value as text for a table: 0.0123, 4.235, 12.3K."""
    if value is None:
        return "not a number"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.2e}"
    return fmt_count(value) if abs(value) >= 10_000 else f"{value:.4g}"


def card(title: str, unit: str, kind: str, wide: bool = False, **attributes: str) -> str:
    """Return an empty card; report.js fills it by its `kind` and the attributes."""
    values = "".join(f' data-{key}="{escape(value)}"' for key, value in attributes.items())
    small = f"<small>{escape(unit)}</small>" if unit else ""
    return (
        f'<div class="card{" wide" if wide else ""}" data-kind="{kind}"{values}>'
        f"<header><b>{escape(title)}</b>{small}</header></div>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; every cell is HTML."""
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        '<div class="card scroll"><table>'
        f"<thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def anchor(title: str) -> str:
    return escape(title.lower().replace(" ", "-"))


def policy(script: str, style: str) -> str:
    """Return the content security policy that lets a browser use this script and this style alone.

    The pictures of the maps are the only images; the script draws them itself, as data: addresses.
    """

    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {hashed(script)}; style-src {hashed(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


class Document(NamedTuple):
    """The content of a page. Every text is HTML, except `title` and the titles of the sections."""

    title: str
    sections: Sequence[str]  # their titles, for the links
    body: str
    notes: str  # the beginning of the last line
    data: dict[str, Any]  # what report.js draws from
    controls: str = ""  # beside the links


def document(content: Document) -> str:
    """Return the whole page."""
    links = "".join(f'<a href="#{anchor(title)}">{escape(title)}</a>' for title in content.sections)
    # A "<" would let a text end the script element.
    data = json.dumps(content.data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    script = (ASSETS / "report.js").read_text(encoding="utf-8")
    title = escape(content.title)
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy(script, style)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><nav><div><strong>{title}</strong>{links}
<label><input type="checkbox" id="smooth" checked> smooth</label>{content.controls}</div></nav>
<main>{content.body}
<footer>{content.notes}A smoothed curve is the mean over a sliding window. The values themselves are drawn
faintly behind it; the mouse shows them too.</footer>
</main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script></body></html>
"""


def save(text: str, out: Path) -> Path:
    """Write a page; return `out`.

    Raises:
        UserError: `out` cannot be written.
    """
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    return out
