"""When a registration counts as dead."""

from __future__ import annotations

from juicebox_hsm.host.cluster.registrations import BLIND_S, DEAD_S, Registrations
from juicebox_hsm.host.services import ServiceAddress, ServiceKind

LOOK_S = 10.0


def address(registered_ms: int) -> ServiceAddress:
    return ServiceAddress(ServiceKind.AGENT, "tls://a", registered_ms)


def watch(watcher: Registrations, entry: ServiceAddress, begin_s: float, end_s: float) -> list[float]:
    """Look every 10 s; return when the entry was called dead."""
    steps = range(int((end_s - begin_s) / LOOK_S) + 1)
    return [at for at in (begin_s + LOOK_S * step for step in steps) if watcher.look([entry], at)]


def test_dead_is_who_did_not_renew_for_the_whole_time() -> None:
    """The value of the time says nothing, only that it stays the same; any renewal begins the wait anew."""
    watcher = Registrations()
    assert watch(watcher, address(5), 0, DEAD_S) == []
    assert watch(watcher, address(4), DEAD_S + LOOK_S, 2 * DEAD_S + LOOK_S) == []
    assert watch(watcher, address(4), 2 * DEAD_S + 2 * LOOK_S, 2 * DEAD_S + 3 * LOOK_S) == [
        2 * DEAD_S + 2 * LOOK_S,
        2 * DEAD_S + 3 * LOOK_S,
    ]


def test_who_did_not_look_has_seen_nothing() -> None:
    """A watcher that was suspended or cut off from the store begins anew: the others may have been, too."""
    watcher = Registrations()
    assert watch(watcher, address(5), 0, DEAD_S) == []
    blind = DEAD_S + BLIND_S + 1
    assert watch(watcher, address(5), blind, blind + DEAD_S) == []
    assert watcher.look([address(5)], blind + DEAD_S + LOOK_S) == [address(5)]
