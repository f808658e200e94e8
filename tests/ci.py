"""Whether the tests run in continuous integration, where what cannot run is a failure instead of a skipped test."""

from __future__ import annotations

import os


def in_ci() -> bool:
    """Tell by the variable CI, which services set to `true`, `1` or a name of their own."""
    return os.environ.get("CI", "").lower() not in {"", "0", "false"}
