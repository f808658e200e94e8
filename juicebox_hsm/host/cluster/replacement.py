"""How lost HSMs are replaced: one step at a time from what is there, so that it can be broken off anywhere. Pure.

A group's members never change. For each group with a lost HSM another one is made with the new HSM in its place, takes
the range over, and the old group is retired. `next_step` looks at the realm afresh each time; what was done before
shows there, so a run after an interrupted one goes on where that stopped (operator-tools.md 2, record 0030).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.cluster.view import ClusterView, GroupView, HsmView
from juicebox_hsm.ids import GroupId, HsmId, OwnedRange, RealmId, uncovered


class ReplacementRefused(LocalError):
    """The HSMs cannot be replaced as things are; the message says why and what to do first."""


@dataclass(frozen=True, slots=True)
class Join:
    """The new HSM behind this agent joins the realm."""

    url: str


@dataclass(frozen=True, slots=True)
class Make:
    """A group of the HSMs behind these agents is made, to take over from `old`; the first one leads it."""

    old: GroupId
    urls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """Everything that `old` owns moves to `new`."""

    old: GroupId
    new: GroupId
    range: OwnedRange


@dataclass(frozen=True, slots=True)
class Retire:
    """The emptied group ends."""

    group: GroupId


ReplacementStep = Join | Make | Move | Retire


def next_step(view: ClusterView, realm: RealmId, replacing: Mapping[HsmId, str]) -> ReplacementStep | None:
    """Return what to do next to replace HSMs (id -> URL of the agent before the new one), None when all is done.

    Raises `ReplacementRefused` for what a person must see to first.
    """
    for url in sorted(replacing.values()):
        new = view.by_url(url)
        if new is None:
            raise ReplacementRefused(f"{url}: no answer of agent or HSM")
        if new.id in replacing:
            raise ReplacementRefused(f"{url}: HSM {new.id.hex()} is one of those that are replaced")
        if new.realm is None:
            return Join(url)
        if new.realm != realm:
            raise ReplacementRefused(f"{url}: its HSM is in realm {new.realm.hex()}, which it can never leave")
    groups = [group for group in view.groups_of(realm) if not group.has_ended]
    for old in groups:
        if any(hsm in replacing for hsm in old.configuration) and not _is_beyond_help(groups, old):
            return _step_for(view, groups, old, replacing)
    return None


def _is_beyond_help(groups: list[GroupView], group: GroupView) -> bool:
    """Tell whether a group lost its majority and others own everything: it cannot end, and nobody misses it."""
    if 2 * len(group.members) > len(group.configuration):
        return False
    return not uncovered(
        [other.owned_range for other in groups if other is not group and other.owned_range is not None]
    )


def _step_for(
    view: ClusterView, groups: list[GroupView], old: GroupView, replacing: Mapping[HsmId, str]
) -> ReplacementStep:
    """Return the next step to be rid of one group. One without a range has moved already, or never served."""
    leader = old.leader
    if leader is None or leader.info.leader is None:
        raise ReplacementRefused(f"group {old.id.hex()} has no leader; look at `cluster status`, then run this again")
    if leader.info.leader.transferring is not None:
        raise ReplacementRefused(f"group {old.id.hex()} has a transfer pending; a manager finishes it, run this again")
    owned = old.owned_range
    if owned is None:
        named = _pending_towards(groups, old)
        if named is not None:
            raise ReplacementRefused(f"a transfer of group {named.hex()} names group {old.id.hex()}; run this again")
        return Retire(old.id)
    wanted = _replaced(view, old, replacing)
    for group in groups:
        if set(group.configuration) == set(wanted) and group.owned_range is None and group.leader is not None:
            return Move(old.id, group.id, owned)
    urls = []
    for hsm, url in wanted.items():
        if url is None:
            raise ReplacementRefused(
                f"HSM {hsm.hex()}, another member of group {old.id.hex()}, does not answer: start it first, or name it "
                "too, with a new HSM of its own, in the same command"
            )
        urls.append(url)
    first = max(range(len(urls)), key=lambda place: urls[place] == leader.url)
    return Make(old.id, (*urls[first:], *urls[:first]))


def _replaced(view: ClusterView, old: GroupView, replacing: Mapping[HsmId, str]) -> dict[HsmId, str | None]:
    """Return the members of the group that takes over, by id, with the URL of each that answers."""
    wanted: dict[HsmId, str | None] = {}
    for hsm in old.configuration:
        url = replacing.get(hsm)
        found = view.hsms.get(hsm) if url is None else view.by_url(url)
        member = hsm if found is None else found.id
        if member in wanted:
            raise ReplacementRefused(f"HSM {member.hex()} would be twice in the group that replaces {old.id.hex()}")
        wanted[member] = None if found is None else found.url
    return dict(sorted(wanted.items()))


def propose(view: ClusterView, realm: RealmId, usable: Sequence[HsmView]) -> dict[HsmId, str | None]:
    """Return the HSMs that groups miss, each with the agent of one that could replace it, None when there is none.

    An HSM is missed when no registered agent has it: managers forget an agent that was silent for 21 minutes, and only
    then is this a proposal. `usable` are HSMs that are in the realm or may join it.
    """
    groups = [group for group in view.groups_of(realm) if not group.has_ended]
    missed = sorted({hsm for group in groups for hsm in group.configuration} - set(view.hsms))
    proposed: dict[HsmId, str | None] = {}
    for lost in missed:
        beside = {hsm for group in groups if lost in group.configuration for hsm in group.configuration}
        free = [hsm for hsm in usable if hsm.id not in beside and hsm.url not in proposed.values()]
        proposed[lost] = min(free, key=lambda hsm: (len(hsm.groups), hsm.id)).url if free else None
    return proposed


def pending_towards(view: ClusterView, realm: RealmId, wanted: GroupId) -> GroupId | None:
    """Return a group whose leader shows a transfer from or to this one: it must be over before this one ends."""
    found = view.group(realm, wanted)
    return None if found is None else _pending_towards(view.groups_of(realm), found)


def _pending_towards(groups: list[GroupView], wanted: GroupView) -> GroupId | None:
    for group in groups:
        info = None if group.leader is None else group.leader.info.leader
        marker = None if info is None else info.transferring
        if marker is not None and wanted.id in (group.id, marker.peer):
            return group.id
    return None
