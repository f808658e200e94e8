"""When a leadership that the agent does not know of is suspect, and what it calls for (agent.md 13)."""

from __future__ import annotations

from juicebox_hsm.consensus.types import Leader, RoleStatus, Witness
from juicebox_hsm.host.group import Groups, GroupState
from juicebox_hsm.host.watchdog import Remedy, Watchdog, suspects
from juicebox_hsm.hsm.messages import GroupStatus, RealmStatus, StatusOk
from juicebox_hsm.ids import GroupId, HsmId, RealmId

REALM, GROUP, HSM = RealmId(b"r" * 16), GroupId(b"g" * 16), HsmId(b"h" * 16)


def status_of(role: Leader | Witness, captured: int) -> StatusOk:
    known = GroupStatus(GROUP, (HSM,), (captured, bytes(32)) if captured else None, None, RoleStatus(role, 9))
    return StatusOk(HSM, RealmStatus(REALM, bytes(32), (known,)), bytes(32))


def test_suspects() -> None:
    """Suspect is only a group the HSM leads with more than one entry captured and without leader state here."""
    groups = Groups()
    assert suspects(groups, status_of(Leader(2), 2)) == [(REALM, GROUP)]
    assert suspects(groups, status_of(Leader(2), 1)) == []
    assert suspects(groups, status_of(Leader(2), 0)) == []
    assert suspects(groups, status_of(Witness(), 5)) == []
    assert suspects(groups, StatusOk(HSM, None, bytes(32))) == []
    group = GroupState(REALM, GROUP, (HSM,), RoleStatus(Witness(), 0))
    groups.add(group)
    assert suspects(groups, status_of(Leader(2), 2)) == [(REALM, GROUP)], "known, but not as led"
    group.adopt(RoleStatus(Leader(2), 9))
    assert suspects(groups, status_of(Leader(2), 2)) == []


def test_a_disagreement_that_lasts_ends_the_process() -> None:
    """Two step-downs are tried before the end; one look at which all is well begins the count anew."""
    dog, groups = Watchdog(), Groups()

    def look(role: Leader | Witness) -> list[Remedy]:
        return [found.remedy for found in dog.look(groups, status_of(role, 5))]

    assert [look(Leader(2)) for _ in range(4)] == [[Remedy.WAIT]] * 2 + [[Remedy.STEP_DOWN]] * 2
    assert look(Witness()) == []
    assert [look(Leader(2)) for _ in range(5)] == [[Remedy.WAIT]] * 2 + [[Remedy.STEP_DOWN]] * 2 + [[Remedy.END]]
