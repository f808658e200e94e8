"""Trouble with TLS in words: no function of OpenSSL, no file and line of an interpreter."""

from __future__ import annotations

import re
import ssl
from pathlib import Path

import pytest
import trio

from juicebox_hsm.adapters.tls.certificates import init_ca, issue
from juicebox_hsm.adapters.tls.cluster_tls import ClusterTls
from juicebox_hsm.adapters.tls.streams import TlsStream
from juicebox_hsm.adapters.tls.wording import reason_of, tls_reason

RAW = re.compile(r"_ssl\.c|\[SSL|error:[0-9A-F]{8}|_[A-Z]{3,}")


def _identity(path: Path, ca: str, role: str) -> ClusterTls:
    if not (path / ca).exists():
        init_ca(path / ca)
    issue(path / ca, role, role, path / f"{ca}-{role}")
    return ClusterTls.load(path / f"{ca}-{role}")


async def test_two_cas_are_told_as_that(tmp_path: Path) -> None:
    """Each side of a handshake between strangers says whose certificate is not trusted."""
    server, client = _identity(tmp_path, "one", "agent"), _identity(tmp_path, "two", "operator")
    left, right = trio.testing.memory_stream_pair()
    said: dict[str, str] = {}

    async def shake(side: str, stream: TlsStream) -> None:
        try:
            await stream.handshake()
            await stream.receive_some()
        except (ssl.SSLError, trio.BrokenResourceError) as error:
            said[side] = reason_of(error)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(shake, "server", TlsStream(left, server.server_context, server_side=True))
        nursery.start_soon(shake, "client", TlsStream(right, client.client_context, server_side=False))
    assert said["client"].startswith("its certificate is not trusted here: ")
    assert said["server"] == "the other side does not trust the CA of our certificate"


@pytest.mark.parametrize("reason", ["WRONG_VERSION_NUMBER", "TLSV1_ALERT_UNKNOWN_CA", "SOMETHING_NEW", "PEM lib", ""])
def test_no_raw_text(reason: str) -> None:
    """Known and unknown reasons are sentences."""
    error = ssl.SSLError(1, f"[SSL: {reason}] something (_ssl.c:1000)")
    error.reason = reason
    assert not RAW.search(tls_reason(error)) or not reason
    assert tls_reason(error)


def test_other_errors_keep_their_words() -> None:
    """What is no TLS error says what the system says; the first of several addresses stands for all."""
    refused = ConnectionRefusedError(111, "Connection refused")
    assert reason_of(refused) == "Connection refused"
    several = OSError("all attempts to connect failed")
    several.__cause__ = ExceptionGroup("multiple", [refused, OSError(113, "No route to host")])
    assert reason_of(several) == "Connection refused"
    assert reason_of(trio.BrokenResourceError()) == "BrokenResourceError"
