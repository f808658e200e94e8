"""The routing table's rules: who claims what, whose answer counts, which gap is how old (load-balancer.md 8)."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.host.routing import (
    HOPE_S,
    STALE_S,
    AgentClaims,
    AgentSlice,
    Gap,
    Route,
    RoutingTable,
    Stall,
    build_table,
    slice_of,
)
from juicebox_hsm.ids import GroupId, OwnedRange, RealmId, RecordId
from juicebox_hsm.wire.rpc import (
    AgentGroupInfo,
    AgentStatus,
    GroupInfo,
    GroupRole,
    HsmInfo,
    LeaderInfo,
    Range,
    RealmInfo,
    RoleInfo,
)

REALM = RealmId(b"R" * 16)
GROUP = GroupId(b"G" * 16)
FULL = Range(start=bytes(32), end=b"\xff" * 32)
ALL = OwnedRange(RecordId(bytes(32)), RecordId(b"\xff" * 32))
LEADS = RoleInfo(GroupRole.LEADER, 1, 1)


def _owned(first: int, last: int) -> OwnedRange:
    return OwnedRange(RecordId(bytes([first]) + bytes(31)), RecordId(bytes([last]) + b"\xff" * 31))


def _route(first: int, last: int, url: str = "tls://a", starting: int = 1, committed: int = 1) -> Route:
    return Route(GROUP, _owned(first, last), url, starting, committed, 0.0)


def _status(
    role: RoleInfo = LEADS, owned: Range | None = FULL, *, leads: bool = True, committed: int = 1
) -> AgentStatus:
    leader = LeaderInfo(committed, committed, owned, None) if leads else None
    group = GroupInfo(GROUP, [b"H" * 16], None, leader, role)
    return AgentStatus(1.0, HsmInfo(b"H" * 16, RealmInfo(REALM, b"", [group]), b""), "u", "", [])


NO_REALM = AgentStatus(1.0, HsmInfo(b"H" * 16, None, b""), "u", "", [])
NO_HSM = AgentStatus(1.0, None, "u", "", [])
WITNESS = _status(RoleInfo(GroupRole.WITNESS, 1, None), leads=False)


@pytest.mark.parametrize(
    "status",
    [
        WITNESS,
        _status(RoleInfo(GroupRole.STEPPING_DOWN, 1, 1)),
        _status(owned=None),
        _status(owned=Range(start=b"\xff" * 32, end=bytes(32))),
        _status(owned=Range(start=b"", end=b"")),
        NO_REALM,
        NO_HSM,
    ],
    ids=["witness", "stepping down", "no range", "backwards", "empty", "no realm", "no HSM"],
)
def test_only_leaders_with_a_range_make_routes(status: AgentStatus) -> None:
    """Witnesses, leaders without a range, leaders that step down and malformed ranges contribute nothing."""
    assert slice_of("u", status, 0.0, {}).routes == ()


def test_a_leadership_keeps_its_age() -> None:
    """A route is as old as its leadership's first report."""
    (route,) = slice_of("u", _status(), 5.0, {}).routes
    assert (route.url, route.since_s) == ("u", 5.0)
    assert slice_of("u", _status(), 9.0, {route.key: 5.0}).routes[0].since_s == 5.0


@given(
    st.lists(
        st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 3), st.integers(0, 3)).filter(
            lambda item: item[0] <= item[1]
        ),
        max_size=6,
    )
)
def test_table_against_a_plain_search(items: list[tuple[int, int, int, int]]) -> None:
    """Candidates and gaps agree with a search byte by byte, whatever ranges overlap."""
    routes = [_route(first, last, f"u{n}", starting, done) for n, (first, last, starting, done) in enumerate(items)]
    table = build_table([AgentSlice(REALM, tuple(routes))], RoutingTable(), 0.0)
    gaps = table.gaps(REALM)
    for byte in range(256):
        record = RecordId(bytes([byte]) + b"\x10" * 31)
        covering = [route for route in routes if route.range.contains(record)]
        found = table.candidates(REALM, record)
        assert sorted(found, key=id) == sorted(covering, key=id)
        claims = [(route.starting, route.committed) for route in found]
        assert claims == sorted(claims, reverse=True)
        assert any(gap.contains(record) for gap in gaps) is (not covering)
        assert table.contested or len(found) <= 1
    assert all(gap.is_valid for gap in gaps)
    assert (table.route_count, table.gap_count) == (len(routes), len(gaps))


def test_gaps_of_an_unknown_realm() -> None:
    """A realm nobody leads is one gap, of no age: there is hope for it."""
    table = build_table([], RoutingTable(), 0.0)
    assert table.gaps(REALM) == [ALL]
    assert not table.is_hopeless(REALM, ALL.start, 1e9)


def test_a_leader_that_cannot_commit_is_no_route() -> None:
    """Its range is a gap from then on, so that clients soon stop waiting; it is a route of the same age when it can."""
    claims = AgentClaims("u", 0.0)

    def table(before: RoutingTable, stalled_s: float | None, now_s: float) -> RoutingTable:
        status = _status()
        own = AgentGroupInfo(REALM, GROUP, LEADS, True, members_alive=1, stalled_s=stalled_s)
        status = msgspec.structs.replace(status, groups=[own])
        assert claims.heard(claims.ask(), status, now_s, contested=False), "the table is built anew"
        return build_table([claims.slice], before, now_s)

    well = table(RoutingTable(), None, 1.0)
    stalled = table(well, 0.1, 2.0)
    assert (stalled.candidates(REALM, ALL.start), stalled.gaps(REALM)) == ([], [ALL])
    assert [(route.group, route.stall) for route in stalled.stalled_in(REALM, ALL)] == [(GROUP, Stall(1, 1))]
    assert (stalled.route_count, stalled.gap_count, stalled.stalled_count) == (0, 1, 1)
    assert stalled.is_hopeless(REALM, ALL.start, 2.1 + HOPE_S)
    assert table(stalled, None, 9.0) == well


def test_age_of_gaps() -> None:
    """A gap that shrinks keeps its age, one that grows is new, and none is hopeless before its time."""

    def after(before: RoutingTable, now_s: float, *routes: Route) -> RoutingTable:
        return build_table([AgentSlice(REALM, routes)], before, now_s)

    upper_gone = after(RoutingTable(), 10.0, _route(0x00, 0x7F))
    assert upper_gone.unclaimed[REALM] == (Gap(_owned(0x80, 0xFF), 10.0),)
    record = RecordId(b"\xf0" * 32)
    assert not upper_gone.is_hopeless(REALM, record, 10.0 + HOPE_S)
    assert upper_gone.is_hopeless(REALM, record, 10.1 + HOPE_S)
    assert not upper_gone.is_hopeless(REALM, RecordId(bytes(32)), 1e9)

    middle_back = after(upper_gone, 20.0, _route(0x00, 0x7F), _route(0xA0, 0xBF))
    assert [gap.since_s for gap in middle_back.unclaimed[REALM]] == [10.0, 10.0]
    all_gone = after(middle_back, 30.0)
    assert all_gone.unclaimed[REALM] == (Gap(ALL, 30.0),)
    assert after(all_gone, 40.0).unclaimed[REALM] == (Gap(ALL, 30.0),)


def test_an_older_answer_does_not_win() -> None:
    """An answer that was asked for earlier and arrives later changes nothing, nor does an older poll's failure."""
    claims = AgentClaims("u", 0.0)
    first, second, third = claims.ask(), claims.ask(), claims.ask()
    assert claims.heard(second, WITNESS, 1.0, contested=False)
    assert not claims.heard(first, _status(), 1.1, contested=True)
    assert claims.slice == AgentSlice(REALM)
    assert claims.heard(third, _status(), 1.2, contested=False)
    assert not claims.missed(second, 100.0, is_unreachable=True, contested=True)
    assert [route.url for route in claims.slice.routes] == ["u"]


def test_silence_and_a_lost_stream() -> None:
    """Without a stream the routes go at once, after mere silence when it has lasted; the realm stays known."""
    silent, lost = AgentClaims("s", 0.0), AgentClaims("l", 0.0)
    for claims in (silent, lost):
        claims.heard(claims.ask(), _status(), 10.0, contested=False)
    assert not silent.missed(silent.ask(), 10.0 + STALE_S - 0.01, is_unreachable=False, contested=False)
    assert silent.slice.routes
    assert silent.missed(silent.ask(), 10.0 + STALE_S, is_unreachable=False, contested=False)
    assert lost.missed(lost.ask(), 10.0, is_unreachable=True, contested=False)
    assert silent.slice == lost.slice == AgentSlice(REALM)


def test_an_answer_ends_silence() -> None:
    """Silence counts from the last answer, also from one that came too late to say anything new."""
    claims = AgentClaims("u", 0.0)
    early = claims.ask()
    claims.heard(claims.ask(), _status(), 1.0, contested=False)
    claims.heard(early, _status(), 3.0, contested=False)
    assert not claims.missed(claims.ask(), 5.9, is_unreachable=False, contested=False)
    assert claims.missed(claims.ask(), 6.0, is_unreachable=False, contested=False)


def test_what_is_worth_a_new_table() -> None:
    """A growing commit index is not, unless claims compete; a leadership that begins anew is, and is young again."""
    claims = AgentClaims("u", 0.0)
    assert claims.heard(claims.ask(), _status(committed=1), 1.0, contested=False)
    assert not claims.heard(claims.ask(), _status(committed=2), 2.0, contested=False)
    assert claims.heard(claims.ask(), _status(committed=3), 3.0, contested=True)
    assert claims.slice.routes[0].since_s == 1.0
    anew = msgspec.structs.replace(LEADS, starting=77)
    assert claims.heard(claims.ask(), _status(anew), 4.0, contested=False)
    assert claims.slice.routes[0].since_s == 4.0


def test_the_freshest_claim_is_first() -> None:
    """Of rival claims the later leadership is first, of equal ones the one that committed more, then by address."""
    slices = [
        AgentSlice(REALM, (_route(0, 255, "old", starting=5, committed=900),)),
        AgentSlice(REALM, (_route(0, 255, "behind", starting=9, committed=10),)),
        AgentSlice(REALM, (_route(0, 255, "z", starting=9, committed=20),)),
        AgentSlice(REALM, (_route(0, 255, "a", starting=9, committed=20),)),
    ]
    table = build_table(slices, RoutingTable(), 0.0)
    assert [route.url for route in table.candidates(REALM, ALL.start)] == ["a", "z", "behind", "old"]
    assert table.contested
