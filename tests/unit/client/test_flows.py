"""Operations over several realms: thresholds, error order, guesses, previous configurations (client-protocol.md 17)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from juicebox_hsm.client import (
    AssertionFailed,
    Client,
    ClientError,
    Configuration,
    HttpTransport,
    InvalidAuth,
    InvalidPin,
    NotRegistered,
    PinHashingMode,
    RateLimitExceeded,
    Replaced,
    Transient,
    TransportError,
    UpgradeRequired,
    recovery,
)
from juicebox_hsm.crypto import derive
from juicebox_hsm.crypto.pin import StretchedPin
from juicebox_hsm.errors import LocalError
from juicebox_hsm.ids import RealmId
from juicebox_hsm.wire import client as wire
from juicebox_hsm.wire import requests as secrets
from juicebox_hsm.wire.client import ClientOutcome
from tests.fakes.random import SeededRandom
from tests.fakes.realm import FakeRealm, FakeTransport, Registered, configure, make_realms

PIN, WRONG, SECRET, INFO = b"1234", b"4321", b"a secret", b"info"


class World:
    """Fake realms, a transport to them and a client."""

    def __init__(
        self, count: int = 3, *, register: int | None = None, recover: int | None = None, **kinds: Any
    ) -> None:
        self.random = SeededRandom(b"world")
        self.realms = make_realms(count, self.random, **kinds)
        self.transport = FakeTransport(self.realms)
        self.configuration = configure(self.realms, register, recover)
        self.client = self.new_client()

    def new_client(self, **options: Any) -> Client:
        """Return a client without sessions."""
        configuration = options.pop("configuration", self.configuration)
        auth = options.pop("auth", lambda realm: "mario")
        return Client(configuration, auth, transport=self.transport, random=self.random, **options)

    async def register(self, num_guesses: int = 3) -> None:
        """Register with the usual arguments."""
        await self.client.register(PIN, SECRET, INFO, num_guesses)

    def fail(self, outcomes: dict[int, ClientOutcome | tuple[int, bytes] | str]) -> None:
        """Let realms (by number from 0) answer everything with an outcome."""

        def fault(realm: FakeRealm, number: int) -> Any:
            verdict = outcomes.get(self.realms.index(realm))
            if isinstance(verdict, ClientOutcome):
                return wire.HTTP_STATUS[verdict], wire.encode_client_response(verdict)
            return verdict

        self.transport.fault = fault

    def guess_counts(self) -> list[int | str]:
        """Return each realm's guess count for the user."""
        return [
            record.guess_count if isinstance(record := realm.records.get("mario"), Registered) else "none"
            for realm in self.realms
        ]


@pytest.mark.parametrize(("count", "software"), [(1, 0), (3, 0), (5, 0), (3, 1), (3, 3), (1, 1)])
async def test_register_recover_delete(count: int, software: int, autojump_clock: MockClock) -> None:
    """The round trip works with hardware realms, software realms and mixtures."""
    world = World(count, software=software)
    await world.register()
    assert await world.client.recover(PIN, INFO) == SECRET
    assert await world.new_client().recover(PIN, INFO) == SECRET
    assert world.guess_counts() == [0] * count
    await world.client.delete()
    with pytest.raises(NotRegistered):
        await world.client.recover(PIN, INFO)


@pytest.mark.parametrize("secret", [b"", b"\0", b"s" * 128])
async def test_secret_sizes(secret: bytes, autojump_clock: MockClock) -> None:
    """Secrets of 0 to 128 bytes come back exactly, zeros included."""
    world = World()
    await world.client.register(b"", secret, b"", 1)
    assert await world.client.recover(b"", b"") == secret


@pytest.mark.parametrize(
    "arguments", [(PIN, b"s" * 129, INFO, 1), (PIN, SECRET, INFO, 65_536), (PIN, SECRET, INFO, -1)]
)
async def test_arguments_out_of_range(arguments: tuple[bytes, bytes, bytes, int], autojump_clock: MockClock) -> None:
    """Impossible arguments are refused before anything is sent."""
    world = World()
    with pytest.raises(LocalError):
        await world.client.register(*arguments)
    assert world.transport.posts == []


async def test_standard_pin_hashing_runs_in_a_thread(autojump_clock: MockClock) -> None:
    """The slow mode gives the same flow; other tasks go on meanwhile."""
    world = World(1)
    configuration = replace(world.configuration, pin_hashing_mode=PinHashingMode.STANDARD_2019)
    client = world.new_client(configuration=configuration)
    await client.register(PIN, SECRET, INFO, 2)
    with pytest.raises(InvalidPin):
        await client.recover(PIN, b"other info")


async def test_guesses_run_out_and_come_back(autojump_clock: MockClock) -> None:
    """Wrong PINs count down without a third request, a right one resets, and after the last the secret is gone."""
    world = World()
    await world.register(num_guesses=2)
    for expected in (1, 0):
        with pytest.raises(InvalidPin) as wrong:
            await world.client.recover(WRONG, INFO)
        assert wrong.value.guesses_remaining == expected
        if expected == 1:
            assert not any(isinstance(request, secrets.Recover3) for request in world.realms[0].requests)
            assert await world.client.recover(PIN, INFO) == SECRET
            assert world.guess_counts() == [0, 0, 0]
            with pytest.raises(InvalidPin):
                await world.client.recover(WRONG, INFO)
    with pytest.raises(InvalidPin) as locked:
        await world.client.recover(PIN, INFO)
    assert locked.value.guesses_remaining == 0
    await world.register()
    assert await world.client.recover(PIN, INFO) == SECRET


async def test_last_guess_may_be_right(autojump_clock: MockClock) -> None:
    """The guess that uses up the limit still recovers."""
    world = World()
    await world.register(num_guesses=1)
    assert await world.client.recover(PIN, INFO) == SECRET
    assert await world.client.recover(PIN, INFO) == SECRET


@pytest.mark.parametrize(
    ("failing", "error"),
    [
        ({}, None),
        ({2: ClientOutcome.INVALID_AUTH}, None),
        ({0: ClientOutcome.UNAVAILABLE}, None),
        ({0: ClientOutcome.UNAVAILABLE, 1: ClientOutcome.UNAVAILABLE}, Transient),
        ({0: ClientOutcome.INVALID_AUTH, 1: ClientOutcome.INVALID_AUTH}, InvalidAuth),
        ({0: ClientOutcome.RATE_LIMIT_EXCEEDED, 1: ClientOutcome.SESSION_ERROR}, RateLimitExceeded),
        ({0: ClientOutcome.DECODING_ERROR, 1: ClientOutcome.PAYLOAD_TOO_LARGE}, AssertionFailed),
        ({0: (426, b"upgrade"), 1: ClientOutcome.RATE_LIMIT_EXCEEDED}, UpgradeRequired),
        ({0: (401, b"<html>"), 1: (426, b"")}, InvalidAuth),
        ({0: (429, b""), 1: (500, b"")}, RateLimitExceeded),
        ({0: (502, b"bad gateway"), 1: "drop"}, Transient),
        ({0: (200, b"a proxy's page"), 1: (204, b"")}, AssertionFailed),
        ({0: "lose", 1: "lose"}, Transient),
    ],
)
async def test_thresholds_and_error_order(
    failing: dict[int, Any], error: type[ClientError] | None, autojump_clock: MockClock
) -> None:
    """A minority may fail; otherwise the most telling error so far is reported, for every way an answer can fail."""
    world = World(3, register=2)
    await world.register()
    world.fail(failing)
    recovering = world.new_client()
    if error is None:
        assert await recovering.recover(PIN, INFO) == SECRET
        await world.new_client().register(PIN, SECRET, INFO, 3)
    else:
        with pytest.raises(error):
            await recovering.recover(PIN, INFO)
        with pytest.raises(error):
            await world.new_client().register(PIN, SECRET, INFO, 3)


async def test_fails_without_waiting_for_hanging_realms(autojump_clock: MockClock) -> None:
    """Once success is impossible the operation ends, although a realm never answers."""
    world = World(3, register=2)
    world.fail({0: ClientOutcome.INVALID_AUTH, 1: ClientOutcome.INVALID_AUTH, 2: "hang"})
    with trio.fail_after(1), pytest.raises(InvalidAuth):
        await world.register()


async def test_waits_for_every_answer_on_success(autojump_clock: MockClock) -> None:
    """With enough successes the slow realms are still waited for, so that all of them are registered."""
    world = World(3, register=2)
    await world.register()
    assert world.guess_counts() == [0, 0, 0]


async def test_register_drops_realms_that_failed(autojump_clock: MockClock) -> None:
    """A realm that is down during registration is not needed, and shares keep their numbers."""
    world = World(3, register=2)
    world.fail({0: ClientOutcome.UNAVAILABLE})
    await world.register()
    world.fail({})
    assert await world.new_client().recover(PIN, INFO) == SECRET
    world.fail({1: ClientOutcome.UNAVAILABLE})
    with pytest.raises(NotRegistered):
        await world.new_client().recover(PIN, INFO)


async def test_minority_version_is_ignored(autojump_clock: MockClock) -> None:
    """Realms that hold another registration than the majority do not disturb."""
    world = World(3, register=2)
    await world.register()
    world.fail({0: ClientOutcome.UNAVAILABLE})
    await world.new_client().register(b"new pin", b"new secret", INFO, 3)
    world.fail({})
    assert await world.new_client().recover(b"new pin", INFO) == b"new secret"
    assert world.guess_counts() == [0, 0, 0]


async def test_no_common_version_is_not_registered(autojump_clock: MockClock) -> None:
    """Without a majority for one version there is no registration."""
    world = World(3)
    await world.register()
    for index, realm in enumerate(world.realms):
        record = realm.records["mario"]
        assert isinstance(record, Registered)
        record.request = replace(record.request, version=bytes((index,)) * 16)
    with pytest.raises(NotRegistered):
        await world.client.recover(PIN, INFO)


async def test_previous_configurations(autojump_clock: MockClock) -> None:
    """Secrets registered under an earlier configuration are found, also on realms the current one does not have."""
    random = SeededRandom(b"previous")
    old, new = make_realms(5, random)[:2], make_realms(5, random)[2:]
    transport = FakeTransport(old + new)
    auth = {realm.realm_id: "mario" for realm in old + new}
    await Client(configure(old), auth, transport=transport, random=random).register(PIN, SECRET, INFO, 3)
    current = configure(new)
    with pytest.raises(NotRegistered):
        await Client(current, auth, transport=transport, random=random).recover(PIN, INFO)
    client = Client(
        current, auth, transport=transport, random=random, previous_configurations=[configure(new[:1]), configure(old)]
    )
    assert await client.recover(PIN, INFO) == SECRET
    with pytest.raises(InvalidPin):
        await client.recover(WRONG, INFO)


async def test_delete_needs_every_realm(autojump_clock: MockClock) -> None:
    """Delete asks all realms whatever fails, and reports the first failure in id order."""
    world = World(3)
    await world.register()
    world.fail({1: ClientOutcome.RATE_LIMIT_EXCEEDED, 2: ClientOutcome.INVALID_AUTH})
    with pytest.raises(RateLimitExceeded):
        await world.client.delete()
    assert world.guess_counts() == ["none", 0, 0]
    world.fail({})
    await world.client.delete()
    assert world.guess_counts() == ["none", "none", "none"]


def spoil_recover2(change: Callable[[secrets.Recover2Ok], secrets.Recover2Ok]) -> Any:
    """Change a realm's Recover2 answers."""
    return lambda answer: change(answer) if isinstance(answer, secrets.Recover2Ok) else answer


def spoil_recover3(**changes: bytes) -> Any:
    """Change fields of a realm's Recover3 answers."""
    return lambda answer: replace(answer, **changes) if isinstance(answer, secrets.Recover3Ok) else answer


def own_key(realm_id: RealmId) -> Callable[[secrets.Recover2Ok], secrets.Recover2Ok]:
    """Let a realm sign its key with a signing key of its own making."""
    signer = derive.RegistrationSigner(realm_id * 2)

    def change(answer: secrets.Recover2Ok) -> secrets.Recover2Ok:
        public = answer.oprf_signed_public_key.public_key
        signed = secrets.SignedPublicKey(public, signer.verifying_key, signer.sign(realm_id, public))
        return replace(answer, oprf_signed_public_key=signed)

    return change


SPOILED: dict[str, Callable[[FakeRealm], Any]] = {
    "signature": lambda realm: spoil_recover2(
        lambda answer: replace(
            answer, oprf_signed_public_key=replace(answer.oprf_signed_public_key, signature=b"s" * 64)
        )
    ),
    "proof": lambda realm: spoil_recover2(
        lambda answer: replace(answer, oprf_proof=secrets.OprfProof(answer.oprf_proof.beta_z, answer.oprf_proof.c))
    ),
    "result": lambda realm: spoil_recover2(
        lambda answer: replace(answer, oprf_blinded_result=answer.oprf_signed_public_key.public_key)
    ),
    "identity": lambda realm: spoil_recover2(lambda answer: replace(answer, oprf_blinded_result=bytes(32))),
    "own key": lambda realm: spoil_recover2(own_key(realm.realm_id)),
    "commitment": lambda realm: spoil_recover2(
        lambda answer: replace(answer, unlock_key_commitment=realm.realm_id * 2)
    ),
    "share": lambda realm: spoil_recover3(encryption_key_scalar_share=b"\1" + bytes(31)),
    "ciphertext": lambda realm: spoil_recover3(encrypted_secret=b"x" * 145),
    "other answer": lambda realm: lambda answer: secrets.DeleteOk(),
    "other phase": lambda realm: lambda answer: secrets.NotRegistered(secrets.Phase.RECOVER3),
    "mismatch": lambda realm: (
        lambda answer: (
            secrets.VersionMismatch(secrets.Phase.RECOVER2) if isinstance(answer, secrets.Recover2Ok) else answer
        )
    ),
}


@pytest.mark.parametrize("name", SPOILED)
async def test_misbehaving_realms(name: str, autojump_clock: MockClock) -> None:
    """One misbehaving realm of three is outvoted; two make the recovery fail, never with a wrong secret."""
    world = World(3)
    await world.register()
    world.realms[0].spoil = SPOILED[name](world.realms[0])
    assert await world.client.recover(PIN, INFO) == SECRET
    world.realms[1].spoil = SPOILED[name](world.realms[1])
    with pytest.raises(AssertionFailed):
        await world.client.recover(PIN, INFO)


async def test_a_replaced_registration_is_told_apart(autojump_clock: MockClock) -> None:
    """A registration that is replaced in the middle of a recovery is an error of its own: nobody misbehaved."""
    world = World(1)
    await world.register()
    world.realms[0].spoil = SPOILED["mismatch"](world.realms[0])
    with pytest.raises(Replaced):
        await world.client.recover(PIN, INFO)
    world.realms[0].spoil = SPOILED["other answer"](world.realms[0])
    with pytest.raises(AssertionFailed) as failed:
        await world.client.recover(PIN, INFO)
    assert not isinstance(failed.value, Replaced)


async def test_fewest_guesses_are_reported(autojump_clock: MockClock) -> None:
    """Realms may have counted differently; the smallest remainder is the honest one to report."""
    world = World(3)
    await world.register(num_guesses=5)
    record = world.realms[1].records["mario"]
    assert isinstance(record, Registered)
    record.guess_count = 2
    with pytest.raises(InvalidPin) as wrong:
        await world.client.recover(WRONG, INFO)
    assert wrong.value.guesses_remaining == 2


async def test_bad_tag_from_realms(autojump_clock: MockClock) -> None:
    """Realms that call the right tag wrong make it an InvalidPin with what they say remains."""
    world = World(3)
    await world.register(num_guesses=5)
    for realm in world.realms[:2]:
        realm.spoil = lambda answer: secrets.BadUnlockKeyTag(4) if isinstance(answer, secrets.Recover3Ok) else answer
    with pytest.raises(InvalidPin) as wrong:
        await world.client.recover(PIN, INFO)
    assert wrong.value.guesses_remaining == 4


@pytest.mark.parametrize(
    "auth",
    [{}, {"ff" * 16: "mario"}, lambda realm: None, {bytes((1,)) * 16: "\u00fc"}],
    ids=["none", "other", "call", "text"],
)
async def test_no_token(auth: Any, autojump_clock: MockClock) -> None:
    """Without a usable token the operation is InvalidAuth and nothing is sent."""
    world = World(1)
    with pytest.raises(InvalidAuth):
        await world.new_client(auth=auth).register(PIN, SECRET, INFO, 1)
    assert world.transport.posts == []


async def test_auth_sources(autojump_clock: MockClock) -> None:
    """Tokens may come from a mapping by hex or bytes id, a function or an async function, asked for each request."""
    world = World(1)
    asked = []

    async def ask(realm: RealmId) -> str:
        asked.append(realm)
        await trio.lowlevel.checkpoint()
        return "mario"

    realm_id = world.realms[0].realm_id
    dashed = "01010101-0101-0101-0101-010101010101"
    for auth in (ask, lambda realm: "mario", {realm_id: "mario"}, {realm_id.hex(): "mario"}, {dashed: "mario"}):
        await world.new_client(auth=auth).register(PIN, SECRET, INFO, 1)
    assert asked == [realm_id] * 2


async def test_exceptions_of_token_functions_pass_unwrapped(autojump_clock: MockClock) -> None:
    """A token function's own failure reaches the caller as it is, with one realm or many."""

    def broken(realm: RealmId) -> str:
        raise ZeroDivisionError

    for count in (1, 3):
        world = World(count)
        with pytest.raises(ZeroDivisionError):
            await world.new_client(auth=broken).register(PIN, SECRET, INFO, 1)


def test_numbers_of_the_official_bindings() -> None:
    """Errors carry the numbers that the official bindings report."""
    order: list[type[ClientError]] = [
        InvalidPin,
        NotRegistered,
        InvalidAuth,
        UpgradeRequired,
        RateLimitExceeded,
        AssertionFailed,
        Transient,
    ]
    assert [error.recover_number for error in order] == list(range(7))
    assert [error.operation_number for error in order] == [None, None, 0, 1, 2, 3, 4]
    assert InvalidPin(1).rank() < InvalidPin(2).rank() < NotRegistered().rank() < Transient().rank()


async def test_a_client_may_be_shared_by_tasks(autojump_clock: MockClock) -> None:
    """Concurrent operations of one client serialize per realm and all succeed."""
    world = World(3)
    await world.register(num_guesses=50)
    results: list[bytes] = []

    async def recover() -> None:
        results.append(await world.client.recover(PIN, INFO))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(recover)
    assert results == [SECRET] * 4


def test_configuration_is_reexported() -> None:
    """The package's front door has what a ten-line script needs."""
    assert Configuration.from_json(configure(make_realms(3, SeededRandom(b"x"))).to_json()).recover_threshold == 2


async def test_own_and_borrowed_transports() -> None:
    """A client closes the transport it made and leaves alone the one it was given."""
    world = World(1)
    async with Client(world.configuration, {}) as client:
        transport = client._own_transport
        assert transport is not None
    with pytest.raises(TransportError, match="closed"):
        await transport.post("https://realm.test/req", (), b"", 1.0)
    async with HttpTransport() as shared:
        async with Client(world.configuration, {}, transport=shared):
            pass
        assert not shared._closed


def test_a_secret_that_does_not_open() -> None:
    """Realms that agree on a ciphertext of another key cannot make the client return anything."""
    world = World(3)
    stretched = StretchedPin(b"a" * 32, b"s" * 32)
    unlock_key, share, encrypted = b"u" * 32, b"\1" + bytes(31), b"e" * 145
    answers = {
        realm.realm: secrets.Recover3Ok(
            share,
            encrypted,
            derive.encrypted_secret_commitment(unlock_key, realm.realm_id, share, encrypted),
        )
        for realm in world.realms
    }
    with pytest.raises(AssertionFailed):
        recovery.open_secret(world.configuration, stretched, unlock_key, answers)
