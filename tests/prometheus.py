"""Debian's Prometheus, where tests need it: `promtool`, which checks rules, and the server itself."""

from __future__ import annotations

import os
import shutil
from typing import Final

import pytest

from tests.ci import in_ci

HOW_TO_GET: Final = "Prometheus is missing (alerts are tested with it): apt-get install prometheus"


def program(name: str) -> str:
    """Return the path of `prometheus` or `promtool`; without it the test is skipped, and fails where CI=true.

    The variable PROMETHEUS may name the server's program.
    """
    found = shutil.which(os.environ.get("PROMETHEUS", name) if name == "prometheus" else name)
    if found is None:
        if in_ci():
            pytest.fail(HOW_TO_GET, pytrace=False)
        pytest.skip(HOW_TO_GET)
    return found
