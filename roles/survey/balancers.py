"""Judge load balancers from outside, as clients meet them: TLS handshake, `/readyz`, `/livez` (operator-tools.md 2)."""

from __future__ import annotations

import datetime as dt
import itertools
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import h11
import trio
from cryptography import x509

from juicebox_hsm.adapters.process.dialing import dial
from juicebox_hsm.adapters.tls.certificate_end import to_unix_ms
from juicebox_hsm.adapters.tls.wording import reason_of
from juicebox_hsm.host.addresses import parse_url
from juicebox_hsm.host.cluster.verdict import BalancerReport
from juicebox_hsm.host.codes import Code, code_of
from juicebox_hsm.host.readiness import REASONS, WARNINGS
from roles.words import WARNING

PROBE_S: Final = 5.0
READ_BYTES: Final = 16_384
TEXT_BYTES_MAX: Final = 65_536  # own: a reason takes about 120 bytes
REASONS_MAX: Final = 8  # own: a realm without leaders gives one per range
_READY: Final = 200
_VERSION: Final = "version: "
_NAME: Final = "name: "


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
            parts = parse_url(url, ("https",))
            stream = await dial(parts.host, parts.port or 443)
            async with trio.SSLStream(stream, _context(), server_hostname=parts.host, https_compatible=True) as tls:
                await tls.do_handshake()
                not_after = _end_of(tls.getpeercert(binary_form=True))
                connection = h11.Connection(h11.CLIENT)
                ready = await _get(tls, connection, parts.authority, "/readyz")
                live = ""
                if connection.our_state is h11.DONE and connection.their_state is h11.DONE:  # else it says goodbye
                    connection.start_next_cycle()
                    live = (await _get(tls, connection, parts.authority, "/livez")).text
        except (OSError, trio.BrokenResourceError, ssl.SSLError, h11.ProtocolError, ValueError) as error:
            return BalancerReport(url, error=reason_of(error), certificate_end_ms=to_unix_ms(not_after))
        lines = [line for line in ready.text.splitlines() if line]
        warnings = [line.removeprefix(WARNING) for line in lines if line.startswith(WARNING)]
        reasons = [] if ready.status == _READY else [line for line in lines if not line.startswith(WARNING)]
        version, name = (_told(live, what) for what in (_VERSION, _NAME))
        return BalancerReport(
            url,
            version=version,
            name=name,
            certificate_end_ms=to_unix_ms(not_after),
            reasons=_coded(ready.reasons, reasons),
            warnings=_coded(ready.warnings, warnings),
        )
    return BalancerReport(url, error=f"no answer within {timeout_s:.0f} s", certificate_end_ms=to_unix_ms(not_after))


def _told(text: str, what: str) -> str:
    """Return what follows `what` at the beginning of a line."""
    return next((line.removeprefix(what) for line in text.splitlines() if line.startswith(what)), "")


async def certificate_end(url: str, timeout_s: float = PROBE_S) -> dt.datetime:
    """Return when the certificate behind an https URL ends. Raises OSError with the reason when it cannot be had."""
    with trio.move_on_after(timeout_s):
        try:
            parts = parse_url(url, ("https",))
            stream = await dial(parts.host, parts.port or 443)
            async with trio.SSLStream(stream, _context(), server_hostname=parts.host, https_compatible=True) as tls:
                await tls.do_handshake()
                end = _end_of(tls.getpeercert(binary_form=True))
        except (trio.BrokenResourceError, ValueError) as error:
            raise OSError(f"no TLS handshake: {reason_of(error)}") from None
        if end is not None:
            return end
        raise OSError("no certificate was shown")
    raise OSError(f"no answer within {timeout_s:.0f} s")


def _end_of(der: bytes | None) -> dt.datetime | None:
    return None if not der else x509.load_der_x509_certificate(der).not_valid_after_utc


@dataclass(frozen=True, slots=True)
class _Page:
    """A page of a balancer, with the codes of its reasons and of its warnings."""

    status: int
    reasons: str
    warnings: str
    text: str


def _coded(codes: str, lines: list[str]) -> tuple[tuple[Code, str], ...]:
    """Return the first lines, each with its code; a balancer of an older version names none."""
    named = [code_of(word.strip()) for word in codes.split(",")]
    told = [*zip(itertools.chain(named, itertools.repeat(Code.OTHER)), lines[:REASONS_MAX], strict=False)]
    left = len(lines) - len(told)
    return (*told, (Code.OTHER, f"and {left} more")) if left else tuple(told)


async def _get(stream: trio.abc.Stream, connection: h11.Connection, host: str, path: str) -> _Page:
    """Return one page. Raises `h11.ProtocolError` for anything but a short HTTP answer."""
    request = h11.Request(method="GET", target=path, headers=[("host", host), ("user-agent", "juicebox-hsm")])
    await stream.send_all((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
    status, text = 0, bytearray()
    headers: dict[str, str] = {}
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(READ_BYTES)))
        elif isinstance(event, h11.Response):
            status = event.status_code
            headers = {name.decode("ascii"): value.decode("ascii", "replace") for name, value in event.headers}
        elif isinstance(event, h11.Data):
            text += event.data
            if len(text) > TEXT_BYTES_MAX:
                raise h11.RemoteProtocolError("the answer is too long")
        elif isinstance(event, h11.EndOfMessage):
            told = (headers.get(REASONS, ""), headers.get(WARNINGS, ""))
            return _Page(status, *told, text.decode("utf-8", "replace"))
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
