"""What a call of the internal RPC can fail with; both errors say whether the peer may have acted on it."""

from __future__ import annotations

from typing import Final

from juicebox_hsm.errors import RealmError
from juicebox_hsm.wire.rpc import RpcCode

_SURELY_REFUSED: Final = frozenset(
    {
        RpcCode.UNKNOWN_METHOD,
        RpcCode.BAD_REQUEST,
        RpcCode.FORBIDDEN,
        RpcCode.OVERLOADED,
        RpcCode.SHUTTING_DOWN,
    }
)


class RpcError(RealmError):
    """A call that has no outcome. `maybe_delivered`: the peer may have run the method, or may yet run it."""

    retryable = True

    def __init__(self, message: str, *, maybe_delivered: bool) -> None:
        super().__init__(message)
        self.maybe_delivered = maybe_delivered


class RpcFailed(RpcError):
    """The RPC layer, theirs or ours (`DEADLINE_EXCEEDED`), gave up the call with `code`."""

    def __init__(self, code: RpcCode, message: str = "", *, maybe_delivered: bool | None = None) -> None:
        delivered = code not in _SURELY_REFUSED if maybe_delivered is None else maybe_delivered
        super().__init__(f"{code.value}: {message}" if message else code.value, maybe_delivered=delivered)
        self.code = code


class RpcUnreachable(RpcError):
    """There is no stream to the peer, or it broke before the reply came."""
