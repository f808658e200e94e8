"""One bad day: a demo realm that serves, a state that is caused on it, and what was then said and when."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import trio

from juicebox_hsm.adapters.faults.switch import Faults
from juicebox_hsm.host.cluster.view import GroupView
from juicebox_hsm.ids import GroupId
from roles.tools.demo.launch import Cluster
from roles.tools.demo.layout import write_file
from roles.tools.demo.processes import OrphanGuard
from roles.tools.demo.pubsub import PubSubEmulator

TOLD_S: Final = 10.0
"""Nothing dangerous is silent for longer (docs/reliability.md)."""
SERVED_S: Final = 5.0
"""Clients who should be served wait no longer."""
LISTEN_S: Final = 25.0
"""So long is listened to, that what comes late has a figure; then it counts as never said."""
BACK_S: Final = 60.0
"""A realm whose trouble is over and that is not ready and serving by then does not come back."""

ANY_STORE: Final = frozenset({"sqlite", "bigtable"})
ONLY_SQLITE: Final = frozenset({"sqlite"})


class Channel(StrEnum):
    """Where an operator or a client learns something. `TOOL` is the command that caused the state."""

    READY = "/readyz"
    METRICS = "metrics"
    LOG = "log"
    STATUS = "status"
    CLIENT = "client"
    TOOL = "tool"


@dataclass(slots=True)
class Day:
    """The realm a state is caused on. `cause` adds what a tool said to `tool_output`, and the way back to `undo`."""

    cluster: Cluster
    directory: Path
    faults: Path
    guard: OrphanGuard
    bus: PubSubEmulator | None = None
    tool_output: list[str] = field(default_factory=list)
    victims: list[str] = field(default_factory=list)
    undo: list[Callable[[], Awaitable[None]]] = field(default_factory=list)

    async def serving(self) -> GroupId:
        """Return the group that has the key space."""
        return (await self._serving()).id

    async def leader(self) -> str:
        """Return the name of the agent that leads the key space."""
        leader = (await self._serving()).leader
        assert leader is not None
        return next(p.service.name for p in self.cluster.of_role("agent") if p.service.url == leader.url)

    async def followers(self) -> list[str]:
        """Return the names of the agents that do not lead the key space."""
        leader = await self.leader()
        return [p.service.name for p in self.cluster.of_role("agent") if p.service.name != leader]

    def set_faults(self, name: str, faults: Faults) -> None:
        """Let a service have these faults from its next look on."""
        write_file(self.faults / f"{name}.json", faults.to_json())

    async def _serving(self) -> GroupView:
        view = await self.cluster.wait_leaders()
        return next(group for group in view.groups.values() if group.owned_range is not None)


async def leave_alone(_day: Day) -> None:
    """Do nothing: the realm must be as it was."""
    await trio.lowlevel.checkpoint()


async def start_victims(day: Day) -> None:
    """Start again what was killed."""
    for name in day.victims:
        await day.cluster.restart(name)


@dataclass(frozen=True, slots=True)
class State:
    """A dangerous state. `says` has a regular expression for each channel that has to name it.

    A client is listed where it has to be refused; anywhere else its calls must go on being answered, each within
    `SERVED_S`. `stores` are those on which there is such a state, `listen_s` is how long is listened at least,
    `has_bus` states need Pub/Sub's emulator.
    """

    name: str
    what: str
    says: Mapping[Channel, str]
    cause: Callable[[Day], Awaitable[None]]
    mend: Callable[[Day], Awaitable[None]] | None = None
    agents: int = 3
    groups: int = 1
    stores: frozenset[str] = ANY_STORE
    listen_s: float = 0.0
    has_bus: bool = False


@dataclass(frozen=True, slots=True)
class Heard:
    """What a channel said and when, in s after the cause; `after_s` None if it never named the state in time."""

    channel: Channel
    after_s: float | None
    text: str

    @property
    def is_silent(self) -> bool:
        """Tell whether this took longer than anything dangerous may."""
        return self.after_s is None or self.after_s > TOLD_S

    @property
    def remark(self) -> str:
        """Return what leads the text: whether it came late, or is only what was said instead."""
        if self.after_s is None:
            return "SILENT; it says: "
        return "LATE: " if self.is_silent else ""


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a state. `back_s` is how long after the mending all was well, if asked.

    `amiss` is what was not when patience ended; `harmed`: clients were refused or waited, and should not have been.
    """

    state: str
    what: str
    heard: tuple[Heard, ...]
    client: str
    client_longest_s: float
    mended: bool
    back_s: float | None
    amiss: str
    harmed: bool = False

    @property
    def silent(self) -> list[str]:
        """Return what was silent: channels, and the end of the trouble if that never came."""
        silent = [heard.channel.value for heard in self.heard if heard.is_silent]
        silent += ["clients harmed"] if self.harmed else []
        return [*silent, "back"] if self.mended and self.back_s is None else silent

    def to_json(self) -> dict[str, Any]:
        """Return the report as a document."""
        return {**asdict(self), "silent": self.silent}

    def lines(self) -> list[str]:
        """Return the report for people."""
        lines = [f"{self.state}: {self.what}"]
        for heard in self.heard:
            when = "never" if heard.after_s is None else f"{heard.after_s:.1f} s"
            lines.append(f"  {heard.channel:8} {when:>7}  {heard.remark}{heard.text}")
        lines.append(f"  clients: {self.client}; the longest call took {self.client_longest_s:.1f} s")
        if self.mended:
            lines.append(f"  back: {f'NEVER: {self.amiss}' if self.back_s is None else f'after {self.back_s:.1f} s'}")
        return lines
