"""The door to the core: one request in, one response out (hsm.md 8)."""

from __future__ import annotations

from typing import assert_never

from juicebox_hsm.hsm import app, capture, leadership, membership, retirement, transfer
from juicebox_hsm.hsm.messages import (
    AppRequest,
    BecomeLeader,
    CancelPreparedTransfer,
    CaptureJump,
    CaptureNext,
    Commit,
    CompleteTransfer,
    ForgetGroup,
    Handshake,
    JoinGroup,
    JoinRealm,
    NewGroup,
    NewRealm,
    PersistState,
    PrepareTransfer,
    Request,
    Response,
    RetireGroup,
    Status,
    StepDown,
    TransferIn,
    TransferOut,
    TransferStatement,
)
from juicebox_hsm.hsm.platform import Platform
from juicebox_hsm.hsm.state import HsmState, Limits, Poisoned

MAX_SESSIONS = 8192
TREE_OVERLAY_SIZE = 1024


class Hsm:
    """One HSM: synchronous, and deterministic given its platform.

    Callers MUST hand in one request at a time. The contents of requests may be hostile: each gets one of its
    documented answers. Raises `Poisoned` once a write to NVRAM failed, or after any request that did not end
    properly; only a restart from NVRAM helps then. Construction raises what `HsmState` says.
    """

    __slots__ = ("_poisoned", "_state")

    def __init__(
        self, platform: Platform, *, max_sessions: int = MAX_SESSIONS, tree_overlay_size: int = TREE_OVERLAY_SIZE
    ) -> None:
        self._poisoned = False
        self._state = HsmState(platform, Limits(max_sessions, tree_overlay_size))

    def handle(self, request: Request) -> Response:
        """Run one request to completion."""
        if self._poisoned:
            raise Poisoned("the HSM failed earlier and must be restarted")
        self._poisoned = True  # whatever leaves through an exception leaves the instance unusable (H6)
        response = _dispatch(self._state, request)
        self._poisoned = False
        return response


def _dispatch(state: HsmState, request: Request) -> Response:  # noqa: C901, PLR0912 -- one arm a request
    match request:
        case AppRequest():
            return app.app_request(state, request)
        case Commit():
            return leadership.commit(state, request)
        case CaptureNext():
            return capture.capture_next(state, request)
        case PersistState():
            return capture.persist_state(state)
        case Handshake():
            return app.handshake(state, request)
        case Status():
            return membership.status(state)
        case NewRealm():
            return membership.new_realm(state)
        case JoinRealm():
            return membership.join_realm(state, request)
        case NewGroup():
            return membership.new_group(state, request)
        case JoinGroup():
            return membership.join_group(state, request)
        case BecomeLeader():
            return leadership.become_leader(state, request)
        case StepDown():
            return leadership.step_down(state, request)
        case CaptureJump():
            return capture.capture_jump(state, request)
        case PrepareTransfer():
            return transfer.prepare_transfer(state, request)
        case CancelPreparedTransfer():
            return transfer.cancel_prepared_transfer(state, request)
        case TransferOut():
            return transfer.transfer_out(state, request)
        case TransferStatement():
            return transfer.transfer_statement(state, request)
        case TransferIn():
            return transfer.transfer_in(state, request)
        case CompleteTransfer():
            return transfer.complete_transfer(state, request)
        case RetireGroup():
            return retirement.retire_group(state, request)
        case ForgetGroup():
            return retirement.forget_group(state, request)
        case _:
            assert_never(request)
