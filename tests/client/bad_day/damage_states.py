"""States of damaged data: a bit is changed in a tree node, a log row or an event, on any store, and changed back."""

from __future__ import annotations

from contextlib import closing
from typing import Any, Final, cast

import apsw
import trio

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import EVERYTHING, KeyRange, Row, RowSet, Selection, SetCell
from juicebox_hsm.adapters.bigtable.outbox_rows import EVENTS
from juicebox_hsm.adapters.bigtable.table import Table
from juicebox_hsm.ids import GroupId
from roles.tools.demo.layout import TENANT
from tests.client.bad_day.day import Channel, Day, State
from tests.client.bad_day.listening import INFO, PIN, registered

CAUGHT_S: Final = 30.0
"""An event waits up to two seconds for its publication, so one is caught within a few tries."""
_FLIP: Final = {
    "node": "UPDATE roots SET node = flipped(node) RETURNING 1",
    "log": "UPDATE log SET entries = flipped(entries) WHERE id = (SELECT max(id) FROM log WHERE id >> 48 ="
    " (SELECT number FROM groups WHERE grp = ?1)) RETURNING 1",
    "event": "UPDATE outbox SET data = flipped(data) WHERE seq > (SELECT published FROM outbox_tenants t WHERE"
    " t.number = outbox.tenant) RETURNING tenant, seq",
}
_BACK: Final = "UPDATE outbox SET data = flipped(data) WHERE tenant = ? AND seq = ?"


def _flipped(value: bytes) -> bytes:
    """Return the value with a bit of its middle changed; twice changes nothing."""
    middle = len(value) // 2
    return value[:middle] + bytes([value[middle] ^ 1]) + value[middle + 1 :]


async def _damage(day: Day, what: str, serving: GroupId) -> bool:
    """Change a bit in what there is of the kind, and note the way back; False if there is nothing of it now."""
    if day.cluster.state.bigtable:
        return await _damage_cells(day, what, serving)
    values = (serving,) if what == "log" else ()

    def execute(statement: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        with closing(apsw.Connection(str(day.cluster.state.path / "store.db"))) as db:
            db.set_busy_timeout(10_000)
            db.create_scalar_function("flipped", cast("Any", _flipped), 1)
            return db.execute(statement, cast("Any", values)).fetchall()

    found = execute(_FLIP[what], values)

    async def undo() -> None:
        await trio.lowlevel.checkpoint()
        if what == "event":
            for row in found:
                execute(_BACK, row)
        else:
            execute(_FLIP[what], values)

    if found:
        day.undo.append(undo)
    return bool(found)


async def _damage_cells(day: Day, what: str, serving: GroupId) -> bool:
    """Do the same on Bigtable, whose rows the session of the demo reads and writes."""
    store: Any = day.cluster.session.store
    realm = day.cluster.realms[0]
    if what == "node":
        table: Table = store.nodes.table(realm)
        wanted = KeyRange(b"\0", b"\xff" * 64)
    elif what == "log":
        table, wanted = store.log._reads.table(realm), keys.log_range(serving, keys.TOP, 1)
    else:
        published = {cursor.tenant: cursor.published for cursor in await store.outbox.cursors(realm)}
        table = store.outbox._table.of(realm)
        wanted = keys.event_range(TENANT.encode(), keys.TOP, published.get(TENANT, 0) + 1)
    selection = Selection(family=EVENTS) if what == "event" else EVERYTHING
    rows = await table.read_rows(RowSet(ranges=(wanted,)), limit=1 if what == "log" else 0, selection=selection)

    async def write(rows: list[Row], *, right: bool) -> None:
        for row in rows:
            cells = row.cells[:1] if what == "log" else row.cells
            await table.mutate_row(row.key, [
                SetCell(c.family, c.qualifier, c.value if right else _flipped(c.value), c.timestamp) for c in cells
            ])  # fmt: skip

    async def undo() -> None:
        await write(rows, right=True)

    await write(rows, right=False)
    if rows:
        day.undo.append(undo)
    return bool(rows)


async def _with_agents_stopped(day: Day, what: str) -> None:
    """Damage what agents remember while they run, and let them read it."""
    agents = day.cluster.of_role("agent")
    serving = await day.serving()
    for agent in agents:
        await agent.kill()
    assert await _damage(day, what, serving), what
    for agent in agents:
        await day.cluster.restart(agent.service.name)


async def _damage_nodes(day: Day) -> None:
    await _with_agents_stopped(day, "node")


async def _damage_log(day: Day) -> None:
    await _with_agents_stopped(day, "log")


async def _damage_event(day: Day) -> None:
    serving = await day.serving()
    async with registered(day.cluster) as user:
        with trio.fail_after(CAUGHT_S):
            while not await _damage(day, "event", serving):
                await user.client.recover(PIN, INFO)


async def mend(day: Day) -> None:
    """Change back what was changed."""
    while day.undo:
        await day.undo.pop()()


def _says(kind: str, words: str) -> dict[Channel, str]:
    return {
        Channel.READY: rf"{words}.* is damaged.*store check",
        Channel.METRICS: rf'agent_store_damaged_total\{{.*kind="{kind}".*\}} [1-9]',
        Channel.LOG: rf"{words}.* is damaged.*store check",
        Channel.STATUS: rf"{words}.* is damaged.*store check",
    }


STATES: Final = (
    State(
        "node-damaged",
        "a bit of the stored root nodes is changed, and changed back",
        {**_says("node", "tree node"), Channel.CLIENT: r""},
        _damage_nodes,
        mend,
    ),
    State(
        "log-damaged",
        "a bit of the last row of the log is changed while no agent runs, and changed back",
        {**_says("log", "log row"), Channel.CLIENT: r""},
        _damage_log,
        mend,
    ),
    State(
        "event-damaged",
        "a bit of an event that waits for its publication is changed, and changed back",
        _says("event", r"event \d+ of tenant"),
        _damage_event,
        mend,
    ),
)
