"""The manager's RPC methods (manager.md 2).

The RPC server runs each body in a nursery of its own, so a caller that goes away never leaves a hand-over or a transfer
half done; here trouble becomes a refusal, and what is under way is shown in `status`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from juicebox_hsm import __version__
from juicebox_hsm.adapters.rpc import Handler, handles
from juicebox_hsm.adapters.tls.certificate_end import to_unix_ms
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.transfer import TransferRequest
from juicebox_hsm.ids import GroupId
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.wire.methods import LEADER_LOST, LEADER_STEPDOWN, MANAGER_STATUS, REBALANCE, TRANSFER, Reply
from juicebox_hsm.wire.rpc import (
    Done,
    Empty,
    LeaderLost,
    ManagerStatus,
    PendingTransfer,
    Rebalanced,
    Refusal,
    Refused,
    StepdownOrder,
    TransferPrepare,
)
from roles.manager.appointment import Appointer
from roles.manager.context import ManagerContext
from roles.manager.rebalance import rebalance
from roles.manager.stepdown import hand_over
from roles.manager.transfer import run_requested_transfer

HINTS_IN_FLIGHT_MAX: Final = 256  # groups x members of a large cluster; more are noise


class ManagerService:
    """Handlers for `MANAGER_METHODS`; `nursery` runs what hints set off, beyond the hint's own call."""

    def __init__(self, context: ManagerContext, appointer: Appointer, nursery: trio.Nursery) -> None:
        self._context = context
        self._appointer = appointer
        self._nursery = nursery
        self._actions = 0
        self._hints = 0

    def handlers(self) -> dict[str, Handler]:
        """Return method name -> handler."""
        return dict(
            (
                handles(MANAGER_STATUS, self._status),
                handles(LEADER_STEPDOWN, self._leader_stepdown),
                handles(LEADER_LOST, self._leader_lost),
                handles(REBALANCE, self._rebalance),
                handles(TRANSFER, self._transfer),
            )
        )

    async def _status(self, body: Empty, caller: object) -> ManagerStatus:  # noqa: ARG002
        state = self._context.state
        now_ms = self._context.now_ms()
        pending = sorted(state.pending.items())
        return ManagerStatus(
            older=json.dumps({"version": __version__}),
            name=self._context.name,
            version=__version__,
            certificate_end_ms=to_unix_ms(self._context.certificate_end()),
            loops=tuple(run for _, run in sorted(state.loops.items())),
            held_leases=tuple(sorted(state.held_leases)),
            actions=tuple(sorted(state.actions.values())),
            transfers=tuple(progress.to_wire(now_ms) for progress in state.transfers),
            pending=tuple(
                PendingTransfer(realm, group, max(0, now_ms - since_ms) / 1000)
                for ((realm, group), _), since_ms in pending
            ),
            announced=tuple(sorted(state.announced)),
            now_ms=now_ms,
            uptime_s=trio.current_time() - self._context.began_s,
        )

    async def _leader_stepdown(self, body: StepdownOrder, caller: object) -> Done | Refused:  # noqa: ARG002
        subject = f"HSM {body.hsm.hex()}" if body.hsm is not None else f"group {(body.group or b'').hex()}"
        return await self._shown(f"stepdown of {subject}", lambda: hand_over(self._context, body))

    async def _leader_lost(self, body: LeaderLost, caller: object) -> Done:  # noqa: ARG002
        if self._hints < HINTS_IN_FLIGHT_MAX:
            self._hints += 1
            self._context.meter.count("manager.leader.lost_hints")
            self._nursery.start_soon(self._handle_hint, body)
        return Done()

    async def _handle_hint(self, body: LeaderLost) -> None:
        try:
            await self._appointer.leader_lost(body)
        except RealmError as error:
            self._context.log.warning("leader_lost not handled", error=str(error))
        finally:
            self._hints -= 1

    async def _rebalance(self, body: Empty, caller: object) -> Rebalanced | Refused:  # noqa: ARG002
        return await self._shown("rebalance", lambda: rebalance(self._context, self._appointer))

    async def _transfer(self, body: TransferPrepare, caller: object) -> Done | Refused:  # noqa: ARG002
        request = TransferRequest.from_wire(body)
        if request is None:
            return Refused(Refusal.UNACCEPTABLE_RANGE, detail="both ends must be 32 bytes, start <= end")
        subject = f"transfer {GroupId(body.source).hex()} to {GroupId(body.destination).hex()}"
        return await self._shown(subject, lambda: run_requested_transfer(self._context, request))

    async def _shown(self, description: str, work: Callable[[], Awaitable[Reply]]) -> Reply | Refused:
        """Run `work`, listed among the current actions; expected trouble becomes a refusal."""
        self._actions += 1
        action = f"{self._actions}"
        self._context.state.actions[action] = description
        try:
            return await work()
        except StoreUnavailable as error:
            return Refused(Refusal.NO_STORE, detail=str(error))
        except RealmError as error:
            return Refused(Refusal.RPC_ERROR, detail=str(error))
        finally:
            del self._context.state.actions[action]
