"""The house lane's work: waiting for former leaders, unknown outcomes, settled index, compaction (agent.md 10, 11)."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING

import trio

from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.events import is_recordable
from juicebox_hsm.host.group import GroupState, is_quiet
from juicebox_hsm.host.leadership.effects import (
    CompactRows,
    ListRows,
    Long,
    ReadUnsettled,
    Rest,
    WriteCertificate,
    WriteSettled,
    WriteUnknown,
)
from juicebox_hsm.host.leadership.events import (
    CertificateWritten,
    Event,
    HouseFailed,
    HouseRested,
    Lane,
    Leaving,
    PredecessorsQuiet,
    RowsCompacted,
    RowsListed,
    SettledWritten,
    UnknownWritten,
    UnsettledRead,
)
from juicebox_hsm.host.log import Intent
from juicebox_hsm.ids import HsmId
from roles.agent.outbox import PAGE_EVENTS, note_set_aside, record_events

if TYPE_CHECKING:
    from roles.agent.context import Agent
    from roles.agent.driver import Driver


async def keep_house(agent: Agent, driver: Driver) -> None:
    """Settle, resolve and compact until cancelled with the leadership, whose trouble ends with it."""
    await wait_for_witnesses(agent, driver.group, driver.members)
    try:
        await driver.run_lane(Lane.HOUSE, partial(_carry_out, agent), first=PredecessorsQuiet())
    finally:
        agent.clear_trouble(Code.COMPACTION, driver.group.group)


async def leave_house(agent: Agent, driver: Driver) -> None:
    """Write the settled index a last time."""
    effect = driver.step(Leaving())
    if effect is None:
        return
    try:
        driver.step(await _do(agent, driver, effect))
    except RealmError as error:
        # the next leader finds the rows by their sequence numbers; it only searches longer
        group = driver.group.group
        agent.log.warning("settled index not written", group=group.hex(), error=str(error))


async def _carry_out(agent: Agent, driver: Driver, effect: Long) -> Long | None:
    try:
        event = await _do(agent, driver, effect)
    except RealmError as error:
        agent.note_trouble(Code.COMPACTION, error, driver.group.group)
        return driver.step(HouseFailed())
    return driver.step(event)


async def _do(agent: Agent, driver: Driver, effect: Long) -> Event:
    """Do one thing and return the event that tells of it. Raises `RealmError`."""
    realm, group = driver.group.realm, driver.group.group
    match effect:
        case ReadUnsettled(last):
            return await _read_unsettled(agent, driver, last)
        case WriteUnknown(events, settled, set_aside):
            await record_events(agent, realm, events, {group: settled})
            if events:
                agent.log.warning("requests of unconfirmed outcome", group=group.hex(), count=len(events))
                agent.metrics.count("agent.outbox.unknown", len(events))
            if set_aside:
                note_set_aside(agent, group, set_aside)
            return UnknownWritten()
        case ListRows(below):
            return RowsListed(await agent.store.log.list_rows(realm, group, below))
        case WriteSettled(index):
            await record_events(agent, realm, [], {group: index})
            return SettledWritten()
        case WriteCertificate(certificate):
            await agent.store.log.write_certificate(realm, group, certificate)
            return CertificateWritten()
        case CompactRows(rows, index):
            await agent.store.log.compact(realm, group, rows)
            agent.metrics.gauge("agent.compaction.compact_index", index)
            return RowsCompacted()
        case Rest(pause_s, failures):
            if not failures:
                _report(agent, driver)
            await trio.sleep(pause_s)
            return HouseRested()
        case _:
            raise TypeError(f"not of the house lane: {effect}")


def _report(agent: Agent, driver: Driver) -> None:
    """Say that a round went well, and what it left."""
    shown = driver.leader.snapshot(trio.current_time())
    agent.metrics.gauge("agent.compaction.uncompacted_rows.count", shown.uncompacted_rows)
    agent.metrics.gauge("agent.compaction.uncompacted_rows.first_index", shown.uncompacted_first)
    agent.clear_trouble(Code.COMPACTION, driver.group.group)


# --- what earlier leaderships left -----------------------------------------------------------------------


async def wait_for_witnesses(agent: Agent, group: GroupState, members: list[HsmId]) -> None:
    """Return when every other member's agent reports Witness and no answers due for this group, or after 60 s."""
    with trio.move_on_after(agent.timings.witness_grace_s):
        while members:
            members = [member for member in members if not await _is_witness(agent, group, member)]
            if members:
                await trio.sleep(agent.timings.witness_poll_s)


async def _is_witness(agent: Agent, group: GroupState, member: HsmId) -> bool:
    url = agent.peers.url_of(member)
    if url is None:
        return False
    status = await agent.peers.status(url)
    return status is not None and is_quiet(status, group.realm, group.group)


async def _read_unsettled(agent: Agent, driver: Driver, last: int) -> UnsettledRead:
    """Read the intents above the settled index, and which of them have rows from their tenant's lowest hint on."""
    realm, group = driver.group.realm, driver.group.group
    settled = await agent.store.outbox.settled(realm, group)
    left: list[tuple[LogEntry, Intent]] = []
    recorded: set[tuple[int, bytes]] = set()
    if settled < last:
        left = await agent.store.log.read_intents(realm, group, settled + 1, last)
    hints: dict[str, list[int]] = defaultdict(list)
    for _, intent in left:
        hints[intent.tenant].append(intent.hint)
    for tenant, asked in hints.items():
        if is_recordable(tenant):
            recorded |= await _recorded(agent, driver.group, tenant, min(asked))
    return UnsettledRead(settled, left, recorded, agent.now_ms())


async def _recorded(agent: Agent, group: GroupState, tenant: str, hint: int) -> set[tuple[int, bytes]]:
    """Return (index, mac) of this group's rows in the tenant's outbox from sequence `hint` on."""
    found: set[tuple[int, bytes]] = set()
    after = max(0, hint - 1)
    while True:
        page = await agent.store.outbox.read(group.realm, tenant, after, PAGE_EVENTS)
        found |= {(row.new.index, row.new.mac) for row in page if row.new.group == group.group}
        if len(page) < PAGE_EVENTS:
            return found
        after = page[-1].seq
