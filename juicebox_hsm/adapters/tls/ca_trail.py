"""The audit trail of a certificate authority: a file in its directory, for there is no store where a CA is kept.

One JSON object a line, and a line is only ever added. Whoever can write the directory can sign without any of this;
what the file tells is what the program was asked to do.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

from juicebox_hsm.adapters.process.threads import in_thread_or_here
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.audit import UNREADABLE, AuditEntry, decode, encode

FILE_NAME: Final = "audit.jsonl"
FILE_MODE: Final = 0o600


class CaTrail:
    """`ports.AuditTrail` in the directory of a CA, which must exist. Raises `LocalError` for what cannot be written."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME

    async def add(self, entry: AuditEntry) -> None:
        """Add an entry; of one change and phase the first one stands. Returns when it is on the disk."""
        await in_thread_or_here(self._add, entry)

    async def read(self, since_ms: int, entries_max: int) -> list[AuditEntry]:
        """Return the newest entries since then, oldest first; none where nothing was ever recorded."""
        found = await in_thread_or_here(self._read)
        wanted = [entry for entry in found if entry.when_ms >= since_ms or entry.action == UNREADABLE]
        return sorted(wanted, key=lambda entry: entry.when_ms)[-entries_max:]

    def _add(self, entry: AuditEntry) -> None:
        told = {"change": entry.change.hex(), "phase": entry.phase.value, "when_ms": entry.when_ms}
        line = json.dumps(told | json.loads(encode(entry))) + "\n"
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, FILE_MODE)
            with os.fdopen(descriptor, "wb") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise LocalError(f"{self._path}: cannot be written: {error.strerror}") from None

    def _read(self) -> list[AuditEntry]:
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LocalError(f"{self._path}: cannot be read: {error.strerror}") from None
        found: dict[tuple[bytes, str], AuditEntry] = {}
        for number, line in enumerate(lines):
            change, phase, when_ms = _parts(line, number)
            found.setdefault((change, phase), decode(change, phase, when_ms, line))
        return list(found.values())


def _parts(line: bytes, number: int) -> tuple[bytes, str, int]:
    """Return id, phase and time of a line; a damaged one gets an id of its own, so that it is shown as such."""
    try:
        told = json.loads(line)
        return bytes.fromhex(told["change"]), str(told["phase"]), int(told["when_ms"])
    except (ValueError, KeyError, TypeError):
        return b"line %d" % number, "", 0
