"""Hosts, addresses, URLs and names: what passes can be used, what does not is refused in words."""

from __future__ import annotations

import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from juicebox_hsm.host.addresses import (
    Address,
    emulator_of,
    is_text,
    parse_address,
    parse_host,
    parse_name,
    parse_url,
    path_of_target,
)

SCHEMES = ("https", "http", "tls")
ODD = [
    "http://[::1",
    "http://[/livez",
    "https://x:99999/",
    "https://x:0/",
    "https://x:y/",
    "https://dd..agent/",
    f"https://{'a' * 64}.example/",
    f"https://{'a.' * 127}example/",
    "https://x y/",
    "https:///path",
    "ftp://x/",
    "//x",
    "",
    "https://x\udcff/",
    "https://-x/",
]


@pytest.mark.parametrize("text", ODD)
def test_urls_that_nobody_can_reach(text: str) -> None:
    """A URL that a resolver or a parser would trip over later is refused here, in printable words."""
    with pytest.raises(ValueError, match=r".") as caught:
        parse_url(text, SCHEMES)
    assert not isinstance(caught.value, UnicodeError)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


@given(st.text() | st.sampled_from(ODD).flatmap(lambda odd: st.text(max_size=3).map(lambda more: odd + more)))
@example("\udc80:1")
def test_any_text_is_used_or_refused(text: str) -> None:
    """Whatever is written: ValueError, or a host that the resolver takes without an error of its encoding."""
    hosts = []
    for parse in (parse_host, lambda text: parse_address(text).host, lambda text: parse_url(text, SCHEMES).host):
        try:
            hosts.append(parse(text))
        except UnicodeError:
            raise
        except ValueError:
            pass
    for host in hosts:
        try:
            socket.getaddrinfo(host, 1, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            pass  # a name, which was not asked for


@pytest.mark.parametrize(
    ("text", "host", "port", "authority"),
    [
        ("https://x", "x", None, "x"),
        ("https://X:7/", "x", 7, "x:7"),
        ("https://[::1]:7/", "::1", 7, "[::1]:7"),
        ("https://[::1]/", "::1", None, "[::1]"),
        ("https://user:pin@lb_1.example./", "lb_1.example.", None, "lb_1.example."),
        ("https://m\u00fcnchen.example/", "xn--mnchen-3ya.example", None, "xn--mnchen-3ya.example"),
    ],
)
def test_urls_that_work(text: str, host: str, port: int | None, authority: str) -> None:
    """Names, addresses and ports come out as they are connected to; a user in a URL goes nowhere."""
    url = parse_url(text, SCHEMES)
    assert (url.host, url.port, url.authority) == (host, port, authority)


def test_addresses() -> None:
    """HOST:PORT with any port, an IPv6 address in brackets only."""
    assert parse_address("[::1]:0") == Address("::1", 0)
    assert parse_address("lb-1.example:65535") == Address("lb-1.example", 65535)
    for text in ("x", ":1", "x:", "x:65536", "x:-1", "x:\u0661", "::1:7", "dd..agent:1", "[::1:7", f"{'a' * 64}:1"):
        with pytest.raises(ValueError, match=r"."):
            parse_address(text)


def test_names() -> None:
    """A service's name can be logged, sent and shown in one line."""
    assert parse_name("Agent 1 \u00fc") == "Agent 1 \u00fc"
    for text in ("a\nb", "\udcff", "\x00", "a" * 256):
        with pytest.raises(ValueError, match=r"."):
            parse_name(text)
    assert is_text("\u00fc")
    assert not is_text("\udcff")


def test_targets() -> None:
    """A request's path is found in both forms of a target, and never by an exception."""
    assert path_of_target("/livez?x") == "/livez"
    assert path_of_target("http://host/livez?x") == "/livez"
    for odd in ("http://[/livez", "http://host", "?x", "*", "", "host:443"):
        assert path_of_target(odd) is None


def test_emulators() -> None:
    """An emulator is named by http and a port; Google's own address means none."""
    assert emulator_of("http://127.0.0.1:7", "service.example") == "127.0.0.1:7"
    assert emulator_of("https://service.example/", "service.example") == ""
    for text in ("http://127.0.0.1", "https://other.example", "http://[::1", "http://x:99999"):
        with pytest.raises(ValueError, match=r"expected http://HOST:PORT"):
            emulator_of(text, "service.example")
