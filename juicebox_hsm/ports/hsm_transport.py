"""The port to the HSM (decision record 0004)."""

from __future__ import annotations

from typing import Protocol

from juicebox_hsm.hsm.messages import Request, Response


class HsmTransport(Protocol):
    """The one way to an HSM (decision record 0004): requests are strictly serialised."""

    async def send(self, request: Request) -> Response:
        """Run one request. Raises `HsmGone` when the HSM is lost or poisoned.

        Cancelling the caller never cancels a request that was begun. May be no checkpoint (`juicebox_hsm.ports`).
        """
        ...
