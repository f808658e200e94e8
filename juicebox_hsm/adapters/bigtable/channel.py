"""Keep one channel to the service: options, keep-alive, and a fresh, warmed channel every 55 minutes (storage.md 9.4).

The service closes connections after about 60 minutes; a new one opened in the middle of a request would cost that
request a TLS handshake and cold caches. Options are set for transparency: no hidden retries (a repeated conditional
write would report its own success as a conflict), no message limit of ours.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio
import trio

from juicebox_hsm.adapters.bigtable.driver import CallFailed, Driver, Metadata
from juicebox_hsm.adapters.observation.logging import get_logger

ROTATION_S: Final = 3_300.0
WARM_S: Final = 5.0
CLOSE_GRACE_S: Final = 30.0
"""How long calls on a replaced channel may still take; longer than any deadline of ours but scans."""

OPTIONS: Final = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


@dataclass(frozen=True, slots=True)
class ChannelTuning:
    """Time-outs of connections in seconds (operator-tools.md 1)."""

    connect_timeout_s: float = 20.0
    keepalive_interval_s: float = 4.0
    keepalive_timeout_s: float = 3.0
    keepalive_while_idle: bool = True

    def options(self, *, insecure: bool) -> list[tuple[str, int]]:
        """Return the channel's options.

        Pings only for the service: the emulator takes those without calls for an attack and closes the connection.
        """
        options = [*OPTIONS, ("grpc.min_reconnect_backoff_ms", round(self.connect_timeout_s * 1000))]
        if insecure:
            return options
        return [
            *options,
            ("grpc.keepalive_time_ms", round(self.keepalive_interval_s * 1000)),
            ("grpc.keepalive_timeout_ms", round(self.keepalive_timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", int(self.keepalive_while_idle)),
            ("grpc.http2.max_pings_without_data", 0),
        ]


DEFAULT_CHANNEL_TUNING: Final = ChannelTuning()

_log = get_logger("bigtable.channel")


class _Open:
    """One channel and its multicallables; lives on the asyncio thread."""

    def __init__(self, target: str, tuning: ChannelTuning, *, insecure: bool, roots: bytes | None) -> None:
        options = tuning.options(insecure=insecure)
        self.channel = (
            grpc.aio.insecure_channel(target, options=options)
            if insecure
            else grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(roots), options=options)
        )
        self._unary: dict[str, Any] = {}
        self._stream: dict[str, Any] = {}

    async def unary(self, method: str, request: bytes, metadata: Metadata, timeout_s: float) -> bytes:
        stub = self._unary.get(method)
        if stub is None:
            stub = self._unary[method] = self.channel.unary_unary(method)
        try:
            response: bytes = await stub(request, metadata=metadata, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise CallFailed(error.code().name, error.details() or "") from None
        return response

    async def stream(self, method: str, request: bytes, metadata: Metadata, timeout_s: float) -> list[bytes]:
        stub = self._stream.get(method)
        if stub is None:
            stub = self._stream[method] = self.channel.unary_stream(method)
        received: list[bytes] = []
        try:
            async for message in stub(request, metadata=metadata, timeout=timeout_s):
                received.append(message)  # noqa: PERF401 - a failure must keep what came before it
        except grpc.aio.AioRpcError as error:
            raise CallFailed(error.code().name, error.details() or "", received) from None
        return received


class ChannelTransport:
    """A `Transport` over one channel at a time to one `host:port`; `roots` are PEM, None for those of the library."""

    def __init__(
        self,
        driver: Driver,
        target: str,
        *,
        insecure: bool,
        tuning: ChannelTuning = DEFAULT_CHANNEL_TUNING,
        roots: bytes | None = None,
    ) -> None:
        self._driver = driver
        self._tuning = tuning
        self._target = target
        self._insecure = insecure
        self._roots = roots
        self._current: _Open | None = None

    async def open(self) -> None:
        """Make the first channel; it connects at its first call."""
        self._current = await self._make()

    async def _make(self) -> _Open:
        async def make() -> _Open:
            return _Open(self._target, self._tuning, insecure=self._insecure, roots=self._roots)

        return await self._driver.run(make)

    async def connect(self) -> None:
        """Connect now: all the warmth there is where a service has no call for more."""
        channel = self._channel().channel
        await self._driver.run(channel.channel_ready)

    async def close(self) -> None:
        """Close the channel; calls under way fail."""
        current, self._current = self._current, None
        if current is not None:
            await self._driver.run(lambda: current.channel.close(None))

    def _channel(self) -> _Open:
        if self._current is None:
            raise CallFailed("UNAVAILABLE", "the channel is closed")
        return self._current

    async def unary(self, method: str, request: bytes, metadata: Metadata, timeout_s: float) -> bytes:
        """Send a request and return its one response. Raises `CallFailed`."""
        channel = self._channel()
        return await self._driver.run(lambda: channel.unary(method, request, metadata, timeout_s))

    async def stream(self, method: str, request: bytes, metadata: Metadata, timeout_s: float) -> list[bytes]:
        """Send a request and return all messages of its response. Raises `CallFailed`."""
        channel = self._channel()
        return await self._driver.run(lambda: channel.stream(method, request, metadata, timeout_s))

    async def rotate(self, warm: Callable[[ChannelTransport], Awaitable[None]]) -> None:
        """Replace the channel by a new one that `warm` used first; the old one closes after its calls ended."""
        fresh = ChannelTransport(
            self._driver, self._target, insecure=self._insecure, tuning=self._tuning, roots=self._roots
        )
        await fresh.open()
        try:
            with trio.fail_after(WARM_S):
                await warm(fresh)
        except (CallFailed, trio.TooSlowError) as error:
            _log.warning("new channel not warmed", error=str(error) or type(error).__name__)
        former, self._current = self._current, fresh._current
        if former is not None:
            await self._driver.run(lambda: former.channel.close(CLOSE_GRACE_S))

    async def keep_rotating(
        self, warm: Callable[[ChannelTransport], Awaitable[None]], interval_s: float = ROTATION_S
    ) -> None:
        """Rotate every 55 minutes, for ever."""
        while True:
            await trio.sleep(interval_s)
            await self.rotate(warm)
