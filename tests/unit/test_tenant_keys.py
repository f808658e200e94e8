"""The secrets codec, record ids and event user ids (client-protocol.md 14 and 15, load-balancer.md 6.4 and 7)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm import tenant_keys
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.tenant_keys import (
    SecretAlgorithm,
    SecretError,
    TenantSecret,
    parse_file,
    parse_payload,
    record_id_key,
)
from tests.vectors import VECTORS, raw

EXAMPLE_FILE = """{"record-id-randomization": {"1": {"data": "32-bytes-to-randomize-record-IDs",
                                   "encoding": "UTF8", "algorithm": "Blake2sMac256"}},
 "tenant-test-acme": {"1": {"data": "an-auth-token-key", "encoding": "UTF8",
                            "algorithm": "HmacSha256"}}}"""


def payload(**changes: Any) -> dict[str, Any]:
    """Return a good payload with changes; None removes a member."""
    members = {"data": "00ff", "encoding": "Hex", "algorithm": "HmacSha256", **changes}
    return {name: value for name, value in members.items() if value is not None}


def test_a_tenant_name_is_no_longer_than_every_carrier_takes() -> None:
    """211 characters are a name, 212 are not, and a secrets file with such a name is refused by that name's rule."""
    longest = "a" * tenant_keys.TENANT_CHARS_MAX
    assert len(f"tenant-{longest}-{'0' * 32}-sub") == 255
    assert tenant_keys.is_tenant_name(longest)
    for name in (longest + "a", "", "a\n", "a-b", "\ud800"):
        assert not tenant_keys.is_tenant_name(name)
        with pytest.raises(SecretError, match="a tenant name has 1 to 211"):
            tenant_keys.parse_file(json.dumps({f"tenant-{name}": {}}))


def test_example_file() -> None:
    """The documented example parses to two secrets, and its key gives the documented record ids."""
    secrets = parse_file(EXAMPLE_FILE)
    assert secrets["tenant-test-acme"][1].data.expose() == b"an-auth-token-key"
    key = record_id_key(secrets["record-id-randomization"])
    documented = {
        ("test-acme", "mario"): "b350b4e784813b000636ff9f686ff47717103873ce6ed34bfd4e4a7195c280f1",
        ("acme", ""): "349b2ee7f6e9797a9f16b3ec6f5314e0f4c163882eb13d8cb646e7124373b00e",
    }
    for (tenant, user), expected in documented.items():
        assert tenant_keys.record_id(key, tenant, user).hex() == expected


def test_record_id_vector() -> None:
    """The published vector for record id and event user id."""
    vector = VECTORS["record_id"]
    key = Secret(raw("record_id", "key"))
    assert tenant_keys.record_id(key, vector["tenant"], vector["user"]).hex() == vector["record_id"]
    assert tenant_keys.event_user_id(vector["tenant"], vector["user"]) == vector["event_user_id"]
    documented = "447ddec5f08c757d40e7acb9f1bc10ed44a960683bb991f5e4ed17498f786ff8"
    assert tenant_keys.event_user_id("test", "121314") == documented


def test_fingerprint_is_stable_and_short() -> None:
    """The fingerprint is the documented 8 bytes of a labelled hash, different per key."""
    first = tenant_keys.record_id_key_fingerprint(Secret(b"a" * 32))
    assert first == bytes.fromhex("1684de8921ad6ad8")
    assert first != tenant_keys.record_id_key_fingerprint(Secret(b"b" * 32))


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (payload(), b"\x00\xff"),
        (payload(data="00FF"), b"\x00\xff"),
        (payload(data=""), b""),
        (payload(data="\u00fcx", encoding="UTF8"), b"\xc3\xbcx"),
        (payload(extra=5), b"\x00\xff"),
    ],
)
def test_good_payloads(members: dict[str, Any], expected: bytes) -> None:
    """Both encodings decode; hex of either case; unknown members are ignored."""
    assert parse_payload(json.dumps(members), "entry").data.expose() == expected


@pytest.mark.parametrize(
    "members",
    [
        payload(data="0"), payload(data="0g"), payload(data="00 ff"), payload(data=5), payload(data=None),
        payload(encoding="hex"), payload(encoding="Base64"), payload(encoding=None), payload(encoding=["Hex"]),
        payload(algorithm="HMACSHA256"), payload(algorithm=None), payload(algorithm={"a": 1}),
        payload(data="\ud800", encoding="UTF8"), [], "secret-data-itself", 5, None,
    ],
)  # fmt: skip
def test_bad_payloads_name_the_entry_and_hide_the_data(members: object) -> None:
    """Every malformed payload is refused with its entry's name and none of its data."""
    with pytest.raises(SecretError, match="tenant-x version 7") as caught:
        parse_payload(json.dumps(members), "tenant-x version 7")
    assert "secret-data-itself" not in str(caught.value)


@pytest.mark.parametrize("text", ["raw key", b"\xff", "[" * 100_000, '{"data":"00","data":"01"}', ""])
def test_payload_that_is_not_json(text: str | bytes) -> None:
    """A payload that is not the JSON is refused: a typo must not become a key. Taking it raw is explicit."""
    with pytest.raises(SecretError, match="entry"):
        parse_payload(text, "entry")
    assert tenant_keys.raw_payload(b"raw key") == TenantSecret(Secret(b"raw key"), SecretAlgorithm.HMAC_SHA256)


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ('{"tenant-a": {"01": {}}}', "tenant-a version 01"),
        ('{"tenant-a": {"-1": {}}}', "tenant-a version -1"),
        ('{"tenant-a": {"x": {}}}', "tenant-a version x"),
        ('{"tenant-a": {"18446744073709551616": {}}}', "tenant-a version 18446744073709551616"),
        ('{"tenant-a": {"1": "raw"}}', "tenant-a version 1"),
        ('{"tenant-a": []}', "tenant-a"),
        ("[]", "secrets file"),
        ('{"tenant-a": {}, "tenant-a": {}}', "secrets file"),
    ],
)
def test_bad_files(text: str, entry: str) -> None:
    """One bad entry fails the load, by name; repeated names and versions in two spellings are refused."""
    with pytest.raises(SecretError, match=entry):
        parse_file(text)


@given(st.binary(max_size=64), st.sampled_from(SecretAlgorithm))
def test_payload_round_trip(data: bytes, algorithm: SecretAlgorithm) -> None:
    """Writing and reading a payload gives the secret back."""
    secret = TenantSecret(Secret(data), algorithm)
    assert parse_payload(tenant_keys.encode_payload(secret), "entry") == secret


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_parsers_document_their_failures(data: bytes | str) -> None:
    """Whatever the input, the parsers return or raise `SecretError`."""
    for parse in (lambda: parse_payload(data, "entry"), lambda: parse_file(data)):
        try:
            parse()
        except SecretError:
            pass


def blake_key(size: int = 32) -> TenantSecret:
    """Return a record-id key of a size."""
    return TenantSecret(Secret(b"k" * size), SecretAlgorithm.BLAKE2S_MAC256)


def test_record_id_key_choice() -> None:
    """One enabled version is used; several are refused unless one is named."""
    assert record_id_key({3: blake_key()}) == Secret(b"k" * 32)
    with pytest.raises(SecretError, match="several enabled versions"):
        record_id_key({1: blake_key(), 2: blake_key()})
    assert record_id_key({1: blake_key(), 2: blake_key()}, 1) == Secret(b"k" * 32)
    with pytest.raises(SecretError, match="not enabled"):
        record_id_key({1: blake_key()}, 2)
    with pytest.raises(SecretError, match="no enabled version"):
        record_id_key({})


@pytest.mark.parametrize(
    "secret", [blake_key(31), blake_key(33), TenantSecret(Secret(b"k" * 32), SecretAlgorithm.HMAC_SHA256)]
)
def test_record_id_key_form(secret: TenantSecret) -> None:
    """The key has exactly 32 bytes and its own algorithm."""
    with pytest.raises(SecretError):
        record_id_key({1: secret})


@pytest.mark.parametrize(
    ("name", "is_tenant", "is_test"),
    [
        ("acme", True, False), ("test-acme", True, True), ("A9", True, False), ("test-", False, False),
        ("test", True, False), ("a-b", False, False), ("a:b", False, False), ("", False, False),
        ("acme\n", False, False), ("test-test-a", False, False), ("Test-a", False, False), ("\u00e9", False, False),
    ],
)  # fmt: skip
def test_tenant_names(name: str, is_tenant: bool, is_test: bool) -> None:
    """Tenant names are letters and digits behind an optional test- prefix."""
    assert (tenant_keys.is_tenant_name(name), tenant_keys.is_test_tenant(name)) == (is_tenant, is_test)
    assert tenant_keys.tenant_secret_name("acme") == "tenant-acme"


def test_strength_warning() -> None:
    """Short HMAC keys deserve a warning that does not show them; others do not."""
    weak = tenant_keys.strength_warning(TenantSecret(Secret(b"short"), SecretAlgorithm.HMAC_SHA256))
    assert weak is not None
    assert "short" not in weak.replace("shorter", "")
    assert tenant_keys.strength_warning(TenantSecret(Secret(b"k" * 32), SecretAlgorithm.HMAC_SHA256)) is None
    assert tenant_keys.strength_warning(blake_key()) is None
