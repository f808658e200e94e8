"""Error families of the project (own: `docs/adr/0002-error-families.md`).

Three families that never mix:

1. *Outcomes* of the protocol are values, not exceptions (see `wire` and `hsm.messages`).
2. *Operational errors* are `RealmError`s raised by adapters; `retryable` says whether trying again may help.
3. *Broken invariants* raise `InvariantViolation` through `check`; nobody catches them and the process stops.
"""

from __future__ import annotations


class RealmError(Exception):
    """An operational error: what failed, where, and whether trying again may help."""

    retryable: bool = False


class DecodingError(RealmError, ValueError):
    """Bytes from outside are not what the protocol allows. Carries no input bytes."""


class LocalError(RealmError):
    """We were called or configured wrongly; the message says how to fix it."""


class NotYet(LocalError):
    """What we need is not there, or is somebody else's, and may be right in a moment without anybody's doing."""

    retryable = True


class NoStore(LocalError):
    """There is no store where one was named, and the caller is not the one to make it."""


class PeerError(RealmError):
    """A peer broke its protocol."""


class InvariantViolation(BaseException):
    """Something that must hold does not. Derives from BaseException so that no handler swallows it."""


def check(condition: object, must_hold: str) -> None:
    """Raise `InvariantViolation` unless `condition` holds. Stays on in production, unlike `assert`."""
    if not condition:
        raise InvariantViolation(must_hold)
