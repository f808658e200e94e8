"""Plan how a group comes to own a target range, in two-group steps (manager.md 6.4). Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from juicebox_hsm.errors import LocalError
from juicebox_hsm.ids import (
    RECORD_ID_MAX,
    RECORD_ID_MIN,
    GroupId,
    OwnedRange,
    RecordId,
    next_record_id,
    prev_record_id,
)

PARTITIONS_MAX: Final = 1_000_000
_SPACE: Final = 1 << 32  # boundaries are multiples in the first four bytes


class PlanRefused(LocalError):
    """The target cannot be reached by moving range ends; the message says why."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A group and the range it owns."""

    group: GroupId
    range: OwnedRange


@dataclass(frozen=True, slots=True)
class Step:
    """One transfer between two groups."""

    source: GroupId
    destination: GroupId
    range: OwnedRange


def even_partition(count: int) -> list[OwnedRange]:
    """Split the whole id space into `count` (1..1 000 000) contiguous ranges of nearly equal size."""
    if not 1 <= count <= PARTITIONS_MAX:
        raise LocalError(f"cannot split into {count} ranges; 1 to {PARTITIONS_MAX} are possible")
    size = _SPACE // count
    starts = [RecordId((index * size).to_bytes(4, "big") + bytes(28)) for index in range(count)]
    ends = [_before(start) for start in starts[1:]] + [RECORD_ID_MAX]
    return [OwnedRange(start, end) for start, end in zip(starts, ends, strict=True)]


def covers(owners: Sequence[OwnedRange], wanted: OwnedRange) -> bool:
    """Tell whether the ranges that overlap `wanted` cover it without gap or overlap."""
    parts = sorted((part for part in owners if part.overlaps(wanted)), key=lambda part: part.start)
    if not parts or parts[0].start > wanted.start or parts[-1].end < wanted.end:
        return False
    return all(next_record_id(left.end) == right.start for left, right in itertools.pairwise(parts))


def plan(destination: GroupId, owners: Sequence[Owner], target: OwnedRange) -> list[Step]:
    """Return the transfers after which `destination` owns exactly `target`.

    `owners` are all ranges of the realm. Raises `PlanRefused` when the destination owns something disjoint from the
    target, when nobody owns part of it, or when a step would leave a hole in a source.
    """
    layout = {owner.group: owner.range for owner in owners}
    owned = layout.get(destination)
    if owned is not None and not owned.overlaps(target):
        raise PlanRefused("the destination owns a range that does not touch the target; move that one first")
    if not covers(list(layout.values()), target):
        raise PlanRefused("part of the target range is owned by nobody; look at `cluster status`")
    steps: list[Step] = []
    if owned is not None:
        _give_away(steps, layout, destination, target)
        _take_below(steps, layout, destination, target)
    _take_above(steps, layout, destination, target)
    return steps


def _before(record: RecordId) -> RecordId:
    """Return the id before one that is not the minimum."""
    previous = prev_record_id(record)
    if previous is None:
        raise PlanRefused("there is no id before the minimum")
    return previous


def _owner_at(layout: dict[GroupId, OwnedRange], record: RecordId | None) -> GroupId | None:
    if record is None:
        return None
    return next((group for group, owned in sorted(layout.items()) if owned.contains(record)), None)


def _apply(steps: list[Step], layout: dict[GroupId, OwnedRange], step: Step) -> None:
    """Append a step and change the layout as it will; refuse one that would leave a hole."""
    held = layout[step.source]
    if held == step.range:
        del layout[step.source]
    elif held.start == step.range.start:
        layout[step.source] = OwnedRange(_after(step.range.end), held.end)
    elif held.end == step.range.end:
        layout[step.source] = OwnedRange(held.start, _before(step.range.start))
    else:
        raise PlanRefused(f"taking the middle out of group {step.source.hex()} would leave a hole")
    owned = layout.get(step.destination)
    joined = step.range if owned is None else owned.join(step.range)
    if joined is None:
        raise PlanRefused(f"group {step.destination.hex()} would own two separate ranges")
    layout[step.destination] = joined
    steps.append(step)


def _after(record: RecordId) -> RecordId:
    following = next_record_id(record)
    if following is None:
        raise PlanRefused("there is no id after the maximum")
    return following


def _give_away(steps: list[Step], layout: dict[GroupId, OwnedRange], destination: GroupId, target: OwnedRange) -> None:
    """Give what sticks out of the target to the neighbours on that side."""
    owned = layout[destination]
    if owned.start < target.start:
        neighbour = _owner_at(layout, prev_record_id(owned.start))
        if neighbour is None:
            raise PlanRefused("nobody is there to take what lies below the target")
        _apply(steps, layout, Step(destination, neighbour, OwnedRange(owned.start, _before(target.start))))
    owned = layout[destination]
    if owned.end > target.end:
        neighbour = _owner_at(layout, next_record_id(owned.end))
        if neighbour is None:
            raise PlanRefused("nobody is there to take what lies above the target")
        _apply(steps, layout, Step(destination, neighbour, OwnedRange(_after(target.end), owned.end)))


def _take_below(steps: list[Step], layout: dict[GroupId, OwnedRange], destination: GroupId, target: OwnedRange) -> None:
    """Take everything of the target below the owned part, nearest first."""
    while layout[destination].start > target.start:
        end = _before(layout[destination].start)
        source = _owner_at(layout, end)
        if source is None:
            raise PlanRefused("part of the target range is owned by nobody")
        start = max(layout[source].start, target.start)
        _apply(steps, layout, Step(source, destination, OwnedRange(start, end)))


def _take_above(steps: list[Step], layout: dict[GroupId, OwnedRange], destination: GroupId, target: OwnedRange) -> None:
    """Take everything of the target above the owned part, nearest first; from its start when nothing is owned."""
    while destination not in layout or layout[destination].end < target.end:
        owned = layout.get(destination)
        start = target.start if owned is None else _after(owned.end)
        source = _owner_at(layout, start)
        if source is None:
            raise PlanRefused("part of the target range is owned by nobody")
        end = min(layout[source].end, target.end)
        _apply(steps, layout, Step(source, destination, OwnedRange(start, end)))


def spread(owners: Sequence[Owner], serving: Sequence[GroupId]) -> list[Step]:
    """Return transfers after which the `serving` groups own nearly equal parts of the id space and nobody else any.

    Ranges keep their order: groups that own something come first, by range, then the others as given; so ranges only
    shrink and grow at their ends. `owners` are all ranges of the realm. Raises `PlanRefused` when some id has no owner.
    """
    layout = {owner.group: owner.range for owner in owners}
    if not covers(list(layout.values()), OwnedRange(RECORD_ID_MIN, RECORD_ID_MAX)):
        raise PlanRefused("part of the id space is owned by nobody; look at `cluster status`")
    empty = [group for group in serving if group not in layout]
    order = [*sorted((group for group in serving if group in layout), key=lambda group: layout[group].start), *empty]
    steps: list[Step] = []
    # From the top down: what lies above a target is settled when its turn comes.
    for position in range(len(order) - 1, -1, -1):
        target = even_partition(len(order))[position]
        group = order[position]
        if group in layout:
            _take_above(steps, layout, group, OwnedRange(layout[group].start, target.end))
            if layout[group].start < target.start:
                below = _owner_at(layout, prev_record_id(layout[group].start)) or order[position - 1]
                _apply(steps, layout, Step(group, below, OwnedRange(layout[group].start, _before(target.start))))
        while group not in layout or layout[group].start > target.start:
            end = _before(layout[group].start) if group in layout else target.end
            source = _owner_at(layout, end)
            if source is None:
                raise PlanRefused("part of the target range is owned by nobody")
            _apply(steps, layout, Step(source, group, OwnedRange(max(layout[source].start, target.start), end)))
    return steps
