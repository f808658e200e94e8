"""Spread leadership evenly: the choice of the next move, and what may be done about one that fails (manager.md 5)."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Final

from juicebox_hsm.host.cluster.view import ClusterView, GroupKey, group_work
from juicebox_hsm.ids import HsmId
from juicebox_hsm.wire.rpc import Rebalanced, Refusal, Refused

TRAILING_ENTRIES_MAX: Final = 1000
"""A member this many entries behind its leader, or more, cannot take over."""
IMPROVEMENT_MIN: Final = 0.10
SETTLE_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """One group at one HSM; `captured` is the index its HSM reports."""

    key: GroupKey
    work: int
    leads: bool
    members: int
    captured: int | None


@dataclass(frozen=True, slots=True)
class HsmLoad:
    """An HSM with its groups; a drained one is no destination, nor is one of which there is a copy."""

    hsm: HsmId
    groups: tuple[GroupLoad, ...]
    drained: bool = False

    @property
    def work(self) -> int:
        """Return the sum over its groups."""
        return sum(group.work for group in self.groups)

    def load_of(self, key: GroupKey) -> GroupLoad | None:
        """Return its part in one group."""
        return next((group for group in self.groups if group.key == key), None)


@dataclass(frozen=True, slots=True)
class Move:
    """Move the leadership of a group from one HSM to another."""

    key: GroupKey
    source: HsmId
    destination: HsmId


def loads(view: ClusterView, drained: Collection[HsmId] = ()) -> list[HsmLoad]:
    """Translate an overview for `next_move`. Only the freshest claim to lead a group counts as leading."""
    result = []
    for hsm in view.hsms.values():
        found = []
        for info in hsm.groups:
            group = view.group(hsm.realm or b"", info.id)
            member = None if group is None else group.member(hsm.id)
            if group is None or member is None:
                continue
            leader = group.leader
            found.append(
                GroupLoad(
                    key=group.key,
                    work=group_work(view, group, member),
                    leads=leader is not None and leader.hsm == hsm.id,
                    members=len(group.configuration),
                    captured=member.captured_index,
                )
            )
        result.append(HsmLoad(hsm.id, tuple(found), hsm.id in drained or hsm.id in view.copied))
    return result


def can_lead(destination: HsmLoad, group: GroupLoad) -> bool:
    """Tell whether an HSM is a member and close enough behind the leader to take over."""
    own = destination.load_of(group.key)
    if own is None or destination.drained or own.captured is None or group.captured is None:
        return False
    return own.captured > group.captured - TRAILING_ENTRIES_MAX


def next_move(hsms: Sequence[HsmLoad]) -> Move | None:
    """Choose the next move, deterministically; None when no move makes the balance strictly better."""
    remaining = sorted(hsms, key=lambda hsm: (hsm.work, hsm.hsm))
    while len(remaining) >= 2:
        average = sum(hsm.work for hsm in remaining) // len(remaining)
        busiest = remaining[-1]
        want = busiest.work - average
        movable = sorted(
            (group for group in busiest.groups if group.leads and group.members > 1),
            key=lambda group: (abs(group.work - want), group.key[1]),
        )
        for group in movable:
            for destination in remaining[:-1]:
                if destination.work + group.work < busiest.work and can_lead(destination, group):
                    return Move(group.key, busiest.hsm, destination.hsm)
        remaining.pop()
    return None


def is_worthwhile(hsms: Sequence[HsmLoad], move: Move) -> bool:
    """Tell whether the source's work falls by at least a tenth: the periodic pass leaves smaller gains alone."""
    source = next(hsm for hsm in hsms if hsm.hsm == move.source)
    group = source.load_of(move.key)
    return group is not None and group.work - 1 >= IMPROVEMENT_MIN * source.work


def is_settled(moved: bytes | None, now_ms: int) -> bool:
    """Tell whether no manager moved the group in the last five minutes; `moved` is what the setting of the move says.

    Managers' clocks differ by seconds; a time further in the future than the rule lasts was never now, and counts for
    nothing. So does what is not a time.
    """
    try:
        return moved is None or abs(now_ms - int(moved)) >= SETTLE_S * 1000
    except ValueError:
        return True


# --- carrying a move out ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskToLeave:
    """Ask the move's source to step down; answered with its last index, or its refusal."""


@dataclass(frozen=True, slots=True)
class AskToLead:
    """Ask an HSM to lead from index `last`, if that is known; answered with why it does not, "" when it does."""

    hsm: HsmId
    last: int | None


Steps = Generator[AskToLeave | AskToLead, "int | Refused | str", "Rebalanced | Refused"]


def carry_out(move: Move) -> Steps:
    """Move a leadership; whatever goes wrong in between, ask the old leader back. Returns what came of it.

    A step-down without an answer may have happened, so somebody has to be asked to lead.
    """
    left = yield AskToLeave()
    if isinstance(left, Refused):
        if left.outcome is not Refusal.RPC_ERROR:
            return Refused(Refusal.STEP_DOWN_FAILED, detail=left.outcome.value)
        return _asked_back((yield AskToLead(move.source, None)), left.detail)
    last = left if isinstance(left, int) else None
    refusal = yield AskToLead(move.destination, last)
    if not refusal:
        return Rebalanced(realm=move.key[0], group=move.key[1], source=move.source, destination=move.destination)
    return _asked_back((yield AskToLead(move.source, last)), str(refusal))


def _asked_back(refusal: object, detail: str) -> Refused:
    if refusal:
        return Refused(Refusal.LEADERSHIP_TRANSFER_FAILED, detail=detail)
    return Refused(Refusal.LEADERSHIP_TRANSFER_ROLLED_BACK, detail=detail)


def leaves_a_leader(outcome: Rebalanced | Refused) -> bool:
    """Tell whether somebody leads the group after a move that was carried out with this outcome."""
    return isinstance(outcome, Rebalanced) or outcome.outcome is not Refusal.LEADERSHIP_TRANSFER_FAILED
