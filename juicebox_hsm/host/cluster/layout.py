"""Which groups a realm shall have and what is missing for it: pure (manager.md 6.4, 6.5; operator-tools.md 2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from juicebox_hsm.consensus.types import GROUP_MEMBERS_MAX, GROUPS_PER_HSM_MAX
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.cluster.planning import Owner, Step, spread
from juicebox_hsm.host.cluster.view import ClusterView, GroupView, HsmView
from juicebox_hsm.ids import FULL_RANGE, GroupId, HsmId, RealmId

HSMS_ADVISED: Final = 5  # what a production realm has, so that two may fail
PROGRAM: Final = "juicebox-hsm cluster"

Members = tuple[HsmId, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """What a realm lacks. `realm` None: it is made at `first`. `members` are URLs, the first one leads at the start.

    `existing` are groups with wanted members, lowest id first; `missing` those to be made.
    """

    realm: RealmId | None
    first: str
    joining: tuple[str, ...]
    existing: tuple[GroupId, ...]
    missing: tuple[tuple[str, ...], ...]
    hsms: int

    @property
    def groups(self) -> int:
        """Return how many groups shall serve."""
        return len(self.existing) + len(self.missing)


def windows(hsms: Iterable[HsmId], groups: int, size: int) -> list[Members]:
    """Return the members of `groups` groups of `size`: HSMs in order of id, each group starting further on, cyclically.

    With `size` equal to the number of HSMs every group has all of them. Raises `LocalError` naming what is too many.
    """
    ordered = sorted(hsms)
    if not 1 <= size <= min(len(ordered), GROUP_MEMBERS_MAX):
        raise LocalError(
            f"a group of {size} members is impossible: there are {len(ordered)} HSMs, and a group has 1 to "
            f"{GROUP_MEMBERS_MAX} members"
        )
    found = []
    for number in range(groups):
        first = number * len(ordered) // groups
        found.append(tuple(sorted(ordered[(first + place) % len(ordered)] for place in range(size))))
    used = max((sum(hsm in members for members in found) for hsm in ordered), default=0)
    if not groups or used > GROUPS_PER_HSM_MAX - 1:  # one more is the group that the realm began with
        raise LocalError(f"{groups} groups: an HSM serves 1 to {GROUPS_PER_HSM_MAX - 1} besides the realm's first")
    return found


def choose_hsms(view: ClusterView, realm: RealmId | None) -> list[HsmView]:
    """Return the realm's HSMs and those in no realm that hold its keys, by id. Raises `LocalError`."""
    silent = [agent.url for agent in view.agents if agent.status is None or agent.status.hsm is None]
    if silent:
        raise LocalError(
            f"{', '.join(silent)}: no answer of agent or HSM; groups never gain members, so start it first or remove "
            "its registration with `cluster discovery remove`"
        )
    inside = [hsm for hsm in view.hsms.values() if realm is not None and hsm.realm == realm]
    fresh = [hsm for hsm in view.hsms.values() if hsm.realm is None]
    keys = {hsm.public_key for hsm in inside} or {hsm.public_key for hsm in fresh}
    if len(keys) > 1:
        raise LocalError("HSMs hold the keys of different realms; start only those of one, or make the realm by hand")
    chosen = sorted((hsm for hsm in (*inside, *fresh) if hsm.public_key in keys), key=lambda hsm: hsm.id)
    if not chosen:
        raise LocalError("no HSM found: start agents first, and look at `cluster agents`")
    return chosen


def make_layout(view: ClusterView, realm: RealmId | None, hsms: Sequence[HsmView], wanted: Sequence[Members]) -> Layout:
    """Compare what is there with the wanted groups; each existing group serves at most one of them."""
    urls = {hsm.id: hsm.url for hsm in hsms}
    left = [] if realm is None else [group for group in view.groups_of(realm) if not group.has_ended]
    existing: list[GroupId] = []
    missing: list[tuple[str, ...]] = []
    for number, members in enumerate(wanted):
        match = next((group for group in left if group.configuration == members), None)
        if match is not None:
            left.remove(match)
            existing.append(match.id)
        else:
            turn = number % len(members)
            missing.append(tuple(urls[hsm] for hsm in (*members[turn:], *members[:turn])))
    first = min(hsm.url for hsm in hsms)
    creating = {first} if realm is None else set()
    return Layout(
        realm=realm,
        first=first,
        joining=tuple(sorted({hsm.url for hsm in hsms if hsm.realm is None} - creating)),
        existing=tuple(sorted(existing)),
        missing=tuple(missing),
        hsms=len(hsms),
    )


def owners_of(groups: Iterable[GroupView]) -> list[Owner]:
    """Return the groups that own a range."""
    return [Owner(group.id, owned) for group in groups if (owned := group.owned_range) is not None]


def commands(view: ClusterView, layout: Layout) -> list[str]:
    """Return what an operator would type; REALM, FIRST and GROUP1... stand for ids that are not known yet."""
    realm = "REALM" if layout.realm is None else layout.realm.hex()
    lines = []
    names: dict[GroupId, str] = {}
    owners = [] if layout.realm is None else owners_of(view.groups_of(layout.realm))
    if layout.realm is None:
        lines.append(f"{PROGRAM} new-realm {layout.first}")
        owners = [Owner(_stand_in(0), FULL_RANGE)]
        names[_stand_in(0)] = "FIRST"
    if layout.joining:
        lines.append(f"{PROGRAM} join-realm --realm {realm} {' '.join(layout.joining)}")
    new = []
    for number, urls in enumerate(layout.missing, start=1):
        lines.append(f"{PROGRAM} new-group --realm {realm} {' '.join(urls)}")
        names[_stand_in(number)] = f"GROUP{number}"
        new.append(_stand_in(number))
    steps = spread(owners, [*layout.existing, *new])
    lines += [transfer_command(realm, step, names) for step in steps]
    if layout.missing or steps:
        lines.append(f"{PROGRAM} rebalance --full")
    return lines


def _stand_in(number: int) -> GroupId:
    """Return an id for a group that does not exist yet; it never leaves this module."""
    return GroupId(b"\xff" * 15 + bytes([number]))


def transfer_command(realm: str, step: Step, names: dict[GroupId, str]) -> str:
    """Return one transfer as a command."""
    source, destination = (names.get(group, group.hex()) for group in (step.source, step.destination))
    return (
        f"{PROGRAM} transfer --realm {realm} --source {source} --destination {destination} "
        f"--start {shorten(step.range.start)} --end {shorten(step.range.end)}"
    )


def shorten(record: bytes) -> str:
    """Return the shortest hex that `--start` and `--end` read as this record id."""
    last = record[-1:]
    kept = record.rstrip(last) if last in (b"\x00", b"\xff") else record[:-1]
    return (kept + last).hex()


def advice(layout: Layout, size: int) -> list[str]:
    """Return what is unwise about the size of a realm, one line each."""
    lines = []
    if layout.hsms < HSMS_ADVISED:
        lines.append(f"{layout.hsms} HSMs; a production realm has {HSMS_ADVISED} or more, so that two may fail")
    if size % 2 == 0:
        lines.append(f"groups of {size} tolerate {(size - 1) // 2} lost members, as many as groups of {size - 1}")
    return lines
