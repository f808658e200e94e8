"""Tenant events: every committed request has its row, true or `unknown`, in order; counters and accounting agree.

A row may only speak of what is committed when it is written. An entry may have both an `unknown` row and, later, its
true one, when a leader that slept records after all (agent.md 11); it never has none, and never two of a kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from juicebox_hsm.host.events import EventKind, NewEvent, OutboxEvent
from juicebox_hsm.hsm.messages import ResultKind, ResultType
from juicebox_hsm.ids import GroupId, RealmId, RecordId
from roles.tools.simulate.judge_commits import Commits
from roles.tools.simulate.judge_ledger import Ledger
from roles.tools.simulate.judge_rules import require
from roles.tools.simulate.judge_store import StoreJudge
from roles.tools.simulate.store_data import RealmData, StoreData

_Key = tuple[GroupId, int, bytes]


class EventsJudge:
    """Watches outboxes; rows are kept even after the store has removed them."""

    def __init__(self, data: StoreData, ledger: Ledger, commits: Commits, logs: StoreJudge) -> None:
        self._data = data
        self._ledger = ledger
        self._commits = commits
        self._logs = logs
        self._rows: dict[tuple[RealmId, str], list[OutboxEvent]] = {}
        self._known: dict[tuple[_Key, bool], OutboxEvent] = {}
        self._settled: dict[GroupId, int] = {}

    def recorded(
        self, realm: RealmId, tenant: str, rows: Sequence[OutboxEvent], settled: Mapping[GroupId, int]
    ) -> None:
        """Check rows at the moment they are written, and settled indexes."""
        for row in rows:
            self._check_row(tenant, row)
            self._rows.setdefault((realm, tenant), []).append(row)
        for group, index in settled.items():
            self._check_settled(group, index)

    def _check_row(self, tenant: str, row: OutboxEvent) -> None:
        new = row.new
        where = f"row {row.seq} of {tenant}"
        key = (new.group, new.index, new.mac)
        committed = self._commits.chains.get(new.group, {}).get(new.index) == new.mac
        require("events", committed, f"{where} speaks of entry {new.index}, which is not committed")
        requests = [result for record, result in self._ledger.touched.get(new.mac, ()) if record == new.record_id]
        intent = self._logs.intents.get(key)
        require("events", intent is not None and requests, f"{where} speaks of an entry that is not its user's")
        if intent is not None and intent.record_id == new.record_id:
            same = (intent.tenant, intent.user) == (tenant, new.user)
            require("events", same, f"{where} is not of the user that entry {new.index} is of")
        is_unknown = new.kind is EventKind.UNKNOWN
        require("events", (key, is_unknown) not in self._known, f"{where} tells entry {new.index} a second time")
        self._known[key, is_unknown] = row
        if is_unknown:
            require("events", new.event == {"event": "unknown"} and new.accounting is None, f"{where} knows too much")
            return
        expected = [expected_event(result) for result in requests]
        # a Delete of nothing changes nothing and is not accounted
        true = any(
            (new.kind, new.event) == (kind, body) and new.accounting in {accounting, None}
            for kind, body, accounting in expected
        )
        require("events", true, f"{where} says {new.kind.value} {dict(new.event or {})}, true is {expected}")

    def _check_settled(self, group: GroupId, index: int) -> None:
        """Check that every intent up to a settled index has its row."""
        before = self._settled.get(group, 0)
        self._settled[group] = max(before, index)
        log = self._logs.logged.get(group, {})
        for at in range(before + 1, index + 1):
            key = (group, at, log.get(at, b""))
            if key in self._logs.intents:
                require("events", self._has_row(key), f"entry {at} of {group.hex()} is settled and has no row")

    def answered(self, reply: bytes) -> None:
        """Check an answer that leaves an agent: an HSM released it, and its true row is written (agent.md 11)."""
        key = self._commits.replies.get(reply)
        if key is None:
            require("I3", condition=False, detail="an agent answered with a reply that no HSM released")
        else:
            told = (key, False) in self._known
            require("events", told, f"the answer to entry {key[1]} of {key[0].hex()} left before its row was written")

    def _has_row(self, key: _Key) -> bool:
        return (key, False) in self._known or (key, True) in self._known

    # --- the end ----------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Check completeness, order, counters and accounting once everything has come to rest."""
        for group, chain in self._commits.chains.items():
            for index, mac in chain.items():
                if (group, index, mac) in self._logs.intents:
                    there = self._has_row((group, index, mac))
                    require("events", there, f"entry {index} of {group.hex()} is committed and has no row")
        self._check_order()
        for realm_id, realm in self._data.realms.items():
            for tenant in realm.tenants:
                rows = self._rows.get((realm_id, tenant), [])
                seqs = [row.seq for row in rows] == list(range(1, len(rows) + 1))
                require("events", seqs, f"the sequence of {tenant} is not dense")
                self._check_counters(realm, tenant, rows)
                self._check_accounting(realm, tenant, rows)

    def _check_order(self) -> None:
        """Check that the true rows of a record come in the order of its history, as far as that is promised.

        One leadership records in order, and has recorded what came before when it gives a range away (agent.md 11).
        Rows of two leaderships of a group may overtake each other.
        """
        place: dict[tuple[RecordId, bytes], int] = {}  # an entry that was made twice is in the history of one record
        for record, history in self._commits.histories.items():
            place.update({(record, mac): number for number, mac in enumerate(history)})
        for (_, tenant), rows in self._rows.items():
            seen: dict[RecordId, list[NewEvent]] = {}
            for row in rows:
                new = row.new
                key = (new.group, new.index, new.mac)
                at = place.get((new.record_id, new.mac))
                if new.kind is EventKind.UNKNOWN or (key, True) in self._known or at is None:
                    continue
                before = seen.setdefault(new.record_id, [])
                late = any(place[other.record_id, other.mac] > at and self._is_promised(new, other) for other in before)
                require("events", not late, f"row {row.seq} of {tenant} comes after one of a later request")
                before.append(new)

    def _is_promised(self, earlier: NewEvent, later: NewEvent) -> bool:
        """Tell whether the row of the earlier request has to come first."""
        leadership = self._ledger.made_by[earlier.mac]
        if earlier.group != later.group:
            return leadership in self._ledger.gave_away
        return leadership == self._ledger.made_by[later.mac]

    def _check_counters(self, realm: RealmData, tenant: str, rows: Sequence[OutboxEvent]) -> None:
        kept = realm.tenants[tenant]
        counted: Counter[str] = Counter()
        for kinds in kept.counters.values():
            counted.update({kind.value: count for kind, count in kinds.items()})
        true = Counter(row.new.kind.value for row in rows if row.seq <= kept.published)
        require("counters", counted == true, f"{tenant} is counted {dict(counted)}, true is {dict(true)}")

    def _check_accounting(self, realm: RealmData, tenant: str, rows: Sequence[OutboxEvent]) -> None:
        """Check that of each record the last accounted event that was published is what accounting holds."""
        true: dict[RecordId, tuple[int, bool]] = {}
        for row in rows:
            if row.new.accounting is not None and row.seq <= realm.tenants[tenant].published:
                true[row.new.record_id] = (row.seq, row.new.accounting == "registered")
        kept: dict[RecordId, tuple[int, bool]] = {}
        for (owner, record, _), found in realm.users.items():
            if owner == tenant:
                kept[record] = max(kept.get(record, (0, False)), found)
        require("counters", kept == true, f"accounting of {tenant} differs from its events")


def expected_event(result: ResultType) -> tuple[EventKind, dict[str, str | int] | None, str | None]:
    """Return kind, event and accounting of a request that changed something, written from agent.md 11 alone."""
    body: dict[str, str | int] | None = None
    accounting = None
    match result.kind:
        case ResultKind.REGISTER2:
            body, accounting = {"event": "registered"}, "registered"
        case ResultKind.DELETE:
            body, accounting = {"event": "deleted"}, "deleted"
        case ResultKind.RECOVER2 if result.guess_count is not None and result.num_guesses is not None:
            body = {"event": "guess_used", "num_guesses": result.num_guesses, "guess_count": result.guess_count}
        case ResultKind.RECOVER3 if result.recovered:
            body = {"event": "share_recovered"}
        case _:
            pass
    return EventKind[result.kind.name], body, accounting
