"""Decide whether what a simulated realm did was right. Pure observers, called by the world; nothing here waits.

Rules and where they are: hsm.md 14 on each HSM call (`judge_ledger`, `judge_commits`, `judge_atomicity`), logs, trees
and ranges (`judge_store`), tenant events (`judge_events`), what holds in quiet (`judge_liveness`), log lines
(`judge_logs`), and the history of every user (`juicebox_hsm.history`). A broken rule is reported once, with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from juicebox_hsm.consensus.macs import Macs
from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.errors import LocalError
from juicebox_hsm.history import Call, check_history
from juicebox_hsm.host.events import OutboxEvent
from juicebox_hsm.host.log import Intent
from juicebox_hsm.hsm import messages as m
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.state import GroupState, Poisoned
from juicebox_hsm.ids import GroupId, RealmId
from roles.tools.simulate.judge_atomicity import (
    Fingerprint,
    changed_groups,
    check_refusal,
    fingerprint,
    is_refusal,
)
from roles.tools.simulate.judge_commits import Commits
from roles.tools.simulate.judge_events import EventsJudge
from roles.tools.simulate.judge_ledger import Ledger, state_of
from roles.tools.simulate.judge_liveness import Quiet, check_duels, check_quiet
from roles.tools.simulate.judge_logs import LogJudge
from roles.tools.simulate.judge_rules import BrokenRule, Violation
from roles.tools.simulate.judge_store import StoreJudge
from roles.tools.simulate.store import SimulatedStore

VIOLATIONS_MAX: Final = 100
"""More say nothing new: what follows the first is often its consequence."""


class Judge:
    """Everything that is checked of one run. `now` is the world's time in seconds."""

    def __init__(
        self,
        store: SimulatedStore,
        record_key: bytes,
        macs: Macs,
        now: Callable[[], float],
        on_violation: Callable[[Violation], object],
    ) -> None:
        self.violations: list[Violation] = []
        self._now = now
        self._on_violation = on_violation
        self._data = store.data
        self.ledger = Ledger(record_key)
        self.commits = Commits(self.ledger)
        self.logs = StoreJudge(store.data, self.ledger, self.commits, macs)
        self.events = EventsJudge(store.data, self.ledger, self.commits, self.logs)
        self._lines = LogJudge()
        self._hsms: dict[str, Hsm] = {}
        self._dead: dict[int, Hsm] = {}  # kept, so that no other object gets the same id
        self._seen: dict[str, Fingerprint] = {}
        """What each HSM was after its last request; nothing but a request changes one."""
        self._unseen: set[str] = set()
        """HSMs of which no request was seen since they came up; asked, never walked."""
        self._calls: list[Call] = []
        self._barriers: list[float] = []
        self._began: list[tuple[float, GroupId]] = []
        store.watchers.append(_Guarded(self))

    def report(self, rule: str, detail: str) -> None:
        """Keep a violation and tell the world."""
        if len(self.violations) < VIOLATIONS_MAX:
            violation = Violation(rule, detail, self._now())
            self.violations.append(violation)
            self._on_violation(violation)

    def check(self, look: Callable[[], object]) -> None:
        """Run one check; report the rule that it finds broken."""
        try:
            look()
        except BrokenRule as broken:
            self.report(broken.rule, broken.detail)

    # --- HSMs -------------------------------------------------------------------------------------------

    def hsm_started(self, name: str, hsm: Hsm) -> None:
        """Take in that an HSM came up."""
        self._hsms[name] = hsm
        self._seen[name] = fingerprint(state_of(hsm))
        self._unseen.add(name)
        self.check(lambda: self.ledger.started(name, hsm))

    def hsm_crashed(self, name: str) -> None:
        """Take in that an HSM lost what was not durable. What its dead process still asks it counts for nothing."""
        dead = self._hsms.pop(name, None)
        if dead is not None:
            self._dead[id(dead)] = dead
        self._seen.pop(name, None)
        self.ledger.ended(name)

    def hsm_wrote(self, name: str, content: bytes) -> None:
        """Take in a completed write to an HSM's NVRAM."""
        self.check(lambda: self.ledger.wrote(name, content))

    def hsm_handle(self, name: str, hsm: Hsm, request: m.Request) -> m.Response:
        """Run one request on an HSM and check what it did."""
        if id(hsm) in self._dead:
            return hsm.handle(request)
        self._hsms[name] = hsm
        before = self._seen[name] if name in self._seen else fingerprint(state_of(hsm))
        try:
            response = hsm.handle(request)
        except Poisoned:
            raise
        except Exception as error:
            self.report("I17", f"HSM {name}: a {type(request).__name__} raised {type(error).__name__}: {error}")
            raise
        state = state_of(hsm)
        after = self._seen[name] = fingerprint(state)
        is_new = name in self._unseen
        self._unseen.discard(name)
        changed = list(state.groups.values()) if is_new else changed_groups(state, before, after)
        self.check(lambda: self._observe(name, hsm, request, response, changed))
        if before != after and is_refusal(response):
            self.check(lambda: check_refusal(name, state, before, after, request, response))
        return response

    def _observe(
        self, name: str, hsm: Hsm, request: m.Request, response: m.Response, changed: Sequence[GroupState]
    ) -> None:
        self.ledger.observe(name, hsm, request, response)
        match request, response:
            case m.Commit(), m.CommitOk():
                self.logs.committed(request.group, self.commits.observe(name, hsm, request, response))
            case m.CaptureNext(), m.RoleOk():
                self.logs.captured(name, request.group, *state_of(hsm).captured[request.group])
            case _:
                pass
        self.ledger.follow(name, hsm, request, changed)
        if self.ledger.begun:
            self._began += [(self._now(), group) for group in self.ledger.begun]
            self.ledger.begun.clear()

    # --- the rest ---------------------------------------------------------------------------------------

    def call(self, call: Call) -> None:
        """Take in a call of a client that has ended, or never will."""
        self._calls.append(call)

    def answered(self, reply: bytes) -> None:
        """Take in the encoded NoiseResponse of an `app` request that an agent answers (handshakes alone excepted)."""
        self.check(lambda: self.events.answered(reply))

    def barrier(self) -> None:
        """Take in that every process of the realm is dead at this moment."""
        self._barriers.append(self._now())

    def secret(self, what: str, value: bytes | str) -> None:
        """Take in something that no log line may show."""
        self.check(lambda: self._lines.secret(what, value))

    def logged(self, line: str) -> None:
        """Read a line of any process' log."""
        self.check(lambda: self._lines.line(line))

    def check_now(self) -> None:
        """Look at logs, ranges and log lines; cheap."""
        self.check(self.logs.check_logs)
        self.check(self._lines.search)

    def finish(self, quiet: Quiet) -> None:
        """Check everything that can be told only at the end."""
        self.check_now()
        self.check(self.logs.check_trees)
        self.check(self.events.finish)
        self.check(lambda: check_quiet(quiet, self._data))
        self.check(lambda: check_duels(self._began, self._now()))
        self._check_histories()

    def _check_histories(self) -> None:
        """Check each user's history; one whose calls overlap too much is undecided, and said to be."""
        by_user: dict[str, list[Call]] = {}
        for call in self._calls:
            by_user.setdefault(call.user, []).append(call)
        for calls in by_user.values():
            try:
                found = check_history(calls, self._barriers)
            except LocalError:
                self._data.counts["history.undecided"] += 1
                continue
            for violation in found:
                self.report("history", str(violation))


class _Guarded:
    """Passes what the store does to the judges of logs and events, and reports what they find."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def appended(
        self,
        realm: RealmId,
        group: GroupId,
        entries: Sequence[LogEntry],
        intents: Sequence[Intent | None],
        delta: bytes,
    ) -> None:
        """See `store_data.Watcher`; realm and delta are checked with the trees."""
        del realm, delta
        self._judge.check(lambda: self._judge.logs.appended(group, entries, intents))

    def recorded(
        self, realm: RealmId, tenant: str, rows: Sequence[OutboxEvent], settled: Mapping[GroupId, int]
    ) -> None:
        """See `store_data.Watcher`."""
        self._judge.check(lambda: self._judge.events.recorded(realm, tenant, rows, settled))


__all__ = ["Judge", "Quiet", "Violation"]
