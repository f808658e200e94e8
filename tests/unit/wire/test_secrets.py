"""Inner messages: every vector, refusals, padding and its sizes (client-protocol.md 8, 19.9)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cbor2
import pytest

from juicebox_hsm.errors import DecodingError, InvariantViolation
from juicebox_hsm.wire import requests as wire
from juicebox_hsm.wire.cbor import SCALAR_ORDER
from juicebox_hsm.wire.requests import Phase
from tests.vectors import VECTORS

REQUESTS = [name for name in VECTORS["cbor"] if name.startswith("SecretsRequest::")]
RESPONSES = [name for name in VECTORS["cbor"] if name.startswith("SecretsResponse::")]
PADDED = "PaddedSecretsResponse of Register1 Ok"


def vector(name: str) -> bytes:
    """Return a CBOR vector's bytes."""
    return bytes.fromhex(VECTORS["cbor"][name]["hex"])


def plain(message: object) -> object:
    """Return a message's fields as the vectors write them: nested dicts with hex bytes."""
    if isinstance(message, bytes):
        return message.hex()
    if isinstance(message, int):
        return message
    fields = {name: plain(getattr(message, name)) for name in type(message).__dataclass_fields__}  # type: ignore[attr-defined]
    if isinstance(message, wire.Register2):
        fields["policy"] = {"num_guesses": fields.pop("num_guesses")}
    return fields


@pytest.mark.parametrize("name", REQUESTS)
def test_request_vectors(name: str) -> None:
    """Each request vector decodes to its values and encodes to its bytes."""
    request = wire.decode_secrets_request(vector(name))
    assert wire.encode_secrets_request(request) == vector(name)
    value = VECTORS["cbor"][name]["value"]
    kind = type(request).__name__
    assert (value == kind) if isinstance(value, str) else (value[kind] == plain(request))


@pytest.mark.parametrize("name", RESPONSES)
def test_response_vectors(name: str) -> None:
    """Each response vector decodes to its values and encodes to its bytes."""
    response = wire.decode_secrets_response(vector(name))
    assert wire.encode_secrets_response(response) == vector(name)
    ((request, answer),) = VECTORS["cbor"][name]["value"].items()
    match response:
        case wire.NotRegistered() | wire.NoGuesses() | wire.VersionMismatch():
            assert (request, answer) == (response.request.value, type(response).__name__)
        case wire.BadUnlockKeyTag():
            assert answer == {"BadUnlockKeyTag": {"guesses_remaining": response.guesses_remaining}}
        case _:
            assert type(response).__name__ == f"{request}Ok"
            assert answer == "Ok" or answer["Ok"] == plain(response)


def test_padding_vector() -> None:
    """The padded vector pads and unpads."""
    inner = vector("SecretsResponse::Register1 Ok")
    assert wire.pad_secrets_response(inner) == vector(PADDED)
    assert wire.unpad_secrets_response(vector(PADDED)) == inner


def test_forward_secrecy() -> None:
    """The requests that carry or earn secrets need an open session."""
    needing = {name for name in REQUESTS if wire.needs_forward_secrecy(wire.decode_secrets_request(vector(name)))}
    assert needing == {"SecretsRequest::Register2", "SecretsRequest::Recover2", "SecretsRequest::Recover3"}


@pytest.mark.parametrize("guesses", [0, 23, 24, 255, 256, 65_535])
def test_guess_counts_and_sizes(guesses: int) -> None:
    """All 16-bit guess limits round-trip at the documented sizes."""
    request = wire.decode_secrets_request(vector("SecretsRequest::Register2"))
    assert isinstance(request, wire.Register2)
    encoded = wire.encode_secrets_request(replace(request, num_guesses=guesses))
    assert len(encoded) == 663 + (guesses > 23) + (guesses > 255)
    decoded = wire.decode_secrets_request(encoded)
    assert isinstance(decoded, wire.Register2)
    assert decoded.num_guesses == guesses


def test_largest_recover2_answer_fits_the_padding() -> None:
    """The answer fits up to 255 used guesses, and one more would not: the reason for the effective limit."""
    answer = wire.decode_secrets_response(vector("SecretsResponse::Recover2 Ok"))
    assert isinstance(answer, wire.Recover2Ok)
    largest = replace(answer, num_guesses=65_535, guess_count=wire.GUESS_COUNT_MAX)
    encoded = wire.encode_secrets_response(largest)
    assert len(encoded) == wire.PADDED_RESPONSE_BYTES
    assert wire.decode_secrets_response(wire.unpad_secrets_response(wire.pad_secrets_response(encoded))) == largest
    too_large = wire.encode_secrets_response(replace(largest, guess_count=256))
    with pytest.raises(InvariantViolation):
        wire.pad_secrets_response(too_large)


def changed(name: str, path: tuple[str, ...], value: object) -> bytes:
    """Return a vector with the member at `path` changed, or removed for `...`."""
    members: dict[str, Any] = cbor2.loads(vector(name))
    inner = members
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return cbor2.dumps(members)


ORDER = SCALAR_ORDER.to_bytes(32, "little")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), b"v" * 15), (("version",), ...), (("oprf_private_key",), ORDER),
        (("oprf_private_key",), b"\xff" * 32), (("oprf_private_key",), b"k" * 31),
        (("encryption_key_scalar_share",), ORDER), (("oprf_signed_public_key",), b"x"),
        (("oprf_signed_public_key", "public_key"), b"p" * 33), (("oprf_signed_public_key", "verifying_key"), ...),
        (("oprf_signed_public_key", "signature"), b"s" * 63), (("unlock_key_commitment",), b""),
        (("unlock_key_tag",), b"t" * 32), (("encrypted_secret",), b"e" * 144), (("encrypted_secret_commitment",), None),
        (("policy",), 5), (("policy", "num_guesses"), 65_536), (("policy", "num_guesses"), -1),
        (("policy", "num_guesses"), True), (("policy",), ...),
    ],
)  # fmt: skip
def test_wrong_register2(path: tuple[str, ...], value: object) -> None:
    """Every field of Register2 has exactly its type, length and range; scalars are canonical."""
    with pytest.raises(DecodingError):
        wire.decode_secrets_request(changed("SecretsRequest::Register2", ("Register2", *path), value))


def test_scalar_bounds() -> None:
    """The order itself is refused, one below it and zero are scalars."""
    for scalar in (bytes(32), (SCALAR_ORDER - 1).to_bytes(32, "little")):
        data = changed("SecretsRequest::Register2", ("Register2", "oprf_private_key"), scalar)
        request = wire.decode_secrets_request(data)
        assert isinstance(request, wire.Register2)
        assert request.oprf_private_key == scalar


@pytest.mark.parametrize(
    "value",
    [
        "Register2", "Recover2", "Ok", "", 5, None, [], {}, {"Register1": None}, {"Recover2": {}}, {"Recover3": "x"},
        {"Recover2": {"version": b"v" * 16, "oprf_blinded_input": b"x" * 31}}, {"Other": {}},
        {"Recover3": {"version": b"v" * 16, "unlock_key_tag": b"x" * 15}}, {"Delete": {}, "Recover1": {}},
    ],
)  # fmt: skip
def test_wrong_requests(value: object) -> None:
    """Unknown variants and wrong shapes are refused."""
    with pytest.raises(DecodingError):
        wire.decode_secrets_request(cbor2.dumps(value))


@pytest.mark.parametrize(
    "value",
    [
        {"Recover1": "VersionMismatch"}, {"Register1": "NotRegistered"}, {"Delete": "NoGuesses"}, {"Recover1": "Ok"},
        {"Recover2": "Ok"}, {"Recover2": {"Ok": {}}}, {"Recover2": {"BadUnlockKeyTag": {"guesses_remaining": 1}}},
        {"Recover3": {"BadUnlockKeyTag": {"guesses_remaining": 65_536}}}, {"Recover3": {"BadUnlockKeyTag": {}}},
        {"Recover1": {"Ok": {"version": b"x"}}}, {"Register1": {"Ok": {}}}, "Ok", {"Other": "Ok"}, {"Recover3": []},
    ],
)  # fmt: skip
def test_wrong_responses(value: object) -> None:
    """Answers that their request cannot have are refused."""
    with pytest.raises(DecodingError):
        wire.decode_secrets_response(cbor2.dumps(value))


@pytest.mark.parametrize("field", ["c", "beta_z"])
def test_proof_scalars_are_canonical(field: str) -> None:
    """Both scalars of a proof are canonical."""
    data = changed("SecretsResponse::Recover2 Ok", ("Recover2", "Ok", "oprf_proof", field), ORDER)
    with pytest.raises(DecodingError):
        wire.decode_secrets_response(data)


@pytest.mark.parametrize(
    ("length", "padded"), [(437, bytes(436)), (-1, bytes(436)), (0, bytes(435)), (0, bytes(437)), ("1", bytes(436))]
)
def test_wrong_padding(length: Any, padded: bytes) -> None:
    """The padding has exactly its size and the length lies inside it."""
    with pytest.raises(DecodingError):
        wire.unpad_secrets_response(cbor2.dumps({"unpadded_length": length, "padded_bytes": padded}))


def test_version_mismatch_belongs_to_later_phases() -> None:
    """Recover1 cannot be answered with a version mismatch."""
    with pytest.raises(InvariantViolation):
        wire.VersionMismatch(Phase.RECOVER1)
