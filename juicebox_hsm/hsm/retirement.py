"""The end of a group: its last entry, and how its members leave it for good (hsm.md 12a).

Forgetting a captured head is what an HSM must never do, for then it could vote twice. It is safe for a group whose log
has ended: the retired entry is certified by a strict majority, nothing can follow it, and no statement admits an HSM to
a group in a later generation than the one it left.
"""

from __future__ import annotations

from juicebox_hsm.consensus.election import elect, highest_votes
from juicebox_hsm.consensus.macs import same
from juicebox_hsm.consensus.types import Captured
from juicebox_hsm.hsm.messages import (
    ForgetGroup,
    ForgetGroupOk,
    NotLeader,
    Outcome,
    RetireGroup,
    RetireGroupOk,
)
from juicebox_hsm.hsm.state import GroupState, HsmState


def retire_group(state: HsmState, request: RetireGroup) -> RetireGroupOk | Outcome | NotLeader:
    """Append the entry that ends the log of a group that owns nothing and takes part in no transfer."""
    found = state.leading(request.realm, request.group)
    if not isinstance(found, tuple):
        return found
    group, leader = found
    last = leader.log.last
    if last.retired:
        return RetireGroupOk(None, last.index, group.clock)
    if last.partition is not None:
        return Outcome.STILL_OWNER
    if last.transferring is not None:
        return Outcome.OTHER_TRANSFER_PENDING
    entry = state.new_entry(group.id, last, None, None, last.consumed, retired=True)
    leader.log.append(entry)
    leader.incoming = None
    return RetireGroupOk(entry, entry.index, group.clock)


def forget_group(state: HsmState, request: ForgetGroup) -> ForgetGroupOk | Outcome:
    """Leave a group whose retired entry a strict majority captured, in whatever role.

    Every vote that counts is for that very entry, since none follows it. What this HSM holds of the group beside it
    lies on a branch that can no longer win, replies included.
    """
    member = state.member(request.realm, request.group)
    if isinstance(member, Outcome):
        return member
    if not state.macs.verify_log_entry(request.realm, member.id, request.entry):
        return Outcome.INVALID_MAC
    if not request.entry.retired:
        return Outcome.NOT_RETIRED
    if not is_certified(state, request, member):
        return Outcome.NO_QUORUM
    realm = state.in_realm(request.realm)
    return Outcome.INVALID_REALM if realm is None else ForgetGroupOk(state.forget_group(realm, member.id))


def is_certified(state: HsmState, request: ForgetGroup, member: GroupState) -> bool:
    """Tell whether a strict majority of the group's members captured the entry of this request."""
    entry = request.entry

    def is_valid(captured: Captured) -> bool:
        is_for_entry = captured.index == entry.index and same(captured.mac, entry.entry_mac)
        return is_for_entry and state.is_valid_vote(captured, request.realm, member)

    return elect(member.configuration, highest_votes(request.captures, is_valid)) is not None
