"""Shared by the emulator suites: shown values of failed assertions, and one emulator of each kind per session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NoReturn

import pytest

from juicebox_hsm.adapters.bigtable import EMULATOR_VARIABLE
from juicebox_hsm.adapters.pubsub.bus import EMULATOR_VARIABLE as PUBSUB_VARIABLE
from roles.tools.demo import pubsub as demo_pubsub
from roles.tools.demo.emulator import HOW_TO_GET, Emulator, find_emulator
from tests.ci import in_ci

pytest.register_assert_rewrite(
    "tests.emulator.contract",
    "tests.emulator.contract_bus",
    "tests.emulator.contract_dispatch",
    "tests.emulator.contract_outbox",
    "tests.emulator.realm_data",
)


def missing(what: str) -> NoReturn:
    """Skip where an emulator is not installed; fail in CI, where that would hide the whole suite."""
    if in_ci():
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


@pytest.fixture(scope="session")
def bigtable_emulator() -> Iterator[str]:
    """Start the emulator once, or use the one the environment names; return its HOST:PORT."""
    given = os.environ.get(EMULATOR_VARIABLE)
    if given:
        yield given
        return
    if find_emulator() is None:
        missing(HOW_TO_GET)
    emulator = Emulator()
    try:
        yield emulator.address
    finally:
        emulator.stop()


@pytest.fixture(scope="session")
def pubsub_emulator() -> Iterator[str]:
    """Start the Pub/Sub emulator once, or use the one the environment names; return its HOST:PORT."""
    given = os.environ.get(PUBSUB_VARIABLE)
    if given:
        yield given
        return
    if demo_pubsub.find_emulator() is None:
        missing(demo_pubsub.HOW_TO_GET)
    emulator = demo_pubsub.PubSubEmulator()
    try:
        emulator.wait_started()
        yield emulator.address
    finally:
        emulator.stop()
