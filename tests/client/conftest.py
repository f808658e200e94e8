"""Shared by the tests of whole realms: which store a realm is on."""

from __future__ import annotations

import os

import pytest

from juicebox_hsm.adapters.bigtable import EMULATOR_VARIABLE
from roles.tools.demo.emulator import HOW_TO_GET, find_emulator
from tests.emulator.conftest import missing


@pytest.fixture(params=["sqlite", pytest.param("bigtable", marks=pytest.mark.emulator)])
def store(request: pytest.FixtureRequest) -> str:
    """Return each kind of store in turn; the demo starts the Bigtable emulator, or uses what the environment names."""
    kind = str(request.param)
    if kind == "bigtable" and not os.environ.get(EMULATOR_VARIABLE) and find_emulator() is None:
        missing(HOW_TO_GET)
    return kind
