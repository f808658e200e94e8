"""Which realms a balancer may serve with its record-id key (load-balancer.md 6.4)."""

from __future__ import annotations

from juicebox_hsm.host.served_realms import Ruling, ServedRealms, setting_name
from juicebox_hsm.ids import RealmId

OURS, THEIRS = b"ourskey1", b"theirs12"
ONE, OTHER, NEW = (RealmId(bytes([n]) * 16) for n in range(3))


def test_a_foreign_key_serves_nobody() -> None:
    """A realm is served when our fingerprint stands, refused when another does, and unknown until then."""
    realms = ServedRealms(OURS)
    assert realms.rule(ONE, OURS) is Ruling.SERVED
    assert realms.rule(OTHER, THEIRS) is Ruling.REFUSED
    assert (realms.allowed, realms.refused) == ({ONE}, {OTHER})
    assert realms.unknown([OTHER, NEW, ONE]) == [NEW]


def test_the_first_ruling_stands() -> None:
    """A second look that says otherwise changes nothing: a store that forgot must not move users to new record ids."""
    realms = ServedRealms(OURS)
    realms.rule(ONE, OURS)
    realms.rule(OTHER, THEIRS)
    assert realms.rule(ONE, THEIRS) is Ruling.KNOWN
    assert realms.rule(OTHER, OURS) is Ruling.KNOWN
    assert (realms.allowed, realms.refused) == ({ONE}, {OTHER})


def test_the_name_of_the_setting() -> None:
    """The name is kept in stores of existing realms."""
    assert setting_name(RealmId(b"\xab" * 16)) == "record-id-key/" + "ab" * 16
