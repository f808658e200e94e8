"""Looking at balancers as clients meet them, over loopback."""

from __future__ import annotations

import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from juicebox_hsm.adapters.tls.certificates import CaKind, init_ca, issue_edge
from juicebox_hsm.host.certificates import remaining_days
from juicebox_hsm.host.codes import Code
from roles.survey.balancers import probe_balancer, probe_balancers

Answer = Callable[[trio.SSLStream[trio.SocketStream]], Awaitable[None]]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """A server context with a fresh edge certificate."""
    path = tmp_path_factory.mktemp("edge")
    init_ca(path / "ca", kind=CaKind.EDGE)
    issue_edge(path / "ca", ["localhost"], path / "cert.pem", path / "key.pem", 30)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path / "cert.pem", path / "key.pem")
    return context


@asynccontextmanager
async def _balancer(tls: ssl.SSLContext, answers: list[bytes]) -> AsyncIterator[str]:
    """Serve one connection: each request gets the next answer."""

    async def serve(stream: trio.SocketStream) -> None:
        secured = trio.SSLStream(stream, tls, server_side=True, https_compatible=True)
        for answer in answers:
            if not await secured.receive_some(4096):
                return
            await secured.send_all(answer)
        await secured.aclose()

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield f"https://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


def _response(status: int, text: str, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} x", f"content-length: {len(text)}", *headers, "", text]
    return "\r\n".join(lines).encode()


async def test_ready_balancer(tls: ssl.SSLContext) -> None:
    """No reasons, its version, and the end of its certificate."""
    live = "Juicebox load balancer: 7\nname: lb1\nversion: 7\n"
    async with _balancer(tls, [_response(200, "ready\n"), _response(200, live)]) as url:
        report = await probe_balancer(url)
    assert (report.error, report.version, report.reasons) == ("", "7", ())
    assert report.certificate_end_ms is not None
    assert 29 < remaining_days(report.certificate_end_ms, round(time.time() * 1000)) <= 30


async def test_reasons_are_lines_and_bounded(tls: ssl.SSLContext) -> None:
    """Each line of /readyz is a reason with its code; a long list is cut. One that closes after it is still judged."""
    text = "".join(f"reason {number}\n" for number in range(20))
    async with _balancer(tls, [_response(503, text, "x-reasons: stopping", "connection: close")]) as url:
        report = await probe_balancer(url)
    assert report.error == ""
    assert report.reasons[:2] == ((Code.STOPPING, "reason 0"), (Code.OTHER, "reason 1"))
    assert report.reasons[-1] == (Code.OTHER, "and 12 more")
    assert len(report.reasons) == 9


async def test_warnings_are_no_reasons(tls: ssl.SSLContext) -> None:
    """A warning in /readyz is reported, of a balancer that is ready and of one that is not, with the code it names."""
    told = "warning: the cluster certificate ends on 2026-11-20, in 9 days"
    for status, first, reasons in ((200, "ready", ()), (503, "no realms", ((Code.OTHER, "no realms"),))):
        text = f"{first}\n{told}\n"
        for headers, code in (
            (("x-warnings: certificate",), Code.CERTIFICATE),
            (("x-warnings: of-tomorrow",), Code.OTHER),
            ((), Code.OTHER),  # a balancer of an older version
        ):
            async with _balancer(tls, [_response(status, text, "connection: close", *headers)]) as url:
                report = await probe_balancer(url)
            assert report.reasons == reasons
            assert report.warnings == ((code, told.removeprefix("warning: ")),)


@pytest.mark.parametrize(
    "answer", [b"", b"\x00\x01garbage\r\n\r\n", _response(200, "x" * 100)[:30], b"SSH-2.0\r\n\r\n"]
)
async def test_garbage_is_an_error(tls: ssl.SSLContext, answer: bytes) -> None:
    """Whatever else answers there is reported, with the certificate it showed."""
    async with _balancer(tls, [answer]) as url:
        (report,) = await probe_balancers([url, url])
    assert report.error
    assert report.certificate_end_ms is not None


async def test_nobody_there() -> None:
    """A refused connection and an address that is none are errors, not exceptions."""
    for url in ("https://127.0.0.1:1", "https://[::", "nonsense"):
        assert (await probe_balancer(url)).error


async def test_silence_ends(tls: ssl.SSLContext) -> None:
    """A balancer that accepts and says nothing costs the time-out and no more."""
    async with _balancer(tls, []) as url:
        assert "no answer" in (await probe_balancer(url, 0.0)).error
