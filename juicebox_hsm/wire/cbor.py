"""CBOR as the client protocol uses it (client-protocol.md 3), and the strict form of HSM state and messages.

Two readers share one guarded decoder:

* `decode` is lenient where deployed decoders are: any key order, unknown keys ignored, byte fields as arrays of
  integers, bytes after the first complete item ignored. Own decisions where the protocol leaves them free: tags and
  indefinite lengths are refused, and a duplicated key is an error even when the key is unknown.
* `decode_strict` accepts exactly the bytes that our encoder would write (definite lengths, shortest integers, no
  duplicate keys, no tags, nothing after the item).

Whatever the bytes, both either return or raise `DecodingError`. Tags never reach the library's own semantic decoders
(dates, bignums, decimals, regular expressions, shared references cost time or surprise); nesting is limited.

The writers are small because the protocol's messages are: concatenating constant keys with encoded values is several
times faster than building a dict and handing it to a general encoder, and byte-exact by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any, Final, NoReturn

import cbor2

from juicebox_hsm.errors import DecodingError

DEPTH_MAX: Final = 32
"""Nesting limit of any message; the deepest of ours nests 7 levels. Keeps hostile nesting off the C stack."""

U16_MAX: Final = 2**16 - 1
U32_MAX: Final = 2**32 - 1
U64_MAX: Final = 2**64 - 1

SCALAR_ORDER: Final = 2**252 + 27742317777372353535851937790883648493
"""Order q of the ristretto255 group; canonical scalars are below it."""

UNIT: Final = object()
"""Value of an enum variant without data, distinct from everything CBOR can carry."""


def _refuse_tag(*_: object) -> NoReturn:
    """Refuse a tagged item; honest peers never send one."""
    raise DecodingError("CBOR tags are not used in this protocol")


class _EveryTag(dict[int, Callable[..., NoReturn]]):
    """Map every tag number to the refusal, so that no built-in semantic decoder can run."""

    def __missing__(self, tag: int) -> Callable[..., NoReturn]:
        """Return the refusal for any tag number."""
        return _refuse_tag


_REFUSE_EVERY_TAG: Final = _EveryTag()


def _decode_one(stream: BytesIO) -> object:
    """Decode the first item of `stream`; raises `DecodingError` whatever goes wrong."""
    try:
        item: object = cbor2.CBORDecoder(
            stream,
            tag_hook=_refuse_tag,
            semantic_decoders=_REFUSE_EVERY_TAG,
            max_depth=DEPTH_MAX,
            allow_indefinite=False,
            allow_duplicate_keys=False,
        ).decode()
    except Exception:  # noqa: BLE001 - the contract: hostile bytes end in DecodingError, whatever the library raises
        raise DecodingError("malformed CBOR") from None
    return item


def decode(data: bytes) -> object:
    """Return the first CBOR item of `data`, ignoring bytes after it. Raises `DecodingError`."""
    return _decode_one(BytesIO(data))


def decode_strict(data: bytes) -> object:
    """Return the one item that `data` encodes canonically: re-encoding it gives `data` again.

    Map order is kept, not sorted, so callers that need a fixed order compare against their own encoding.
    Raises `DecodingError`. Cost: one decode and one encode.
    """
    item = _decode_one(BytesIO(data))
    try:
        canonical = cbor2.dumps(item)
    except Exception:  # noqa: BLE001 - items our encoder cannot write were never written by us
        canonical = b""
    if canonical != data:
        raise DecodingError("CBOR is not in canonical form")
    return item


# Writers ------------------------------------------------------------------------------------------------------


def head(major: int, value: int) -> bytes:
    """Return the shortest head of major type `major` (0 to 7) with argument `value` (unsigned 64 bits)."""
    lead = major << 5
    if value < 24:
        return bytes((lead | value,))
    if value < 0x100:
        return bytes((lead | 24, value))
    if value < 0x10000:
        return bytes((lead | 25,)) + value.to_bytes(2, "big")
    if value < 0x100000000:
        return bytes((lead | 26,)) + value.to_bytes(4, "big")
    return bytes((lead | 27,)) + value.to_bytes(8, "big")


def uint(value: int) -> bytes:
    """Encode an unsigned integer."""
    return head(0, value)


def byte_string(value: bytes) -> bytes:
    """Encode a byte string."""
    return head(2, len(value)) + value


def text(value: str) -> bytes:
    """Encode a text string."""
    raw = value.encode()
    return head(3, len(raw)) + raw


def map_head(entries: int) -> bytes:
    """Encode the head of a map of `entries` pairs."""
    return head(5, entries)


# Readers of decoded items -------------------------------------------------------------------------------------


def as_map(item: object) -> dict[Any, Any]:
    """Return `item` if it is a map, else raise `DecodingError`."""
    if type(item) is not dict:
        raise DecodingError("a map was expected")
    return item


def as_bytes(item: object) -> bytes:
    """Return a byte field, which may also arrive as an array of integers 0..255."""
    if type(item) is bytes:
        return item
    if type(item) is list:
        if any(type(octet) is not int or not 0 <= octet <= 255 for octet in item):
            raise DecodingError("a byte array holds something that is not a byte")
        return bytes(item)
    raise DecodingError("bytes were expected")


def as_fixed(item: object, size: int) -> bytes:
    """Return a byte field of exactly `size` bytes."""
    value = item if type(item) is bytes else as_bytes(item)
    if len(value) != size:
        raise DecodingError(f"a field of {size} bytes has {len(value)}")
    return value


def as_scalar(item: object) -> bytes:
    """Return a canonical scalar: 32 bytes, little-endian, below the group order."""
    value = as_fixed(item, 32)
    if int.from_bytes(value, "little") >= SCALAR_ORDER:
        raise DecodingError("a scalar is not canonical")
    return value


def as_uint(item: object, maximum: int) -> int:
    """Return an unsigned integer of at most `maximum`."""
    if type(item) is not int or not 0 <= item <= maximum:
        raise DecodingError(f"an integer from 0 to {maximum} was expected")
    return item


def as_text(item: object) -> str:
    """Return a text string."""
    if type(item) is not str:
        raise DecodingError("text was expected")
    return item


def as_variant(item: object) -> tuple[str, object]:
    """Split an enum value into its variant name and its value; `UNIT` for a variant without data."""
    if type(item) is str:
        return item, UNIT
    if type(item) is dict and len(item) == 1:
        for name, value in item.items():
            if type(name) is str:
                return name, value
    raise DecodingError("an enum variant was expected")
