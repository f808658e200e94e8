"""Row keys sort as the scans need it and are those of the vectors (storage.md 2, part C)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.accounting import day_micros
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ids import GroupId, RealmId, RecordId
from juicebox_hsm.merkle.kernel import row_key
from juicebox_hsm.ports.errors import StoreInvalid

GROUP = GroupId(bytes(range(16)))
indexes = st.integers(0, 2**64 - 1)
tenants = st.text(st.characters(min_codepoint=0x20, exclude_categories=["Cs"]), min_size=1, max_size=40)


def test_vectors() -> None:
    """Downward indexes, node keys and days are the published ones."""
    assert keys.downward(1).hex() == "fffffffffffffffe"
    assert keys.downward(2**64 - 1).hex() == "0000000000000000"
    assert keys.log_key(GROUP, 1) == GROUP + bytes.fromhex("fffffffffffffffe")
    assert keys.certificate_key(GROUP, 2).hex() == GROUP.hex() + "ff" * 8 + "fffffffffffffffd"
    assert day_micros(1_693_934_286_000) == 1_693_872_000_000_000
    node = bytes(32)
    for bits, head in ((0, "80"), (7, "7f87"), (8, "7f4081"), (14, "7f7f87"), (55, "7f" * 7 + "7e86")):
        prefix = int("1" * bits or "0", 2) << (-bits % 8)
        assert row_key(prefix.to_bytes((bits + 7) // 8, "big"), bits, node)[:-32].hex() == head
    assert len(row_key(b"\xff" * 32, 256, node)) == 70
    assert keys.realm_tables(RealmId(b"\xab" * 16))[0] == "ab" * 16 + "-log"
    assert keys.address_key(ServiceKind.AGENT, "tls://x") == b"atls://x"


@given(indexes, indexes)
def test_newer_sorts_first(one: int, two: int) -> None:
    """Of two numbers the larger has the smaller key, and it comes back from the key."""
    assert (one < two) == (keys.downward(one) > keys.downward(two))
    assert keys.upward(keys.downward(one)) == one
    assert keys.log_index(keys.log_key(GROUP, one)) == one


@given(st.integers(1, 2**64 - 1), indexes)
def test_certificates_are_outside_entry_scans(index: int, certified: int) -> None:
    """Every certificate lies behind every entry row of its group and before the next group."""
    key = keys.certificate_key(GROUP, certified)
    assert keys.log_key(GROUP, index) < key
    scan = keys.log_range(GROUP, keys.TOP, 1)
    assert not scan.start <= key <= scan.end
    assert key < GroupId(bytes(range(15)) + b"\x10")


@given(tenants, tenants, indexes, indexes)
def test_tenants_rows_lie_together(one: str, two: str, seq: int, other: int) -> None:
    """A tenant's events, cursor and acknowledgements are one block of keys, whatever other tenants are called."""
    a, b = keys.check_tenant(one), keys.check_tenant(two)
    rows = [keys.event_key(a, seq), keys.cursor_key(a), keys.acknowledged_key(a, 5), keys.after_tenant(a)]
    assert rows == sorted(rows)
    foreign = keys.event_key(b, other)
    assert a == b or not rows[0] < foreign < rows[-1]
    assert all(keys.tenant_of(row) == a for row in rows[:3])
    assert keys.settled_range().end < rows[0]


@given(tenants)
def test_user_rows_name_their_tenant(tenant: str) -> None:
    """Names with colons come back whole, because the record id is parsed from the right."""
    key = keys.user_key(tenant, RecordId(b"\x01" * 32))
    assert keys.user_tenant(key) == tenant


def test_what_no_key_can_carry() -> None:
    """Names that would break the order of keys, and keys that are not ours, are refused."""
    for tenant in ("", "\x00", "a\x1f", "x" * 257):
        with pytest.raises(LocalError):
            keys.check_tenant(tenant)
    for key in (b"", b"x" * 64, b":" + b"0" * 64):
        with pytest.raises(StoreInvalid):
            keys.user_tenant(key)
    with pytest.raises(StoreInvalid):
        keys.upward(bytes(7))
    with pytest.raises(StoreInvalid):
        keys.tenant_of(b"tenant")
