"""One HSM, one place: which HSMs answer at several addresses, so that one of them is a copy (custody.md 4).

A copied HSM directory that runs beside the original can sign for two histories of a log. Nobody can tell from outside
which one is the copy, so both are distrusted. One process may have several addresses, after a change of the advertised
one for instance; an `instance`, drawn when a process starts, tells it from a copy. Who does not answer is no copy: it
is what is left of a service that moved.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from juicebox_hsm.ids import HsmId


class Place(NamedTuple):
    """An address that answered, with its HSM; `instance` is empty when an agent of an older version tells none."""

    url: str
    hsm: HsmId
    instance: bytes


def copied(places: Iterable[Place]) -> dict[HsmId, tuple[str, ...]]:
    """Return the HSMs that answer from several processes, with an address of each, by id."""
    found: dict[HsmId, dict[bytes, str]] = {}
    for place in sorted(places):
        if place.instance:
            found.setdefault(place.hsm, {}).setdefault(place.instance, place.url)
    return {hsm: tuple(sorted(urls.values())) for hsm, urls in sorted(found.items()) if len(urls) > 1}


class Elsewhere:
    """Where else an agent's own HSM answers. A copy that gave one answer too few is still believed to be there."""

    def __init__(self) -> None:
        self.urls: tuple[str, ...] = ()
        self._missed: set[str] = set()

    def asked(self, own: Place, answered: Collection[Place], registered: Collection[str]) -> None:
        """Adopt who answered when all `registered` addresses were asked."""
        there = {url for url in copied((own, *answered)).get(own.hsm, ()) if url != own.url}
        spoke = {place.url for place in answered}
        silent = {url for url in self.urls if url in registered and url not in spoke}
        self.urls = tuple(sorted(there | (silent - self._missed)))
        self._missed = silent
