"""Hosts, addresses, URLs and names as operators, peers and clients write them: one rule for each, in one place.

Whatever passes here can be resolved, connected to, logged and sent without an error nobody foresaw: Python's resolver
raises `UnicodeError` for a name that is too long, its URL parser `ValueError` for a port or a bracket, and text that is
not UTF-8 breaks the first reply that carries it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, urlsplit

HOST_CHARS_MAX: Final = 253
"""Longest name in the DNS (RFC 1035, without the length bytes)."""

NAME_CHARS_MAX: Final = 255
"""Longest name of a service (own): HOST:PORT behind the role's name fits."""

PORT_MAX: Final = 65_535
_SHOWN_CHARS_MAX: Final = 100
_LABEL: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
"""RFC 1123 with the underscore that container networks use in names."""


@dataclass(frozen=True, slots=True)
class Address:
    """A host and port; IPv6 hosts without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return HOST:PORT with brackets around an IPv6 host."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Tell whether the host is a loopback address or `localhost`."""
        return is_loopback(self.host)

    @property
    def is_unspecified(self) -> bool:
        """Tell whether the host is 0.0.0.0 or ::."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False


@dataclass(frozen=True, slots=True)
class Url:
    """A URL whose parts are usable. `port` is None where none is given."""

    scheme: str
    host: str
    port: int | None
    path: str
    query: str

    @property
    def authority(self) -> str:
        """Return HOST or HOST:PORT as a request's `Host` header has it."""
        if self.port is not None:
            return str(Address(self.host, self.port))
        return f"[{self.host}]" if ":" in self.host else self.host


def is_loopback(host: str) -> bool:
    """Tell whether `host` names this machine: `localhost` or a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_host(text: str) -> str:
    """Return a host that can be resolved: an IP address without brackets, or a name. Raises ValueError with the reason.

    A name in other letters than ASCII becomes what the DNS calls it (IDNA).
    """
    try:
        ipaddress.ip_address(text)
    except ValueError:
        pass
    else:
        return text
    try:
        name = text if text.isascii() else text.encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    labels = name.removesuffix(".").split(".")
    if len(name) > HOST_CHARS_MAX or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{shown(text)} is neither an IP address nor a host name")
    return name


def parse_address(text: str) -> Address:
    """Parse HOST:PORT or [V6]:PORT; raises ValueError with the reason."""
    host, separator, port_text = text.rpartition(":")
    if not separator or not host:
        raise ValueError(f"{shown(text)} is not HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{shown(text)}: write an IPv6 address as [ADDRESS]:PORT")
    return Address(parse_host(host), parse_port(port_text))


def parse_port(text: str, port_min: int = 0) -> int:
    """Parse a port from `port_min` to 65535; raises ValueError."""
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(PORT_MAX))
    if not is_number or not port_min <= int(text) <= PORT_MAX:
        raise ValueError(f"{shown(text)}: the port must be a number from {port_min} to {PORT_MAX}")
    return int(text)


def parse_url(text: str, schemes: Collection[str]) -> Url:
    """Parse SCHEME://HOST[:PORT][/...]; raises ValueError with the reason."""
    parts = _split(text)
    if parts.scheme not in schemes:
        raise ValueError(f"{shown(text)}: expected {' or '.join(f'{scheme}://HOST[:PORT]' for scheme in schemes)}")
    try:
        port = parts.port
    except ValueError:
        raise ValueError(f"{shown(text)}: the port must be a number from 1 to {PORT_MAX}") from None
    if port == 0:
        raise ValueError(f"{shown(text)}: the port must be a number from 1 to {PORT_MAX}")
    try:
        host = parse_host(parts.hostname or "")
    except ValueError as error:
        raise ValueError(f"{shown(text)}: {error}") from None
    return Url(parts.scheme, host, port, parts.path, parts.query)


def emulator_of(text: str, service_host: str) -> str:
    """Return HOST:PORT of an emulator's `http://HOST:PORT`, "" for https at `service_host`; raises ValueError."""
    try:
        url = parse_url(text, ("http", "https"))
    except ValueError:
        url = None
    if url is not None and url.scheme == "https" and url.host == service_host:
        return ""
    if url is None or url.scheme != "http" or url.port is None:
        raise ValueError(f"{text}: expected http://HOST:PORT of an emulator, or https://{service_host}")
    return url.authority


def parse_name(text: str) -> str:
    """Return the name of a service for logs and statuses; raises ValueError unless it is printable and short."""
    if not text.isprintable() or len(text) > NAME_CHARS_MAX:
        raise ValueError(f"{shown(text)}: a name has at most {NAME_CHARS_MAX} characters, all printable")
    return text


def path_of_target(target: str) -> str | None:
    """Return the path in an HTTP request's target, in absolute form too; None when it has none."""
    if target.startswith("/"):
        return target.partition("?")[0]
    try:
        path = _split(target).path
    except ValueError:
        return None
    return path if path.startswith("/") else None


def is_text(text: str) -> bool:
    """Tell whether `text` was UTF-8: what the system hands over otherwise carries its odd bytes as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(text: str) -> str:
    """Return `text` for a message: quoted, every odd character escaped, not too long."""
    return ascii(text if len(text) <= _SHOWN_CHARS_MAX else f"{text[:_SHOWN_CHARS_MAX]}...")


def _split(text: str) -> SplitResult:
    """Split a URL; raises ValueError with our words for a broken bracket or a character that is none of a URL's."""
    try:
        return urlsplit(text)
    except ValueError:
        raise ValueError(f"{shown(text)} is not a URL") from None
