"""One changed bit in a cell of the log or the outbox is never taken for data, whichever it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from juicebox_hsm.adapters.bigtable import keys
from juicebox_hsm.adapters.bigtable.codec import Cell, Row
from juicebox_hsm.adapters.bigtable.log_rows import ENTRIES, decode_with_intents, entry_cells
from juicebox_hsm.adapters.bigtable.outbox_rows import EVENTS, decode_event, encode_event
from juicebox_hsm.host.events import OutboxEvent
from juicebox_hsm.ports.errors import StoreDamaged
from juicebox_hsm.wire.rpc import DamageKind, StoreDamage
from tests.emulator.realm_data import GROUP, batch, event, intent


def _flips(value: bytes) -> list[bytes]:
    return [
        value[:at] + bytes([value[at] ^ 1 << bit]) + value[at + 1 :] for at in range(len(value)) for bit in range(8)
    ]


def _found_or_harmless(value: bytes, read: Callable[[bytes], object], damage: StoreDamage) -> None:
    """Check that all changes are found and named, but those of the four bytes that name the checksum."""
    told = []
    for flipped in _flips(value):
        try:
            assert read(flipped) == read(value), "the name of the checksum was hit"
        except StoreDamaged as error:
            told.append(error.damage)
    assert set(told) == {damage}
    assert len(told) >= 8 * (len(value) - 4)


def test_log_cells() -> None:
    """An entry with its intent: a changed bit is named by group and index, or changes nothing that is read."""
    (cell,) = entry_cells(batch(7, 7), [intent(7)])
    key = keys.log_key(GROUP, 7)

    def read(value: bytes) -> object:
        return decode_with_intents(Row(key, [Cell(ENTRIES, cell.qualifier, 0, value)]))

    assert read(cell.value) == [(batch(7, 7)[0], intent(7))]
    _found_or_harmless(cell.value, read, StoreDamage(DamageKind.LOG, "of entry 7", GROUP))


def test_outbox_cells() -> None:
    """An event likewise, by tenant and number."""
    new = event(3, body={"num_guesses": 5})
    value = encode_event(9, new)

    def read(value: bytes) -> OutboxEvent:
        return decode_event("acme", Cell(EVENTS, keys.downward(9), 0, value))

    assert read(value) == OutboxEvent(9, new)
    _found_or_harmless(value, read, StoreDamage(DamageKind.EVENT, "9 of tenant acme"))


def test_cells_of_earlier_versions_are_read() -> None:
    """Without a checksum there is nothing to compare; what was written stays readable."""
    value = encode_event(9, event(3))
    older = bytes([value[0] - 1]) + value[1:-9]
    assert decode_event("acme", Cell(EVENTS, keys.downward(9), 0, older)) == OutboxEvent(9, event(3))
    with pytest.raises(StoreDamaged):
        decode_event("acme", Cell(EVENTS, keys.downward(8), 0, older))
