"""Keep every group led: the periodic pass and the `leader_lost` hint (manager.md 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.appointment import (
    is_led,
    leaderless_since,
    orphans,
    served,
    still_leaderless,
    urls_to_ask,
)
from juicebox_hsm.host.cluster.leases import group_lease
from juicebox_hsm.host.cluster.view import ClusterView, GroupKey, GroupView, name_of
from juicebox_hsm.ids import GroupId, HsmId, RealmId
from juicebox_hsm.wire.rpc import LeaderLost
from roles.clock import OwnClock
from roles.manager.assign import assign
from roles.manager.context import ManagerContext
from roles.manager.leases import LeaseBusy, management_lease
from roles.survey.overview import HINT_TIMEOUT_S, STATUS_TIMEOUT_S, ask_agents, discovered_agents, read_overview

PARALLEL_GROUPS_MAX: Final = 16
HINT_ATTEMPTS_MAX: Final = 5
HINT_RETRY_S: Final = 0.2


class Appointer:
    """Appoints leaders; one per manager. Not re-entrant passes, any number of hints at once."""

    def __init__(self, context: ManagerContext) -> None:
        self._context = context
        self._clock = OwnClock(context.now_ms, context.meter, context.log)
        self._leaderless_since: dict[GroupKey, float] = {}
        self._hinted: dict[GroupKey, int] = {}

    async def run_pass(self) -> None:
        """Look once at all groups and appoint where nobody leads. Raises `StoreUnavailable` without discovery."""
        context = self._context
        announced = set(context.state.announced)
        view = await read_overview(context.store, context.rpc, STATUS_TIMEOUT_S)
        remember_urls(context, view)
        for agent in view.agents:
            self._clock.read(agent.url, agent.clock)
        self._clock.look()
        # Announced before we looked, and led: the announcement has served. What was announced since stays.
        context.state.announced -= served(announced, view)
        extra_work: dict[HsmId, int] = {}
        limiter = trio.CapacityLimiter(PARALLEL_GROUPS_MAX)
        async with trio.open_nursery() as nursery:
            for group in self.orphans(view, trio.current_time()):
                nursery.start_soon(self._lead_one, limiter, view, group, extra_work)

    def orphans(self, view: ClusterView, now_s: float) -> list[GroupView]:
        """Return the groups to act on now; `now_s` is monotonic. Remembers what it saw for the next read."""
        self._leaderless_since = leaderless_since(self._leaderless_since, view, now_s)
        return orphans(view, self._leaderless_since, self._context.state.announced, now_s)

    async def _lead_one(
        self, limiter: trio.CapacityLimiter, view: ClusterView, group: GroupView, extra_work: dict[HsmId, int]
    ) -> None:
        context = self._context
        async with limiter:
            try:
                async with management_lease(context, group_lease(group.key)):
                    current = await self._still_leaderless(group)
                    if current is not None:
                        await assign(context, view, current, extra_work=extra_work)
            except LeaseBusy:
                context.log.debug("group is being worked on", group=name_of(group.key))
            except RealmError as error:
                context.meter.count("manager.loop.errors", loop="leaders")
                context.log.warning("appointment failed", group=name_of(group.key), error=str(error))

    async def _still_leaderless(self, group: GroupView) -> GroupView | None:
        """Look again under the lease: whoever held it before us may have appointed a leader meanwhile."""
        urls = [member.url for member in group.members]
        fresh = await ask_agents(self._context.rpc, urls, HINT_TIMEOUT_S)
        return still_leaderless(group, fresh)

    async def leader_lost(self, hint: LeaderLost) -> None:
        """Act on a member's report; reports of one group are coalesced into one action."""
        key = (RealmId(hint.realm), GroupId(hint.group))
        running = key in self._hinted
        self._hinted[key] = max(hint.starting, self._hinted.get(key, 0))
        if running:
            return
        try:
            for attempt in range(HINT_ATTEMPTS_MAX):
                if attempt:
                    await trio.sleep(HINT_RETRY_S)
                if await self._act_on_hint(key):
                    return
        finally:
            del self._hinted[key]

    async def _act_on_hint(self, key: GroupKey) -> bool:
        """Try once; True when there is nothing left to do here."""
        context = self._context
        try:
            async with management_lease(context, group_lease(key)):
                view = await ask_agents(context.rpc, await self._urls_of(key), HINT_TIMEOUT_S)
                group = view.groups.get(key)
                if group is None:
                    return False
                if is_led(group, self._hinted[key]):
                    context.state.announced.discard(key)
                    return True
                context.state.announced.add(key)
                return await assign(context, view, group) is not None
        except LeaseBusy:
            return True
        except RealmError as error:
            context.meter.count("manager.loop.errors", loop="leader_lost")
            context.log.warning("leader_lost not handled", group=name_of(key), error=str(error))
            return False

    async def _urls_of(self, key: GroupKey) -> Iterable[str]:
        """Return the agents last seen with the group, or all of them."""
        known = self._context.state.urls.get(key)
        return known or await discovered_agents(self._context.store)


def remember_urls(context: ManagerContext, view: ClusterView) -> None:
    """Keep the agents of each group that was seen; a member that is silent now stays known while its group is."""
    for key, group in view.groups.items():
        context.state.urls[key] = urls_to_ask(group, context.state.urls.get(key, ()))
