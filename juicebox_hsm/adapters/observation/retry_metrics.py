"""How long operations that repeat themselves took, and how they ended (operator-tools.md 9.2).

Of each such operation `P` there are `P.time{result}`, `P.retryable_errors`, `P.exhausted_errors` and `P.fatal_errors`;
asking for them makes them exist with value 0.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from juicebox_hsm.adapters.observation.metrics import Counter, Metrics, Timer
from juicebox_hsm.errors import RealmError

RESULTS: Final = ("ok", "exhausted", "fatal")


class Family:
    """The series of one operation: `P.time{result}`, `P.retryable_errors`, `P.exhausted_errors`, `P.fatal_errors`."""

    __slots__ = ("_exhausted", "_fatal", "_retryable", "_timers")

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._timers: dict[str, Timer] = {result: metrics.timer(f"{name}.time", result=result) for result in RESULTS}
        self._retryable: Counter = metrics.counter(f"{name}.retryable_errors")
        self._exhausted: Counter = metrics.counter(f"{name}.exhausted_errors")
        self._fatal: Counter = metrics.counter(f"{name}.fatal_errors")

    def succeeded(self, elapsed_ns: int) -> None:
        """Count a success."""
        self._timers["ok"].observe_ns(elapsed_ns)

    def retried(self) -> None:
        """Count an error after which the operation goes on."""
        self._retryable.add()

    def failed(self, error: RealmError, elapsed_ns: int) -> None:
        """Count the error that ended the operation by its kind; one that another try may mend was the last of them."""
        if error.retryable:
            self._timers["exhausted"].observe_ns(elapsed_ns)
            self._retryable.add()
            self._exhausted.add()
        else:
            self._timers["fatal"].observe_ns(elapsed_ns)
            self._fatal.add()

    @contextmanager
    def measured(self, *answers: type[Exception]) -> Iterator[None]:
        """Count what the block does: success, or the `RealmError` that it raises; errors of `answers` are successes."""
        began_ns = time.perf_counter_ns()
        try:
            yield
        except RealmError as error:
            self.failed(error, time.perf_counter_ns() - began_ns)
            raise
        except answers:
            self.succeeded(time.perf_counter_ns() - began_ns)
            raise
        self.succeeded(time.perf_counter_ns() - began_ns)
