"""Notice an older, empty or other store: one whose logs end before what our HSM captured (storage.md 5).

An HSM captures what was appended and nothing else, so such a store has lost entries, and with them guesses. The HSMs
refuse to serve from it, silently as seen from outside; here the reason gets a name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.log import lacks
from juicebox_hsm.host.readiness import OtherStore
from juicebox_hsm.hsm.messages import GroupStatus
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.errors import StoreDamaged, StoreInvalid
from juicebox_hsm.wire.rpc import LogBehind
from roles.agent.service import hsm_status

if TYPE_CHECKING:
    from roles.agent.context import Agent


async def watch_log_tails(agent: Agent) -> None:
    """Compare the ends of our groups' logs with what our HSM captured, for ever."""
    while True:
        await compare(agent)
        await trio.sleep(agent.timings.backlog_s)


async def compare(agent: Agent) -> None:
    """Compare once. What cannot be read says nothing: others tell that."""
    status = await hsm_status(agent)
    if status is None or status.realm is None:
        return
    found: list[LogBehind] = []
    for group in status.realm.groups:  # captured first, then read: an entry is appended before anybody captures it
        known = agent.groups.get(status.realm.id, group.id)
        if known is None or known.end is not None or group.captured is None:
            continue
        try:
            told = await _behind(agent, status.realm.id, group, *group.captured)
        except StoreDamaged:
            continue
        except RealmError:
            return
        if told is not None:
            found.append(told)
    agent.logs_behind = tuple(found)
    if found:
        agent.note(OtherStore(tuple(found)))
    else:
        agent.clear_trouble(Code.ANOTHER_STORE)


async def _behind(agent: Agent, realm: RealmId, group: GroupStatus, index: int, mac: bytes) -> LogBehind | None:
    try:
        last = await agent.store.log.read_last(realm, group.id)
    except StoreDamaged:
        raise  # told where it was met, and no sign of another store
    except StoreInvalid:
        last = None  # the realm is not there at all
    if not lacks(last, index, mac):
        return None
    return LogBehind(group.id, index, 0 if last is None else last.index)
