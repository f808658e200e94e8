"""The judge of tenant events sees each of its rules broken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.host.events import EventKind, NewEvent
from juicebox_hsm.hsm import messages as m
from juicebox_hsm.ids import GroupId
from juicebox_hsm.wire import requests as secrets
from roles.tools.simulate.store_data import TenantRows
from tests.fakes.hsm import expect
from tests.unit.simulate.judged import TENANT, JudgedWorld, broken


@pytest.fixture
def history(world: JudgedWorld) -> tuple[GroupId, list[LogEntry]]:
    """Return a group and its five committed client entries, none of which has a row yet."""
    group = world.grouped()
    client = world.user()
    begun = len(world.logs[group])
    requests = (secrets.Register1(), client.register2(2), secrets.Recover1(), client.recover2(), client.recover3())
    for request in requests:
        world.ask(group, 0, client, request)
    return group, world.logs[group][begun:]


History = tuple[GroupId, list[LogEntry]]


def publish(world: JudgedWorld) -> TenantRows:
    """Publish and count everything that is recorded, as the dispatcher does."""
    realm = world.shared.data.realms[world.realm]
    rows = realm.tenants[TENANT]
    for row in list(rows.rows.values())[rows.published :]:
        day = rows.counters.setdefault("20231114", {})
        day[row.new.kind] = day.get(row.new.kind, 0) + 1
        if row.new.accounting is not None:
            realm.users[TENANT, row.new.record_id, 0] = (row.seq, row.new.accounting == "registered")
    rows.published = rows.tail
    return rows


def record(world: JudgedWorld, *events: NewEvent) -> None:
    """Write rows."""
    world.shared.data.record(world.realm, TENANT, events, None)


def unknown(event: NewEvent) -> NewEvent:
    """Return the row of unconfirmed outcome."""
    return replace(event, kind=EventKind.UNKNOWN, event={"event": "unknown"}, accounting=None)


def test_sound_events(world: JudgedWorld, history: History) -> None:
    """True rows, an unknown one, and a true one that came late after its unknown: no rule is broken."""
    group, entries = history
    world.record_events(group, *entries[:2])
    record(world, *(unknown(world.event(group, entry)) for entry in entries[2:4]))
    world.record_events(group, entries[4], entries[2])
    world.shared.data.raise_settled(world.realm, {group: entries[-1].index})
    publish(world)
    world.judge.check(world.judge.events.finish)
    assert world.judge.violations == []


def test_a_row_before_its_commit(world: JudgedWorld, history: History) -> None:
    """events: a row of an entry that is not committed."""
    group, _ = history
    entry = world.app(group, 0, world.user(), secrets.Recover1()).entry
    broken("events", lambda: world.record_events(group, entry))


def test_a_row_that_is_missing(world: JudgedWorld, history: History) -> None:
    """events: a committed request without a row when all has come to rest, or when its index is settled."""
    group, entries = history
    world.record_events(group, *entries[:3], entries[4])
    broken("events", lambda: world.shared.data.raise_settled(world.realm, {group: entries[-1].index}))
    publish(world)
    broken("events", lambda: world.judge.check(world.judge.events.finish))


def test_a_row_twice(world: JudgedWorld, history: History) -> None:
    """events: a request that is told twice."""
    group, entries = history
    world.record_events(group, *entries)
    broken("events", lambda: world.record_events(group, entries[0]))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": EventKind.RECOVER1},
        {"event": {"event": "guess_used", "num_guesses": 2, "guess_count": 2}},
        {"event": None},
        {"user": "cd" * 32},
        {"accounting": "registered"},
        {"mac": bytes(32)},
        {"kind": EventKind.UNKNOWN},
    ],
)
def test_a_row_that_is_not_true(world: JudgedWorld, history: History, change: dict[str, object]) -> None:
    """events: a row that names another kind, guess, user or entry, or an unknown one that knows the event."""
    group, entries = history
    false = replace(world.event(group, entries[3]), **change)  # type: ignore[arg-type]  # fields by name
    broken("events", lambda: record(world, false))


def test_an_answer_before_its_row(world: JudgedWorld, history: History) -> None:
    """events, I3: an answer that leaves an agent while its row is not written, or that no HSM released."""
    group, entries = history
    replies = {key[2]: reply for reply, key in world.judge.commits.replies.items()}
    world.record_events(group, entries[0])
    world.judge.answered(replies[entries[0].entry_mac])
    broken("events", lambda: world.judge.answered(replies[entries[1].entry_mac]))
    record(world, unknown(world.event(group, entries[1])))
    broken("events", lambda: world.judge.answered(replies[entries[1].entry_mac]))
    broken("I3", lambda: world.judge.answered(b"invented"))


def test_rows_out_of_order(world: JudgedWorld, history: History) -> None:
    """events: true rows of one record in another order than that of its history."""
    group, entries = history
    world.record_events(group, *entries[:3], entries[4], entries[3])
    publish(world)
    broken("events", lambda: world.judge.check(world.judge.events.finish))


def test_rows_of_two_leaderships_may_overtake_each_other(world: JudgedWorld, history: History) -> None:
    """A leader that leaves may record after its successor did: nothing orders the two, unless a range moved between."""
    group, entries = history
    world.lead(group, 1)
    world.commit(group, 1)
    client = world.user()
    world.ask(group, 1, client, secrets.Recover1())
    world.record_events(group, *entries[:4], world.logs[group][-1], entries[4])
    publish(world)
    world.judge.check(world.judge.events.finish)
    assert world.judge.violations == []
    ledger = world.judge.ledger
    ledger.made_by[world.logs[group][-1].entry_mac] = ledger.made_by[entries[4].entry_mac]
    broken("events", lambda: world.judge.check(world.judge.events.finish))


def test_an_entry_that_was_made_twice(world: JudgedWorld, history: History) -> None:
    """An HSM that leads again may make the very entry of a lost leadership for another request: neither changed
    anything, the first is unknown, the second has its row. Two that change something are never one entry."""
    group, entries = history
    world.record_events(group, *entries)
    first, other = world.client(b"\x21" * 32), world.client(b"\x22" * 32)
    for _ in range(2):  # its place in the history of `other` is not that in the history of `first`
        world.ask(group, 0, other, secrets.Register1())
        world.record_events(group, world.logs[group][-1])
    lost = expect(world.send(0, world.app_message(group, first, first.handshake(secrets.Register1()))), m.AppRequestOk)
    world.append(group, [lost.entry])
    world.crash(0)
    world.lead(group, 0)
    made = expect(world.send(0, world.app_message(group, other, other.handshake(secrets.Register1()))), m.AppRequestOk)
    assert made.entry == lost.entry
    world.logs[group].append(made.entry)
    world.commit(group, 0)
    second = world.event(group, made.entry)
    record(world, replace(second, record_id=other.record, user="cd" * 32))
    publish(world)
    world.judge.check(world.judge.events.finish)
    record(world, unknown(second))
    publish(world)
    world.judge.check(world.judge.events.finish)
    assert world.judge.violations == []


def test_counters_that_differ(world: JudgedWorld, history: History) -> None:
    """counters: a request that was counted twice, or whose registration accounting does not know."""
    group, entries = history
    world.record_events(group, *entries)
    rows = publish(world)
    rows.counters["20231114"][EventKind.RECOVER2] += 1
    broken("counters", lambda: world.judge.check(world.judge.events.finish))
    rows.counters["20231114"][EventKind.RECOVER2] -= 1
    world.shared.data.realms[world.realm].users.clear()
    broken("counters", lambda: world.judge.check(world.judge.events.finish))
