"""Building blocks of the HSM transport's CBOR: one codec per kind of field (hsm.md 2 and 8).

A `Codec` writes bytes and reads decoded items. Readers check types, lengths and ranges; that nothing else was in the
bytes is checked by whoever encodes the result again and compares. They raise `errors.DecodingError`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, assert_never

import cbor2

from juicebox_hsm.consensus.codec import (
    captured_from_item,
    encode_captured,
    encode_log_entry,
    log_entry_from_item,
    partition_from_item,
    range_from_item,
    transferring_from_item,
)
from juicebox_hsm.consensus.macs import (
    NULL,
    array_head,
    encode_partition,
    encode_range,
    encode_transferring_in,
    encode_transferring_out,
)
from juicebox_hsm.consensus.types import (
    MAC_BYTES,
    Leader,
    Partition,
    RoleStatus,
    SteppingDown,
    Transferring,
    TransferringIn,
    Witness,
)
from juicebox_hsm.errors import DecodingError, check
from juicebox_hsm.hsm.messages import ResultKind, ResultType
from juicebox_hsm.ids import ID_BYTES, RECORD_ID_BYTES
from juicebox_hsm.wire import cbor
from juicebox_hsm.wire.client import (
    decode_noise_request,
    decode_noise_response,
    encode_noise_request,
    encode_noise_response,
)


@dataclass(frozen=True, slots=True)
class Codec:
    """How one kind of value is written to bytes and read from a decoded item."""

    write: Callable[[Any], bytes]
    read: Callable[[object], Any]


Fields = tuple[tuple[str, Codec], ...]


def read_fields(item: object, names: tuple[str, ...]) -> list[object]:
    """Return the values of a map that has exactly these keys."""
    fields = cbor.as_map(item)
    if tuple(fields) != names:
        raise DecodingError("a message has other fields than declared")
    return list(fields.values())


def write_map(names: tuple[str, ...], values: list[bytes]) -> bytes:
    """Encode a map of text keys and encoded values."""
    check(len(names) == len(values), "every field has a value")
    pairs = (cbor.text(name) + value for name, value in zip(names, values, strict=True))
    return cbor.map_head(len(names)) + b"".join(pairs)


def struct(build: Callable[..., Any], fields: Fields, last: tuple[str, Codec] | None = None) -> Codec:
    """Return the codec of a dataclass whose attributes carry the names of its wire fields.

    A `last` field has a default that is false, and is left out of the bytes while it has it.
    """

    def write(value: Any) -> bytes:
        shown = (*fields, last) if last is not None and getattr(value, last[0]) else fields
        return write_map(tuple(name for name, _ in shown), [codec.write(getattr(value, name)) for name, codec in shown])

    def read(item: object) -> Any:
        shown = (*fields, last) if last is not None and last[0] in cbor.as_map(item) else fields
        values = read_fields(item, tuple(name for name, _ in shown))
        return build(*[codec.read(value) for (_, codec), value in zip(shown, values, strict=True)])

    return Codec(write, read)


def fixed(size: int) -> Codec:
    """Return the codec of a byte string of exactly `size` bytes."""

    def read(item: object) -> bytes:
        if type(item) is not bytes or len(item) != size:
            raise DecodingError(f"a byte string of {size} bytes was expected")
        return item

    return Codec(cbor.byte_string, read)


def uint(maximum: int) -> Codec:
    """Return the codec of an unsigned integer of at most `maximum`."""
    return Codec(cbor.uint, lambda item: cbor.as_uint(item, maximum))


def optional(codec: Codec) -> Codec:
    """Return the codec that writes None as null."""
    return Codec(
        lambda value: NULL if value is None else codec.write(value),
        lambda item: None if item is None else codec.read(item),
    )


def array(codec: Codec) -> Codec:
    """Return the codec of a tuple of like values."""

    def write(values: tuple[Any, ...]) -> bytes:
        return array_head(len(values)) + b"".join(map(codec.write, values))

    def read(item: object) -> tuple[Any, ...]:
        return tuple(map(codec.read, _list(item)))

    return Codec(write, read)


def row(*codecs: Codec) -> Codec:
    """Return the codec of a tuple of unlike values, an array on the wire."""

    def write(values: tuple[Any, ...]) -> bytes:
        parts = (codec.write(value) for codec, value in zip(codecs, values, strict=True))
        return array_head(len(codecs)) + b"".join(parts)

    def read(item: object) -> tuple[Any, ...]:
        items = _list(item)
        if len(items) != len(codecs):
            raise DecodingError(f"an array of {len(codecs)} was expected")
        return tuple(codec.read(value) for codec, value in zip(codecs, items, strict=True))

    return Codec(write, read)


def _list(item: object) -> list[object]:
    if type(item) is not list:
        raise DecodingError("an array was expected")
    return item


def _read_bytes(item: object) -> bytes:
    if type(item) is not bytes:
        raise DecodingError("a byte string was expected")
    return item


def _read_bool(item: object) -> bool:
    if type(item) is not bool:
        raise DecodingError("a boolean was expected")
    return item


def _read_partition(item: object) -> Partition:
    partition = partition_from_item(item)
    if partition is None:
        raise DecodingError("a partition was expected")
    return partition


def _write_transferring(value: Transferring) -> bytes:
    if isinstance(value, TransferringIn):
        return cbor.map_head(1) + cbor.text("In") + encode_transferring_in(value)
    return cbor.map_head(1) + cbor.text("Out") + encode_transferring_out(value)


def _reencoded(item: object) -> bytes:
    """Return the bytes of a nested item for a decoder that wants bytes; the client protocol's decoders do."""
    encoded: bytes = cbor2.dumps(item)
    return encoded


ID: Final = fixed(ID_BYTES)
RECORD_ID: Final = fixed(RECORD_ID_BYTES)
MAC: Final = fixed(MAC_BYTES)
NONCE: Final = fixed(16)
BYTES: Final = Codec(cbor.byte_string, _read_bytes)
BOOL: Final = Codec(lambda value: b"\xf5" if value else b"\xf4", _read_bool)
U16: Final = uint(cbor.U16_MAX)
U32: Final = uint(cbor.U32_MAX)
U64: Final = uint(cbor.U64_MAX)
RANGE: Final = Codec(encode_range, range_from_item)
PARTITION: Final = Codec(encode_partition, _read_partition)
TRANSFERRING: Final = Codec(_write_transferring, transferring_from_item)
ENTRY: Final = Codec(encode_log_entry, log_entry_from_item)
CAPTURED: Final = Codec(encode_captured, captured_from_item)
PAIR: Final = row(U64, MAC)
NOISE_REQUEST: Final = Codec(encode_noise_request, lambda item: decode_noise_request(_reencoded(item)))
NOISE_RESPONSE: Final = Codec(encode_noise_response, lambda item: decode_noise_response(_reencoded(item)))


# Roles and results --------------------------------------------------------------------------------------------


def _write_role(value: RoleStatus) -> bytes:
    match value.role:
        case Leader(starting):
            role = cbor.map_head(1) + cbor.text("Leader") + write_map(("starting",), [cbor.uint(starting)])
        case SteppingDown(starting):
            fields = write_map(("leader_starting",), [cbor.uint(starting)])
            role = cbor.map_head(1) + cbor.text("SteppingDown") + fields
        case Witness():
            role = cbor.text("Witness")
        case _:
            assert_never(value.role)
    return write_map(("role", "at"), [role, cbor.uint(value.at)])


def _read_role(item: object) -> RoleStatus:
    role_item, at = read_fields(item, ("role", "at"))
    name, value = cbor.as_variant(role_item)
    clock = U64.read(at)
    if name == "Witness" and value is cbor.UNIT:
        return RoleStatus(Witness(), clock)
    if name == "Leader":
        return RoleStatus(Leader(U64.read(read_fields(value, ("starting",))[0])), clock)
    if name == "SteppingDown":
        return RoleStatus(SteppingDown(U64.read(read_fields(value, ("leader_starting",))[0])), clock)
    raise DecodingError("unknown role")


ROLE: Final = Codec(_write_role, _read_role)

_UPDATED: Final = ("num_guesses", "guess_count")
_KINDS: Final = {kind.value: kind for kind in ResultKind}


def _write_result(value: ResultType) -> bytes:
    name = cbor.text(value.kind.value)
    if value.kind is ResultKind.RECOVER2:
        updated = NULL
        if value.num_guesses is not None and value.guess_count is not None:
            updated = write_map(_UPDATED, [cbor.uint(value.num_guesses), cbor.uint(value.guess_count)])
        return cbor.map_head(1) + name + write_map(("updated",), [updated])
    if value.kind is ResultKind.RECOVER3:
        return cbor.map_head(1) + name + write_map(("recovered",), [BOOL.write(value.recovered)])
    return name


def _read_result(item: object) -> ResultType:
    name, value = cbor.as_variant(item)
    kind = _KINDS.get(name)
    if kind is None:
        raise DecodingError("unknown result type")
    if kind is ResultKind.RECOVER2:
        (updated,) = read_fields(value, ("updated",))
        if updated is None:
            return ResultType(kind)
        num_guesses, guess_count = read_fields(updated, _UPDATED)
        return ResultType(kind, U16.read(num_guesses), U16.read(guess_count))
    if kind is ResultKind.RECOVER3:
        return ResultType(kind, recovered=BOOL.read(read_fields(value, ("recovered",))[0]))
    if value is not cbor.UNIT:
        raise DecodingError("this result type carries nothing")
    return ResultType(kind)


RESULT: Final = Codec(_write_result, _read_result)
