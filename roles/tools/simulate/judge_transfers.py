"""Ranges on their way between groups: prepared, given away, signed for, taken in once (I4, I14; hsm.md 12).

`made` looks at every entry, because a marker travels in every entry until it is taken off.
"""

from __future__ import annotations

from typing import Final

from juicebox_hsm.consensus.types import LogEntry, Partition, TransferringIn, TransferringOut
from juicebox_hsm.hsm import messages as m
from juicebox_hsm.hsm.state import HsmState, LeaderState
from juicebox_hsm.ids import GroupId, OwnedRange
from roles.tools.simulate.judge_rules import require

_MARKED: Final = (m.PrepareTransfer, m.TransferOut)


class Transfers:
    """Every transfer that HSMs prepared and signed."""

    def __init__(self) -> None:
        self._prepared: dict[tuple[GroupId, GroupId, OwnedRange], None] = {}
        self._outs: dict[tuple[GroupId, GroupId, int], Partition] = {}

    def prepared(self, request: m.PrepareTransfer) -> None:
        """Note that a destination is ready for a range."""
        self._prepared[request.source, request.destination, request.range] = None

    def left(self, request: m.TransferOut) -> None:
        """Check that a range leaves only towards a group that is ready for it."""
        asked = (request.source, request.destination, request.range)
        require("I4", asked in self._prepared, "a range left towards a group that had not prepared for it")

    def signed(self, name: str, state: HsmState, request: m.TransferStatement, response: m.TransferStatementOk) -> None:
        """I4: a range is signed away only once its going is committed."""
        role = state.groups[request.source].role
        marker = role.log.last.transferring if isinstance(role, LeaderState) else None
        if not isinstance(role, LeaderState) or not isinstance(marker, TransferringOut):
            require("I4", condition=False, detail=f"HSM {name} signed a transfer that is not under way")
            return
        is_committed = role.committed is not None and role.committed >= marker.at == response.at
        require("I4", is_committed, f"HSM {name} signed away a range before that was committed")
        self._outs[request.source, request.destination, marker.at] = marker.partition

    def made(self, request: m.Request, entry: LogEntry, parent: LogEntry | None) -> None:
        """I14: markers appear and disappear only through the transfer handlers, and say where they appeared."""
        marker = entry.transferring
        if parent is None:
            require("I14", marker is None and not entry.consumed, "a first entry has a marker")
            return
        before, after = dict(parent.consumed), dict(entry.consumed)
        kept = all(after.get(source, 0) >= at for source, at in before.items())
        require("I14", kept, "consumed decreased")
        if isinstance(request, _MARKED):
            fresh = parent.transferring is None and marker is not None and marker.at == entry.index
            require("I14", fresh, "a marker came over another one, or says another index")
        elif isinstance(request, m.TransferIn | m.CancelPreparedTransfer):
            gone = isinstance(parent.transferring, TransferringIn) and marker is None
            require("I14", gone, "an In marker was not there, or stayed")
        elif isinstance(request, m.CompleteTransfer):
            require("I14", isinstance(parent.transferring, TransferringOut) and marker is None, "no Out marker to end")
        else:
            require("I14", marker == parent.transferring, "a marker changed on its way")
        if isinstance(request, m.TransferIn):
            raised = after.get(request.source) == request.at > before.get(request.source, 0)
            require("I14", raised, f"the transfer of index {request.at} was taken in twice")
            sent = self._outs.get((request.source, request.destination, request.at))
            arrived = sent is not None and sent == request.transferring
            require("I4", arrived, "a range arrived that its source never signed away")
        else:
            require("I14", entry.consumed == parent.consumed, "consumed changed outside of a transfer")
