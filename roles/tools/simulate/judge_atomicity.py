"""I16 and I17: a request that is refused leaves no trace, and no request ends an HSM."""

from __future__ import annotations

from juicebox_hsm.hsm import messages as m
from juicebox_hsm.hsm.state import GroupState, HsmState, LeaderState, WitnessState
from juicebox_hsm.ids import GroupId
from roles.tools.simulate.judge_rules import require

Fingerprint = tuple[object, ...]


def fingerprint(state: HsmState) -> Fingerprint:
    """Return what a refused request must leave as it is. Cost: the groups of the HSM, not its log."""
    return (
        state.persistent,
        tuple(state.captured.items()),
        tuple(_of_group(group) for group in state.groups.values()),
    )


def _of_group(group: GroupState) -> Fingerprint:
    role = group.role
    if isinstance(role, WitnessState):
        return (group.clock, type(role))
    log = (role.log.first, len(role.log), role.log.last.entry_mac, role.committed)
    if isinstance(role, LeaderState):
        root = None if role.tree is None else role.tree.root
        return (group.clock, type(role), *log, role.incoming, root, len(role.sessions))
    return (group.clock, type(role), *log, role.stepdown_at, len(role.abandoned))


def changed_groups(state: HsmState, before: Fingerprint, after: Fingerprint) -> list[GroupState]:
    """Return the groups that are not what they were, for what has not changed has been checked."""
    old: tuple[object, ...] = before[2]  # type: ignore[assignment]  # tuples, made below
    new: tuple[object, ...] = after[2]  # type: ignore[assignment]
    if len(old) != len(new):
        return list(state.groups.values())
    return [group for group, was, now in zip(state.groups.values(), old, new, strict=True) if was != now]


def is_refusal(response: m.Response) -> bool:
    """Tell whether an answer is anything other than success."""
    return isinstance(response, m.Outcome | m.NotLeader | m.NotWitness | m.NotCaptured)


def check_refusal(
    name: str, state: HsmState, before: Fingerprint, after: Fingerprint, request: m.Request, response: m.Response
) -> None:
    """I16: judge what changed in an HSM that refused: only the exceptions that hsm.md 14 names may have."""
    what = f"HSM {name} refused a {type(request).__name__} and changed"
    match request:
        case m.CaptureNext(group=group):
            _check_others(what, state, before, after, group)
        case m.AppRequest(group=group):
            costs_session = isinstance(response, m.Outcome) and response in _SESSION_LOST
            require("I16", costs_session or isinstance(response, m.NotLeader), what)
            require("I16", before[:2] == after[:2], what)
            _check_others(what, state, before, after, group)
        case m.BecomeLeader():
            require("I16", before[1:] == after[1:], what)
        case _:
            require("I16", condition=False, detail=what)


_SESSION_LOST = (m.Outcome.SESSION_ERROR, m.Outcome.DECODING_ERROR)


def _check_others(what: str, state: HsmState, before: Fingerprint, after: Fingerprint, group: GroupId) -> None:
    """Check that a request changed nothing of the groups that it did not name."""
    pairs = zip(state.groups, before[2], after[2], strict=True)  # type: ignore[call-overload]  # tuples, made above
    require("I16", all(old == new for of, old, new in pairs if of != group), what)
