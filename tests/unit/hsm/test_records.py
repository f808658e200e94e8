"""The record's state machine and bytes (hsm.md 13.3)."""

from __future__ import annotations

from dataclasses import replace

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.errors import DecodingError
from juicebox_hsm.hsm.messages import ResultKind, ResultType
from juicebox_hsm.hsm.records import (
    NO_GUESSES,
    NOT_REGISTERED,
    RECORD_BYTES,
    NoGuesses,
    NotRegistered,
    Record,
    Registered,
    decode_record,
    encode_record,
    refuse_invalid,
    run,
)
from juicebox_hsm.wire import requests as secrets
from juicebox_hsm.wire.cbor import SCALAR_ORDER
from juicebox_hsm.wire.requests import Phase
from tests.fakes.hsm import Client, realm_keys

CLIENT = Client(realm_keys().communication_public, bytes(32))
REGISTER = CLIENT.register2(3)
OTHER = bytes(16)


def registered(count: int = 0, num_guesses: int = 3) -> Registered:
    return Registered(replace(REGISTER, num_guesses=num_guesses), count)


def nonce(size: int) -> bytes:
    return b"\x07" * size


def plain(kind: ResultKind) -> ResultType:
    return ResultType(kind)


R1, R2, R3 = ResultKind.RECOVER1, ResultKind.RECOVER2, ResultKind.RECOVER3
recover2 = CLIENT.recover2
recover3 = CLIENT.recover3

TABLE: list[tuple[str, Record, secrets.SecretsRequest, secrets.SecretsResponse, ResultType, Record | None]] = [
    ("r1 none", NOT_REGISTERED, secrets.Register1(), secrets.Register1Ok(), plain(ResultKind.REGISTER1), None),
    ("r1 some", registered(2), secrets.Register1(), secrets.Register1Ok(), plain(ResultKind.REGISTER1), None),
    ("r2 none", NOT_REGISTERED, REGISTER, secrets.Register2Ok(), plain(ResultKind.REGISTER2), registered()),
    ("r2 over", registered(2, 5), REGISTER, secrets.Register2Ok(), plain(ResultKind.REGISTER2), registered()),
    ("r2 locked", NO_GUESSES, REGISTER, secrets.Register2Ok(), plain(ResultKind.REGISTER2), registered()),
    ("1 none", NOT_REGISTERED, secrets.Recover1(), secrets.NotRegistered(Phase.RECOVER1), plain(R1), None),
    ("1 locked", NO_GUESSES, secrets.Recover1(), secrets.NoGuesses(Phase.RECOVER1), plain(R1), NO_GUESSES),
    ("1 spent", registered(3), secrets.Recover1(), secrets.NoGuesses(Phase.RECOVER1), plain(R1), NO_GUESSES),
    ("1 zero", registered(0, 0), secrets.Recover1(), secrets.NoGuesses(Phase.RECOVER1), plain(R1), NO_GUESSES),
    ("1 ok", registered(2), secrets.Recover1(), secrets.Recover1Ok(REGISTER.version), plain(R1), registered(2)),
    ("1 255", registered(255, 999), secrets.Recover1(), secrets.NoGuesses(Phase.RECOVER1), plain(R1), NO_GUESSES),
    ("2 none", NOT_REGISTERED, recover2(), secrets.NotRegistered(Phase.RECOVER2), plain(R2), None),
    ("2 locked", NO_GUESSES, recover2(), secrets.NoGuesses(Phase.RECOVER2), plain(R2), NO_GUESSES),
    ("2 version", registered(1), recover2(OTHER), secrets.VersionMismatch(Phase.RECOVER2), plain(R2), registered(1)),
    ("2 v+spent", registered(3), recover2(OTHER), secrets.VersionMismatch(Phase.RECOVER2), plain(R2), registered(3)),
    ("2 spent", registered(3), recover2(), secrets.NoGuesses(Phase.RECOVER2), plain(R2), NO_GUESSES),
    ("2 255", registered(255, 300), recover2(), secrets.NoGuesses(Phase.RECOVER2), plain(R2), NO_GUESSES),
    ("3 none", NOT_REGISTERED, recover3(), secrets.NotRegistered(Phase.RECOVER3), plain(R3), None),
    ("3 locked", NO_GUESSES, recover3(), secrets.NoGuesses(Phase.RECOVER3), plain(R3), NO_GUESSES),
    (
        "3 version",
        registered(1),
        recover3(OTHER, OTHER),
        secrets.VersionMismatch(Phase.RECOVER3),
        plain(R3),
        registered(1),
    ),
    ("3 wrong", registered(1), recover3(OTHER), secrets.BadUnlockKeyTag(2), plain(R3), registered(1)),
    ("3 wrong last", registered(3), recover3(OTHER), secrets.BadUnlockKeyTag(0), plain(R3), NO_GUESSES),
    ("3 wrong over", registered(5), recover3(OTHER), secrets.BadUnlockKeyTag(0), plain(R3), NO_GUESSES),
    ("3 wrong 255", registered(254, 999), recover3(OTHER), secrets.BadUnlockKeyTag(1), plain(R3), registered(254, 999)),
    (
        "3 ok at limit",
        registered(3),
        recover3(),
        secrets.Recover3Ok(REGISTER.encryption_key_scalar_share, REGISTER.encrypted_secret, b"\x06" * 16),
        ResultType(R3, recovered=True),
        registered(0),
    ),
    ("d none", NOT_REGISTERED, secrets.Delete(), secrets.DeleteOk(), plain(ResultKind.DELETE), None),
    ("d some", registered(1), secrets.Delete(), secrets.DeleteOk(), plain(ResultKind.DELETE), NOT_REGISTERED),
    ("d locked", NO_GUESSES, secrets.Delete(), secrets.DeleteOk(), plain(ResultKind.DELETE), NOT_REGISTERED),
]


@pytest.mark.parametrize(("name", "record", "request_", "reply", "result", "written"), TABLE, ids=[t[0] for t in TABLE])
def test_state_table(
    name: str,
    record: Record,
    request_: secrets.SecretsRequest,
    reply: secrets.SecretsResponse,
    result: ResultType,
    written: Record | None,
) -> None:
    """Every row of the record's state table: answer, telemetry, new state, and whether a leaf is written."""
    effect = run(record, request_, nonce)
    assert (effect.reply, effect.result, effect.written) == (reply, result, written)


@pytest.mark.parametrize(("count", "num_guesses"), [(0, 1), (2, 3), (254, 65535)])
def test_i1_recover2_spends_before_it_evaluates(count: int, num_guesses: int) -> None:
    """A granted evaluation comes with the raised count in the record, the reply and the telemetry."""
    effect = run(registered(count, num_guesses), recover2(), nonce)
    assert isinstance(effect.reply, secrets.Recover2Ok)
    assert effect.reply.guess_count == count + 1
    assert effect.reply.num_guesses == num_guesses
    assert effect.written == registered(count + 1, num_guesses)
    assert effect.result == ResultType(R2, num_guesses, count + 1)
    assert len(secrets.encode_secrets_response(effect.reply)) <= secrets.PADDED_RESPONSE_BYTES


@given(st.integers(0, 400), st.lists(st.sampled_from(["wrong", "right", "v2", "v3", "r1"]), max_size=40))
def test_i1_guesses_never_exceed_the_limit(num_guesses: int, steps: list[str]) -> None:
    """Whatever the order of requests, evaluations since the last success never exceed min(num_guesses, 255)."""
    record: Record = registered(0, num_guesses)
    spent = 0
    for step in steps:
        requests: dict[str, secrets.SecretsRequest] = {
            "wrong": recover3(OTHER),
            "right": recover3(),
            "v2": CLIENT.recover2(),
            "v3": recover3(OTHER, OTHER),
            "r1": secrets.Recover1(),
        }
        effect = run(record, requests[step], nonce)
        record = record if effect.written is None else effect.written
        if isinstance(effect.reply, secrets.Recover2Ok):
            spent += 1
        if isinstance(effect.reply, secrets.Recover3Ok):
            spent = 0
        assert spent <= min(num_guesses, 255)
        if isinstance(record, NoGuesses | NotRegistered):
            assert not isinstance(effect.reply, secrets.Recover2Ok | secrets.Recover3Ok)


def test_invalid_operands_are_decoding_errors() -> None:
    """The identity, non-canonical points and a zero key never reach an evaluation."""
    for point in (bytes(32), b"\xff" * 32, b"\1" + bytes(31)):
        with pytest.raises(DecodingError):
            refuse_invalid(secrets.Recover2(OTHER, point))
    with pytest.raises(DecodingError):
        refuse_invalid(replace(REGISTER, oprf_private_key=bytes(32)))
    refuse_invalid(REGISTER)
    refuse_invalid(recover2())


def test_i13_written_leaves_have_one_size() -> None:
    """Registered with any counters and NoGuesses encode to the same 750 bytes; the longest encoding is 723."""
    sizes = {len(encode_record(record)) for record in (NO_GUESSES, registered(), registered(65535, 65535))}
    assert sizes == {RECORD_BYTES}
    longest = encode_record(registered(65535, 65535))
    assert int.from_bytes(longest[-4:], "big") == 723
    assert len(encode_record(NOT_REGISTERED)) < 50


scalars = st.integers(1, SCALAR_ORDER - 1).map(lambda value: value.to_bytes(32, "little"))


def of(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


registrations = st.builds(
    secrets.Register2,
    of(16),
    scalars,
    st.builds(secrets.SignedPublicKey, of(32), of(32), of(64)),
    of(32),
    of(16),
    scalars,
    of(145),
    of(16),
    st.integers(0, 65535),
)


@given(st.builds(Registered, registrations, st.integers(0, 65535)))
def test_records_round_trip(record: Registered) -> None:
    """Every registration survives encoding, whatever its padding holds, and is a declared CBOR map."""
    encoded = encode_record(record)
    assert decode_record(encoded) == record
    size = int.from_bytes(encoded[-4:], "big")
    assert decode_record(encoded[:size] + b"\xaa" * (746 - size) + encoded[-4:]) == record
    kept, signed = record.registration, record.registration.oprf_signed_public_key
    document = {
        "registration_state": {
            "Registered": {
                "version": kept.version,
                "oprf_private_key": kept.oprf_private_key,
                "oprf_signed_public_key": {
                    "public_key": signed.public_key,
                    "verifying_key": signed.verifying_key,
                    "signature": signed.signature,
                },
                "unlock_key_commitment": kept.unlock_key_commitment,
                "unlock_key_tag": kept.unlock_key_tag,
                "user_secret_encryption_key_scalar_share": kept.encryption_key_scalar_share,
                "encrypted_user_secret": kept.encrypted_secret,
                "encrypted_user_secret_commitment": kept.encrypted_secret_commitment,
                "guess_count": record.guess_count,
                "policy": {"num_guesses": kept.num_guesses},
            }
        }
    }
    assert encoded[:size] == cbor2.dumps(document)


def trailer(encoded: bytes, size: int) -> bytes:
    return encoded + size.to_bytes(4, "big")


def test_m13_bad_records_are_refused() -> None:
    """Wrong lengths, trailers, states, fields and types are decoding errors."""
    good = encode_record(registered())
    body = good[:-4]
    size = int.from_bytes(good[-4:], "big")
    for name in (b"NotRegistered", b"NoGuesses"):
        text = b"\xa1\x72registration_state" + bytes([0x60 + len(name)]) + name
        assert isinstance(decode_record(trailer(text, len(text))), NotRegistered | NoGuesses)
    bad = [
        b"",
        b"\0\0\0",
        bytes(4),
        good + b"\0",
        trailer(body, 747),
        trailer(body, 2**32 - 1),
        trailer(body, size - 1),
        trailer(body, size + 1),
        trailer(body.ljust(747, b"\0"), size),
        trailer(b"\xa1\x72registration_state" + b"\x65Other", 25),
        trailer(body[:size].replace(b"num_guesses\x03", b"num_guesses\x20"), size),
        trailer(body[:size].replace(b"num_guesses", b"num_guessex"), size),
        trailer(body[:size].replace(b"public_key", b"public_kex"), size),
        trailer(body[:size].replace(b"policy\xa1knum_guesses\x03", b"policy\xa0"), size - 13),
        trailer(body[:size].replace(b"gversionP", b"gversionO"), size),
        trailer(body[:size].replace(REGISTER.oprf_private_key, b"\xff" * 32), size),
    ]
    for data in bad:
        with pytest.raises(DecodingError):
            decode_record(data)


@given(st.binary(max_size=760))
def test_m13_garbage_records_are_decoding_errors(data: bytes) -> None:
    """Bytes that are no record raise DecodingError and nothing else."""
    with pytest.raises(DecodingError):
        decode_record(data)
