"""The client's configuration: reading, checks and request URLs (client-protocol.md 16)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.client import Configuration, ConfigurationError, Realm
from juicebox_hsm.client.configuration import parse_realm_id
from juicebox_hsm.ids import RealmId


def realm(number: int = 1, **changes: Any) -> dict[str, Any]:
    """Return a realm's members with changes; None removes one."""
    members = {"id": f"{number:02x}" * 16, "address": "https://h/", "public_key": "ab" * 32, **changes}
    return {name: value for name, value in members.items() if value is not None}


def configuration(*realms: Any, **changes: Any) -> dict[str, Any]:
    """Return a configuration's members, by default of one realm."""
    members = {
        "realms": list(realms) or [realm()],
        "register_threshold": max(len(realms), 1),
        "recover_threshold": max(len(realms), 1) // 2 + 1,
        "pin_hashing_mode": "Standard2019",
        **changes,
    }
    return {name: value for name, value in members.items() if value is not None}


@pytest.mark.parametrize(
    "members",
    [
        configuration(),
        configuration(realm(1), realm(2), realm(3)),
        configuration(realm(1), realm(2), realm(3), recover_threshold=3),
        configuration(realm(1), realm(2), realm(3), register_threshold=2),
        configuration(realm(public_key=None)),
        configuration(realm(id="0A0B0C0D-0e0f-0001-0203-040506070809")),
        configuration(realm(public_key="AB" * 32)),
        configuration(pin_hashing_mode="FastInsecure"),
        configuration(extra=1),
    ],
)
def test_good_configurations(members: dict[str, Any]) -> None:
    """Good configurations are read from text, bytes and objects alike, and written back."""
    read = Configuration.from_json(members)
    text = json.dumps(members)
    assert Configuration.from_json(text) == Configuration.from_json(text.encode()) == read
    assert Configuration.from_json(read.to_json()) == read


@pytest.mark.parametrize(
    "members",
    [
        configuration(realms=[]),
        configuration(realms=None),
        configuration(realms={"a": 1}),
        configuration("x"),
        configuration(realm(1), realm(1)),
        configuration(realm(1), realm(1, id=("01" * 16).upper())),
        configuration(realm(id="01" * 15)),
        configuration(realm(id="0g" * 16)),
        configuration(realm(id=5)),
        configuration(realm(address="ftp://h/")),
        configuration(realm(address="h:1")),
        configuration(realm(address="https://[bad/")),
        configuration(realm(address="https://h:99999/")),
        configuration(realm(address=None)),
        configuration(realm(public_key="ab" * 31)),
        configuration(realm(public_key="")),
        configuration(realm(public_key=7)),
        configuration(recover_threshold=0),
        configuration(recover_threshold=2),
        configuration(recover_threshold=True),
        configuration(recover_threshold="1"),
        configuration(realm(1), realm(2), recover_threshold=1),
        configuration(realm(1), realm(2), realm(3), realm(4), recover_threshold=2),
        configuration(register_threshold=0),
        configuration(register_threshold=2),
        configuration(realm(1), realm(2), realm(3), recover_threshold=3, register_threshold=2),
        configuration(pin_hashing_mode="standard2019"),
        configuration(pin_hashing_mode=None),
        configuration(pin_hashing_mode=["Standard2019"]),
        [],
    ],
)
def test_bad_configurations(members: Any) -> None:
    """Each broken rule is refused when the configuration is made, not when a secret is lost."""
    with pytest.raises(ConfigurationError):
        Configuration.from_json(json.dumps(members))


@given(st.binary(max_size=100) | st.text(max_size=100))
def test_garbage(source: str | bytes) -> None:
    """Whatever the text, reading returns or raises `ConfigurationError`."""
    with pytest.raises(ConfigurationError):
        Configuration.from_json(source)


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("https://h:8080", "https://h:8080/req"),
        ("https://h:8080/", "https://h:8080/req"),
        ("https://h/a/", "https://h/a/req"),
        ("https://h/a", "https://h/req"),
    ],
)
def test_request_url(address: str, url: str) -> None:
    """The address is joined with `req` as a relative reference."""
    assert Realm(RealmId(bytes(16)), address).url == url


def test_share_numbers_follow_ids() -> None:
    """Shares are numbered from 1 in the order of ids, whatever the order of the configuration."""
    read = Configuration.from_json(configuration(realm(3), realm(1), realm(2)))
    assert [read.share_number(each) for each in read.realms] == [1, 2, 3]
    assert [each.id[0] for each in read.realms] == [1, 2, 3]
    assert parse_realm_id("01" * 16) == read.realms[0].id


@pytest.mark.parametrize(("realm_id", "public_key"), [(bytes(15), None), (bytes(17), None), (bytes(16), b"k" * 31)])
def test_realms_made_by_hand(realm_id: bytes, public_key: bytes | None) -> None:
    """A realm made without JSON is checked as well: the crypto below trusts its lengths."""
    with pytest.raises(ConfigurationError):
        Realm(RealmId(realm_id), "https://h/", public_key)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "[::1]"])
def test_http_is_for_this_machine(host: str) -> None:
    """Loopback realms may be asked in the clear."""
    assert Realm(RealmId(bytes(16)), f"http://{host}:8080/").url == f"http://{host}:8080/req"


@pytest.mark.parametrize("host", ["realm.example", "10.0.0.1", "localhost.example", "127.0.0.1.example", "[::2]"])
def test_http_elsewhere_is_refused(host: str) -> None:
    """Tokens never travel in the clear to another machine."""
    with pytest.raises(ConfigurationError, match="use https"):
        Realm(RealmId(bytes(16)), f"http://{host}/")
