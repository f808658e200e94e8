"""Carry a plan out: signals to processes, cuts of the network, fault files, orders to managers and agents."""

from __future__ import annotations

import resource
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Final

import trio

from juicebox_hsm.adapters.faults.switch import LOOK_S, NO_FAULTS, Faults
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.view import ClusterView, GroupKey, GroupView, wire_range
from juicebox_hsm.ids import OwnedRange, RecordId
from juicebox_hsm.wire.methods import (
    BECOME_LEADER,
    LEADER_LOST,
    LEADER_STEPDOWN,
    REBALANCE,
    STEPDOWN,
    TRANSFER,
    AnyMethod,
)
from juicebox_hsm.wire.rpc import (
    BecomeLeaderCall,
    Done,
    Empty,
    GroupCall,
    LeaderLost,
    PeerRole,
    Rebalanced,
    Refused,
    StepdownOrder,
    SteppedDown,
    TransferPrepare,
)
from roles.tools.chaos.plan import Action, Kind
from roles.tools.chaos.proxy import Network
from roles.tools.demo.launch import Cluster
from roles.tools.demo.layout import write_file
from roles.tools.demo.processes import RunningService, describe_exit
from roles.tools.session import ToolFailure

ORDER_S: Final = 5.0
TRANSFER_S: Final = 30.0
LISTEN_S: Final = 20.0
REVIVE_PAUSE_S: Final = 0.3
PAUSE_TRIES_MAX: Final = 20
PAUSE_SETTLE_S: Final = 0.005
DISK_SLACK_BYTES: Final = 256 * 1024
"""How far a process with a full disk may still write into a file beyond the size of its own log."""

RIVALS_LOOK_S: Final = 0.05
"""Between looks at who leads while two managers appoint: an idle rival stays until the other one writes."""

_RECORD_BYTES: Final = 32
_CALLERS: Final = {"become_leader": PeerRole.MANAGER, "leader_lost": PeerRole.AGENT}
"""Who may call what operators may not."""


class Chaos:
    """Does to a cluster what a plan says. `say` gets one line for everything that happens.

    `pools` call services as an agent and as a manager; what operators may ask is asked as one.
    """

    def __init__(
        self,
        cluster: Cluster,
        network: Network,
        pools: Mapping[PeerRole, Any],
        faults_dir: Path,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self._cluster = cluster
        self._network = network
        self._pools = pools
        self._faults_dir = faults_dir
        self._seed = seed
        self._say = say
        self._held: set[str] = set()
        self._faults: dict[str, Faults] = {}
        self.barriers: list[float] = []
        self.exits: list[str] = []
        self.skipped = 0

    # --- carrying out ------------------------------------------------------------------------------------------

    async def run(self, plan: list[Action], begun: float) -> None:
        """Carry the plan out, each action in a task of its own; returns when all have ended and are undone."""
        async with trio.open_nursery() as nursery:
            for action in plan:
                await trio.sleep_until(begun + action.at_s)
                nursery.start_soon(self._carry_out, action)

    async def _carry_out(self, action: Action) -> None:
        try:
            result = await self._do(action)
        except (RealmError, ToolFailure) as error:
            result = f"{type(error).__name__}: {error}"
        except (ProcessLookupError, PermissionError):
            result = "the process had just ended"
        self._say(f"#{action.number} {action.kind.value} {action.target}: {result}")

    async def _do(self, action: Action) -> str:
        match action.kind:
            case Kind.RESTART_ALL:
                return await self.restart_all(action.for_s)
            case Kind.TRANSFER:
                return await self._transfer(action)
            case Kind.STEPDOWN_MANAGER | Kind.STEPDOWN_DIRECT | Kind.DUEL | Kind.BOTH_MANAGERS:
                return await self._leadership(action)
            case Kind.RIVAL_MANAGERS:
                return await self._rival_managers(action)
            case Kind.CUT | Kind.DELAY | Kind.ISOLATE:
                return await self._disturb_network(action)
        target = await self._resolve(action, action.target)
        match action.kind:
            case Kind.KILL | Kind.TERMINATE | Kind.SHORT_PAUSE | Kind.LONG_PAUSE:
                return await self._signal(action, target)
            case Kind.DISK_FULL:
                return await self._fill_disk(action, target)
            case Kind.NVRAM_FAILS:
                return await self._fail_nvram(action, target)
            case _:
                return await self._inject(action, target)

    async def _resolve(self, action: Action, name: str) -> RunningService:
        """Return the service that `leader`, `witness` or a name means now."""
        if name not in {"leader", "witness"}:
            return self._cluster.process(name)
        random = Random(f"{self._seed}:{action.number}")  # noqa: S311 -- repeatable as far as it goes
        agents = self._cluster.of_role("agent")
        view = await self._cluster.view()
        leading = {group.leader.url for group in view.groups.values() if group.leader is not None}
        wanted = [agent for agent in agents if (agent.service.url in leading) == (name == "leader")]
        return random.choice(wanted or agents)

    @asynccontextmanager
    async def _hold(self, *names: str) -> AsyncIterator[bool]:
        """Take services for an action on their processes; False when another one has one of them."""
        if self._held & set(names):
            self.skipped += 1
            yield False
            return
        self._held.update(names)
        try:
            yield True
        finally:
            self._held.difference_update(names)

    # --- processes -----------------------------------------------------------------------------------------------

    async def _signal(self, action: Action, target: RunningService) -> str:
        name = target.service.name
        async with self._hold(name) as free:
            if not free:
                return f"{name} is busy with another fault; skipped"
            if action.kind in {Kind.SHORT_PAUSE, Kind.LONG_PAUSE}:
                try:
                    holds = await self._pause(target, anywhere=action.kind is Kind.SHORT_PAUSE or bool(action.amount))
                    await trio.sleep(action.for_s)
                finally:
                    target.send(signal.SIGCONT)
                return f"paused {name}{', which held the write lock of the store' if holds else ''}"
            if action.kind is Kind.KILL:
                await target.kill()
            else:
                await target.stop()
            await trio.sleep(action.for_s)
            await self._start(target)
            return f"{'killed' if action.kind is Kind.KILL else 'stopped'} and started {name}"

    async def _pause(self, target: RunningService, *, anywhere: bool) -> bool:
        """Stop a process; tell whether it holds the store's lock, which no other process can take from it.

        With SQLite all writers share one lock, so a pause inside a transaction stops every write of the realm: that is
        a store that hangs, while a pause outside of one is a member that hangs. `anywhere` False asks for the latter.
        """
        for _ in range(PAUSE_TRIES_MAX):
            target.send(signal.SIGSTOP)
            await trio.sleep(PAUSE_SETTLE_S)
            if anywhere or not self._holds_store_lock(target):
                break
            target.send(signal.SIGCONT)
            await trio.sleep(PAUSE_SETTLE_S)
        return self._holds_store_lock(target)

    def _holds_store_lock(self, running: RunningService) -> bool:
        """Look for the lock file beside the store in the kernel's list of locks."""
        try:
            inode = (self._cluster.state.path / "store.db.lock").stat().st_ino
        except OSError:
            return False  # another kind of store
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            columns = line.split()
            if columns[1] != "->" and columns[4] == str(running.pid) and columns[5].endswith(f":{inode}"):
                return True
        return False

    async def restart_all(self, down_s: float) -> str:
        """Kill every process at once and start all again; nothing that was under way survives."""
        while self._held:  # noqa: ASYNC110 -- a handful of times in a run
            await trio.sleep(0.05)
        async with self._hold(*(running.service.name for running in self._cluster.processes)):
            for running in self._cluster.processes:
                running.wanted = False
                running.send(signal.SIGKILL)
            for running in self._cluster.processes:
                await running.kill()
            self.barriers.append(trio.current_time())
            await trio.sleep(down_s)
            async with trio.open_nursery() as nursery:
                for running in self._cluster.processes:
                    nursery.start_soon(self._start, running)
        return "killed and started everything"

    async def _start(self, running: RunningService) -> None:
        if not running.is_running:
            running.start()
            self._cluster.write_processes()
        with trio.move_on_after(LISTEN_S):
            await running.wait_listening()

    def note_exit(self, running: RunningService) -> bool:
        """Record an exit nobody asked for; the supervisor then starts the service again. True if it was recorded."""
        if running.is_running:
            return False
        self.exits.append(describe_exit(running))
        self._say(f"{running.service.name} exited with status {running.exit_status}")
        return True

    async def revive(self, running: RunningService) -> None:
        """Start a service again that ended by itself, as a supervisor does."""
        await trio.sleep(REVIVE_PAUSE_S)
        while running.service.name in self._held:  # noqa: ASYNC110 -- rare
            await trio.sleep(REVIVE_PAUSE_S)
        await self._start(running)

    def heal(self) -> None:
        """Undo everything that may still be wrong."""
        self._network.heal_all()
        for running in self._cluster.processes:
            running.send(signal.SIGCONT)
            self._set_disk_limit(running, None)
            self._write_faults(running.service.name, NO_FAULTS)

    # --- disk, store, clock --------------------------------------------------------------------------------------

    async def _fill_disk(self, action: Action, target: RunningService) -> str:
        name = target.service.name
        async with self._hold(name) as free:
            if not free:
                return f"{name} is busy with another fault; skipped"
            limit = target.log.stat().st_size + DISK_SLACK_BYTES
            self._set_disk_limit(target, limit)
            try:
                await trio.sleep(action.for_s)
            finally:
                self._set_disk_limit(target, None)
            return f"no file of {name} could grow beyond {limit} bytes"

    async def _fail_nvram(self, action: Action, target: RunningService) -> str:
        """Let an agent's next NVRAM write fail, if there is one in time; its process then ends and is revived."""
        name = target.service.name
        async with self._hold(name) as free:
            if not free:
                return f"{name} is busy with another fault; skipped"
            self._write_faults(name, replace(self._faults.get(name, NO_FAULTS), nvram_fails=True))
            try:
                with trio.move_on_after(action.for_s):
                    await target.wait()
            finally:
                self._write_faults(name, replace(self._faults.get(name, NO_FAULTS), nvram_fails=False))
            return f"{name} {'wrote nothing meanwhile' if target.is_running else 'lost its HSM'}"

    @staticmethod
    def _set_disk_limit(running: RunningService, limit: int | None) -> None:
        """Set the soft limit of file sizes of a running process; the hard one stays, so it can be raised again."""
        if not running.is_running:
            return
        try:
            _, hard = resource.prlimit(running.pid, resource.RLIMIT_FSIZE)
            soft = hard if limit is None else limit
            resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (soft, hard))
        except ProcessLookupError:
            pass

    async def _inject(self, action: Action, target: RunningService) -> str:
        name = target.service.name
        before = self._faults.get(name, NO_FAULTS)
        match action.kind:
            case Kind.SLOW_STORE:
                during = replace(before, store_delay_ms=action.amount)
            case Kind.STORE_DOWN:
                during = replace(before, store_refuses=True)
            case Kind.LOST_REPLIES:
                during = replace(before, store_loses_replies=True)
            case _:
                during = replace(before, clock_offset_ms=action.amount)
        changed = next(field for field in Faults.__slots__ if getattr(during, field) != getattr(NO_FAULTS, field))
        self._write_faults(name, during)
        try:
            await trio.sleep(action.for_s)
        finally:
            now = self._faults.get(name, NO_FAULTS)
            self._write_faults(name, replace(now, **{changed: getattr(NO_FAULTS, changed)}))
        return f"{name} had {action.kind.value}"

    def _change_faults(self, name: str, **changes: bool) -> None:
        """Change some of a service's faults and keep what other actions asked for."""
        self._write_faults(name, replace(self._faults.get(name, NO_FAULTS), **changes))

    def _write_faults(self, name: str, faults: Faults) -> None:
        self._faults[name] = faults
        write_file(self._faults_dir / f"{name}.json", faults.to_json())

    # --- network ---------------------------------------------------------------------------------------------------

    async def _disturb_network(self, action: Action) -> str:
        one = (await self._resolve(action, action.target)).service.name
        others = [action.other]
        if action.kind is Kind.ISOLATE:
            others = [running.service.name for running in self._cluster.processes]
        others = [other for other in others if other != one]
        for other in others:
            if action.kind is Kind.DELAY:
                self._network.delay(one, other, action.amount / 1000)
            else:
                self._network.cut(one, other, resets=bool(action.amount))
        try:
            await trio.sleep(action.for_s)
        finally:
            for other in others:
                self._network.heal(one, other)
        return f"{one} and {', '.join(others) or 'nobody'}"

    # --- leadership ------------------------------------------------------------------------------------------------

    async def _leadership(self, action: Action) -> str:
        view = await self._cluster.view()
        random = Random(f"{self._seed}:{action.number}")  # noqa: S311 -- repeatable as far as it goes
        groups = sorted(view.groups.values(), key=lambda group: group.key)
        if not groups:
            return "no agent answered"
        group = random.choice(groups)
        named = GroupCall(group.realm, group.id)
        order = StepdownOrder(realm=group.realm, group=group.id)
        match action.kind:
            case Kind.STEPDOWN_MANAGER:
                return await self._ask(self._url(action.target), LEADER_STEPDOWN, order)
            case Kind.STEPDOWN_DIRECT:
                if group.leader is None:
                    return "nobody leads"
                return await self._ask(group.leader.url, STEPDOWN, named)
            case Kind.BOTH_MANAGERS:
                others: list[tuple[AnyMethod, Any]] = [(REBALANCE, Empty()), (LEADER_STEPDOWN, order)]
                return await self._ask_all(
                    [
                        (self._url(action.target), LEADER_STEPDOWN, order),
                        (self._url(action.other), *random.choice(others)),
                    ]
                )
        leader = group.leader
        witnesses = [member.url for member in group.members if leader is None or member.hsm != leader.hsm]
        if action.target == "one witness" and witnesses:
            witnesses = [random.choice(witnesses)]
        become = BecomeLeaderCall(group.realm, group.id)
        return await self._ask_all([(url, BECOME_LEADER, become) for url in witnesses])

    async def _rival_managers(self, action: Action) -> str:
        """Let two managers without leases choose a group's next leader at the same moment, from opposite ends."""
        view = await self._cluster.view()
        random = Random(f"{self._seed}:{action.number}")  # noqa: S311 -- repeatable as far as it goes
        groups = [group for _, group in sorted(view.groups.items()) if len(group.members) > 1]
        led = [(group, group.leader) for group in groups if group.leader is not None]
        if not led:
            return "nobody leads a group of several"
        group, leader = random.choice(led)
        managers = (action.target, action.other)
        try:
            for name in managers:
                self._change_faults(name, ignores_leases=True, reversed_candidates=name == action.other)
            await trio.sleep(2 * LOOK_S)
            told = await self._ask(leader.url, STEPDOWN, GroupCall(group.realm, group.id))
            lost = LeaderLost(group.realm, group.id, leader.starting)
            led_at_once: set[str] = set()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_rivals, group.key, action.for_s, led_at_once)
                await self._ask_all([(self._url(name), LEADER_LOST, lost) for name in managers])
        finally:
            for name in managers:
                self._change_faults(name, ignores_leases=False, reversed_candidates=False)
        return f"{leader.name} {told}; led at once: {', '.join(sorted(led_at_once)) or 'nobody'}"

    async def _watch_rivals(self, key: GroupKey, for_s: float, led_at_once: set[str]) -> None:
        """Add the names of members that were seen to lead a group at the same time."""
        with trio.move_on_after(for_s):
            while True:
                group = (await self._cluster.view()).groups.get(key)
                leaders = [] if group is None else [member.name for member in group.members if member.leads]
                if len(leaders) > 1:
                    led_at_once.update(leaders)
                await trio.sleep(RIVALS_LOOK_S)

    async def _transfer(self, action: Action) -> str:
        random = Random(f"{self._seed}:{action.number}")  # noqa: S311 -- repeatable as far as it goes
        chosen = choose_transfer(await self._cluster.view(), random)
        if chosen is None:
            return "no two groups to move a range between"
        source, destination, moved = chosen
        body = TransferPrepare(source.realm, source.id, destination.id, wire_range(moved))
        reply = await self._ask(self._url(action.target), TRANSFER, body, TRANSFER_S)
        return f"{source.id.hex()[:8]} to {destination.id.hex()[:8]}: {reply}"

    def _url(self, name: str) -> str:
        return self._cluster.process(name).service.url

    async def _ask(self, url: str, method: AnyMethod, body: Any, timeout_s: float = ORDER_S) -> str:
        caller = _CALLERS.get(method.name)
        pool = self._cluster.session.rpc if caller is None else self._pools[caller]
        try:
            reply = await pool.call(url, method, body, timeout_s=timeout_s)
        except RealmError as error:
            return str(error) or type(error).__name__
        match reply:
            case Refused():
                return reply.outcome.value
            case SteppedDown():
                return f"stepped down at {reply.last}"
            case Done() | Rebalanced():
                return "done"
        return type(reply).__name__

    async def _ask_all(self, calls: list[tuple[str, AnyMethod, Any]]) -> str:
        """Ask several at the same moment."""
        replies = ["" for _ in calls]

        async def ask(position: int, url: str, method: AnyMethod, body: Any) -> None:
            replies[position] = f"{method.name}: {await self._ask(url, method, body)}"

        async with trio.open_nursery() as nursery:
            for position, (url, method, body) in enumerate(calls):
                nursery.start_soon(ask, position, url, method, body)
        return "; ".join(replies) or "nobody to ask"


def choose_transfer(view: ClusterView, random: Random) -> tuple[GroupView, GroupView, OwnedRange] | None:
    """Choose a range that one group can give to a neighbour, or to a group that owns nothing. Pure."""
    groups = sorted(view.groups.values(), key=lambda group: group.key)
    owners = [(group, owned) for group in groups if (owned := group.owned_range) is not None]
    if not owners or len(groups) < 2:
        return None
    source, owned = random.choice(owners)
    others = [group for group in groups if group.realm == source.realm and group.id != source.id]
    destination = random.choice(others)
    whole = random.random() < 0.2
    cut = random.randint(owned.start[0], owned.end[0])
    above = OwnedRange(RecordId(max(bytes(owned.start), bytes([cut]).ljust(_RECORD_BYTES, b"\0"))), owned.end)
    below = OwnedRange(owned.start, RecordId(bytes([cut]).ljust(_RECORD_BYTES, b"\xff")))
    theirs = destination.owned_range
    if whole or cut in {owned.start[0], owned.end[0]}:
        return source, destination, owned
    if theirs is None:
        return source, destination, random.choice([above, below])
    return source, destination, above if theirs.start > owned.end else below
