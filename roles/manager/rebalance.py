"""Spread leadership evenly: a pure choice of the next move, and its carry-out (manager.md 5)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.view import ClusterView, GroupKey, group_work
from juicebox_hsm.ids import HsmId
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.wire.rpc import Rebalanced, Refusal, Refused
from roles.manager.appointment import Appointer
from roles.manager.assign import appoint, drained_hsms
from roles.manager.context import ManagerContext, text
from roles.manager.leases import LeaseBusy, LeaseLost, group_lease, management_lease
from roles.manager.stepdown import step_down
from roles.survey.overview import read_overview

TRAILING_ENTRIES_MAX: Final = 1000
IMPROVEMENT_MIN: Final = 0.10
SETTLE_S: Final = 300.0
PAUSED: Final = "rebalance/paused"
MOVED_PREFIX: Final = "rebalance/moved/"


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
    """An HSM with its groups; a drained one is no destination."""

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
        result.append(HsmLoad(hsm.id, tuple(found), hsm.id in drained))
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


def describe(hsms: Sequence[HsmLoad], move: Move | None) -> str:
    """Return the workloads as text, one HSM a line, marking what moves and where."""
    lines = []
    for hsm in sorted(hsms, key=lambda load: (load.work, load.hsm)):
        mark = " [destination]" if move is not None and move.destination == hsm.hsm else ""
        lines.append(f"{hsm.hsm.hex()} work {hsm.work}{' drained' if hsm.drained else ''}{mark}")
        for group in hsm.groups:
            moving = " [moving]" if move is not None and (move.key, move.source) == (group.key, hsm.hsm) else ""
            lines.append(f"  {text(group.key)} work {group.work}{' leader' if group.leads else ''}{moving}")
    return "\n".join(lines)


async def rebalance(context: ManagerContext, appointer: Appointer, *, periodic: bool = False) -> Rebalanced | Refused:
    """Make at most one move. The periodic pass honours the pause switch and the hysteresis."""
    try:
        if periodic and await context.store.settings.get(PAUSED) is not None:
            return Rebalanced()
        view = await read_overview(context.store, context.rpc, context.now_ms())
        hsms = loads(view, await drained_hsms(context))
        for hsm in hsms:
            context.meter.gauge("manager.workload", hsm.work, hsm=hsm.hsm.hex())
        move = next_move(hsms)
        if move is None or (periodic and not (is_worthwhile(hsms, move) and await _is_settled(context, move.key))):
            return Rebalanced()
        context.log.info("rebalancing", workloads=describe(hsms, move))
        async with management_lease(context, group_lease(move.key)):
            outcome = await _carry_out(context, view, move)
            if isinstance(outcome, Rebalanced):
                await _remember_move(context, move.key)
    except LeaseBusy:
        return Refused(Refusal.BUSY, detail=text(move.key) if move else "")
    except LeaseLost as error:
        return Refused(Refusal.BUSY, detail=str(error))
    except StoreUnavailable as error:
        return Refused(Refusal.NO_STORE, detail=str(error))
    if isinstance(outcome, Refused):
        context.log.warning("rebalancing failed", group=text(move.key), outcome=outcome.outcome.value)
        if outcome.outcome is Refusal.LEADERSHIP_TRANSFER_FAILED:
            await _appointment_pass(context, appointer)
    else:
        context.meter.count("manager.rebalance.moves")
        context.log.info("rebalanced", group=text(move.key), hsm=move.destination.hex())
    return outcome


def _moved_setting(key: GroupKey) -> str:
    return f"{MOVED_PREFIX}{text(key)}"


async def _is_settled(context: ManagerContext, key: GroupKey) -> bool:
    """Tell whether no manager moved the group in the last five minutes. Raises `StoreUnavailable`.

    Managers' clocks differ by seconds; a time further in the future than the rule lasts was never now, and counts for
    nothing. So does what is not a time.
    """
    value = await context.store.settings.get(_moved_setting(key))
    try:
        return value is None or abs(context.now_ms() - int(value)) >= SETTLE_S * 1000
    except ValueError:
        return True


async def _remember_move(context: ManagerContext, key: GroupKey) -> None:
    """Tell the other managers, before the lease lets them at the group. The move itself stands, come what may."""
    try:
        await context.store.settings.put(_moved_setting(key), str(context.now_ms()).encode())
    except RealmError as error:
        context.log.warning("move not remembered, it may be followed by another", group=text(key), error=str(error))


async def _carry_out(context: ManagerContext, view: ClusterView, move: Move) -> Rebalanced | Refused:
    """Step the old leader down and ask the target; whatever goes wrong in between, ask the old leader back."""
    group = view.groups[move.key]
    old, new = group.member(move.source), group.member(move.destination)
    if old is None or new is None:
        return Refused(Refusal.STEP_DOWN_FAILED, detail="members changed")
    last = await step_down(context, group, old)
    if isinstance(last, Refused):
        if last.outcome is Refusal.RPC_ERROR:  # it may have stepped down: make sure somebody leads
            reason = await appoint(context, group, old, None)
            outcome = Refusal.LEADERSHIP_TRANSFER_FAILED if reason else Refusal.LEADERSHIP_TRANSFER_ROLLED_BACK
            return Refused(outcome, detail=last.detail)
        context.state.announced.discard(move.key)
        return Refused(Refusal.STEP_DOWN_FAILED, detail=last.outcome.value)
    refusal = await appoint(context, group, new, last)
    if not refusal:
        context.state.announced.discard(move.key)
        return Rebalanced(realm=move.key[0], group=move.key[1], source=move.source, destination=move.destination)
    if not await appoint(context, group, old, last):
        context.state.announced.discard(move.key)
        return Refused(Refusal.LEADERSHIP_TRANSFER_ROLLED_BACK, detail=refusal)
    return Refused(Refusal.LEADERSHIP_TRANSFER_FAILED, detail=refusal)


async def _appointment_pass(context: ManagerContext, appointer: Appointer) -> None:
    """Give the group to anybody; the periodic pass would do so too, a little later."""
    try:
        await appointer.run_pass()
    except RealmError as error:
        context.log.warning("appointment pass failed", error=str(error))
