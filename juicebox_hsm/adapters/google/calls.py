"""Call one of Google's services from Trio: where it is, credentials, deadlines, retries (operator-tools.md 1, 6.2).

Pub/Sub and Secret Manager use what Bigtable uses: `grpc.aio` on one thread, raw protobuf, a token in each call's
metadata. Only calls that may be repeated go through here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote

import trio

from juicebox_hsm.adapters.bigtable.auth import ApplicationDefault, Authorization, NoAuthorization
from juicebox_hsm.adapters.bigtable.channel import DEFAULT_CHANNEL_TUNING, ChannelTransport, ChannelTuning
from juicebox_hsm.adapters.bigtable.driver import CallFailed, Driver, Transport
from juicebox_hsm.adapters.bigtable.retry import REFUSED, RETRYABLE
from juicebox_hsm.adapters.clock.retrying import Attempts
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.observation.retry_metrics import Family
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.addresses import emulator_of
from juicebox_hsm.host.retry import RetryProfile
from juicebox_hsm.ports.errors import StoreInvalid, StoreUnavailable

CALL_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Service:
    """One of Google's services: its name for people, where it is, and what its tokens must be good for.

    `families` maps a method, as a gRPC path, to the metrics it is measured by; others are not.
    """

    name: str
    target: str
    scopes: tuple[str, ...]
    otherwise: str = ""
    families: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach a service. `emulator` is HOST:PORT without TLS and credentials, "" the service itself."""

    project: str
    emulator: str = ""
    call_s: float = CALL_S
    channel: ChannelTuning = DEFAULT_CHANNEL_TUNING


def parse_url(url: str, host: str, flag: str) -> str:
    """Return HOST:PORT of an emulator, "" for the service at `host`. Raises `LocalError` naming the flag."""
    try:
        found = emulator_of(url, host)
    except ValueError as error:
        raise LocalError(f"{flag} {error}") from None
    return found


class GoogleCalls:
    """Repeatable unary calls to one service."""

    def __init__(
        self,
        service: Service,
        transport: Transport,
        authorization: Authorization,
        call_s: float,
        metrics: Metrics | None = None,
    ) -> None:
        metrics = Metrics() if metrics is None else metrics
        self._families = {method: Family(metrics, name) for method, name in service.families.items()}
        self._service = service
        self._transport = transport
        self._authorization = authorization
        self._call_s = call_s

    async def unary(
        self,
        method: str,
        request: bytes,
        routing: tuple[str, str],
        retry: RetryProfile,
        *,
        timeout_s: float | None = None,
        passed: Collection[str] = (),
    ) -> bytes:
        """Call `method`, a gRPC path, again while that can help.

        `routing` is the field of the request that chooses the server, with its value. Status names in `passed` come
        back as `CallFailed`. Raises `StoreUnavailable` when attempts or time are over or the caller is not allowed,
        `StoreInvalid` for a request that the service will never take.
        """
        family = self._families.get(method)
        if family is None:
            return await self._repeat(method, request, routing, retry, timeout_s, passed, family)
        with family.measured(CallFailed):  # what the caller takes for an answer is one here too
            return await self._repeat(method, request, routing, retry, timeout_s, passed, family)

    async def _repeat(
        self,
        method: str,
        request: bytes,
        routing: tuple[str, str],
        retry: RetryProfile,
        timeout_s: float | None,
        passed: Collection[str],
        family: Family | None,
    ) -> bytes:
        """Call until there is an answer or no hope."""
        name, value = routing
        header = ("x-goog-request-params", f"{name}={quote(value, safe='')}")
        what = f"{self._service.name} {method.rpartition('/')[2]}"
        attempts, renewed = Attempts(retry), False
        while True:
            try:
                return await self._transport.unary(
                    method, request, (header, *self._authorization.metadata()), timeout_s or self._call_s
                )
            except CallFailed as failure:
                if failure.code in passed:
                    raise
                if failure.code == "UNAUTHENTICATED" and not renewed:
                    renewed = True
                    if await self._authorization.renew():
                        continue
                message = f"{what}: {failure.code}: {failure.details}"
                if failure.code in RETRYABLE:
                    if attempts.exhausted():
                        raise StoreUnavailable(message) from None
                elif failure.code in REFUSED:
                    raise StoreUnavailable(message) from None
                else:
                    raise StoreInvalid(message) from None
            if family is not None:
                family.retried()
            await attempts.pause()


@asynccontextmanager
async def open_calls(service: Service, access: Access, metrics: Metrics | None = None) -> AsyncIterator[GoogleCalls]:
    """Connect to a service for as long as the block runs. Raises `LocalError` without credentials."""
    authorization: Authorization = (
        NoAuthorization()
        if access.emulator
        else await ApplicationDefault.find(service.scopes, service.name, service.otherwise, metrics)
    )
    driver = Driver(service.name)
    await driver.start()
    try:
        insecure = bool(access.emulator)
        transport = ChannelTransport(
            driver, access.emulator or service.target, insecure=insecure, tuning=access.channel
        )
        await transport.open()
        failure: BaseException | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(authorization.keep_fresh)
                nursery.start_soon(transport.keep_rotating, ChannelTransport.connect)
                try:
                    yield GoogleCalls(service, transport, authorization, access.call_s, metrics)
                except (trio.Cancelled, GeneratorExit):
                    raise
                except BaseException as error:  # noqa: BLE001 - raised again below, outside the nursery
                    failure = error
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await transport.close()
        if failure is not None:
            raise failure
    finally:
        await driver.stop()


def scopes(*names: str) -> Sequence[str]:
    """Return the full names of OAuth scopes."""
    return tuple(f"https://www.googleapis.com/auth/{name}" for name in names)
