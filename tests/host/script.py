"""Transcripts of a leadership: `>` lines are events for the real machine, `<` lines what it wants done.

`rN` are requests, `wN` waits, single letters HSMs (`a` is our own). An entry is named by its index, with `'` on another
branch than ours. `@ T` sets the time in seconds; `= name` lines show fields of the snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from juicebox_hsm.consensus.types import (
    Captured,
    Leader,
    LogEntry,
    Partition,
    Role,
    RoleStatus,
    SteppingDown,
    Witness,
)
from juicebox_hsm.host.leadership import effects as does
from juicebox_hsm.host.leadership import events as on
from juicebox_hsm.host.leadership.machine import Leadership
from juicebox_hsm.host.leadership.state import UNCOMMITTED_MAX, Limits
from juicebox_hsm.host.log import Intent, LogRow
from juicebox_hsm.hsm.messages import AppRequestOk, CommitOk, NotLeader, Outcome, Response, ResultKind, ResultType
from juicebox_hsm.ids import GroupId, HsmId, OwnedRange, RealmId, RecordId
from juicebox_hsm.merkle.kernel import EMPTY_DELTA
from juicebox_hsm.merkle.walk import Lost
from juicebox_hsm.wire.client import TransportRequest, TransportResponse

REALM, GROUP = RealmId(b"r" * 16), GroupId(b"g" * 16)
EVERYTHING: Final = Partition(OwnedRange(RecordId(bytes(32)), RecordId(b"\xff" * 32)), bytes(32))
LOST: Final = Lost(7, bytes(32))
LONG: Final = does.Long.__args__


def hsm(name: str) -> HsmId:
    return HsmId(name.encode() * 16)


def mac(name: str) -> bytes:
    return name.encode().rjust(32, b".")


def index_of(name: str) -> int:
    return int(name.rstrip("'"))


def entry(name: str, *, owning: bool = True) -> LogEntry:
    """Return an entry by its index; the entry after `7'` is `8'`."""
    index = index_of(name)
    before = f"{index - 1}{name[len(name.rstrip(chr(39))) :]}"
    return LogEntry(index, EVERYTHING if owning else None, None, mac(before), mac(name), hsm("a"))


def captured(member: str, name: str) -> Captured:
    return Captured(hsm(member), REALM, GROUP, index_of(name), mac(name), bytes(32))


class Script:
    """One scenario: builds events from words, steps the machine, and words its effects."""

    def __init__(self, head: dict[str, str]) -> None:
        members = tuple(hsm(name) for name in head.get("members", "a,b,c").split(","))
        limits = Limits(
            hole_s=float(head.get("hole_s", "5")),
            compact_pause_s=float(head.get("compact_pause_s", "1")),
            uncommitted_max=int(head.get("uncommitted_max", UNCOMMITTED_MAX)),
        )
        self.starting = int(head["starting"])
        self.clock = int(head.get("clock", "5"))
        role = RoleStatus(Leader(self.starting), self.clock)
        self.machine = Leadership(REALM, GROUP, members, self.starting, role, limits)
        self.now = 0.0
        self.requests: dict[str, on.ClientRequest] = {}
        self.waits: dict[str, on.CommitWait] = {}
        self.under_way: dict[str, does.Long] = {}
        self.answered: dict[str, str] = {}
        if head.get("inherits", "yes") == "yes":
            self.machine.step(on.Inherited(entry(str(self.starting - 1))), 0.0)

    # --- events --------------------------------------------------------------------------------------

    def request(self, name: str, tenant: str = "acme") -> on.ClientRequest:
        if name not in self.requests:
            record = RecordId(name.encode().ljust(32, b"."))
            self.requests[name] = on.ClientRequest(
                record, 1, TransportRequest(b""), tenant, "u", 0, lambda _answer: None
            )
        return self.requests[name]

    def role(self, words: dict[str, str]) -> RoleStatus:
        starting = int(words.get("starting", self.starting))
        kinds: dict[str, Role] = {
            "Leader": Leader(starting),
            "SteppingDown": SteppingDown(starting),
            "Witness": Witness(),
        }
        return RoleStatus(kinds.get(words["role"], Witness()), int(words.get("clock", self.clock)))

    def event(self, name: str, plain: list[str], named: dict[str, str]) -> on.Event:
        """Return the event of a line; most have no fields, the rest are listed in `_BUILDERS`."""
        build = _BUILDERS.get(name)
        if build is not None:
            return build(self, plain, named)
        kind = getattr(on, name)
        made: on.Event = kind()
        return made

    # --- effects -------------------------------------------------------------------------------------

    def name_of(self, request: on.ClientRequest) -> str:
        return next(name for name, known in self.requests.items() if known is request)

    def words(self, effect: does.Effect) -> str:
        """Return an effect as a line."""
        kind = type(effect).__name__
        word = _WORDS.get(type(effect))
        if word is None:
            return kind
        return f"{kind} {word(self, effect)}".rstrip()

    def step(self, event: on.Event) -> list[str]:
        """Step the machine, check what the contract says of every step, and return the effects' lines."""
        lane = self._lane_of(event)
        if lane is not None:
            begun = self.under_way.pop(lane, None)
            wanted = _TOLD_AFTER.get(type(event))
            assert wanted is None or isinstance(begun, wanted), f"{event} is told when {wanted} is done, not {begun}"
            assert wanted is not None or begun is None, f"{lane} is at {begun} and has no turn"
        effects = self.machine.step(event, self.now)
        long = [isinstance(effect, LONG) for effect in effects]
        assert not any(long[:-1]), "at most one long effect, and last"
        for effect in effects:
            match effect:
                case does.Release(answers):
                    assert isinstance(event, on.OutboxWritten), "only the step that saw the rows releases"
                    for answer in answers:
                        self._answer(answer.request)
                case does.Refuse(request):
                    self._answer(request)
                case does.CompactRows():
                    assert isinstance(event, on.CertificateWritten), "only the step that saw the certificate compacts"
                case _:
                    pass
        if effects and long[-1] and isinstance(effects[-1], LONG):
            assert lane is not None or isinstance(event, on.HandoverAsked), "a long effect has a lane"
            if lane is not None:
                self.under_way[lane] = effects[-1]
        return [self.words(effect) for effect in effects]

    def _lane_of(self, event: on.Event) -> str | None:
        """Return the lane that tells an event, None for those that come from outside."""
        match event:
            case on.Turn(lane):
                return lane.value
            case on.MemberTurn(member) | on.PushAnswered(member) | on.PushFailed(member):
                return member.decode()[0]
            case on.HsmAnswered(request):
                begun = self.under_way.get("produce")
                return "produce" if isinstance(begun, does.AskHsm) and begun.request is request else None
            case on.SteppedDown():
                return next((lane for lane, begun in self.under_way.items() if isinstance(begun, does.StepDown)), None)
            case on.PredecessorsQuiet():
                return "house"
            case on.Leaving():
                self.under_way.pop("house", None)  # cancelled with the leadership
                return "house"
            case _:
                return _LANES.get(type(event))

    def _answer(self, request: on.ClientRequest) -> None:
        name = self.name_of(request)
        assert name not in self.answered, f"{name} is answered once"
        self.answered[name] = "yes"

    def show(self, name: str) -> str:
        """Return one field of the snapshot as a line."""
        value = getattr(self.machine.snapshot(self.now), name)
        return f"= {name} {value.index if isinstance(value, LogEntry) else value}"


_TOLD_AFTER: Final[dict[type, type | tuple[type, ...]]] = {
    on.TailRead: does.ReadTail,
    on.TailFailed: does.ReadTail,
    on.ProofsRead: does.ReadProofs,
    on.ProofsFailed: does.ReadProofs,
    on.HsmAnswered: does.AskHsm,
    on.AppendFinished: does.Append,
    on.OwnShown: does.ShowOwn,
    on.SteppedDown: does.StepDown,
    on.CommitAnswered: does.AskCommit,
    on.OutboxWritten: does.WriteOutbox,
    on.OutboxFailed: does.WriteOutbox,
    on.PushAnswered: does.Push,
    on.PushFailed: does.Push,
    on.MemberTurn: (does.Pause, type(None)),
    on.UnsettledRead: does.ReadUnsettled,
    on.UnknownWritten: does.WriteUnknown,
    on.RowsListed: does.ListRows,
    on.SettledWritten: does.WriteSettled,
    on.CertificateWritten: does.WriteCertificate,
    on.RowsCompacted: does.CompactRows,
    on.HouseFailed: LONG,
    on.HouseRested: does.Rest,
}
_LANES: Final[dict[type, str]] = {
    kind: "commit"
    if kind in {on.CommitAnswered, on.OutboxWritten, on.OutboxFailed}
    else "house"
    if told in {does.ReadUnsettled, does.WriteUnknown, does.ListRows, does.WriteSettled, does.WriteCertificate}
    or told in {does.CompactRows, does.Rest, LONG}
    else "produce"
    for kind, told in _TOLD_AFTER.items()
}

Builder = Callable[[Script, list[str], dict[str, str]], on.Event]


def _hsm_answered(script: Script, plain: list[str], named: dict[str, str]) -> on.Event:
    reply: Response
    if "entry" in named:
        reply = AppRequestOk(entry(named["entry"]), EMPTY_DELTA + b"changes" if "wrote" in plain else EMPTY_DELTA)
    elif plain[1] == "not_leader":
        reply = NotLeader(script.role(named) if "role" in named else None)
    else:
        reply = Outcome[plain[1].upper()]
    return on.HsmAnswered(script.request(plain[0]), reply, int(named.get("hint", "1")))


def _commit_answered(script: Script, plain: list[str], named: dict[str, str]) -> on.Event:
    if "committed" not in named:
        reply = NotLeader(script.role(named)) if plain == ["not_leader"] else Outcome[plain[0].upper()]
        return on.CommitAnswered(reply)
    released = []
    for pair in filter(None, named.get("released", "").split(",")):
        name, kind = pair.split(":")
        result = ResultType(ResultKind[kind.upper()], recovered=kind == "recover3")
        released.append((mac(name), TransportResponse(b""), result))
    abandoned = tuple(mac(name) for name in filter(None, named.get("abandoned", "").split(",")))
    return on.CommitAnswered(
        CommitOk(int(named["committed"]), tuple(released), abandoned, script.role({"role": "Leader", **named}))
    )


def _unsettled_read(_script: Script, _plain: list[str], named: dict[str, str]) -> on.Event:
    left = []
    for pair in filter(None, named.get("left", "").split(",")):
        name, tenant = pair.split(":")
        left.append((entry(name), Intent(tenant, "u", RecordId(bytes(32)), 1)))
    recorded = {(index_of(name), mac(name)) for name in filter(None, named.get("recorded", "").split(","))}
    return on.UnsettledRead(int(named["settled"]), left, recorded, 42)


def _transfer_made(script: Script, plain: list[str], named: dict[str, str]) -> on.Event:
    wait = on.CommitWait(int(named["index"]), int(named.get("clock", script.clock)), lambda _refusal: None)
    script.waits[plain[0]] = wait
    return on.TransferMade(wait, entry(named["entry"]) if "entry" in named else None, EMPTY_DELTA)


_BUILDERS: Final[dict[str, Builder]] = {
    "Turn": lambda _s, plain, _n: on.Turn(on.Lane(plain[0])),
    "RoleAdopted": lambda s, plain, n: on.RoleAdopted(s.role({"role": plain[0], **n})),
    "Inherited": lambda _s, plain, _n: on.Inherited(entry(plain[0])),
    "HandoverAsked": lambda _s, plain, _n: on.HandoverAsked(plain[0] == "manager"),
    "RequestArrived": lambda s, plain, n: on.RequestArrived(
        s.request(plain[0], n.get("tenant", "acme")), "outbox_full" in plain
    ),
    "RequestGone": lambda s, plain, _n: on.RequestGone(s.request(plain[0])),
    "RetryDue": lambda s, plain, _n: on.RetryDue(s.request(plain[0])),
    "TailRead": lambda _s, plain, _n: on.TailRead(
        None if plain[0] == "none" else entry(plain[0], owning="unowned" not in plain)
    ),
    "ProofsRead": lambda _s, plain, _n: on.ProofsRead([LOST if word == "missing" else b"proof" for word in plain]),
    "HsmAnswered": _hsm_answered,
    "StoreFailed": lambda _s, _p, _n: on.StoreFailed(),
    "AppendFinished": lambda _s, plain, _n: on.AppendFinished(on.AppendResult(plain[0])),
    "TransferMade": _transfer_made,
    "WaitTimedOut": lambda s, plain, _n: on.WaitTimedOut(s.waits[plain[0]]),
    "CaptureHeard": lambda _s, plain, _n: on.CaptureHeard(captured(plain[0], plain[1])),
    "CommitAnswered": _commit_answered,
    "MemberTurn": lambda _s, plain, _n: on.MemberTurn(hsm(plain[0]), "heartbeat" in plain),
    "PushAnswered": lambda _s, plain, n: on.PushAnswered(
        hsm(plain[0]), None if plain[1] == "none" else captured(n.get("of", plain[0]), plain[1]), "behind" in plain
    ),
    "PushFailed": lambda _s, plain, _n: on.PushFailed(hsm(plain[0]), "refused" in plain),
    "UnsettledRead": _unsettled_read,
    "RowsListed": lambda _s, plain, _n: on.RowsListed([LogRow(int(first), False) for first in plain]),
}


def _role_words(role: RoleStatus) -> str:
    return f"{type(role.role).__name__} clock={role.at}"


def _lane_words(lane: on.Lane | HsmId) -> str:
    return lane.value if isinstance(lane, on.Lane) else lane.decode()[0]


def _of(captures: Sequence[Captured]) -> str:
    return " ".join(f"{c.hsm.decode()[0]}:{c.mac.decode().lstrip('.')}" for c in captures)


def _events_words(events: Sequence[object], settled: int | None) -> str:
    rows = " ".join(f"{row.index}:{row.kind.value}" for row in events)  # type: ignore[attr-defined]  # NewEvent
    return f"{rows} settled={settled}".strip() if settled is not None else rows


_WORDS: Final[dict[type, Callable[..., str]]] = {
    does.Release: lambda s, e: " ".join(s.name_of(answer.request) for answer in e.answers),
    does.Refuse: lambda s, e: f"{s.name_of(e.request)} {e.refusal.name.lower()}{' consumed' if e.consumed else ''}",
    does.RetryLater: lambda s, e: f"{s.name_of(e.request)} {e.delay_s:g}",
    does.Adopt: lambda _s, e: _role_words(e.role),
    does.Wake: lambda _s, e: _lane_words(e.lane),
    does.SetDeadline: lambda _s, e: f"{e.at_s:g}",
    does.WaitOver: lambda s, e: (
        f"{next(name for name, wait in s.waits.items() if wait is e.wait)} "
        f"{'ok' if e.refusal is None else e.refusal.name.lower()}"
    ),
    does.Note: lambda _s, e: e.what.value,
    does.TellDamaged: lambda _s, e: f"depth {e.node.depth}",
    does.ReadProofs: lambda s, e: " ".join(s.name_of(request) for request in e.requests),
    does.AskHsm: lambda s, e: f"{s.name_of(e.request)} at={e.index}",
    does.Append: lambda _s, e: " ".join(str(made.index) for made in e.entries),
    does.ShowOwn: lambda _s, e: " ".join(str(made.index) for made in e.entries),
    does.StepDown: lambda _s, e: f"{e.code.value}{' forced' if e.forced else ''}",
    does.AskCommit: lambda _s, e: _of(e.captures),
    does.WriteOutbox: lambda _s, e: _events_words(e.events, e.settled),
    does.Push: lambda _s, e: f"{_lane_words(e.member)} entries={len(e.entries)} last={e.last}",
    does.Pause: lambda _s, e: f"{_lane_words(e.member)} {e.why.value}",
    does.ReadUnsettled: lambda _s, e: f"last={e.last}",
    does.WriteUnknown: lambda _s, e: _events_words(e.events, e.settled),
    does.ListRows: lambda _s, e: f"below={e.below}",
    does.WriteSettled: lambda _s, e: str(e.index),
    does.WriteCertificate: lambda _s, e: f"{e.certificate.index} {_of(e.certificate.captures)}",
    does.CompactRows: lambda _s, e: f"{' '.join(str(row.first_index) for row in e.rows)} upto={e.index}",
    does.Rest: lambda _s, e: f"{e.pause_s:g}{f' failures={e.failures}' if e.failures else ''}",
}


def _parse(words: str) -> tuple[list[str], dict[str, str]]:
    plain = [word for word in words.split() if "=" not in word]
    return plain, dict(word.split("=", 1) for word in words.split() if "=" in word)


def play(path: Path) -> str:
    """Run a transcript's events through the machine; returns the transcript as it comes out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    out: list[str] = []
    script: Script | None = None
    for number, line in enumerate(lines, 1):
        if line.startswith("<"):
            continue
        if line.startswith("leadership "):
            script = Script(_parse(line.removeprefix("leadership "))[1])
        elif line.startswith("@ "):
            assert script is not None
            script.now = float(line[2:])
        elif line.startswith("= "):
            assert script is not None
            out.append(script.show(line.split()[1]))
            continue
        elif line.startswith("> "):
            assert script is not None, "a transcript begins with its leadership"
            name, _, rest = line[2:].partition(" ")
            try:
                event = script.event(name, *_parse(rest))
            except (KeyError, IndexError, AttributeError, TypeError) as error:
                raise AssertionError(f"{path.name}:{number}: {line!r} is no event: {error!r}") from error
            out += [line, *(f"< {effect}" for effect in script.step(event))]
            continue
        else:
            assert line.startswith("#") or not line.strip(), f"{path.name}:{number}: {line!r}"
        out.append(line)
    return "\n".join(out) + "\n"
