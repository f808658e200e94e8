"""When a certificate ends, and from when on somebody has to be told (operator-tools.md 2, 3). Moments are Unix ms.

Every service reads its certificates at start and at HUP only, so an end that nobody sees is an outage of everything
that was issued on the same day.
"""

from __future__ import annotations

from typing import Final

from juicebox_hsm.host.clocks import DAY_MS

DAYS_WARN: Final = 20  # operator-tools.md 3: time enough to issue a new one, with a holiday in between
MOMENT_MS_MAX: Final = 253_402_300_799_000  # the last second of the year 9999, the last one that a date can hold


def remaining_days(end_ms: int, now_ms: int) -> float:
    """Return the days until `end_ms`, negative afterwards."""
    return (end_ms - now_ms) / DAY_MS


def is_due(end_ms: int | None, now_ms: int) -> bool:
    """Tell whether somebody has to see to a certificate: it ended or ends soon."""
    return end_ms is not None and remaining_days(end_ms, now_ms) < DAYS_WARN


def is_valid(from_ms: int, end_ms: int, now_ms: int) -> bool:
    """Tell whether a certificate that is valid from `from_ms` to `end_ms` may be used now."""
    return from_ms <= now_ms <= end_ms


def may_replace(present: tuple[int, int], new: tuple[int, int], now_ms: int) -> bool:
    """Tell whether a certificate may take another's place, by when each is valid (from, end).

    One that is not valid must not take the place of one that is: nobody would connect any more.
    """
    return is_valid(*new, now_ms) or not is_valid(*present, now_ms)


def moment_ms(told: object) -> int | None:
    """Return the end of a certificate as a peer tells it; None for anything that is no moment, since peers may send
    anything."""
    return told if isinstance(told, int) and 0 <= told <= MOMENT_MS_MAX else None
