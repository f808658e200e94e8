"""Who was heard when, and who counts as lost (agent.md 7, 8; manager.md 3.2). Times are monotonic seconds, arguments.

*Leaders.* A member that stops hearing its leader tells the managers at once. Hints only save time: managers check
before they act, and their own 2 s loop stays. A hint is due when no leadership that may still write speaks any more,
because the stream of its agent closed or after 1 s of silence, when this agent left leadership without being asked,
and when it has heard no leader 250 ms after it registered; and again every second until a leader speaks.

*Agents.* One that answers is in the map of addresses, one that does not answer twice in a row is not. Once is not
enough: an agent that was paused itself finds that all its questions timed out, and must not lead a group whose
members it cannot reach (own).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from juicebox_hsm.ids import GroupId, HsmId, RealmId

LEADERSHIPS_MAX: Final = 9
"""Leaderships heard at once; a group has no more members, so what goes beyond is made up."""

GroupKey = tuple[RealmId, GroupId]


class Claim(NamedTuple):
    """What tells the leaderships of a group apart, in the order in which they count (record 0018).

    `last` is the last index it wrote, or the one it began after; `starting` is the first it may create.
    """

    last: int
    starting: int


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a leader may be silent, and when hints go out; seconds."""

    silence_s: float
    hint_first_s: float
    hint_again_s: float


@dataclass(slots=True)
class _Heard:
    """What a member heard of its group's leaders, ranked by the last index they say they wrote (record 0018).

    Appends are conditional, so a leadership that ends below what another one wrote can never write again: it is
    deposed, and what it says counts for nothing. Those that end at the same index are all able to write the next one,
    wherever they began.
    """

    end: int = 0
    """The highest index any leadership said it wrote, or began after."""
    spoke: dict[int, tuple[float, Callable[[], bool]]] = field(default_factory=dict)
    """`starting` -> when and whether that stream ended, of those that end there and spoke since the newest began."""
    left: Claim | None = None
    """A leadership of our own that ended unasked; the managers are told until another one speaks."""
    hint_at: float | None = None
    """When the next hint is due while the leader counts as lost."""

    def note(self, claim: Claim, now: float, is_closed: Callable[[], bool]) -> bool:
        """Note that a leadership spoke; False when it is deposed."""
        known = claim.starting in self.spoke
        if claim.last < self.end and not known:
            return False
        if claim.last > self.end or all(claim.starting > other for other in self.spoke):
            self.end = claim.last
            self.spoke.clear()
        elif not known and len(self.spoke) >= LEADERSHIPS_MAX:
            return False
        self.spoke[claim.starting] = (now, is_closed)
        return True

    def claims(self) -> list[Claim]:
        """Return the leaderships that are not deposed."""
        return [Claim(self.end, starting) for starting in self.spoke]

    def is_speaking(self, starting: int, now: float, silence_s: float) -> bool:
        """Tell whether this leadership is neither silent nor cut off from us."""
        at, is_closed = self.spoke[starting]
        return now - at < silence_s and not is_closed()


class Leaders:
    """The leaders that one agent hears, of all its groups, and which of them it must report."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._groups: dict[GroupKey, _Heard] = {}
        self._registered_at: float | None = None

    def registered(self, now: float) -> None:
        """Note that this agent is known to others; no hint is due before."""
        if self._registered_at is None:
            self._registered_at = now

    def _of(self, group: GroupKey) -> _Heard:
        return self._groups.setdefault(group, _Heard())

    def heard(self, group: GroupKey, claim: Claim, now: float, is_closed: Callable[[], bool]) -> None:
        """Note that a leadership spoke on a stream, of which `is_closed` tells whether it has ended."""
        known = self._of(group)
        if known.left is not None and claim.last < known.left.last:
            return
        if known.note(claim, now, is_closed):
            known.left = None

    def began(self, group: GroupKey) -> None:
        """Note that our own HSM leads the group now."""
        self._of(group).left = None

    def left(self, group: GroupKey, claim: Claim) -> None:
        """Note that a leadership of our own ended without being asked to."""
        self._of(group).left = claim

    def unreported(self, group: GroupKey) -> Claim | None:
        """Return the leadership of our own that ended unasked, while no other one has spoken since."""
        return self._of(group).left

    def hint(self, group: GroupKey, now: float, *, leads: bool) -> int | None:
        """Return the lost leadership's `starting`, 0 if none was ever heard, if a hint is due now.

        Sets the next due time, and forgets a leadership of our own once another one speaks or we lead again.
        """
        heard, patience = self._of(group), self._patience
        if self._registered_at is None:
            return None
        # what we heard before a leadership of our own counts only if it ranks above that one
        claims = [claim for claim in heard.claims() if heard.left is None or claim > heard.left]
        if leads or any(heard.is_speaking(c.starting, now, patience.silence_s) for c in claims):
            heard.hint_at = None
            heard.left = None
            return None
        lost = max([*heard.claims(), *([] if heard.left is None else [heard.left])], default=None)
        if heard.hint_at is None:
            heard.hint_at = now if lost is not None else self._registered_at + patience.hint_first_s
        if now < heard.hint_at:
            return None
        heard.hint_at = now + patience.hint_again_s
        return 0 if lost is None else lost.starting


class Reachable:
    """Which agents answer: HSM ids and their agents' addresses."""

    def __init__(self) -> None:
        self._urls: dict[HsmId, str] = {}
        self._missed: set[HsmId] = set()

    def url_of(self, member: HsmId) -> str | None:
        """Return where the agent of `member` is, if it answered lately."""
        return self._urls.get(member)

    def asked(self, answered: Mapping[HsmId, str], registered: Collection[str]) -> bool:
        """Adopt who answered when all `registered` addresses were asked.

        Returns whether to ask again soon, because somebody is in the map on trust.
        """
        urls = dict(answered)
        missed = {member for member in self._urls if member not in answered}
        new = missed - self._missed
        for member in sorted(new):
            if self._urls[member] in registered:
                urls[member] = self._urls[member]
        self._missed = missed
        self._urls = urls
        return bool(new)
