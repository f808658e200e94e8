"""Sends metrics to a DogStatsD agent over UDP, if DD_AGENT_HOST names one (operator-tools.md 9.2).

Once per second, and once more when the service ends, everything that changed goes out in packets of at most 1400
bytes; nothing ever waits for it, and a failure to send changes nothing but the numbers somebody sees. Distributions
travel as single values, at most 512 per series and second, the rest through the sample rate.
"""

from __future__ import annotations

import math
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import trio

from juicebox_hsm.adapters.observation.exposition import number_text
from juicebox_hsm.adapters.observation.families import Tags
from juicebox_hsm.adapters.observation.logging import get_logger
from juicebox_hsm.adapters.observation.metrics import Distribution, Metrics
from juicebox_hsm.adapters.process.threads import NoThread, thread_needed
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.addresses import Address, parse_host, parse_port

PERIOD_S: Final = 1.0
PACKET_BYTES_MAX: Final = 1400  # own: fits any Ethernet
VALUES_PER_LINE_MAX: Final = 50
MESSAGE_CHARS_MAX: Final = 500  # own
RESOLVE_AGAIN_S: Final = 60.0  # own
PORT: Final = 8125
HOST_VARIABLE: Final = "DD_AGENT_HOST"
PORT_VARIABLE: Final = "DD_DOGSTATSD_PORT"

SocketAddress = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
AddressInfo = tuple[socket.AddressFamily, socket.SocketKind, int, str, SocketAddress]
"""What `getaddrinfo` finds."""

_log = get_logger("dogstatsd")


async def send_metrics(metrics: Metrics, tags: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> None:
    """Send until cancelled; returns at once without DD_AGENT_HOST. `tags` go with every line (service, version).

    What was counted before the cancellation still goes out, so a service cancels this last; sending never waits.
    DD_DOGSTATSD_PORT may name another port than 8125.
    """
    agent = agent_address(environment)
    if agent is None:
        return
    metrics.enable_samples()
    while True:
        endpoint = await _connect(agent)
        if endpoint is None:
            for _ in drain(metrics, tags):
                pass  # or old values would be sent as new ones later
            await trio.sleep(RESOLVE_AGAIN_S)
            continue
        with endpoint, trio.move_on_after(RESOLVE_AGAIN_S):
            try:
                while True:
                    _send(endpoint, drain(metrics, tags))
                    await trio.sleep(PERIOD_S)
            finally:
                _send(endpoint, drain(metrics, tags))


def _send(endpoint: socket.socket, packets: Iterable[bytes]) -> None:
    for packet in packets:
        try:
            endpoint.send(packet)
        except OSError:
            pass  # nobody listens, or the buffer is full: neither is ours to solve


def agent_address(environment: Mapping[str, str]) -> Address | None:
    """Return where metrics go, None without DD_AGENT_HOST; raises `LocalError` naming the variable that is wrong."""
    host = environment.get(HOST_VARIABLE, "")
    variable, text = PORT_VARIABLE, environment.get(PORT_VARIABLE, "")
    try:
        port = parse_port(text, 1) if text else PORT
        variable = HOST_VARIABLE
        return Address(parse_host(host), port) if host else None
    except ValueError as error:
        raise LocalError(f"{variable}: {error}") from None


async def _connect(agent: Address) -> socket.socket | None:
    try:
        with thread_needed():
            return open_endpoint(await trio.socket.getaddrinfo(agent.host, agent.port, type=socket.SOCK_DGRAM))
    except (OSError, NoThread) as error:
        _log.warning("cannot send metrics", host=agent.host, error=str(error))
        return None


def open_endpoint(found: Sequence[AddressInfo]) -> socket.socket:
    """Return a socket for the first address where nobody refuses; if all do, for the first IPv4 one.

    `localhost` is often `::1` first, where an agent that listens on 127.0.0.1 hears nothing. One's own machine refuses
    at once, and an empty datagram asks it without being a metric. Raises `OSError` when no address can be used.
    """
    problem = OSError("no address")
    refusing: list[AddressInfo] = []
    for info in found:
        try:
            endpoint = _open(info)
        except OSError as error:
            problem = error
            continue
        if len(found) == 1 or not _is_refused(endpoint):
            return endpoint
        endpoint.close()
        refusing.append(info)
    if not refusing:
        raise problem
    return _open(min(refusing, key=lambda info: info[0] != socket.AF_INET))


def _open(info: AddressInfo) -> socket.socket:
    endpoint = socket.socket(info[0], socket.SOCK_DGRAM)
    try:
        endpoint.setblocking(False)
        endpoint.connect(info[4])
    except OSError:
        endpoint.close()
        raise
    return endpoint


def _is_refused(endpoint: socket.socket) -> bool:
    try:
        endpoint.send(b"")
    except OSError:
        return True
    return endpoint.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


def drain(metrics: Metrics, tags: Mapping[str, str]) -> Iterator[bytes]:
    """Take what changed since the last time, as packets."""
    packet = b""
    for line in list(_lines(metrics, tuple(sorted(tags.items())))):
        encoded = line.encode()
        if packet and len(packet) + 1 + len(encoded) > PACKET_BYTES_MAX:
            yield packet
            packet = b""
        packet = packet + b"\n" + encoded if packet else encoded
    if packet:
        yield packet


def service_check(name: str, tags: Mapping[str, str], *, ok: bool, message: str = "") -> bytes:
    """Return a service check as a packet: status 0 or 2, its message reduced to what no syntax gets confused by."""
    said = re.sub(r"[^A-Za-z0-9._ -]", "_", message)[:MESSAGE_CHARS_MAX]
    return f"_sc|{_name(name)}|{0 if ok else 2}{_tags(tuple(sorted(tags.items())))}|m:{said}".encode()


def send_once(packets: Iterable[bytes], environment: Mapping[str, str] = os.environ) -> bool:
    """Send packets to DD_AGENT_HOST, if it is set; False when nobody is there, which changes nothing else.

    Raises `LocalError` for an address that can never be one.
    """
    agent = agent_address(environment)
    if agent is None:
        return False
    try:
        found = socket.getaddrinfo(agent.host, agent.port, type=socket.SOCK_DGRAM)
        with open_endpoint(found) as endpoint:
            for packet in packets:
                endpoint.send(packet)
    except OSError as error:
        _log.warning("cannot send metrics", host=agent.host, error=str(error))
        return False
    return True


def _lines(metrics: Metrics, common: Tags) -> Iterator[str]:
    for (name, tags), counter in metrics.counters.items():
        if counter.value != counter.sent:
            yield f"{_name(name)}:{counter.value - counter.sent}|c{_tags(common + tags)}"
            counter.sent = counter.value
    for (name, tags), gauge in metrics.gauges.items():
        if math.isfinite(gauge.value):  # the protocol has no other numbers
            yield f"{_name(name)}:{number_text(gauge.value)}|g{_tags(common + tags)}"
    for (name, tags), distribution in metrics.distributions.items():
        yield from _values(_name(name), common + tags, distribution)
    for (name, tags), timer in metrics.timers.items():
        yield from _values(_name(name) + ".ns", common + tags, timer)
    for title, text in metrics.events:
        shown, body = title[:100], text[:1000].replace("\n", "\\n")
        yield f"_e{{{len(shown.encode())},{len(body.encode())}}}:{shown}|{body}{_tags(common)}"
    metrics.events.clear()


def _values(name: str, tags: Tags, distribution: Distribution) -> Iterator[str]:
    samples = distribution.samples
    if not samples:
        return
    rate = f"|@{len(samples) / distribution.unsent:.6f}" if distribution.unsent > len(samples) else ""
    for start in range(0, len(samples), VALUES_PER_LINE_MAX):
        values = ":".join(number_text(value) for value in samples[start : start + VALUES_PER_LINE_MAX])
        yield f"{name}:{values}|d{rate}{_tags(tags)}"
    distribution.samples = []
    distribution.unsent = 0


def _name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "_", name)


def _tags(tags: Tags) -> str:
    if not tags:
        return ""
    return "|#" + ",".join(re.sub(r"[^a-z0-9_:./-]", "_", f"{key}:{value}".lower()) for key, value in tags)
