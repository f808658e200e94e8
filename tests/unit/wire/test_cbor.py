"""The guarded CBOR decoder and the strict form (client-protocol.md 3)."""

from __future__ import annotations

import cbor2
import pytest

from juicebox_hsm.errors import DecodingError
from juicebox_hsm.wire import cbor


@pytest.mark.parametrize("value", [0, 23, 24, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**64 - 1])
def test_integers(value: int) -> None:
    """Heads take their shortest form at every boundary, as the general encoder's do."""
    assert cbor.uint(value) == cbor2.dumps(value)
    assert cbor.decode(cbor.uint(value)) == value
    if value <= 70_000:
        assert cbor.byte_string(bytes(value)) == cbor2.dumps(bytes(value))
        assert cbor.text("t" * value) == cbor2.dumps("t" * value)


HOSTILE = {
    "empty": b"",
    "cut short": b"\x58\x20abc",
    "huge byte string": bytes.fromhex("5bffffffffffffffff"),
    "large byte string": bytes.fromhex("5b0000000100000000") + b"x" * 100,
    "huge text": bytes.fromhex("7bffffffffffffffff"),
    "huge array": bytes.fromhex("9bffffffffffffffff"),
    "huge map": bytes.fromhex("bbffffffffffffffff"),
    "bad text": b"\x61\xff",
    "lone surrogate": b"\x63\xed\xa0\x80",
    "break": b"\xff",
    "indefinite bytes": b"\x5f\x41a\xff",
    "indefinite map": b"\xbf\xff",
    "reserved head": b"\x1c",
    "reserved simple value": b"\xf8\x10",
    "deep arrays": b"\x81" * 100_000 + b"\x00",
    "deep maps": b"\xa1\x00" * 100_000 + b"\x00",
    "deep map keys": b"\xa1" * 100_000 + b"\x00\x00",
    "deep tags": b"\xc6" * 100_000 + b"\x00",
    "self-describing": bytes.fromhex("d9d9f700"),
    "bignum": bytes.fromhex("c249") + b"\xff" * 9,
    "decimal": bytes.fromhex("c4821b7fffffffffffffff01"),
    "bigfloat": bytes.fromhex("c5821b7fffffffffffffff01"),
    "epoch": bytes.fromhex("c1fb7ff0000000000000"),
    "date text": bytes.fromhex("c0") + b"\x6a2020-01-01",
    "regular expression": bytes.fromhex("d823") + b"\x64(a*)",
    "shared cycle": bytes.fromhex("d81c81d81d00"),
    "set as key": bytes.fromhex("a1d90102810100"),
    "duplicate keys": b"\xa2\x00\x00\x00\x01",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bytes(data: bytes) -> None:
    """Both decoders refuse hostile bytes with `DecodingError`, quickly and without deep recursion."""
    for decode in (cbor.decode, cbor.decode_strict):
        with pytest.raises(DecodingError):
            decode(data)


@pytest.mark.parametrize("opening", [b"\x81", b"\xa1\x00"], ids=["arrays", "maps"])
def test_depth(opening: bytes) -> None:
    """Nesting is refused beyond the documented depth and no earlier, in either form and by both decoders."""
    assert cbor.DEPTH_MAX == 32  # docs/protocol/client-protocol.md 3
    for decode in (cbor.decode, cbor.decode_strict):
        assert decode(opening * cbor.DEPTH_MAX + b"\x00") is not None
        with pytest.raises(DecodingError):
            decode(opening * (cbor.DEPTH_MAX + 1) + b"\x00")


def test_every_tag_is_refused() -> None:
    """No tag number reaches a semantic decoder, those the library knows today or may learn."""
    for tag in [*range(2_000), 43_000, 55_799, 2**16, 2**32, 2**64 - 1]:
        for content in (b"\x00", b"\x60", b"\x80"):
            with pytest.raises(DecodingError):
                cbor.decode(cbor.head(6, tag) + content)


@pytest.mark.parametrize(
    "item", [0, -1, b"bytes", "text", [1, [2, {"a": None}]], {"a": 1, b"b": [True, False]}, {"z": 1, "a": 2}, {}]
)
def test_strict_accepts_canonical(item: object) -> None:
    """What our encoder writes is read back; map order is the writer's."""
    decoded = cbor.decode_strict(cbor2.dumps(item))
    assert decoded == item
    if isinstance(item, dict) and isinstance(decoded, dict):
        assert list(decoded) == list(item)


@pytest.mark.parametrize(
    "data",
    [b"\x18\x17", b"\x19\x00\xff", b"\x1a\x00\x00\xff\xff", b"\x58\x01a", b"\x78\x01a", b"\x98\x01\x00",
     b"\xb8\x01\x00\x00", b"\x00\x00", b"\x80\x00", b"\xf9\x3c\x00", b"\x9f\xff", b"\xa1\x18\x01\x00"],
)  # fmt: skip
def test_strict_refuses_other_spellings(data: bytes) -> None:
    """Longer heads, trailing bytes, indefinite lengths and short floats have another canonical spelling."""
    with pytest.raises(DecodingError):
        cbor.decode_strict(data)


def test_decoding_errors_carry_no_input() -> None:
    """Errors may be logged, so they show nothing of what was decoded, not even as a cause."""
    with pytest.raises(DecodingError) as caught:
        cbor.decode(b"\x6csecretsecre\xff")
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_strict_refuses_what_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that our encoder cannot write was not written by us, whatever the encoder raises."""
    monkeypatch.setattr(cbor2, "dumps", lambda item: {}[item])
    with pytest.raises(DecodingError):
        cbor.decode_strict(b"\x00")
