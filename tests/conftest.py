"""Shared test configuration: order, time limits, the slow switch, fresh logs, the freshness of the C extension."""

from __future__ import annotations

import atexit
import importlib.util
import logging as stdlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

import tests.examples  # noqa: F401 -- loads the hypothesis profile
from juicebox_hsm.adapters.observation import logging
from tests.ci import in_ci
from tests.order import shuffled
from tests.time_limit import pytest_runtest_call, pytest_runtest_protocol, pytest_runtest_setup, pytest_runtest_teardown

# every test has a time limit
__all__ = ["pytest_runtest_call", "pytest_runtest_protocol", "pytest_runtest_setup", "pytest_runtest_teardown"]

SEEDS = 2**32
SEED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --slow, --update-transcripts and --shuffle-seed."""
    parser.addoption("--slow", action="store_true", help="also run soaks and long searches")
    parser.addoption("--update-transcripts", action="store_true", help="write tests/host/transcripts anew")
    parser.addoption(
        "--shuffle-seed", type=int, metavar="N", help="shuffle the tests; continuous integration draws and shows a seed"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed of the order, if there is one."""
    seed = config.getoption("--shuffle-seed")
    if seed is None and in_ci():
        seed = random.SystemRandom().randrange(SEEDS)
    if seed is not None:
        config.stash[SEED] = seed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the seed, so that an order that fails can be had again."""
    if SEED in config.stash:
        terminalreporter.write_line(f"this order again: --shuffle-seed {config.stash[SEED]}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shuffle if asked; deselect slow tests unless asked for: they are a separate command, not a skipped part."""
    if SEED in config.stash:
        items[:] = shuffled(items, config.stash[SEED])
    if config.getoption("--slow"):
        return
    kept = [item for item in items if item.get_closest_marker("slow") is None]
    dropped = [item for item in items if item.get_closest_marker("slow") is not None]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(autouse=True)
def _fresh_log() -> Iterator[None]:
    """Give each test a log as a process begins with: what was said and configured before is forgotten."""
    root = stdlib.getLogger()
    handlers, level = list(root.handlers), root.level
    logging._output.level, logging._output.stream, logging._output.writer = stdlib.INFO, None, None
    logging._processors[:] = logging._chain(as_json=True, colors=False)
    logging._limiter._places.clear()
    structlog.contextvars.clear_contextvars()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    atexit.unregister(logging.report_suppressed)
    atexit.unregister(logging.flush)


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
