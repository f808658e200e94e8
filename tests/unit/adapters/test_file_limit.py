"""Connections and open files: what is let in always fits."""

from __future__ import annotations

import resource

import pytest

from juicebox_hsm.adapters.process.file_limit import (
    FILES_RESERVED,
    PROBES_SHARE,
    SERVICE_SHARE,
    fit_connections,
    raise_file_limit,
)


def test_the_soft_limit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system grants is used; a sandbox that forbids it changes nothing."""
    calls: list[tuple[int, int]] = []

    def refuse(_: int, pair: tuple[int, int]) -> None:
        calls.append(pair)
        raise ValueError("not allowed")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_file_limit()
    assert calls == [(4096, 4096)]


@pytest.mark.parametrize("soft", [64, 256, 1024, 4096, 1 << 20])
def test_all_listeners_together_leave_files(monkeypatch: pytest.MonkeyPatch, soft: int) -> None:
    """However small the limit, a full service and full probes leave a quarter of it, or 256, to store and peers."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    taken = fit_connections(10_000, SERVICE_SHARE) + fit_connections(128, PROBES_SHARE)
    assert taken <= soft - min(FILES_RESERVED, soft // 4)
    assert fit_connections(1, PROBES_SHARE) == 1


def test_no_limit_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit the listener's own bound counts."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert fit_connections(10_000, SERVICE_SHARE) == 10_000
