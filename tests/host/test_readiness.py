"""Whether a service is ready: what counts, in which order, and that every code has a line."""

from __future__ import annotations

import pytest

from juicebox_hsm.host.certificates import DAYS_WARN
from juicebox_hsm.host.clocks import DAY_MS
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.outbox import Unpublished
from juicebox_hsm.host.readiness import (
    CopyAt,
    DamageMet,
    EventsSetAside,
    EventsWait,
    NoAnswer,
    OfRealm,
    OtherStore,
    OwnCertificateEnds,
    OwnClockOff,
    Plain,
    Readiness,
    Reason,
    SecretsOld,
    ShownCertificateNotValid,
    Stalled,
    Trouble,
    Troubles,
    Unserved,
    code_headers,
    of_certificate,
    of_outbox,
    of_routes,
    of_secrets,
    of_shown_certificate,
)
from juicebox_hsm.host.routing import AgentSlice, Route, RoutingTable, Stall, build_table
from juicebox_hsm.host.served_realms import ServedRealms
from juicebox_hsm.ids import FULL_RANGE, GroupId, OwnedRange, RealmId, RecordId
from juicebox_hsm.wire.rpc import DamageKind, LogBehind, StoreDamage
from roles.words import own_sentence, readiness_text

REALM, OTHER = RealmId(b"R" * 16), RealmId(b"S" * 16)
GROUP = GroupId(b"G" * 16)
LOW = OwnedRange(RecordId(bytes(32)), RecordId(b"\x7f" + b"\xff" * 31))
HIGH = OwnedRange(RecordId(b"\x80" + bytes(31)), RecordId(b"\xff" * 32))

PLAIN = (Code.NOT_REGISTERED, Code.STOPPING, Code.HSM_SILENT, Code.NO_REALMS)
TROUBLES = (
    Code.STORE, Code.REGISTRATION, Code.DISCOVERY, Code.LOG_NOT_FOLLOWED, Code.COMPACTION, Code.GROUP_NOT_LEFT,
    Code.STORE_REPLACED, Code.OUTBOX_UNREADABLE, Code.EVENTS_NOT_DISPATCHED, Code.BUS,
)  # fmt: skip


def every_reason() -> list[Reason]:
    """Return one of everything that a service may say of itself."""
    return [
        *(Plain(code) for code in PLAIN),
        *(Trouble(code, "down") for code in TROUBLES),
        OtherStore((LogBehind(GROUP, 5, 3),)),
        CopyAt("tls://b"),
        DamageMet(StoreDamage(DamageKind.LOG, "of entry 7", GROUP)),
        Stalled(GROUP, LOW, 1, 3, stalled_s=2.0),
        Stalled(GROUP, None, 1, 3, realm=REALM),
        OfRealm(Code.RECORD_ID_KEY, REALM),
        OfRealm(Code.RECORD_ID_KEY_UNCHECKED, REALM),
        Unserved(REALM, LOW),
        SecretsOld(601.0),
        OwnClockOff(-7.0, refuses=True),
        OwnCertificateEnds(DAY_MS, 0),
        ShownCertificateNotValid(DAY_MS, 2 * DAY_MS, 0),
        EventsWait(Unpublished(7, 61.0)),
        EventsSetAside(2),
        NoAnswer(2.0),
    ]


def test_every_reason_is_one_line() -> None:
    """A page has a line for each reason and warning, in their order, and a header with a code for each."""
    everything = every_reason()
    assert all(own_sentence(reason) and "\n" not in own_sentence(reason) for reason in everything)
    found = Readiness((everything[0], everything[1]), (everything[-1],))
    first, second, last = (own_sentence(reason) for reason in (*found.reasons, *found.warnings))
    assert readiness_text(found) == f"{first}\n{second}\nwarning: {last}\n"
    assert code_headers(found) == {"x-reasons": "not-registered,stopping", "x-warnings": "no-answer"}
    assert readiness_text(Readiness()) == "ready\n"
    assert (Readiness().is_ready, code_headers(Readiness())) == (True, {})
    assert Readiness(warnings=(everything[0],)).is_ready


def test_trouble_is_held_until_it_is_over() -> None:
    """Each code and group has one place, which the last failure fills; only its own end empties it."""
    troubles = Troubles()
    one = Trouble(Code.COMPACTION, "busy", GROUP)
    assert troubles.note(one)
    assert not troubles.note(Trouble(Code.COMPACTION, "down", GROUP)), "known, so not worth another log line"
    assert troubles.note(Trouble(Code.COMPACTION, "busy", GroupId(b"H" * 16)))
    assert troubles.note(OtherStore(()))
    assert [trouble.code for trouble in troubles] == [Code.ANOTHER_STORE, Code.COMPACTION, Code.COMPACTION]
    assert next(iter(each for each in troubles if each.group == GROUP)) == Trouble(Code.COMPACTION, "down", GROUP)
    assert not troubles.clear(Code.COMPACTION), "that of no group"
    assert troubles.clear(Code.COMPACTION, GROUP)
    assert not troubles.clear(Code.COMPACTION, GROUP)
    assert len(troubles) == 2


@pytest.mark.parametrize(
    ("waiting", "is_long", "is_full"),
    [
        (Unpublished(99_999, 59.9), False, False),
        (Unpublished(100_000, 0.0), True, False),
        (Unpublished(1, 60.0), True, False),
        (Unpublished(10_000_000, 0.0), True, True),
    ],
)
def test_backlog_bounds(waiting: Unpublished, is_long: bool, is_full: bool) -> None:
    """Warnings begin at 1 % of the bound or 60 s; at the bound requests are refused. Lost events are told beside it."""
    assert (waiting.is_long, waiting.is_full) == (is_long, is_full)
    assert of_outbox(waiting, 0) == ((EventsWait(waiting),) if is_long else ())
    assert of_outbox(waiting, 3)[-1] == EventsSetAside(3)
    assert len(of_outbox(waiting, 3)) == 1 + is_long


def test_certificates_and_secrets_that_grow_old() -> None:
    """A certificate is warned of 20 days before its end; secrets count as old after ten missed refreshes."""
    assert of_certificate(None, 0) == ()
    assert of_certificate(DAYS_WARN * DAY_MS, 0) == ()
    assert of_certificate(DAYS_WARN * DAY_MS, 1) == (OwnCertificateEnds(DAYS_WARN * DAY_MS, 1),)
    assert of_shown_certificate(10, 20, 10) == of_shown_certificate(10, 20, 20) == ()
    for now_ms in (9, 21):
        assert of_shown_certificate(10, 20, now_ms) == (ShownCertificateNotValid(10, 20, now_ms),)
    assert of_secrets(600.0, 60.0) == ()
    assert of_secrets(600.1, 60.0) == (SecretsOld(600.1),)


def _table(realm: RealmId, *routes: Route) -> RoutingTable:
    return build_table([AgentSlice(realm, routes)], RoutingTable(), 0.0)


def test_one_whole_realm_is_enough() -> None:
    """A balancer is ready for one realm that is led everywhere and may be served; else each realm's gaps are told."""
    served = ServedRealms(b"ours")
    served.rule(REALM, b"ours")
    whole = Route(GROUP, FULL_RANGE, "tls://a", 1, 1, 0.0)
    assert of_routes(RoutingTable(), served) == [Plain(Code.NO_REALMS)]
    assert of_routes(_table(REALM, whole), served) == []
    assert of_routes(_table(OTHER, whole), served) == [OfRealm(Code.RECORD_ID_KEY_UNCHECKED, OTHER)]
    served.rule(OTHER, b"theirs")
    assert of_routes(_table(OTHER, whole), served) == [OfRealm(Code.RECORD_ID_KEY, OTHER)]
    both = build_table([AgentSlice(OTHER, (whole,)), AgentSlice(REALM, (whole,))], RoutingTable(), 0.0)
    assert of_routes(both, served) == []


def test_a_leader_without_majority_is_told_instead_of_a_gap() -> None:
    """Its range is not served, and the reason is its majority; what nobody leads is told as such."""
    served = ServedRealms(b"ours")
    served.rule(REALM, b"ours")
    stalled = Route(GROUP, LOW, "tls://a", 1, 1, 0.0, Stall(1, 3))
    told = Stalled(GROUP, LOW, 1, 3, realm=REALM)
    assert of_routes(_table(REALM, stalled), served) == [told, Unserved(REALM, HIGH)]
    high = Route(GROUP, HIGH, "tls://b", 1, 1, 0.0)
    assert of_routes(_table(REALM, stalled, high), served) == [told]
