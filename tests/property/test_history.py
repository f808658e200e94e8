"""The history checker against an exact realm, against falsified histories, and against a slow checker."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import assume, given
from hypothesis import strategies as st

from juicebox_hsm.history import Call, Op, Outcome, check_user
from tests.examples import examples
from tests.property.history_model import PHASES, Simulation, explainable

_FINAL = {Op.REGISTER: 2, Op.RECOVER: 3, Op.DELETE: 1}


@given(
    seed=st.integers(0, 2**32),
    lanes=st.integers(1, 2),
    loss=st.sampled_from([0.0, 0.05, 0.1]),
    count=st.integers(1, 25),
)
@examples(100)
def test_what_an_exact_realm_does_is_explained(seed: int, lanes: int, loss: float, count: int) -> None:
    """Whatever is lost, repeated, late or at the same time: an exact realm is never accused."""
    simulation = Simulation(Random(seed), lanes=lanes, loss=loss, count=count)
    simulation.run()
    violation = check_user(simulation.calls, simulation.barriers)
    assert violation is None, str(violation)


@given(seed=st.integers(0, 2**32), count=st.integers(1, 8))
def test_unknown_losses_are_never_accused(seed: int, count: int) -> None:
    """Without counts of lost attempts, the checker allows for all that a client may have lost."""
    simulation = Simulation(Random(seed), lanes=1, loss=0.1, count=count)
    simulation.run()
    violation = check_user([replace(call, lost=None) for call in simulation.calls], simulation.barriers)
    assert violation is None, str(violation)


def _results(call: Call, secrets: list[str]) -> list[Call]:
    """Return the call with every other answer that a client could report."""
    found = [replace(call, outcome=Outcome.OK, lost=(0,) * _FINAL[call.op], guesses_remaining=None)]
    if call.op is Op.RECOVER:
        found = [replace(found[0], secret=secret) for secret in secrets]
        blank = replace(call, secret="", guesses_remaining=None)
        found += [replace(blank, outcome=Outcome.NOT_REGISTERED, lost=lost) for lost in ((0,), (0, 0), (0, 0, 0))]
        found += [replace(blank, outcome=Outcome.REPLACED, lost=lost) for lost in ((0, 0), (0, 0, 0))]
        found += [
            replace(blank, outcome=Outcome.INVALID_PIN, guesses_remaining=left, lost=lost)
            for left in range(6)
            for lost in ((0,), (0, 0), (0, 0, 0))
        ]
    return [other for other in found if other != call]


@given(seed=st.integers(0, 2**32), count=st.integers(1, 20), data=st.data())
@examples(100)
def test_every_false_answer_in_a_sequential_history_is_noticed(seed: int, count: int, data: st.DataObject) -> None:
    """With one call at a time and nothing lost there is one right answer: any other is a violation at that call."""
    simulation = Simulation(Random(seed), lanes=1, loss=0.0, count=count)
    simulation.run()
    position = data.draw(st.integers(0, count - 1))
    secrets = [call.secret for call in simulation.calls if call.op is Op.REGISTER]
    others = _results(simulation.calls[position], secrets or ["s0"])
    assume(others)
    falsified = data.draw(st.sampled_from(others))
    calls = [*simulation.calls[:position], falsified, *simulation.calls[position + 1 :]]
    violation = check_user(calls, simulation.barriers)
    assert violation is not None
    assert violation.call is falsified


@given(seed=st.integers(0, 2**32), lanes=st.integers(1, 2), count=st.integers(2, 4), data=st.data())
@examples(200)
def test_the_verdict_is_that_of_the_slow_checker(seed: int, lanes: int, count: int, data: st.DataObject) -> None:
    """On small histories, true and falsified, trying all orders of all requests decides the same."""
    simulation = Simulation(Random(seed), lanes=lanes, loss=0.2, count=count, barriers=False)
    simulation.run()
    calls = sorted(simulation.calls, key=lambda call: call.start)
    assume(sum(sum(call.lost or ()) for call in calls) <= 3)
    if data.draw(st.booleans()):
        position = data.draw(st.integers(0, len(calls) - 1))
        secrets = [call.secret for call in calls if call.op is Op.REGISTER]
        others = _results(calls[position], secrets or ["s0"])
        assume(others)
        calls[position] = data.draw(st.sampled_from(others))
    assert (check_user(calls) is None) == explainable(calls), " | ".join(map(str, calls))


def test_the_simulation_reaches_what_it_should() -> None:
    """The generated histories contain every outcome, so that the properties above speak about all of them."""
    seen: set[Outcome] = set()
    phases: set[tuple[Op, int]] = set()
    late = 0
    for seed in range(40):
        simulation = Simulation(Random(seed), lanes=2, loss=0.2, count=40)
        simulation.run()
        seen.update(call.outcome for call in simulation.calls)
        phases.update((call.op, len(call.lost or ())) for call in simulation.calls)
        late += len(simulation.barriers)
    assert seen == set(Outcome)
    assert phases >= {(op, number + 1) for op, names in PHASES.items() for number in range(len(names))}
    assert late > 0
