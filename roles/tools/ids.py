"""Ids and record ids as operators write and read them (operator-tools.md 1)."""

from __future__ import annotations

from collections.abc import Iterable

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.ids import ID_BYTES, RECORD_ID_BYTES, RecordId
from roles.tools.session import ToolFailure


def is_id(text: str) -> bool:
    """Tell whether a text is an id or could be the beginning of one."""
    return bool(text) and len(text) <= 2 * ID_BYTES and not set(text.lower()) - set("0123456789abcdef")


def resolve_id(text: str, known: Iterable[bytes], what: str) -> bytes:
    """Return the one known id that starts with these hex digits (any number of them).

    A full id is returned even when nobody shows it. Raises `ToolFailure` (exit 3) for no match and for several,
    (exit 2) for text that is not hex.
    """
    digits = text.lower()
    if not is_id(digits):
        raise ToolFailure(f"{text!r} is not a {what} id: give up to 32 hex digits", ExitCode.USAGE)
    if len(digits) == 2 * ID_BYTES:
        return bytes.fromhex(digits)
    matches = sorted({item for item in known if item.hex().startswith(digits)})
    if not matches:
        raise ToolFailure(f"no item with that ID: {what} {text}", ExitCode.ID)
    if len(matches) > 1:
        names = ", ".join(item.hex() for item in matches[:4])
        raise ToolFailure(f"ambiguous {what} id {text}: {names}", ExitCode.ID)
    return matches[0]


def parse_record_id(text: str) -> RecordId:
    """Return a record id from hex; a short one ending in 00 or ff is padded with that byte.

    Raises ValueError with the reason.
    """
    try:
        raw = bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        raise ValueError(f"{text!r} is not hex") from None
    if len(raw) > RECORD_ID_BYTES or not raw:
        raise ValueError(f"{text!r} is {len(raw)} bytes; a record id has 32")
    if len(raw) < RECORD_ID_BYTES:
        if raw[-1] not in (0x00, 0xFF):
            raise ValueError(f"{text!r} is short; give 32 bytes of hex, or end it in 00 or ff to repeat that byte")
        raw += raw[-1:] * (RECORD_ID_BYTES - len(raw))
    return RecordId(raw)
