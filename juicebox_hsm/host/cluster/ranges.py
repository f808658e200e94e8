"""Record ids and ranges as people read them (operator-tools.md 1)."""

from __future__ import annotations

from typing import Final

from juicebox_hsm.ids import OwnedRange

_SHORTENED_FROM: Final = 4  # a trailing run of more than 3 bytes is shortened


def show_record_id(record: bytes) -> str:
    """Return `0x` and hex, a trailing run of 00 or ff longer than 3 bytes cut to its first byte and `...`."""
    last = record[-1:]
    kept = record.rstrip(last)
    if last in (b"\x00", b"\xff") and len(record) - len(kept) >= _SHORTENED_FROM:
        return f"0x{(kept + last).hex()}..."
    return f"0x{record.hex()}"


def show_range(value: OwnedRange | None) -> str:
    """Return `[start-end]`, or `none`."""
    return "none" if value is None else f"[{show_record_id(value.start)}-{show_record_id(value.end)}]"
