"""Ownership transfer at the agent: how long stale proofs are tried, whose tail counts, which edges prove a join."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.errors import InvariantViolation
from juicebox_hsm.host.retry import STORE_RETRY
from juicebox_hsm.host.transfer import (
    QUICK_ATTEMPTS_MAX,
    STALE_PAUSE_S,
    StaleAttempts,
    judge_tail,
    refusal_of,
    waits_to_sign,
)
from juicebox_hsm.hsm.messages import NotLeader, Outcome
from juicebox_hsm.ids import HsmId
from juicebox_hsm.wire.rpc import Refusal


def entry(index: int, mac: bytes = b"m") -> LogEntry:
    return LogEntry(index, None, None, bytes(32), mac * 32, HsmId(bytes(16)))


def leader(last: LogEntry | None, *made: LogEntry) -> Any:
    """A leadership that knows its last acknowledged entry and those it made."""
    return SimpleNamespace(last_appended=last, made=lambda asked: asked in made)


def test_stale_proofs_are_tried_at_once_then_with_pauses_then_not() -> None:
    """The first follow each other at once; then pauses grow like the store's; neither number nor time is unbounded."""
    attempts = StaleAttempts(100.0)
    pauses = [attempts.failed(100.0, leads=True) for _ in range(QUICK_ATTEMPTS_MAX + 2)]
    assert pauses[: QUICK_ATTEMPTS_MAX - 1] == [STALE_PAUSE_S] * (QUICK_ATTEMPTS_MAX - 1)
    assert pauses[QUICK_ATTEMPTS_MAX - 1 :] == [STORE_RETRY.delay_s(attempt) for attempt in (1, 2, 3)]
    assert STORE_RETRY.attempts_max is not None
    for _ in range(STORE_RETRY.attempts_max - len(pauses) - 1):
        assert isinstance(attempts.failed(100.0, leads=True), float)
    assert attempts.failed(100.0, leads=True) is Refusal.NO_STORE
    slow = StaleAttempts(100.0)
    assert isinstance(slow.failed(100.0 + STORE_RETRY.total_s - 0.1, leads=True), float)
    assert slow.failed(100.0 + STORE_RETRY.total_s, leads=True) is Refusal.NO_STORE


def test_attempts_end_with_the_leadership() -> None:
    """Another leadership of the same group is not asked: its entries are not those the caller knows of."""
    assert StaleAttempts(0.0).failed(0.0, leads=False) is Refusal.NOT_LEADER
    assert waits_to_sign(leads=False, in_time=True) is Refusal.NOT_LEADER
    assert waits_to_sign(leads=True, in_time=False) is Refusal.COMMIT_TIMEOUT
    assert waits_to_sign(leads=True, in_time=True) is None


def test_a_tail_counts_for_the_leader_that_wrote_it() -> None:
    """A deposed leader, whose log goes on without it, cannot pass; one whose acknowledgement is on the way waits."""
    mine, next_one, theirs = entry(5), entry(6), entry(6, b"x")
    assert judge_tail(mine, leader(mine, mine), leads=True, in_time=True) is mine
    assert judge_tail(mine, leader(mine, mine), leads=False, in_time=True) is Refusal.NOT_LEADER
    assert judge_tail(None, leader(mine, mine), leads=True, in_time=True) is Refusal.NOT_LEADER
    assert judge_tail(theirs, leader(mine, mine), leads=True, in_time=True) is Refusal.NOT_LEADER
    assert judge_tail(next_one, leader(mine, mine, next_one), leads=True, in_time=True) is None
    assert judge_tail(next_one, leader(mine, mine, next_one), leads=True, in_time=False) is Refusal.NOT_LEADER
    assert judge_tail(mine, leader(None), leads=True, in_time=True) is Refusal.NOT_LEADER
    forged = entry(5, b"x")
    assert judge_tail(forged, leader(mine, mine), leads=True, in_time=True) is Refusal.NOT_LEADER


def test_refusals_of_the_hsm_are_told_as_they_are() -> None:
    """What the HSM may answer has a word on the wire; anything else breaks an invariant."""
    assert refusal_of(NotLeader(None)) is Refusal.NOT_LEADER
    assert refusal_of(Outcome.MISSING_PROOF) is Refusal.INVALID_PROOF
    assert refusal_of(Outcome.BUSY) is Refusal.BUSY
    with pytest.raises(InvariantViolation):
        refusal_of(cast("Any", Outcome.STALE_PROOF))
