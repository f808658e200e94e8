"""A Google service in a thread: TLS by a CA of the test's, and a bearer token in every call, which may expire.

It answers every method with nothing, which is a good answer to all that these tests send.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from juicebox_hsm.adapters.tls.certificates import CaKind, init_ca, issue_edge
from tests.patience import HANGS_S

STREAMS = {"ReadRows", "MutateRows"}
WAIT_S = HANGS_S


@dataclass(frozen=True)
class Call:
    """One call: its method, the connection it came over, its token, what it was routed by."""

    method: str
    peer: str
    token: str
    routing: str


class GoogleService:
    """`valid` is the token it takes; `missing` names tables that do not exist."""

    def __init__(self, directory: Path) -> None:
        init_ca(directory / "ca", kind=CaKind.EDGE)
        issue_edge(directory / "ca", ["localhost"], directory / "cert.pem", directory / "key.pem")
        self.roots = (directory / "ca" / "ca.pem").read_bytes()
        self.valid = "token1"
        self.missing: set[str] = set()
        self.calls: list[Call] = []
        self._changed = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(8), handlers=(self,))
        pair = ((directory / "key.pem").read_bytes(), (directory / "cert.pem").read_bytes())
        port = self._server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials((pair,)))
        self.target = f"localhost:{port}"
        self._server.start()

    def stop(self) -> None:
        """Stop serving."""
        self._server.stop(None).wait()

    def wait_for(self, condition: Callable[[list[Call]], bool]) -> bool:
        """Wait until the calls so far are as wanted; blocks."""
        with self._changed:
            return self._changed.wait_for(lambda: condition(self.calls), WAIT_S)

    def service(self, details: Any) -> Any:
        """Return how one call is handled; what the library asks of a handler."""
        name = details.method.rpartition("/")[2]
        given = dict(details.invocation_metadata)
        token, routing = given.get("authorization", ""), given.get("x-goog-request-params", "")

        def check(context: grpc.ServicerContext) -> None:
            with self._changed:
                self.calls.append(Call(name, context.peer(), token.removeprefix("Bearer "), routing))
                self._changed.notify_all()
            if token != f"Bearer {self.valid}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "Request had invalid authentication credentials.")
            if any(table in routing for table in self.missing):
                context.abort(grpc.StatusCode.NOT_FOUND, "Table not found")

        def unary(request: bytes, context: grpc.ServicerContext) -> bytes:
            check(context)
            return b""

        def stream(request: bytes, context: grpc.ServicerContext) -> Any:
            check(context)
            return iter(())

        return (
            grpc.unary_stream_rpc_method_handler(stream)
            if name in STREAMS
            else grpc.unary_unary_rpc_method_handler(unary)
        )
