"""Judge load balancers from outside, as clients meet them: TLS handshake, `/readyz`, `/livez` (operator-tools.md 2)."""

from __future__ import annotations

import datetime as dt
import itertools
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import h11
import trio
from cryptography import x509

from juicebox_hsm.adapters.tls.certificate_end import to_unix_ms
from juicebox_hsm.host.cluster.verdict import BalancerReport
from juicebox_hsm.host.codes import Code, code_of

PROBE_S: Final = 5.0
READ_BYTES: Final = 16_384
TEXT_BYTES_MAX: Final = 65_536  # own: a reason takes about 120 bytes
REASONS_MAX: Final = 8  # own: a realm without leaders gives one per range
_READY: Final = 200
_VERSION: Final = "version: "
_WARNING: Final = "warning: "
_CODES: Final = b"x-warnings"  # load-balancer.md 5.3: a code for each warning, in order


def _context() -> ssl.SSLContext:
    """Return a context that accepts any certificate: what it says is judged here, whom to trust is the clients' matter.

    Nothing secret is sent over it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    return context


async def probe_balancer(url: str, timeout_s: float = PROBE_S) -> BalancerReport:
    """Look at one balancer; trouble becomes the report's `error`."""
    not_after: dt.datetime | None = None
    with trio.move_on_after(timeout_s):
        try:
            parts = urlsplit(url)
            host = parts.hostname or ""
            stream = await trio.open_tcp_stream(host, parts.port or 443)
            async with trio.SSLStream(stream, _context(), server_hostname=host, https_compatible=True) as tls:
                await tls.do_handshake()
                not_after = _end_of(tls.getpeercert(binary_form=True))
                connection = h11.Connection(h11.CLIENT)
                ready = await _get(tls, connection, parts.netloc, "/readyz")
                live = ""
                if connection.our_state is h11.DONE and connection.their_state is h11.DONE:  # else it says goodbye
                    connection.start_next_cycle()
                    live = (await _get(tls, connection, parts.netloc, "/livez")).text
        except (OSError, trio.BrokenResourceError, ssl.SSLError, h11.ProtocolError, ValueError) as error:
            return BalancerReport(
                url, error=str(error) or type(error).__name__, certificate_end_ms=to_unix_ms(not_after)
            )
        lines = [line for line in ready.text.splitlines() if line]
        told = [line.removeprefix(_WARNING) for line in lines if line.startswith(_WARNING)][:REASONS_MAX]
        codes = [code_of(word.strip()) for word in ready.codes.split(",")]
        warnings = zip(told, itertools.chain(codes, itertools.repeat(Code.OTHER)), strict=False)
        reasons = [] if ready.status == _READY else [line for line in lines if not line.startswith(_WARNING)]
        if len(reasons) > REASONS_MAX:
            reasons = [*reasons[:REASONS_MAX], f"and {len(reasons) - REASONS_MAX} more"]
        version = next((line.removeprefix(_VERSION) for line in live.splitlines() if line.startswith(_VERSION)), "")
        return BalancerReport(
            url,
            version=version,
            certificate_end_ms=to_unix_ms(not_after),
            reasons=tuple(reasons),
            warnings=tuple((code, warning) for warning, code in warnings),
        )
    return BalancerReport(url, error=f"no answer within {timeout_s:.0f} s", certificate_end_ms=to_unix_ms(not_after))


async def certificate_end(url: str, timeout_s: float = PROBE_S) -> dt.datetime:
    """Return when the certificate behind an https URL ends. Raises OSError with the reason when it cannot be had."""
    with trio.move_on_after(timeout_s):
        try:
            parts = urlsplit(url)
            host = parts.hostname or ""
            stream = await trio.open_tcp_stream(host, parts.port or 443)
            async with trio.SSLStream(stream, _context(), server_hostname=host, https_compatible=True) as tls:
                await tls.do_handshake()
                end = _end_of(tls.getpeercert(binary_form=True))
        except (trio.BrokenResourceError, ValueError) as error:
            raise OSError(f"no TLS handshake: {error.__cause__ or error}") from None
        if end is not None:
            return end
        raise OSError("no certificate was shown")
    raise OSError(f"no answer within {timeout_s:.0f} s")


def _end_of(der: bytes | None) -> dt.datetime | None:
    return None if not der else x509.load_der_x509_certificate(der).not_valid_after_utc


@dataclass(frozen=True, slots=True)
class _Page:
    """A page of a balancer; `codes` are those of its warnings."""

    status: int
    codes: str
    text: str


async def _get(stream: trio.abc.Stream, connection: h11.Connection, host: str, path: str) -> _Page:
    """Return one page. Raises `h11.ProtocolError` for anything but a short HTTP answer."""
    request = h11.Request(method="GET", target=path, headers=[("host", host), ("user-agent", "juicebox-hsm")])
    await stream.send_all((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
    status, codes, text = 0, b"", bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(READ_BYTES)))
        elif isinstance(event, h11.Response):
            status = event.status_code
            codes = dict(event.headers).get(_CODES, b"")
        elif isinstance(event, h11.Data):
            text += event.data
            if len(text) > TEXT_BYTES_MAX:
                raise h11.RemoteProtocolError("the answer is too long")
        elif isinstance(event, h11.EndOfMessage):
            return _Page(status, codes.decode("ascii", "replace"), text.decode("utf-8", "replace"))
        elif isinstance(event, h11.ConnectionClosed):
            raise h11.RemoteProtocolError("the connection was closed")


async def probe_balancers(urls: Iterable[str], timeout_s: float = PROBE_S) -> tuple[BalancerReport, ...]:
    """Look at all of them at once, in order of URL."""
    reports: list[BalancerReport] = []

    async def look(url: str) -> None:
        reports.append(await probe_balancer(url, timeout_s))

    async with trio.open_nursery() as nursery:
        for url in sorted(set(urls)):
            nursery.start_soon(look, url)
    return tuple(sorted(reports, key=lambda report: report.url))
