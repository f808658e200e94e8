"""Plans for a realm's groups: who is in which, what is missing, and the commands that make it."""

from __future__ import annotations

import datetime as dt

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.cluster.layout import advice, choose_hsms, commands, make_layout, shorten, windows
from juicebox_hsm.host.cluster.planning import even_partition
from juicebox_hsm.host.cluster.view import AgentView, ClusterView, build_view
from juicebox_hsm.ids import FULL_RANGE, HsmId, RecordId
from juicebox_hsm.wire import rpc
from roles.cli import cli
from roles.tools.cluster.stats import period
from roles.tools.ids import parse_record_id
from roles.tools.session import ToolFailure
from tests.host.cluster.agents import REALM, FakeAgent, FakeGroup, group, hsm

KEY = b"k" * 32


def _fresh(number: int, key: bytes = KEY) -> AgentView:
    """Return an agent whose HSM is in no realm."""
    info = rpc.HsmInfo(hsm(number), None, key)
    return AgentView(f"tls://a{number}", rpc.AgentStatus(1.0, info, f"a{number}", "build", []))


def _realm(members: list[int], groups: int) -> ClusterView:
    """Return a realm whose first group is of one HSM; group 1 owns everything."""
    agents = [FakeAgent(f"tls://a{number}", hsm(number)) for number in members]
    ids: list[bytes] = [hsm(number) for number in members]
    for agent in agents:
        agent.groups = {group(number): FakeGroup(list(ids)) for number in range(1, groups + 1)}
    agents[0].groups[group(9)] = FakeGroup([ids[0]])
    for number in range(1, groups + 1):
        agents[0].lead(group(number), FULL_RANGE if number == 1 else None)
    agents[0].lead(group(9), None if groups else FULL_RANGE)
    return build_view([AgentView(agent.url, agent.status()) for agent in agents])


@given(st.integers(1, 12), st.integers(1, 15), st.integers(1, 9))
def test_windows_use_every_hsm_alike(hsms: int, groups: int, size: int) -> None:
    """Groups have the size that was asked for, no member twice, and nobody is in many more of them than another."""
    ids = [HsmId(bytes([number]) * 16) for number in range(hsms)]
    if size > hsms:
        with pytest.raises(LocalError):
            windows(ids, groups, size)
        return
    found = windows(ids, groups, size)
    assert len(found) == groups
    assert all(len(set(members)) == size and list(members) == sorted(members) for members in found)
    used = [sum(one in members for members in found) for one in ids]
    assert sum(used) == groups * size
    if groups == hsms or size == hsms:
        assert set(used) == {groups * size // hsms}


def test_windows_of_as_many_groups_as_hsms_go_round() -> None:
    """Group i begins with HSM i and goes on cyclically."""
    assert windows([hsm(3), hsm(1), hsm(2)], 3, 2) == [(hsm(1), hsm(2)), (hsm(2), hsm(3)), (hsm(1), hsm(3))]


def test_too_many_groups_for_an_hsm() -> None:
    """The first group of the realm takes one of an HSM's sixteen places."""
    assert len(windows([hsm(1)], 15, 1)) == 15
    with pytest.raises(LocalError, match="16 groups"):
        windows([hsm(1)], 16, 1)


def test_recommended_layout_from_fresh_agents() -> None:
    """5 HSMs and 3 groups: a realm, four joiners, three groups led by different HSMs, three moves."""
    view = build_view([_fresh(number) for number in range(1, 6)])
    hsms = choose_hsms(view, None)
    layout = make_layout(view, None, hsms, windows([one.id for one in hsms], 3, 5))
    lines = [line.removeprefix("juicebox-hsm cluster ") for line in commands(view, layout)]
    assert lines == [
        "new-realm tls://a1",
        "join-realm --realm REALM tls://a2 tls://a3 tls://a4 tls://a5",
        "new-group --realm REALM tls://a1 tls://a2 tls://a3 tls://a4 tls://a5",
        "new-group --realm REALM tls://a2 tls://a3 tls://a4 tls://a5 tls://a1",
        "new-group --realm REALM tls://a3 tls://a4 tls://a5 tls://a1 tls://a2",
        "transfer --realm REALM --source FIRST --destination GROUP3 --start aaaaaaaa00 --end ff",
        "transfer --realm REALM --source FIRST --destination GROUP2 --start 5555555500 --end aaaaaaa9ff",
        "transfer --realm REALM --source FIRST --destination GROUP1 --start 00 --end 55555554ff",
        "rebalance --full",
    ]
    assert advice(layout, 5) == []
    assert len(advice(layout, 4)) == 1


def test_existing_groups_are_used() -> None:
    """A group with the wanted members is kept, the lowest id first; what is complete needs nothing."""
    view = _realm([1, 2, 3], 2)
    hsms = choose_hsms(view, REALM)
    wanted = windows([one.id for one in hsms], 3, 3)
    layout = make_layout(view, REALM, hsms, wanted)
    assert layout.existing == (group(1), group(2))
    assert layout.missing == (("tls://a3", "tls://a1", "tls://a2"),)
    assert len(commands(view, layout)) == 4
    one = make_layout(view, REALM, hsms, wanted[:1])
    assert commands(view, one) == []


def test_hsms_with_other_keys_are_left_alone() -> None:
    """Only HSMs that hold the realm's keys can join it; with nothing but strangers there is nothing to choose."""
    realm = _realm([1, 2, 3], 1)
    view = build_view([*realm.agents, _fresh(4), _fresh(5, b"x" * 32)])
    assert [one.id for one in choose_hsms(view, REALM)] == [hsm(number) for number in (1, 2, 3, 4)]
    with pytest.raises(LocalError, match="different realms"):
        choose_hsms(build_view([_fresh(4), _fresh(5, b"x" * 32)]), None)
    with pytest.raises(LocalError, match="no HSM"):
        choose_hsms(build_view([]), None)


def test_a_silent_agent_stops_the_plan() -> None:
    """Groups never gain members, so a layout is not made while somebody is away."""
    with pytest.raises(LocalError, match="tls://a9"):
        choose_hsms(build_view([_fresh(1), AgentView("tls://a9", None, "down")]), None)


@given(st.binary(min_size=32, max_size=32) | st.integers(1, 300).map(lambda n: even_partition(n)[-1].start))
def test_shortened_record_ids_are_read_back(record: bytes) -> None:
    """The commands that are printed mean the ids that were planned."""
    assert parse_record_id(shorten(RecordId(record))) == record


def test_periods() -> None:
    """Months begin on the first; what cannot be counted is refused."""
    today = dt.date(2026, 1, 15)
    assert period(None, None, None, today) == (dt.date(2026, 1, 1), dt.date(2026, 2, 1))
    assert period("last-month", None, None, today) == (dt.date(2025, 12, 1), dt.date(2026, 1, 1))
    assert period(None, today, dt.date(2026, 1, 16), today) == (today, dt.date(2026, 1, 16))
    day = dt.timedelta(days=1)
    for when, start, end in (
        ("this-month", today, today + day),
        (None, today, None),
        (None, None, today),
        (None, today + day, today + 2 * day),
        (None, today, today),
        (None, today - 117 * day, today),
    ):
        with pytest.raises(ToolFailure):
            period(when, start, end, today)
    assert period(None, today - 999 * day, today, today, None) == (today - 999 * day, today), "what is kept for ever"


def test_period_flags_are_usage() -> None:
    """A day that is none is refused before anything is opened."""
    result = CliRunner().invoke(cli, ["cluster", "user-summary", "--store", "sqlite:/none/x", "--start", "2026-02-30"])
    assert result.exit_code == 2
    assert "YYYY-MM-DD" in result.output
