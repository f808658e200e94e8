"""Capture: the log watcher of every member, its jumps, and the persister (agent.md 7, hsm.md 10).

`juicebox_hsm.host.witness` says what the HSM is given and when; here it is read, sent and waited for. A row *read from
the store* that the HSM refuses is damaged (decision record 0040): it is told and read again, and other groups go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import trio

from juicebox_hsm.adapters.observation.logging import bind_context
from juicebox_hsm.consensus.codec import decode_captured
from juicebox_hsm.consensus.types import Captured, LogEntry
from juicebox_hsm.errors import RealmError, check
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.group import Groups, GroupState
from juicebox_hsm.host.leadership.events import CaptureHeard, Event
from juicebox_hsm.host.log import Compacted
from juicebox_hsm.host.witness import Evidence, Feed, Idle, Jump, Jumped, Persist
from juicebox_hsm.hsm.messages import (
    CaptureJump,
    CaptureNext,
    NotWitness,
    Outcome,
    PersistState,
    PersistStateOk,
    RoleOk,
)
from juicebox_hsm.ids import HsmId
from juicebox_hsm.ports.errors import HsmGone, StoreDamaged
from juicebox_hsm.wire.methods import CAPTURED
from juicebox_hsm.wire.rpc import CapturedReply, DamageKind, GroupCall, StoreDamage
from roles.agent.oneshot import Signal
from roles.agent.outside import Outside, Roles
from roles.agent.peers import Peers

WATCH_CHUNK_ENTRIES: Final = 200
CAPTURED_TIMEOUT_S: Final = 0.5


class Persister:
    """Group commit for the HSM's captures: one PersistState in flight, the next covers what came meanwhile.

    What was captured is noted in `groups` and told to the leaderships that `tell` knows.
    """

    def __init__(self, outside: Outside, groups: Groups, tell: Callable[[GroupState, Event], None]) -> None:
        self._outside = outside
        self._groups = groups
        self._tell = tell
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
            reply = await self._outside.hsm.send(PersistState())
            check(isinstance(reply, PersistStateOk), "PersistState cannot be refused")
            if isinstance(reply, PersistStateOk):
                self._adopt(reply.captured)
            self._done = self._begun
            self._waiting.unpark_all()

    def _adopt(self, captures: tuple[Captured, ...]) -> None:
        self.captures = captures
        for captured in captures:
            group = self._groups.get(captured.realm, captured.group)
            if group is None:
                continue
            group.captured = captured
            self._tell(group, CaptureHeard(captured))


class Follower:
    """Keeps one group's captures at the end of its log."""

    def __init__(self, outside: Outside, group: GroupState, persister: Persister, peers: Peers, roles: Roles) -> None:
        self._outside = outside
        self._group = group
        self._persister = persister
        self._peers = peers
        self._roles = roles
        self._following = group.following
        self._tail: LogEntry | None = None
        """The last entry that the HSM captured, as far as we have seen it."""
        self.lock = trio.Lock()
        """Held from a decision of the witness to the HSM's answer to it, and while the HSM forgets the group."""
        self.wake = Signal()

    async def push(self, entries: Sequence[LogEntry]) -> int | None:
        """Capture acknowledged entries that continue our position; None when the log must be read instead.

        Returns the persister ticket that covers them. MUST only be given entries the store acknowledged.
        """
        if self.lock.locked():
            await self.lock.acquire()
        else:
            self.lock.acquire_nowait()  # spares a trip through the scheduler per batch
        try:
            if self._group.has_left:
                return None
            match self._following.pushed(entries):
                case Persist():
                    return self._persister.request()
                case Feed(fresh):
                    outcome = await self._feed(fresh)
                    if outcome is None:
                        return self._persister.request()
                    self._outside.metrics.count("agent.push.refused", outcome=outcome.value)
                    await self._learn_head()
        finally:
            self.lock.release()
        self.wake.set()
        return None

    async def _feed(self, entries: tuple[LogEntry, ...]) -> Outcome | None:
        """Feed entries to the HSM; None on success."""
        reply = await self._outside.hsm.send(CaptureNext(self._group.realm, self._group.group, entries))
        outcome = self._following.fed(entries, reply)
        if isinstance(reply, RoleOk):
            self._roles.adopt(self._group, reply.role)
            self._saw(entries[-1])
        return outcome

    def _saw(self, entry: LogEntry) -> None:
        """Note the HSM's captured head; a retired one ends the group."""
        self._tail = entry
        if entry.retired and self._group.end is None:
            self._group.end, self._group.ended_at_s = entry, trio.current_time()

    async def _learn_head(self) -> None:
        """Learn the HSM's captured head again: a prefix of a refused push stays captured."""
        await self._persister.covered(self._persister.request())
        self._following.head(self._group.captured)

    async def run(self) -> None:
        """Follow the log from our position until the HSM has forgotten the group."""
        bind_context(realm=self._group.realm.hex(), group=self._group.group.hex())
        while True:
            try:
                found = await self._read(self._following.position)
                if found == [] and not self._knows_tail:
                    await self._learn_tail()
            except RealmError as error:
                self._outside.note_trouble(Code.LOG_NOT_FOLLOWED, error, self._group.group)
                await trio.sleep(self._following.read_failed())
                continue
            async with self.lock:
                if self._group.has_left:
                    return
                step = self._following.read(found, trio.current_time())
                refused = await self._feed(step.entries) if isinstance(step, Feed) else None
                if refused is not None:
                    await self._learn_head()
            if refused is not None:
                self._note_refused(self._following.position, refused)
                await trio.sleep(self._following.read_failed())
                continue
            if not self._following.is_catching_up:
                self._outside.clear_trouble(Code.LOG_NOT_FOLLOWED, self._group.group)
            match step:
                case Feed():
                    self._persister.request()
                case Idle(seconds):
                    self._following.waited(woken=await self.wake.wait_at_most(seconds))
                case Jump():
                    await self._catch_up(step)

    def _note_refused(self, index: int, outcome: Outcome) -> None:
        """Tell of a stored entry that the HSM will not have. Reading it again may help: it may have been mended."""
        damaged = StoreDamaged(
            DamageKind.LOG, f"of entry {index}", group=self._group.group, why=f"the HSM says {outcome.value}"
        )
        self._outside.note_damage(damaged.damage)
        self._outside.note_trouble(Code.LOG_NOT_FOLLOWED, damaged, self._group.group)

    async def _read(self, index: int) -> list[LogEntry] | Compacted:
        group = self._group
        return await self._outside.store.log.read_from(group.realm, group.group, index, WATCH_CHUNK_ENTRIES)

    # --- the end of the log ----------------------------------------------------------------------------

    @property
    def _knows_tail(self) -> bool:
        return self._tail is not None and self._tail.index == self._following.position - 1

    async def _learn_tail(self) -> None:
        """Read the entry that our HSM captured last: after a start, or a jump, nobody has seen it."""
        last = await self._outside.store.log.read_last(self._group.realm, self._group.group)
        if last is not None and last.index == self._following.position - 1:
            self._saw(last)

    # --- catch-up (H1) ---------------------------------------------------------------------------------

    async def _catch_up(self, jump: Jump) -> None:
        """Jump over compacted entries, or pause before the caller reads the log again."""
        outside = self._outside
        if jump.is_first:
            outside.log.warning("entries compacted, jumping", group=self._group.group.hex(), index=jump.missing)
        if jump.is_trouble:
            error = RealmError(f"index {jump.missing} is compacted and no certificate helps yet")
            outside.note_trouble(Code.LOG_NOT_FOLLOWED, error, self._group.group)
        try:
            has_jumped = await self._jump()
        except HsmGone:
            raise
        except RealmError as error:
            outside.note_trouble(Code.LOG_NOT_FOLLOWED, error, self._group.group)
            has_jumped = False
        outside.metrics.count("agent.catchup.jump", result="ok" if has_jumped else "retry")
        if has_jumped:
            outside.metrics.timing("agent.catchup", int(self._following.caught_up(trio.current_time()) * 1e9))
        else:
            await trio.sleep(self._following.jump_pause_s(trio.current_time()))

    async def _jump(self) -> bool:
        """Try one CaptureJump with the newest certificate; tell whether our position moved."""
        outside, group = self._outside, self._group
        certificate = await outside.store.log.read_certificate(group.realm, group.group)
        if certificate is None:
            return False
        evidence = Evidence(certificate, await self.live_captures())
        while evidence.wanted is not None:
            evidence.add(await self._read(evidence.wanted))
        if not evidence.entries:
            return False
        async with self.lock:
            reply = await outside.hsm.send(CaptureJump(group.realm, group.group, evidence.entries, evidence.captures))
            match self._following.jumped(reply):
                case Jumped.MOVED:
                    await self._learn_head()
                    outside.log.info(
                        "jumped", group=group.group.hex(), certificate=certificate.index, position=group.position
                    )
                    return True
                case Jumped.LEADS:
                    if isinstance(reply, NotWitness):
                        self._roles.adopt(group, reply.role)
                    await self._roles.step_down(group, force=True, why="a jump needs a witness")
                case Jumped.CORRUPTED if isinstance(reply, Outcome):
                    self._note_refused(certificate.index, reply)
                case Jumped.LATER if reply is Outcome.NO_QUORUM and evidence.is_complete:
                    self._outside.note_damage(
                        StoreDamage(DamageKind.CERTIFICATE, f"at index {certificate.index}", group.group)
                    )
                case _:
                    pass
        return False

    async def live_captures(self) -> list[Captured]:
        """Ask every reachable member for its persisted capture."""
        found: list[Captured] = []
        body = GroupCall(self._group.realm, self._group.group)

        async def ask(member: HsmId, url: str) -> None:
            try:
                reply = await self._outside.rpc.call(url, CAPTURED, body, timeout_s=CAPTURED_TIMEOUT_S)
                if isinstance(reply, CapturedReply) and reply.captured is not None:
                    captured = decode_captured(reply.captured)
                    if captured.hsm == member:
                        found.append(captured)
            except RealmError:
                # an unreachable member has no vote this time
                return

        async with trio.open_nursery() as nursery:
            for member in self._group.configuration:
                url = self._peers.url_of(member)
                if url is not None:
                    nursery.start_soon(ask, member, url)
        return found
