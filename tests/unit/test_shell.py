"""What every service does as a process: exit codes, signals, its entry in discovery, the watchdog."""

from __future__ import annotations

import math
import signal
import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from juicebox_hsm.adapters.observation.logging import get_logger
from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.adapters.process.supervision import StartPhase
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.readiness import EventsSetAside, Plain, Readiness
from juicebox_hsm.host.services import ServiceAddress, ServiceKind
from juicebox_hsm.ports.errors import StoreUnavailable
from roles.shell import READINESS_S, Entry, Kind, Shell, start
from tests.unit.manager.fakes import FakeDiscovery

KIND = Kind("test", "test", (), sends_traces=False)


def make_shell() -> Shell:
    return Shell(KIND, "test", None, StartPhase())


class FlakyDiscovery(FakeDiscovery):
    """Discovery whose store is down while `broken`."""

    broken = True

    async def register(self, kind: ServiceKind, url: str, now_ms: int) -> None:
        self._check()
        await super().register(kind, url, now_ms)

    async def deregister(self, kind: ServiceKind, url: str) -> None:
        self._check()
        await super().deregister(kind, url)

    async def list(self, kind: ServiceKind | None = None) -> list[ServiceAddress]:
        self._check()
        return await super().list(kind)

    def _check(self) -> None:
        if self.broken:
            raise StoreUnavailable("down")


def entry_in(discovery: FlakyDiscovery) -> Entry:
    return Entry(
        discovery, ServiceKind.MANAGER, "tls://m", lambda: round(trio.current_time() * 1000), get_logger("test")
    )


async def test_registration_is_retried_and_renewed(autojump_clock: trio.testing.MockClock) -> None:
    """A failed registration is tried again after 10 s, a good one renewed after a minute."""
    discovery = FlakyDiscovery()
    registered = trio.Event()
    failures: list[RealmError] = []
    async with trio.open_nursery() as nursery:

        async def keep() -> None:
            await entry_in(discovery).keep(10.0, succeeded=registered.set, failed=failures.append)

        nursery.start_soon(keep)
        await trio.sleep(5)
        assert not registered.is_set()
        assert len(failures) == 1
        discovery.broken = False
        await trio.sleep(6)
        assert registered.is_set()
        assert discovery.rows == {(ServiceKind.MANAGER, "tls://m"): 10_000}
        await trio.sleep(60)
        assert discovery.rows == {(ServiceKind.MANAGER, "tls://m"): 70_000}
        nursery.cancel_scope.cancel()


async def test_an_entry_that_others_removed_is_made_again_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """A service nobody can find is found again within 2 s; a store that cannot be read changes nothing."""
    discovery = FlakyDiscovery()
    discovery.broken = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(entry_in(discovery).keep, 10.0)
        await trio.sleep(5)
        discovery.rows.clear()
        await discovery.register(ServiceKind.AGENT, "tls://m", 0)
        await trio.sleep(2)
        assert discovery.rows[ServiceKind.MANAGER, "tls://m"] == 6_000
        discovery.broken = True
        await trio.sleep(30)
        assert discovery.rows[ServiceKind.MANAGER, "tls://m"] == 6_000
        nursery.cancel_scope.cancel()


async def test_an_entry_that_cannot_be_withdrawn_ends_nothing() -> None:
    """A store that is down while a service stops leaves an entry that expires; the service still stops in order."""
    discovery = FlakyDiscovery()
    entry = entry_in(discovery)
    discovery.rows[ServiceKind.MANAGER, "tls://m"] = 0
    await entry.withdraw()
    assert discovery.rows
    discovery.broken = False
    await entry.withdraw()
    assert not discovery.rows


async def _fail_in_a_nursery(shell: Shell, *, started: bool) -> None:
    if started:
        shell.started("test started")
    async with trio.open_nursery():
        raise RealmError("another service refuses")


@pytest.mark.parametrize(("started", "code"), [(False, ExitCode.UNAVAILABLE), (True, ExitCode.INTERNAL)])
def test_trouble_with_others_counts_by_when_it_comes(
    started: bool, code: ExitCode, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the start is over a failing dependency is "unavailable" (69), afterwards it is a crash (70)."""
    with pytest.raises(SystemExit) as ended:
        start(KIND, "test", _fail_in_a_nursery, started=started)
    assert ended.value.code == code
    assert "another service refuses" in capsys.readouterr().err


async def test_the_second_stop_signal_hurries(autojump_clock: trio.testing.MockClock) -> None:
    """One SIGTERM stops in order; a second one, of any kind, tells the service not to wait for anybody."""
    shell = make_shell()
    async with trio.open_nursery() as nursery:
        await shell.catch_signals(nursery)
        signal.raise_signal(signal.SIGTERM)
        await shell.stop.wait()
        assert not shell.hurry.is_set()
        signal.raise_signal(signal.SIGINT)
        await shell.hurry.wait()
        nursery.cancel_scope.cancel()


async def test_the_watchdog_is_fed_while_the_service_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """The supervisor hears nothing more once what the service depends on stops answering, so that it restarts it."""
    path = tmp_path / "notify"
    alive = True

    async def is_alive() -> bool:
        return alive

    def heard() -> int:
        count = 0
        while True:
            try:
                count += supervisor.recv(100) == b"WATCHDOG=1"
            except BlockingIOError:
                return count

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(path))
        supervisor.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        monkeypatch.setenv("WATCHDOG_USEC", "4000000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        async with trio.open_nursery() as nursery:
            make_shell().report(nursery, is_alive=is_alive)
            await trio.sleep(3)
            assert heard() == 2  # at once, and every 2 s
            alive = False
            await trio.sleep(10)
            assert heard() == 0
            nursery.cancel_scope.cancel()


async def test_every_service_reports_each_second(autojump_clock: trio.testing.MockClock) -> None:
    """The uptime and what a service samples are written every second, whatever the service does."""
    shell = make_shell()
    samples: list[float] = []
    async with trio.open_nursery() as nursery:
        shell.report(nursery, lambda: samples.append(trio.current_time()))
        await trio.sleep(2.5)
        nursery.cancel_scope.cancel()
    assert len(samples) == 3
    assert "service_uptime" in shell.metrics.render()


async def test_readiness_is_told_as_metrics(autojump_clock: trio.testing.MockClock) -> None:
    """Codes are 1 while the service says them, 0 after; who hangs is not ready, who warns is."""
    shell = make_shell()
    hangs, found = False, Readiness((Plain(Code.NOT_REGISTERED), Plain(Code.NOT_REGISTERED)), (EventsSetAside(3),))

    async def readyz() -> Readiness:
        await trio.sleep(math.inf if hangs else 0)
        return found

    def told() -> dict[str, float]:
        gauges = shell.metrics.gauges.items()
        return {dict(tags)["code"]: gauge.value for (name, tags), gauge in gauges if name == "service.reason"}

    async with trio.open_nursery() as nursery:
        nursery.start_soon(shell.tell_readiness, readyz)
        await trio.sleep(1)
        assert shell.metrics.gauge_of("service.ready").value == 0
        assert told() == {"not-registered": 1, "events-set-aside": 1}
        found = Readiness((), found.warnings)
        await trio.sleep(READINESS_S)
        assert shell.metrics.gauge_of("service.ready").value == 1
        assert told() == {"not-registered": 0, "events-set-aside": 1}
        hangs = True
        await trio.sleep(3 * READINESS_S)
        assert shell.metrics.gauge_of("service.ready").value == 0
        assert told() == {"not-registered": 0, "events-set-aside": 0, "no-answer": 1}
        nursery.cancel_scope.cancel()
