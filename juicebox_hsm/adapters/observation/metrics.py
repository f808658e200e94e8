"""Counters, gauges and distributions of one process (operator-tools.md 9.2).

Names are the dotted ones of the specification. `render` gives Prometheus text: dots become `_`, counters end in
`_total`, timers become histograms `X_seconds`; `metric_names` explains each. `dogstatsd` sends the same under the
dotted names.

A hot path asks once for its handle (`counter`, `timer`, ...) and then pays an addition or a bisection; `count`,
`timing` and so on look the handle up each time. Asking for a handle also makes it appear with value 0, so that a
rate is defined before the first event. Everything runs on the event loop's thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

from juicebox_hsm.adapters.observation.exposition import histograms, numbers
from juicebox_hsm.adapters.observation.families import COUNTS, DURATIONS, Family, Kind, Tags
from juicebox_hsm.adapters.observation.metric_names import find, from_the_start

SERIES_MAX: Final = 10_000  # own: about 5 MB; tags such as tenant and address come from outside
SAMPLES_MAX: Final = 512  # own: per distribution and second, for DogStatsD; more are counted in its sample rate
EVENTS_MAX: Final = 100  # own


class Counter:
    """A number that only grows."""

    __slots__ = ("sent", "value")

    def __init__(self) -> None:
        self.value = 0
        self.sent = 0

    def add(self, n: int = 1) -> None:
        """Add `n` >= 0."""
        self.value += n


class Gauge:
    """A number that is what it was last set to."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        """Set the value."""
        self.value = value


class Distribution:
    """How often values fell between the bounds of `buckets`."""

    __slots__ = ("_bounds", "bounds", "count", "counts", "samples", "total", "unsent")

    def __init__(self, bounds: Sequence[float] = COUNTS, scale: float = 1.0) -> None:
        """`bounds` are shown as given; observed values are compared with bounds times `scale`."""
        self.bounds = bounds
        self._bounds = [bound * scale for bound in bounds]
        self.counts = [0] * (len(bounds) + 1)
        self.count = 0
        self.total = 0.0
        self.samples: list[float] | None = None
        self.unsent = 0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.count += 1
        self.total += value
        if self.samples is not None:
            self.unsent += 1
            if len(self.samples) < SAMPLES_MAX:
                self.samples.append(value)


class Timer(Distribution):
    """A distribution of durations: nanoseconds in, seconds shown."""

    __slots__ = ()

    def __init__(self, bounds: Sequence[float] = DURATIONS) -> None:
        super().__init__(bounds, 1e9)

    observe_ns = Distribution.observe


_T = TypeVar("_T", Counter, Gauge, Distribution, Timer)
_V = TypeVar("_V")


class Metrics:
    """All series of a process. Make one per process and hand it down."""

    def __init__(self) -> None:
        self.counters: dict[tuple[str, Tags], Counter] = {}
        self.gauges: dict[tuple[str, Tags], Gauge] = {}
        self.distributions: dict[tuple[str, Tags], Distribution] = {}
        self.timers: dict[tuple[str, Tags], Timer] = {}
        self.events: list[tuple[str, str]] = []
        self._sampling = False
        self._dropped = self.counter("metrics.series_dropped")

    def counter(self, name: str, **tags: str | int | bool | None) -> Counter:
        """Return the counter of `name` and `tags`; tags of value None are left out."""
        return self._series(self.counters, Counter, name, tags)

    def gauge_of(self, name: str, **tags: str | int | bool | None) -> Gauge:
        """Return the gauge of `name` and `tags`."""
        return self._series(self.gauges, Gauge, name, tags)

    def timer(self, name: str, **tags: str | int | bool | None) -> Timer:
        """Return the timer of `name` (with or without `.ns`) and `tags`."""
        name = name.removesuffix(".ns")
        return self._series(self.timers, lambda: Timer(_bounds(name, DURATIONS)), name, tags)

    def distribution_of(self, name: str, **tags: str | int | bool | None) -> Distribution:
        """Return the distribution of `name` and `tags`, for sizes and numbers of things."""
        return self._series(self.distributions, lambda: Distribution(_bounds(name, COUNTS)), name, tags)

    def count(self, name: str, n: int = 1, **tags: str | int | bool | None) -> None:
        """Add `n` to a counter."""
        self.counter(name, **tags).add(n)

    def gauge(self, name: str, value: float, **tags: str | int | bool | None) -> None:
        """Set a gauge."""
        self.gauge_of(name, **tags).set(value)

    def timing(self, name: str, ns: float, **tags: str | int | bool | None) -> None:
        """Count a duration in nanoseconds."""
        self.timer(name, **tags).observe_ns(ns)

    def distribution(self, name: str, value: float, **tags: str | int | bool | None) -> None:
        """Count a size or number of things."""
        self.distribution_of(name, **tags).observe(value)

    def event(self, title: str, text: str) -> None:
        """Note an event, such as `Agent watchdog triggered`; only DogStatsD carries the text."""
        self.count("events", title=title)
        if self._sampling and len(self.events) < EVENTS_MAX:
            self.events.append((title, text))

    def enable_samples(self) -> None:
        """Keep single values for a sender that wants them."""
        self._sampling = True
        for distribution in (*self.distributions.values(), *self.timers.values()):
            distribution.samples = []

    def remove(self, name: str) -> None:
        """Remove all series of `name`, such as gauges of things that are gone."""
        _remove(self.counters, name)
        _remove(self.gauges, name)
        _remove(self.distributions, name)
        _remove(self.timers, name)

    def declare(self, families: Iterable[Family]) -> None:
        """Make the series that can be known before anything happened."""
        for family, tags in from_the_start(families):
            match family.kind:
                case Kind.COUNT:
                    self.counter(family.name, **tags)
                case Kind.GAUGE:
                    self.gauge_of(family.name, **tags)
                case Kind.DURATION:
                    self.timer(family.name, **tags)
                case Kind.DISTRIBUTION:
                    self.distribution_of(family.name, **tags)

    def render(self) -> str:
        """Return everything as Prometheus text (format 0.0.4)."""
        counted = ((name, tags, counter.value) for (name, tags), counter in self.counters.items())
        set_to = ((name, tags, gauge.value) for (name, tags), gauge in self.gauges.items())
        spread = ((name, tags, found) for (name, tags), found in self.distributions.items())
        timed = ((name, tags, timer) for (name, tags), timer in self.timers.items())
        lines = [
            *numbers(_with_families(counted, Kind.COUNT)),
            *numbers(_with_families(set_to, Kind.GAUGE)),
            *histograms(_with_families(spread, Kind.DISTRIBUTION), 1.0),
            *histograms(_with_families(timed, Kind.DURATION), 1e-9),
        ]
        return "\n".join(lines) + "\n"

    def _series(
        self,
        known: dict[tuple[str, Tags], _T],
        make: Callable[[], _T],
        name: str,
        tags: Mapping[str, str | int | bool | None],
    ) -> _T:
        key = (name, _tags(tags))
        found = known.get(key)
        if found is None:
            found = make()
            if isinstance(found, Distribution) and self._sampling:
                found.samples = []
            if len(self.counters) + len(self.gauges) + len(self.distributions) + len(self.timers) >= SERIES_MAX:
                self._dropped.add()
                return found
            known[key] = found
        return found


def _remove(series: dict[tuple[str, Tags], _T], name: str) -> None:
    for key in [key for key in series if key[0] == name]:
        del series[key]


def _tags(tags: Mapping[str, str | int | bool | None]) -> Tags:
    if not tags:
        return ()
    given = [(key, value if type(value) is str else str(value)) for key, value in tags.items() if value is not None]
    if len(given) > 1:
        given.sort()
    return tuple(given)


def _bounds(name: str, otherwise: tuple[float, ...]) -> tuple[float, ...]:
    family = find(name)
    return otherwise if family is None else family.bounds


def _with_families(series: Iterable[tuple[str, Tags, _V]], kind: Kind) -> Iterator[tuple[Family, Tags, _V]]:
    """Yield series with their families and all their labels, those too that the dotted name stands for."""
    for name, tags, value in series:
        family = find(name) or Family(name, kind, "")
        yield family, tuple(sorted((*family.fixed, *tags))) if family.fixed else tags, value
