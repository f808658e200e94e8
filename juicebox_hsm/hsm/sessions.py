"""The leader's cache of open Noise sessions (hsm.md 13.1)."""

from __future__ import annotations

from juicebox_hsm.crypto.noise import Session
from juicebox_hsm.errors import check
from juicebox_hsm.ids import RecordId


class Sessions:
    """Least-recently-used cache keyed by (record id, session id), so no session serves another user's record.

    A session is used by taking it out; whoever took it puts it back after success, and only then.
    """

    __slots__ = ("_capacity", "_sessions")

    def __init__(self, capacity: int) -> None:
        check(1 <= capacity <= 65535, "a session cache holds 1 to 65535 sessions")
        self._capacity = capacity
        self._sessions: dict[tuple[RecordId, int], Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, key: tuple[RecordId, int]) -> bool:
        return key in self._sessions

    def take(self, record: RecordId, session_id: int) -> Session | None:
        """Remove and return the session, if there is one."""
        return self._sessions.pop((record, session_id), None)

    def put(self, record: RecordId, session_id: int, session: Session) -> None:
        """Store as most recently used, replacing silently; the least recently used goes when the cache is full."""
        key = (record, session_id)
        self._sessions.pop(key, None)
        if len(self._sessions) >= self._capacity:
            del self._sessions[next(iter(self._sessions))]
        self._sessions[key] = session
