"""Everything in this folder happens in virtual time, so that no test depends on how fast the machine is."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from tests import virtual_time

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run each asynchronous test of this folder on the virtual clock."""
    for item in items:
        if HERE in item.path.parents and inspect.iscoroutinefunction(getattr(item, "obj", None)):
            item.add_marker(pytest.mark.trio(run=virtual_time.run), append=False)
