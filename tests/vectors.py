"""The client protocol's test vectors (client-protocol.md 19), loaded once for all tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "client-protocol-vectors.json").read_text())


def raw(*path: str | int) -> bytes:
    """Return the hex vector at `path` as bytes, e.g. `raw("oprf", "input")`."""
    value: Any = VECTORS
    for step in path:
        value = value[step]
    return bytes.fromhex(value)
