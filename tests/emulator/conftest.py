"""Shared by the emulator suites: shown values of failed assertions, and one Bigtable emulator per session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from roles.tools.demo_emulator import EMULATOR_VARIABLE, HOW_TO_GET, Emulator, find_emulator

pytest.register_assert_rewrite(
    "tests.emulator.contract",
    "tests.emulator.contract_bus",
    "tests.emulator.contract_outbox",
    "tests.emulator.realm_data",
)


@pytest.fixture(scope="session")
def bigtable_emulator() -> Iterator[str]:
    """Start the emulator once, or use the one the environment names; return its HOST:PORT."""
    given = os.environ.get(EMULATOR_VARIABLE)
    if given:
        yield given
        return
    if find_emulator() is None:
        if os.environ.get("CI") == "true":
            pytest.fail(HOW_TO_GET, pytrace=False)
        pytest.skip(HOW_TO_GET)
    emulator = Emulator()
    try:
        yield emulator.address
    finally:
        emulator.stop()
