"""Capture: the log watcher of every member, catch-up by quorum jump, and the persister (agent.md 7, hsm.md 10).

`Follower.position` (in `GroupState`) is the next index the HSM has to capture. Entries reach the HSM three ways: read
from the log by the watcher, pushed by the leader's agent, or fed by our own appender; a lock keeps them in order.
Only the HSM decides what it captures. A row *read from the store* that it refuses means a corrupted log or a bug, and
the process ends; a *pushed* entry it refuses is dropped and the log is read instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import trio

from juicebox_hsm.adapters.observation.logging import bind_context
from juicebox_hsm.consensus.codec import decode_captured
from juicebox_hsm.consensus.types import Captured, LogEntry
from juicebox_hsm.errors import RealmError, check
from juicebox_hsm.host.group import GroupState
from juicebox_hsm.host.leadership.events import CaptureHeard
from juicebox_hsm.host.log import Compacted
from juicebox_hsm.host.retry import STORE_RETRY
from juicebox_hsm.hsm.messages import (
    CaptureJump,
    CaptureJumpOk,
    CaptureNext,
    NotWitness,
    Outcome,
    PersistState,
    PersistStateOk,
    RoleOk,
)
from juicebox_hsm.ids import HsmId
from juicebox_hsm.ports.errors import HsmGone
from juicebox_hsm.wire.methods import CAPTURED
from juicebox_hsm.wire.rpc import CapturedReply, GroupCall
from roles.agent.oneshot import Signal

if TYPE_CHECKING:
    from roles.agent.context import Agent

WATCH_CHUNK_ENTRIES: Final = 200
CAPTURED_TIMEOUT_S: Final = 0.5
_REFUSED: Final = (Outcome.INVALID_MAC, Outcome.INVALID_CHAIN, Outcome.MISSING_PREV)


class LogRefused(RealmError):
    """The HSM refused an entry that the store holds: the log is corrupted. The agent must end."""


class Persister:
    """Group commit for the HSM's captures: one PersistState in flight, the next covers what came meanwhile."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._wanted = Signal()
        self._begun = 0
        self._done = 0
        self._waiting = trio.lowlevel.ParkingLot()
        self.captures: tuple[Captured, ...] = ()

    def request(self) -> int:
        """Ask for a PersistState that begins after now; returns a ticket for `covered`."""
        self._wanted.set()
        return self._begun + 1

    async def covered(self, ticket: int) -> None:
        """Wait until the PersistState of `ticket` is done."""
        while self._done < ticket:
            await self._waiting.park()

    async def run(self) -> None:
        """Persist for ever."""
        self._wanted.set()
        while True:
            await self._wanted.wait()
            self._begun += 1
            reply = await self._agent.hsm.send(PersistState())
            check(isinstance(reply, PersistStateOk), "PersistState cannot be refused")
            if isinstance(reply, PersistStateOk):
                self._adopt(reply.captured)
            self._done = self._begun
            self._waiting.unpark_all()

    def _adopt(self, captures: tuple[Captured, ...]) -> None:
        self.captures = captures
        for captured in captures:
            group = self._agent.groups.get(captured.realm, captured.group)
            if group is None:
                continue
            group.captured = captured
            self._agent.tell(group, CaptureHeard(captured))


class Follower:
    """Keeps one group's captures at the end of its log."""

    def __init__(self, agent: Agent, group: GroupState) -> None:
        self._agent = agent
        self._group = group
        self._lock = trio.Lock()
        self._jump_began: float | None = None
        self.wake = Signal()

    async def push(self, entries: Sequence[LogEntry]) -> int | None:
        """Capture acknowledged entries that continue our position; None when the log must be read instead.

        Returns the persister ticket that covers them. MUST only be given entries the store acknowledged.
        """
        if self._lock.locked():
            await self._lock.acquire()
        else:
            self._lock.acquire_nowait()  # spares a trip through the scheduler per batch
        try:
            position = self._group.position
            first = entries[0].index
            if first > position:
                self.wake.set()
                return None
            fresh = tuple(entries[position - first :])
            if not fresh:
                return self._agent.persister.request()
            outcome = await self._capture(fresh)
            if outcome is None:
                return self._agent.persister.request()
            self._agent.metrics.count("agent.push.refused", outcome=outcome.value)
            await self._resync()
        finally:
            self._lock.release()
        self.wake.set()
        return None

    async def _capture(self, entries: tuple[LogEntry, ...]) -> Outcome | None:
        """Feed entries to the HSM; None on success."""
        reply = await self._agent.hsm.send(CaptureNext(self._group.realm, self._group.group, entries))
        if isinstance(reply, RoleOk):
            self._group.position = entries[-1].index + 1
            self._agent.adopt(self._group, reply.role)
            return None
        check(reply in _REFUSED, "CaptureNext answers as specified")
        return reply if isinstance(reply, Outcome) else None

    async def _resync(self) -> None:
        """Learn the HSM's captured head again: a prefix of a refused push stays captured."""
        await self._agent.persister.covered(self._agent.persister.request())
        captured = self._group.captured
        self._group.position = 1 if captured is None else captured.index + 1

    async def run(self) -> None:
        """Read the log from our position for ever."""
        bind_context(realm=self._group.realm.hex(), group=self._group.group.hex())
        timings = self._agent.timings
        idle_s = timings.watch_idle_first_s
        failures = 0
        trouble = f"log {self._group.group.hex()}"
        while True:
            try:
                read = await self._agent.store.log.read_from(
                    self._group.realm, self._group.group, self._group.position, WATCH_CHUNK_ENTRIES
                )
            except RealmError as error:
                failures += 1
                self._agent.note_trouble(trouble, error)
                await trio.sleep(STORE_RETRY.delay_s(failures))
                continue
            failures = 0
            if isinstance(read, Compacted):
                await self._catch_up(read.index)
                continue
            if self._jump_began is None:
                self._agent.clear_trouble(trouble)
            if read:
                await self._feed_stored(read)
                idle_s = timings.watch_idle_first_s
                continue
            woken = await self.wake.wait_at_most(idle_s)
            idle_s = timings.watch_idle_first_s if woken else min(2 * idle_s, timings.watch_idle_max_s)

    async def _feed_stored(self, entries: list[LogEntry]) -> None:
        self._jump_began = None
        async with self._lock:
            fresh = tuple(entry for entry in entries if entry.index >= self._group.position)
            if not fresh or fresh[0].index != self._group.position:
                return
            outcome = await self._capture(fresh)
        if outcome is not None:
            raise LogRefused(
                f"group {self._group.group.hex()}: the HSM answers {outcome.value} to the stored entries "
                f"{fresh[0].index} to {fresh[-1].index}"
            )
        self._agent.persister.request()

    # --- catch-up (H1) ---------------------------------------------------------------------------------

    async def _catch_up(self, missing: int) -> None:
        """Jump over compacted entries, or pause before the caller reads the log again."""
        agent, group = self._agent, self._group
        now = trio.current_time()
        if self._jump_began is None:
            self._jump_began = now
            agent.log.warning("entries compacted, jumping", group=group.group.hex(), index=missing)
        elif now - self._jump_began > agent.timings.catch_up_unready_s:
            error = RealmError(f"index {missing} is compacted and no certificate helps yet")
            agent.note_trouble(f"log {group.group.hex()}", error)
        try:
            jumped = await self._jump()
        except (LogRefused, HsmGone):
            raise
        except RealmError as error:
            agent.note_trouble(f"log {group.group.hex()}", error)
            jumped = False
        agent.metrics.count("agent.catchup.jump", result="ok" if jumped else "retry")
        if jumped:
            agent.metrics.timing("agent.catchup", int((trio.current_time() - self._jump_began) * 1e9))
            self._jump_began = None
        else:
            await trio.sleep(min(STORE_RETRY.cap_s, 0.05 + (trio.current_time() - self._jump_began) / 4))

    async def _jump(self) -> bool:
        """Try one CaptureJump with the newest certificate; tell whether our position moved."""
        agent, group = self._agent, self._group
        certificate = await agent.store.log.read_certificate(group.realm, group.group)
        if certificate is None:
            return False
        live = await self._live_captures()
        last = max((captured.index for captured in (*certificate.captures, *live)), default=0)
        entries = await self._read_tail(certificate.index, last)
        if not entries:
            return False
        async with self._lock:
            request = CaptureJump(group.realm, group.group, tuple(entries), (*certificate.captures, *live))
            reply = await agent.hsm.send(request)
            match reply:
                case CaptureJumpOk():
                    await self._resync()
                    agent.log.info(
                        "jumped", group=group.group.hex(), certificate=certificate.index, position=group.position
                    )
                    return True
                case NotWitness(role=role):
                    agent.adopt(group, role)
                    await agent.step_down(group, force=True, why="a jump needs a witness")
                    return False
                case Outcome.INVALID_MAC | Outcome.INVALID_CHAIN:
                    raise_refused(group, reply)
        check(
            reply in (Outcome.NO_QUORUM, Outcome.STALE_INDEX, Outcome.MISSING_ENTRIES),
            "CaptureJump answers as specified",
        )
        return False

    async def _read_tail(self, first: int, last: int) -> list[LogEntry]:
        """Return entries first..last as far as the log has them; [] when they were compacted meanwhile."""
        group = self._group
        entries: list[LogEntry] = []
        while first <= last:
            read = await self._agent.store.log.read_from(group.realm, group.group, first, WATCH_CHUNK_ENTRIES)
            if isinstance(read, Compacted):
                return []
            if not read:
                break
            entries.extend(entry for entry in read if entry.index <= last)
            first = read[-1].index + 1
        return entries

    async def _live_captures(self) -> list[Captured]:
        """Ask every reachable member for its persisted capture."""
        found: list[Captured] = []
        body = GroupCall(self._group.realm, self._group.group)

        async def ask(member: HsmId, url: str) -> None:
            try:
                reply = await self._agent.rpc.call(url, CAPTURED, body, timeout_s=CAPTURED_TIMEOUT_S)
                if isinstance(reply, CapturedReply) and reply.captured is not None:
                    captured = decode_captured(reply.captured)
                    if captured.hsm == member:
                        found.append(captured)
            except RealmError:
                # an unreachable member has no vote this time
                return

        async with trio.open_nursery() as nursery:
            for member in self._group.configuration:
                url = self._agent.peers.url_of(member)
                if url is not None:
                    nursery.start_soon(ask, member, url)
        return found


def raise_refused(group: GroupState, outcome: object) -> None:
    """Raise `LogRefused` for a stored row the HSM will not have."""
    raise LogRefused(f"group {group.group.hex()}: the HSM answers {outcome} to rows of the stored log")
