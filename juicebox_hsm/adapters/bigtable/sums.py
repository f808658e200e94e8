"""The checksum that ends a cell of the log or the outbox: it finds damage, not forgery.

A cell's value ends with a map in CBOR, whose last field it is. Cells of earlier versions have none.
"""

from __future__ import annotations

from typing import Final
from zlib import crc32

from juicebox_hsm.wire import cbor

SUM_BYTES: Final = 4
SUM_HEAD: Final = cbor.text("sum") + cbor.head(2, SUM_BYTES)
"""The field's name, and the head of its string of bytes (RFC 8949 3.1)."""


def with_sum(value: bytes) -> bytes:
    """Return a value that ends with `SUM_HEAD` and the CRC-32 of all before."""
    return value + crc32(value).to_bytes(SUM_BYTES, "big")


def has_wrong_sum(value: bytes, last: bytes) -> bool:
    """Tell whether a value, whose `last` part is the map, has a checksum that is not its own."""
    return last[:-SUM_BYTES].endswith(SUM_HEAD) and value != with_sum(value[:-SUM_BYTES])
