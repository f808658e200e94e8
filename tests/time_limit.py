"""A time limit for every test, its fixtures and its clean-up: one that hangs says where, fails, and lets the next run.

At the limit the stacks of all threads are written to stderr and the test is interrupted, wherever it is.
Where that does not end the test within a minute, because it hangs in C or its clean-up hangs too, the whole run ends.
Limits are for tests that hang, not for slow machines: they are far above what any test takes.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Final

import pytest

DEFAULT_S: Final = 300.0
SLOW_S: Final = 14_400.0
"""Of tests marked slow: soaks and long searches."""
CLEAN_UP_S: Final = 60.0


@functools.cache
def _stderr() -> int:
    """Return the real one, asked for between tests: while one runs pytest keeps what is written to 2."""
    return os.dup(2)


class TimeLimitPassed(Exception):
    """A test hung."""


def limit_s(item: pytest.Item) -> float:
    """Return how many seconds a test may take."""
    marker = item.get_closest_marker("time_limit")
    if marker is not None:
        return float(marker.args[0])
    return DEFAULT_S if item.get_closest_marker("slow") is None else SLOW_S


@contextmanager
def _limited(item: pytest.Item) -> Iterator[None]:
    """Interrupt the block at the test's limit, as Control-C would: Trio delivers that so that tasks can clean up."""
    limit, stderr = limit_s(item), _stderr()
    passed = False

    def stop(_number: int, _frame: object) -> None:
        nonlocal passed
        passed = True
        os.write(stderr, f"\n{item.nodeid} hangs after {limit:.0f} s\n".encode())
        faulthandler.dump_traceback(stderr)
        faulthandler.dump_traceback_later(CLEAN_UP_S, exit=True, file=stderr)
        signal.raise_signal(signal.SIGINT)

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in jobs that a shell put into the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    except BaseException as error:
        if passed:
            raise TimeLimitPassed(f"after {limit:.0f} s; stderr has the stacks") from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Find the real stderr, while it is there to be found."""
    _stderr()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Make a test's fixtures under its limit."""
    with _limited(item):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test under its limit."""
    with _limited(item):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Clean up after a test under its limit."""
    with _limited(item):
        return (yield)
