"""Shared test configuration: hypothesis profiles, the slow switch, and the freshness of the C extension."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase, MultiplexedDatabase, ReadOnlyDatabase

from juicebox_hsm.adapters.observation import logging
from tests.time_limit import pytest_runtest_call, pytest_runtest_protocol, pytest_runtest_setup, pytest_runtest_teardown

# every test has a time limit
__all__ = ["pytest_runtest_call", "pytest_runtest_protocol", "pytest_runtest_setup", "pytest_runtest_teardown"]

FOUND = DirectoryBasedExampleDatabase(Path(__file__).parent / "data" / "found")
LOCAL = DirectoryBasedExampleDatabase(Path(__file__).parent.parent / ".hypothesis" / "examples")

settings.register_profile(
    "default",
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    database=MultiplexedDatabase(LOCAL, ReadOnlyDatabase(FOUND)),
)
settings.register_profile(
    "long", max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck), database=FOUND
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _own_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test's log lines be left out, or counted, because of what another one logged."""
    monkeypatch.setattr(logging, "_limiter", logging._Limiter())


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --slow and --update-transcripts."""
    parser.addoption("--slow", action="store_true", help="also run soaks and long searches")
    parser.addoption("--update-transcripts", action="store_true", help="write tests/host/transcripts anew")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect slow tests unless asked for: they are a separate command, not a skipped part of this one."""
    if config.getoption("--slow"):
        return
    kept = [item for item in items if item.get_closest_marker("slow") is None]
    dropped = [item for item in items if item.get_closest_marker("slow") is not None]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(autouse=True)
def _no_lines_held_back() -> None:
    """Forget which places logged a moment ago: how many lines of one test appear must not depend on those before."""
    logging = sys.modules.get("juicebox_hsm.adapters.observation.logging")
    if logging is not None:
        logging._limiter.__init__()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse to test a stale C library: an editable install does not rebuild it."""
    path = Path(__file__).with_name("native_freshness.py")
    if path.exists():
        spec = importlib.util.spec_from_file_location("native_freshness", path)
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            message = module.stale_message()
            if message:
                pytest.exit(message, returncode=3)
