"""JSON records with their own checksum: a flipped bit is noticed, wherever it is."""

import json
import zlib
from typing import Any


def _crc32(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def seal(content: dict[str, Any], field: str) -> dict[str, Any]:
    """Return the content with its CRC-32 as one more field."""
    return content | {field: _crc32(content)}


def unseal(content: dict[str, Any], field: str) -> dict[str, Any]:
    """Return the content without its checksum. Earlier versions wrote none.

    Raises:
        ValueError: the content is not what was sealed.
    """
    rest = {name: value for name, value in content.items() if name != field}
    if content.get(field) not in (None, _crc32(rest)):
        raise ValueError(f"does not hold what was written (its checksum is not {content[field]})")
    return rest
