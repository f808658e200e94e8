"""The HSM leads a group and its agent does not know: how long that may be (agent.md 13).

Between a role and its adoption there is a moment in which this is so in order; and a realm or group that is being
created has captured no more than its first entry. What lasts is a disagreement of which one side is wrong.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from juicebox_hsm.consensus.types import Leader
from juicebox_hsm.host.group import Groups
from juicebox_hsm.hsm.messages import StatusOk
from juicebox_hsm.ids import GroupId, RealmId

STEP_DOWN_AT: Final = 3
"""After this many suspect checks in a row the HSM is asked to step down."""
END_AT: Final = 5
"""If that did not help, the process ends at this one: a new one learns from its HSM what is so."""
CREATED_INDEX: Final = 1
"""Whoever captured no more than this may be about to be told of the group that was just created."""


class Remedy(enum.Enum):
    """What a suspicion calls for."""

    WAIT = enum.auto()
    STEP_DOWN = enum.auto()
    END = enum.auto()


@dataclass(frozen=True, slots=True)
class Suspicion:
    """The HSM leads this group without the agent's knowledge, for `checks` looks in a row."""

    realm: RealmId
    group: GroupId
    checks: int

    @property
    def remedy(self) -> Remedy:
        """Return what to do about it."""
        if self.checks >= END_AT:
            return Remedy.END
        return Remedy.STEP_DOWN if self.checks >= STEP_DOWN_AT else Remedy.WAIT


class Watchdog:
    """Counts suspect looks; one look at which all is well forgets them."""

    def __init__(self) -> None:
        self._checks: dict[tuple[RealmId, GroupId], int] = {}

    def look(self, groups: Groups, status: StatusOk) -> list[Suspicion]:
        """Compare what the HSM says with what the agent knows."""
        self._checks = {key: self._checks.get(key, 0) + 1 for key in suspects(groups, status)}
        return [Suspicion(realm, group, checks) for (realm, group), checks in self._checks.items()]


def suspects(groups: Groups, status: StatusOk) -> list[tuple[RealmId, GroupId]]:
    """Return the groups the HSM leads, has captured beyond creation, and the agent has no leadership of."""
    if status.realm is None:
        return []
    found = []
    for reported in status.realm.groups:
        group = groups.get(status.realm.id, reported.id)
        captured = 0 if reported.captured is None else reported.captured[0]
        leads = isinstance(reported.role.role, Leader) and captured > CREATED_INDEX
        if leads and (group is None or group.leader is None):
            found.append((status.realm.id, reported.id))
    return found
