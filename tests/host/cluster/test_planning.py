"""Plans for moving ranges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.cluster.planning import Owner, PlanRefused, covers, even_partition, plan, spread
from juicebox_hsm.ids import FULL_RANGE, RECORD_ID_MAX, GroupId, OwnedRange, RecordId, next_record_id, uncovered
from tests.host.cluster.agents import group, record, subtract


def _range(start: str, end: str) -> OwnedRange:
    return OwnedRange(record(start), record(end, 0xFF))


def test_three_equal_parts() -> None:
    """The documented boundaries for three."""
    parts = even_partition(3)
    assert [part.start.hex()[:10] for part in parts] == ["0000000000", "5555555500", "aaaaaaaa00"]
    assert [part.end.hex()[:10] for part in parts] == ["55555554ff", "aaaaaaa9ff", "ffffffffff"]


@given(st.integers(1, 300))
def test_even_partition_covers_everything(count: int) -> None:
    """The parts are contiguous, in order, and cover the id space."""
    parts = even_partition(count)
    assert len(parts) == count
    assert covers(parts, FULL_RANGE)
    assert uncovered(parts) == []


@pytest.mark.parametrize("count", [0, -1, 1_000_001])
def test_even_partition_limits(count: int) -> None:
    """No parts and more than a million are refused."""
    with pytest.raises(LocalError):
        even_partition(count)


def test_coverage_notices_gaps_and_overlaps() -> None:
    """A missing id, a missing end and an overlap are each noticed."""
    low, high = _range("00", "7f"), _range("80", "ff")
    assert covers([high, low], FULL_RANGE)
    assert not covers([low], FULL_RANGE)
    assert not covers([low, _range("81", "ff")], FULL_RANGE)
    assert not covers([low, _range("7f", "ff")], FULL_RANGE)
    assert covers([low], _range("10", "20"))


def test_gaps() -> None:
    """What nobody owns is listed, in order."""
    assert uncovered([]) == [FULL_RANGE]
    assert uncovered([_range("20", "3f"), _range("60", "ff")]) == [_range("00", "1f"), _range("40", "5f")]


def test_takes_from_an_empty_start() -> None:
    """With nothing owned, steps go up from the target's start."""
    owners = [Owner(group(1), _range("00", "7f")), Owner(group(2), _range("80", "ff"))]
    steps = plan(group(9), owners, _range("40", "bf"))
    assert [(step.source, step.range) for step in steps] == [
        (group(1), _range("40", "7f")),
        (group(2), _range("80", "bf")),
    ]


def test_gives_away_then_takes() -> None:
    """What sticks out goes to the neighbour first; then below, then above."""
    owners = [
        Owner(group(1), _range("00", "3f")),
        Owner(group(2), _range("40", "bf")),
        Owner(group(3), _range("c0", "ff")),
    ]
    steps = plan(group(2), owners, _range("50", "df"))
    assert [(step.source, step.destination, step.range) for step in steps] == [
        (group(2), group(1), _range("40", "4f")),
        (group(3), group(2), _range("c0", "df")),
    ]


def test_middle_of_a_source_is_refused() -> None:
    """Cutting the middle out would leave a source with two ranges."""
    with pytest.raises(PlanRefused, match="hole"):
        plan(group(9), [Owner(group(1), FULL_RANGE)], _range("40", "7f"))


def test_disjoint_destination_is_refused() -> None:
    """A destination that owns something elsewhere cannot jump."""
    owners = [Owner(group(1), _range("00", "7f")), Owner(group(2), _range("80", "ff"))]
    with pytest.raises(PlanRefused, match="does not touch"):
        plan(group(2), owners, _range("00", "3f"))


def test_unowned_target_is_refused() -> None:
    """What nobody owns cannot be taken."""
    with pytest.raises(PlanRefused, match="nobody"):
        plan(group(9), [Owner(group(1), _range("00", "7f"))], _range("40", "ff"))


def test_nothing_to_do() -> None:
    """Owning the target already needs no step."""
    assert plan(group(1), [Owner(group(1), FULL_RANGE)], FULL_RANGE) == []


@given(st.lists(st.integers(1, 255), unique=True, max_size=6), st.data())
def test_plans_reach_the_target_by_legal_steps(cuts: list[int], data: st.DataObject) -> None:
    """Whatever the layout, a plan's steps are each allowed, keep full coverage, and end at the target."""
    starts = [record("00"), *(record(f"{cut:02x}") for cut in sorted(cuts))]
    ends = [*(record(f"{cut - 1:02x}", 0xFF) for cut in sorted(cuts)), RECORD_ID_MAX]
    layout = {group(index): OwnedRange(start, end) for index, (start, end) in enumerate(zip(starts, ends, strict=True))}
    destination = group(data.draw(st.integers(0, len(layout))))
    low, high = sorted(data.draw(st.tuples(st.integers(0, 255), st.integers(0, 255))))
    target = _range(f"{low:02x}", f"{high:02x}")
    try:
        steps = plan(destination, [Owner(key, owned) for key, owned in layout.items()], target)
    except PlanRefused:
        return
    for step in steps:
        held = layout.pop(step.source)
        assert held == step.range or held.split_at(step.range) is not None
        rest = subtract(held, step.range)
        if rest is not None:
            layout[step.source] = rest
        taken = layout.get(step.destination)
        joined = step.range if taken is None else taken.join(step.range)
        assert joined is not None
        layout[step.destination] = joined
        assert covers(list(layout.values()), FULL_RANGE)
    assert layout[destination] == target
    assert next_record_id(RECORD_ID_MAX) is None


@st.composite
def _layouts(draw: st.DrawFn) -> tuple[list[Owner], list[GroupId]]:
    """Return a covered id space cut at random places among some groups, and the groups that shall serve."""
    cuts = sorted(draw(st.sets(st.integers(1, 2**256 - 1), max_size=5)))
    starts = [0, *cuts]
    ends = [*(cut - 1 for cut in cuts), 2**256 - 1]
    names = draw(st.permutations(range(1, len(starts) + 1)))
    owners = [
        Owner(group(name), OwnedRange(RecordId(start.to_bytes(32, "big")), RecordId(end.to_bytes(32, "big"))))
        for name, start, end in zip(names, starts, ends, strict=True)
    ]
    serving = draw(st.lists(st.integers(1, 10), min_size=1, max_size=6, unique=True))
    return owners, [group(name) for name in serving]


@given(_layouts())
def test_spread_reaches_an_even_layout_by_legal_steps(case: tuple[list[Owner], list[GroupId]]) -> None:
    """Every step gives an end of a range to a neighbour or an empty group; at the end the parts are even."""
    owners, serving = case
    layout = {owner.group: owner.range for owner in owners}
    steps = spread(owners, serving)
    for step in steps:
        left = subtract(layout.pop(step.source), step.range)
        if left is not None:
            layout[step.source] = left
        owned = layout.get(step.destination)
        joined = step.range if owned is None else owned.join(step.range)
        assert joined is not None
        layout[step.destination] = joined
        assert covers(list(layout.values()), FULL_RANGE)
    assert set(layout) == set(serving)
    assert sorted(layout.values(), key=lambda part: part.start) == even_partition(len(serving))
    assert len(steps) <= 2 * (len(owners) + len(serving))


def test_spread_of_an_even_layout_is_nothing() -> None:
    """A layout that is as wanted is left alone, whoever owns which part."""
    parts = even_partition(3)
    owners = [Owner(group(name), part) for name, part in zip((3, 1, 2), parts, strict=True)]
    assert spread(owners, [group(1), group(2), group(3)]) == []


def test_spread_of_a_fresh_realm() -> None:
    """The first group's range is cut into thirds by three steps, and it keeps nothing."""
    steps = spread([Owner(group(9), FULL_RANGE)], [group(1), group(2), group(3)])
    assert [(step.source, step.destination) for step in steps] == [(group(9), group(name)) for name in (3, 2, 1)]


def test_spread_refuses_an_id_without_owner() -> None:
    """A hole is for the operator to look at, not to plan around."""
    with pytest.raises(PlanRefused):
        spread([Owner(group(1), _range("00", "7f"))], [group(1)])
