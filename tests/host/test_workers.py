"""When a balancer's workers count as ready, reloaded, hanging and alive (load-balancer.md 1)."""

from __future__ import annotations

from juicebox_hsm.host.workers import RELOAD_S, START_S, Crew, Worker

SILENCE_S = 5.0


def _ready(crew: Crew, now_s: float = 0.0) -> None:
    for worker in crew.workers:
        worker.started(now_s)
        assert worker.heard(now_s, says_ready=True)


def test_all_or_nobody_is_ready() -> None:
    """The supervisor is told once, when the last worker that may still come is ready; not for a crew that gave up."""
    crew = Crew(3)
    first, second, third = crew.workers
    first.started(0.0)
    first.heard(1.0, says_ready=True)
    second.started(0.0)
    assert not crew.is_ready_due()
    third.is_given_up = True
    assert not second.heard(1.0, says_ready=False)
    assert not crew.is_ready_due()
    assert second.heard(2.0, says_ready=True)
    assert crew.is_ready_due()
    assert not crew.is_ready_due(), "told once"
    nobody = Crew(1)
    nobody.workers[0].is_given_up = True
    assert not nobody.is_ready_due()


def test_a_hup_is_passed_on_when_it_can_be_taken() -> None:
    """Never to a worker that starts, nor while one is being taken; a process that ended needs none."""
    worker = Worker(0)
    worker.started(0.0)
    worker.must_reload = True
    assert not worker.takes_reload(), "it has no handler yet"
    worker.heard(1.0, says_ready=True)
    assert not bool(worker.is_settled)
    assert worker.takes_reload()
    worker.must_reload = True
    assert not worker.takes_reload(), "one at a time"
    worker.heard(2.0, says_ready=True)
    assert worker.takes_reload()
    worker.ended()
    worker.started(3.0)
    worker.heard(4.0, says_ready=True)
    assert worker.is_settled
    assert not worker.takes_reload()
    worker.ended()
    assert not worker.heard(5.0, says_ready=True), "the word of a process that is gone"


def test_a_reload_ends_in_time() -> None:
    """Ready again means reloaded; a worker that does not reload is named once, and the supervisor waits no longer."""
    crew = Crew(2)
    _ready(crew)
    assert crew.is_ready_due()
    assert crew.overdue(RELOAD_S * 2) is None, "nothing was asked"
    crew.reload(10.0)
    one, other = crew.workers
    assert one.takes_reload()
    assert other.takes_reload()
    one.heard(11.0, says_ready=True)
    assert not crew.is_ready_due()
    assert crew.overdue(10.0 + RELOAD_S) is None
    assert crew.overdue(10.1 + RELOAD_S) == [other]
    assert crew.overdue(99.0 + RELOAD_S) is None, "told once"
    other.heard(99.0, says_ready=True)
    assert not crew.is_ready_due(), "it was told to go on already"


def test_who_hangs_and_who_lives() -> None:
    """A start may take long, silence afterwards not; one that is between two processes keeps the crew alive."""
    crew = Crew(2)
    starting, serving = crew.workers
    starting.started(0.0)
    serving.started(0.0)
    serving.heard(1.0, says_ready=True)
    assert crew.hanging(1.0 + SILENCE_S, SILENCE_S) == []
    assert crew.hanging(1.1 + SILENCE_S, SILENCE_S) == [serving]
    assert crew.hanging(START_S + 0.1, SILENCE_S) == [starting, serving]
    assert not crew.is_alive(START_S + 0.1, SILENCE_S)
    serving.ended()
    assert crew.hanging(START_S + 0.1, SILENCE_S) == [starting]
    assert crew.is_alive(START_S + 0.1, SILENCE_S), "it is being started again"
    serving.is_given_up = True
    assert not crew.is_alive(START_S + 0.1, SILENCE_S)
