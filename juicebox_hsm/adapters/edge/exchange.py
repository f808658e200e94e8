"""Requests and responses of the client edge, independent of the HTTP version (load-balancer.md 5).

A handler is called as soon as the head of a request is complete; the body is read only when the handler asks for it
(`Request.body`), so that a refused version or an oversized body costs no reading.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from juicebox_hsm.host.addresses import path_of_target

Headers = Sequence[tuple[bytes, bytes]]

REASONS: Final = {
    200: b"OK",
    400: b"Bad Request",
    401: b"Unauthorized",
    404: b"Not Found",
    405: b"Method Not Allowed",
    413: b"Content Too Large",
    426: b"Upgrade Required",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}


UNAUTHORIZED: Final = 401


class BodyTooLarge(Exception):  # an expected outcome of reading, always caught by the handler
    """The body has more bytes than the handler allows; it was not read to its end."""


class Disconnected(Exception):  # ends the exchange, not an error of ours
    """The client went away, or was too slow, before its request was complete."""


@dataclass(frozen=True, slots=True)
class Response:
    """A complete answer. `headers` have lower-case names and do not include content-length or x-exec-time."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def tells_time(self) -> bool:
        """Tell whether `x-exec-time` goes with it: not with a 401, for it would show which tenants have keys."""
        return self.status != UNAUTHORIZED


class Request(ABC):
    """The head of a request, and a way to its body. Header names are lower-case bytes."""

    __slots__ = ("headers", "method", "target")

    def __init__(self, method: str, target: bytes, headers: Headers) -> None:
        self.method = method
        self.target = target
        self.headers = headers

    @property
    def path(self) -> str:
        """Return the path without query, also for a target in absolute form; "", which no route has, without one."""
        return path_of_target(self.target.decode("latin-1")) or ""

    def header(self, name: bytes) -> str | None:
        """Return the first value of header `name` (lower case), decoded as latin-1, or None."""
        for key, value in self.headers:
            if key == name:
                return value.decode("latin-1")
        return None

    def declared_length(self) -> int | None:
        """Return the content-length, or None when absent or not a number (the parser has refused such a request)."""
        text = self.header(b"content-length")
        return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 20 else None

    @abstractmethod
    async def body(self, limit: int) -> bytes:
        """Read and return the whole body of at most `limit` bytes.

        Raises `BodyTooLarge` (before reading when content-length says so, else as soon as the limit is passed) and
        `Disconnected`; the handler lets the latter pass.
        """


Handler = Callable[[Request], Awaitable[Response]]
