"""A balancer's workers as their parent judges them (load-balancer.md 1): who is settled, who hangs, what is told on.

To the supervisor the parent speaks for all: ready when every worker is, reloaded when every worker has, alive while one
is. A worker reads its files when it starts, so a HUP that finds it starting is passed on once it is ready; before that
it has no handler, and the signal would end it. Moments are in s on a monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

START_S: Final = 90.0
"""Longest start of a worker, as in our unit template; it waits for the store with a deadline of its own."""

SILENCE_S_MIN: Final = 5.0
"""Shortest silence for which a worker is killed (own): a busy machine is no reason."""

RELOAD_S: Final = 30.0
"""Longest time until the supervisor is told that a reload is over (own); it takes a worker milliseconds."""


@dataclass(slots=True, eq=False)
class Worker:
    """One worker, over all processes that are started for it; it was started, or spoke last, at `heard_s`."""

    number: int
    runs: bool = False
    heard_s: float = 0.0
    is_ready: bool = False
    is_reloading: bool = False
    must_reload: bool = False
    is_given_up: bool = False

    @property
    def is_settled(self) -> bool:
        """Tell whether it is ready with what its files hold now, or never will be."""
        return self.is_given_up or (self.is_ready and not self.is_reloading and not self.must_reload)

    def started(self, now_s: float) -> None:
        """Note a new process."""
        self.runs, self.heard_s = True, now_s

    def ended(self) -> None:
        """Note the end of the process; the next one reads its files anew."""
        self.runs = self.is_ready = self.is_reloading = self.must_reload = False

    def heard(self, now_s: float, *, says_ready: bool) -> bool:
        """Note that it spoke; tell whether it is ready, with the start or with a reload."""
        self.heard_s = now_s
        if not says_ready or not self.runs:
            return False
        self.is_ready, self.is_reloading = True, False
        return True

    def takes_reload(self) -> bool:
        """Tell whether to pass a HUP on now: one at a time, and only to a process that has a handler for it."""
        if not (self.runs and self.must_reload and self.is_ready) or self.is_reloading:
            return False
        self.must_reload, self.is_reloading = False, True
        return True

    def is_alive(self, now_s: float, silence_s: float) -> bool:
        """Tell whether it starts in time, or speaks at least every `silence_s`."""
        return self.runs and now_s - self.heard_s <= (silence_s if self.is_ready else START_S)


class Crew:
    """All workers, and what the supervisor was told of them."""

    def __init__(self, count: int) -> None:
        self.workers: Final = [Worker(number) for number in range(count)]
        self.has_been_ready = False
        self._owes_ready = True
        self._reload_until_s = 0.0

    @property
    def kept(self) -> list[Worker]:
        """The workers that have not been given up."""
        return [worker for worker in self.workers if not worker.is_given_up]

    def is_ready_due(self) -> bool:
        """Tell whether to say now that all are ready: once everybody is settled, if it is waited for."""
        if not self._owes_ready or not self.kept or not all(worker.is_settled for worker in self.workers):
            return False
        self._owes_ready, self.has_been_ready = False, True
        return True

    def reload(self, now_s: float) -> None:
        """Have every process that runs read its files again."""
        self._owes_ready = True
        self._reload_until_s = now_s + RELOAD_S
        for worker in self.workers:
            worker.must_reload = worker.runs

    def hanging(self, now_s: float, silence_s: float) -> list[Worker]:
        """Return whose process has to be killed."""
        return [worker for worker in self.workers if worker.runs and not worker.is_alive(now_s, silence_s)]

    def overdue(self, now_s: float) -> list[Worker] | None:
        """Return who has not reloaded in time, for the supervisor shall wait no longer; None while it may."""
        if not self.has_been_ready or not self._owes_ready or now_s <= self._reload_until_s:
            return None
        self._owes_ready = False
        return [worker for worker in self.workers if not worker.is_settled]

    def is_alive(self, now_s: float, silence_s: float) -> bool:
        """Tell whether any worker lives, be it between two processes of it."""
        return any(not worker.runs or worker.is_alive(now_s, silence_s) for worker in self.kept)
