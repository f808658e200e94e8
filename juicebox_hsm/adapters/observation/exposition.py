"""Prometheus text, format 0.0.4: each family with HELP and TYPE, its series under it.

A histogram with labels that has seen no value is left out: most of a service's are such, and each costs eight lines of
every scrape. Those that are shown have all buckets of their family, so that they can be added up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, Protocol, TypeVar

from juicebox_hsm.adapters.observation.families import Family, Kind, Tags, prometheus_name

_TYPES: Final = {
    Kind.COUNT: "counter",
    Kind.GAUGE: "gauge",
    Kind.DURATION: "histogram",
    Kind.DISTRIBUTION: "histogram",
}


class Histogram(Protocol):
    """What a histogram is made of. `counts` has one more than `bounds`: what is above them all."""

    bounds: Sequence[float]
    counts: list[int]
    count: int
    total: float


def numbers(series: Iterable[tuple[Family, Tags, float]]) -> list[str]:
    """Return counters and gauges as lines."""
    lines: list[str] = []
    for family, members in _by_name((family, (tags, value)) for family, tags, value in series):
        lines += _head(family)
        lines += [f"{family.series}{_labels(tags)} {number_text(value)}" for tags, value in members]
    return lines


def histograms(series: Iterable[tuple[Family, Tags, Histogram]], scale: float) -> list[str]:
    """Return histograms as lines; totals are shown times `scale`."""
    seen = ((family, (tags, found)) for family, tags, found in series if found.count or not tags)
    lines: list[str] = []
    for family, members in _by_name(seen):
        lines += _head(family)
        name = family.series
        for tags, found in members:
            labels, running = _labels(tags), 0
            bucket = f"{name}_bucket{labels[:-1]}," if labels else f"{name}_bucket{{"
            for bound, count in zip((*found.bounds, math.inf), found.counts, strict=True):
                running += count
                lines.append(f'{bucket}le="{number_text(bound)}"}} {running}')
            lines.append(f"{name}_sum{labels} {number_text(found.total * scale)}")
            lines.append(f"{name}_count{labels} {found.count}")
    return lines


T = TypeVar("T")


def _by_name(series: Iterable[tuple[Family, T]]) -> list[tuple[Family, list[T]]]:
    """Return what is shown under one name together, in order of names."""
    found: dict[str, tuple[Family, list[T]]] = {}
    for family, member in series:
        found.setdefault(family.series, (family, []))[1].append(member)
    return [members for _, members in sorted(found.items())]


def _head(family: Family) -> list[str]:
    meaning = (family.together or family.meaning).replace("\\", "\\\\").replace("\n", "\\n")
    head = [f"# HELP {family.series} {meaning}"] if meaning else []
    return [*head, f"# TYPE {family.series} {_TYPES[family.kind]}"]


def _labels(tags: Tags) -> str:
    if not tags:
        return ""
    return "{" + ",".join(f'{prometheus_name(key)}="{_escape(value)}"' for key, value in tags) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def number_text(value: float) -> str:
    """Return a number in full, as both forms take it: whole ones without a point, others to the last digit."""
    if math.isfinite(value):
        return str(int(value)) if value == int(value) else repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
