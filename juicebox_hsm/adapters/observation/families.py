"""What a metric family is: its name in both forms, its kind, what it means, and its labels.

DogStatsD knows a family by its dotted name. Prometheus text shows it under that name with `_` for `.`, unless the name
carries a value, as that of a store operation does: then several are shown as one family, and the value is a label.
`metric_names` has the tables.
"""

from __future__ import annotations

import enum
import functools
import re
from dataclasses import dataclass
from typing import Final

Tags = tuple[tuple[str, str], ...]

DURATIONS: Final = (0.001, 0.005, 0.025, 0.1, 1.0)
"""Bounds in s. Each costs a line per series and scrape, so families have no more than somebody looks at (own)."""
SHORT: Final = (0.0001, 0.0005, 0.0025, 0.01, 0.1)
"""Of what happens inside of the process."""
PER_PEER: Final = (0.005, 0.025, 0.1, 0.5)
"""Of what has a series for each method and service that is called."""
FINE: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Of what clients wait for."""
LONG: Final = (0.1, 0.5, 2.5, 10.0, 30.0, 150.0)
COUNTS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 256.0, 1024.0)
"""Of sizes and numbers of things."""


class Kind(enum.Enum):
    """What kind of number it is, as docs/metrics.md calls it."""

    COUNT = "count"
    GAUGE = "gauge"
    DURATION = "duration"
    DISTRIBUTION = "distribution"


@dataclass(frozen=True, slots=True)
class Family:
    """A family by its dotted name. `meaning` is one line; `tags` are the labels that go with each value.

    `values` are those of the only tag where they are known beforehand. A family without tags exists from the start, and
    so does one with `values`, except where it is `late`: then being absent says something. `shown` and `fixed` are the
    name for Prometheus, without what the kind adds, and the labels that stand for what only the dotted name says;
    `together` is then what all that are shown under this name mean.
    """

    name: str
    kind: Kind
    meaning: str
    tags: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    late: bool = False
    shown: str = ""
    fixed: Tags = ()
    together: str = ""
    bounds: tuple[float, ...] = DURATIONS

    @property
    def series(self) -> str:
        """Return the name in Prometheus text; `_bucket`, `_sum` and `_count` come behind that of a histogram."""
        base = self.shown or prometheus_name(self.name)
        return base + {Kind.COUNT: "_total", Kind.DURATION: "_seconds"}.get(self.kind, "")

    @property
    def labels(self) -> tuple[str, ...]:
        """Return all labels in Prometheus text."""
        return (*(name for name, _ in self.fixed), *self.tags)


@functools.lru_cache(maxsize=1024)  # names are written in the code; a scrape asks for each many times
def prometheus_name(name: str) -> str:
    """Return a name with `_` for what Prometheus does not allow."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", name)


_REPEATED: Final = re.compile(
    r"(store_client|pubsub|gcp|secret_manager\.google)\.([a-z_.]+)\.(?:time|(retryable|exhausted|fatal)_errors)"
)
"""The series of operations that repeat themselves: group, operation, and what is measured (operator-tools.md 9.2)."""
_GROUPS: Final = {
    "store_client": "Operations of the store",
    "pubsub": "Calls of Pub/Sub",
    "gcp": "Calls for tokens of Google's services",
    "secret_manager.google": "Calls of Secret Manager",
}


def repeated(name: str) -> Family | None:
    """Return the family of an operation that repeats itself, None if `name` is no such name."""
    found = _REPEATED.fullmatch(name)
    return None if found is None else of_operation(found[1], found[2], found[3])


def of_operation(group: str, operation: str, failure: str | None, meaning: str = "") -> Family:
    """Return the family of an operation's times, or of its errors of a kind: retryable, exhausted or fatal."""
    of, what = ("operation", operation), _GROUPS[group]
    if failure is None:
        name, shown = f"{group}.{operation}.time", prometheus_name(f"{group}.time")
        together = f"{what}, tries included"
        return Family(name, Kind.DURATION, meaning, ("result",), late=True, shown=shown, fixed=(of,), together=together)
    name, shown = f"{group}.{operation}.{failure}_errors", prometheus_name(f"{group}.errors")
    together, kind = f"{what} that failed: tried again, given up, or fatal", ("kind", failure)
    return Family(name, Kind.COUNT, meaning, late=True, shown=shown, fixed=(kind, of), together=together)
