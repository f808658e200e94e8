"""Shared certificates: drawing keys is the slowest part of these tests."""

from __future__ import annotations

import pytest

from tests.unit.edge.harness import Identity, make_identity


@pytest.fixture(scope="session")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """Return certificate files good for `localhost`."""
    return make_identity(tmp_path_factory.mktemp("edge"))
