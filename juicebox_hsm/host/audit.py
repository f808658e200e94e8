"""What was changed in a cluster, by whom and with what result: the entries of the audit trail (record 0035).

A change that somebody orders is told twice, before it is begun and when it has ended. What has no second entry is
`UNKNOWN`: whoever made the change ended meanwhile, or is still at it. What managers do unasked is told once, when it is
done.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from juicebox_hsm.host.cluster.ranges import show_record_id
from juicebox_hsm.wire.rpc import GroupCall, GroupJoin, GroupNew, RealmJoin, StepdownOrder, TransferPrepare

CHANGE_BYTES: Final = 16
"""A change's id is drawn at random, so that nobody has to ask for the last one."""
TEXT_CHARS_MAX: Final = 400
"""Own: names, places and what a service said. An entry stays below 8 KiB, whatever was ordered."""
ARGUMENTS_MAX: Final = 16
"""Own: the orders have at most four arguments, a command line of `replace` more."""
UNREADABLE: Final = "unreadable"
"""The action of an entry that cannot be decoded: it shows as damage, and hides no other."""


class Phase(enum.Enum):
    """Which of a change's entries it is."""

    STARTED = "started"
    DONE = "done"
    FAILED = "failed"


class Result(enum.Enum):
    """How a change ended, as far as the trail tells."""

    DONE = "done"
    FAILED = "failed"
    UNKNOWN = "unknown"


Arguments = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One entry. `when_ms` is Unix time by the clock of whoever wrote it.

    `who` is role and name of a certificate as `operator/NAME`, "" without one; `origin` is where the order came from
    and `recorded_by` the program that wrote the entry. `detail` is what came of it, or why it failed.
    """

    change: bytes
    phase: Phase
    when_ms: int
    who: str
    origin: str
    recorded_by: str
    action: str
    arguments: Arguments = ()
    detail: str = ""

    def ended(self, when_ms: int, *, failed: bool, detail: str = "") -> AuditEntry:
        """Return the entry that tells how this change ended."""
        phase = Phase.FAILED if failed else Phase.DONE
        return replace(self, phase=phase, when_ms=when_ms, detail=_bounded(detail))


@dataclass(frozen=True, slots=True)
class Change:
    """What all entries of a change say together. `entry` is the one that says most, `ended_ms` None while unknown."""

    entry: AuditEntry
    result: Result
    began_ms: int | None
    ended_ms: int | None


def make_entry(
    change: bytes,
    when_ms: int,
    *,
    who: str,
    origin: str,
    recorded_by: str,
    action: str,
    arguments: Arguments = (),
    phase: Phase = Phase.STARTED,
) -> AuditEntry:
    """Return an entry with everything in it bounded."""
    kept = tuple((_bounded(name), _bounded(value)) for name, value in arguments[:ARGUMENTS_MAX])
    return AuditEntry(
        change, phase, when_ms, _bounded(who), _bounded(origin), _bounded(recorded_by), _bounded(action), kept
    )


def _bounded(text: str) -> str:
    return text if len(text) <= TEXT_CHARS_MAX else f"{text[: TEXT_CHARS_MAX - 3]}..."


def changes(entries: Iterable[AuditEntry]) -> list[Change]:
    """Return the changes that entries tell of, in the order they began."""
    found: dict[bytes, list[AuditEntry]] = {}
    for entry in entries:
        found.setdefault(entry.change, []).append(entry)
    told = [_change(of_one) for of_one in found.values()]
    return sorted(told, key=lambda change: change.entry.when_ms if change.began_ms is None else change.began_ms)


def _change(entries: list[AuditEntry]) -> Change:
    began = next((entry for entry in entries if entry.phase is Phase.STARTED), None)
    ended = next((entry for entry in entries if entry.phase is not Phase.STARTED), None)
    if ended is None:
        return Change(entries[0], Result.UNKNOWN, entries[0].when_ms, None)
    result = Result.FAILED if ended.phase is Phase.FAILED else Result.DONE
    return Change(ended, result, None if began is None else began.when_ms, ended.when_ms)


def encode(entry: AuditEntry) -> bytes:
    """Return an entry as stores keep it: JSON, for people who have nothing but a shell of the store."""
    told = {
        "who": entry.who,
        "origin": entry.origin,
        "recorded_by": entry.recorded_by,
        "action": entry.action,
        "arguments": dict(entry.arguments),
        "detail": entry.detail,
    }
    return json.dumps(told, separators=(",", ":")).encode()


def decode(change: bytes, phase: str, when_ms: int, data: bytes) -> AuditEntry:
    """Return an entry from its parts; never fails, for one damaged row must not hide the others."""
    try:
        told = json.loads(data)
        known = Phase(phase)
        texts = {name: str(told[name]) for name in ("who", "origin", "recorded_by", "action", "detail")}
        arguments = tuple((str(name), str(value)) for name, value in told["arguments"].items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return AuditEntry(change, Phase.FAILED, when_ms, "", "", "", UNREADABLE)
    return AuditEntry(change, known, when_ms, arguments=arguments, **texts)


# --- what services are ordered to do -------------------------------------------------------------------


ORDERS: Final = {
    "realm/new": "new-realm",
    "realm/join": "join-realm",
    "group/new": "new-group",
    "group/join": "join-group",
    "group/retire": "retire",
    "stepdown": "stepdown",
    "leader_stepdown": "stepdown",
    "rebalance": "rebalance",
    "transfer": "transfer",
}
"""Method that operators may call and that changes something -> the action's name in the trail."""


def arguments_of(body: object) -> Arguments:
    """Return what an order is about."""
    match body:
        case TransferPrepare(realm=realm, source=source, destination=destination, range=moved):
            ends = f"[{show_record_id(moved.start)}-{show_record_id(moved.end)}]"
            named = {"realm": realm, "source": source, "destination": destination}
            return (*_hex(named), ("range", ends))
        case StepdownOrder(hsm=hsm, realm=realm, group=group):
            return _hex({"hsm": hsm, "realm": realm, "group": group})
        case RealmJoin(realm=realm):
            return _hex({"realm": realm})
        case GroupNew(realm=realm, members=members):
            return (*_hex({"realm": realm}), ("hsms", " ".join(hsm.hex() for hsm, _ in members)))
        case GroupJoin(realm=realm, group=group) | GroupCall(realm=realm, group=group):
            return _hex({"realm": realm, "group": group})
        case _:
            return ()


def _hex(named: Mapping[str, bytes | None]) -> Arguments:
    return tuple((name, value.hex()) for name, value in named.items() if value is not None)
