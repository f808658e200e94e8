"""Calls as they go to the real service: TLS, tokens that expire, channels that are replaced (storage.md 9.4)."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import google.auth
import pytest
import trio

from juicebox_hsm.adapters.bigtable import auth
from juicebox_hsm.adapters.bigtable.auth import ApplicationDefault
from juicebox_hsm.adapters.bigtable.channel import ChannelTransport
from juicebox_hsm.adapters.bigtable.codec import RowExists, SetCell
from juicebox_hsm.adapters.bigtable.driver import CallFailed, Driver
from juicebox_hsm.adapters.bigtable.retry import NoSuchTable
from juicebox_hsm.adapters.bigtable.table import Endpoint, Table
from juicebox_hsm.adapters.bigtable.warming import warm_channel
from juicebox_hsm.adapters.google.calls import GoogleCalls, Service
from juicebox_hsm.host.retry import RetryProfile
from juicebox_hsm.ports.errors import StoreUnavailable
from tests.fakes.google_service import Call, GoogleService
from tests.patience import HANGS_S

INSTANCE = "projects/p/instances/i"
PUBLISH = "/google.pubsub.v1.Publisher/Publish"
QUICK = RetryProfile(first_s=0.01, cap_s=0.02, attempts_max=3, total_s=5.0)
CELL = (SetCell("f", b"q", b"v"),)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[GoogleService]:
    """Start a service whose certificate only the test's CA vouches for."""
    started = GoogleService(tmp_path)
    yield started
    started.stop()


class Tokens:
    """Credentials whose tokens are numbered: token1, token2, ..."""

    expiry: dt.datetime | None = None
    token = ""

    def __init__(self) -> None:
        self.given = 0

    def refresh(self, transport: object) -> None:
        """Give the next token."""
        self.given += 1
        self.token = f"token{self.given}"


@asynccontextmanager
async def connected(
    service: GoogleService, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Endpoint, ChannelTransport]]:
    """Connect as the store does, with a first token."""
    monkeypatch.setattr(auth, "MIN_AGE_S", 0.0)
    authorization = ApplicationDefault(Tokens(), None)
    await authorization.refresh()
    driver = Driver()
    await driver.start()
    transport = ChannelTransport(driver, service.target, insecure=False, roots=service.roots)
    await transport.open()
    try:
        yield Endpoint(transport, authorization, INSTANCE, "", 10.0, QUICK), transport
    finally:
        await transport.close()
        await driver.stop()


def tokens(service: GoogleService) -> list[str]:
    """Return the tokens of the calls so far, and forget the calls."""
    seen = [call.token for call in service.calls]
    service.calls.clear()
    return seen


async def test_an_expired_token_is_renewed(service: GoogleService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads, writes and other services' calls that are refused for their token go again with a new one, at once."""
    async with connected(service, monkeypatch) as (endpoint, transport):
        table = Table(endpoint, "settings")
        calls = GoogleCalls(Service("pubsub", service.target, ()), transport, endpoint.authorization, 10.0)
        asks: list[Callable[[], Any]] = [
            partial(table.mutate_row, b"key", CELL),
            partial(table.read_row, b"key"),
            partial(calls.unary, PUBLISH, b"", ("topic", "t"), QUICK),
        ]
        for number, ask in enumerate(asks, 1):
            await ask()
            assert tokens(service) == [f"token{number}"]
            service.valid = f"token{number + 1}"
            await ask()
            assert tokens(service) == [f"token{number}", f"token{number + 1}"]


async def test_a_conditional_write_is_not_sent_again(service: GoogleService, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is refused for its token is reported as not carried out; the next has a new token."""
    async with connected(service, monkeypatch) as (endpoint, _):
        table = Table(endpoint, "settings")
        service.valid = "token2"
        with pytest.raises(StoreUnavailable, match="UNAUTHENTICATED"):
            await table.check_and_mutate(b"key", RowExists(), if_not=CELL)
        await table.check_and_mutate(b"key", RowExists(), if_not=CELL)
        assert tokens(service) == ["token1", "token2"]


async def test_a_service_that_takes_no_token(service: GoogleService, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is refused with a new token, too, fails: it is renewed once, not for ever."""
    async with connected(service, monkeypatch) as (endpoint, transport):
        service.valid = "another"
        calls = GoogleCalls(Service("pubsub", service.target, ()), transport, endpoint.authorization, 10.0)
        with pytest.raises(StoreUnavailable, match="UNAUTHENTICATED"):
            await Table(endpoint, "settings").mutate_row(b"key", CELL)
        with pytest.raises(StoreUnavailable, match="UNAUTHENTICATED"):
            await calls.unary(PUBLISH, b"", ("topic", "t"), QUICK)
        assert tokens(service) == ["token1", "token2", "token2", "token3"]


async def test_a_certificate_of_nobody_we_know(service: GoogleService) -> None:
    """Without the CA that vouches for the service nothing is sent, no token either."""
    driver = Driver()
    await driver.start()
    transport = ChannelTransport(driver, service.target, insecure=False)
    await transport.open()
    try:
        with pytest.raises(CallFailed):
            await transport.unary(PUBLISH, b"", (("authorization", "Bearer token1"),), 10.0)
        assert not service.calls
    finally:
        await transport.close()
        await driver.stop()


def _warmed(calls: list[Call]) -> list[list[Call]]:
    """Return the calls of each connection that began with a warming, without those of the table's users."""
    peers = dict.fromkeys(call.peer for call in calls)
    by_peer = [[call for call in calls if call.peer == peer] for peer in peers]
    return [own for own in by_peer if own[0].method == "PingAndWarm" and len(own) >= 3]


async def test_new_channels_are_warm(service: GoogleService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replacing channel first warms the instance, then reads each table in use; a missing one stops nothing."""
    async with connected(service, monkeypatch) as (endpoint, transport):
        await Table(endpoint, "settings").read_row(b"key")
        service.missing.add("gone")
        with pytest.raises(NoSuchTable):
            await Table(endpoint, "a-gone").read_row(b"key")
        Table(endpoint, "unused")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.keep_rotating, partial(warm_channel, endpoint), 0.05)
            assert await trio.to_thread.run_sync(service.wait_for, lambda calls: len(_warmed(calls)) >= 2)
            nursery.cancel_scope.cancel()
        for own in _warmed(service.calls)[:2]:
            assert [call.method for call in own[:3]] == ["PingAndWarm", "ReadRows", "ReadRows"]
            assert "a-gone" in own[1].routing
            assert "settings" in own[2].routing
            assert all(call.token == "token1" for call in own)
        await Table(endpoint, "settings").read_row(b"key")
        assert service.calls[-1].peer != service.calls[0].peer, "the first channel is out of use"


async def test_channels_without_a_call_to_warm_are_connected(
    service: GoogleService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What replaces the channel to another service has connected before it is used."""
    async with connected(service, monkeypatch) as (endpoint, transport):
        calls = GoogleCalls(Service("pubsub", service.target, ()), transport, endpoint.authorization, 10.0)
        await calls.unary(PUBLISH, b"", ("topic", "t"), QUICK)
        with trio.fail_after(HANGS_S):
            await transport.rotate(ChannelTransport.connect)
        await calls.unary(PUBLISH, b"", ("topic", "t"), QUICK)
        assert len({call.peer for call in service.calls}) == 2


async def test_a_token_endpoint_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials whose first token does not come are one line about the endpoint, not a bare time-out."""
    release = threading.Event()

    class Hanging(Tokens):
        def refresh(self, transport: object) -> None:
            release.wait(HANGS_S)

    monkeypatch.setattr(google.auth, "default", lambda scopes: (Hanging(), "p"))
    monkeypatch.setattr(auth, "REFRESH_TIMEOUT_S", 0.05)
    try:
        with pytest.raises(StoreUnavailable, match="token endpoint does not answer") as caught:
            await ApplicationDefault.find()
        assert "\n" not in str(caught.value)
    finally:
        release.set()
