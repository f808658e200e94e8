"""One request to one realm: sessions, attempts, pauses and the table of errors (client-protocol.md 17)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from juicebox_hsm.client import AssertionFailed, InvalidAuth, InvalidPin, Transient
from juicebox_hsm.client.errors import ClientError
from juicebox_hsm.client.exchange import Exchange
from juicebox_hsm.wire import client as wire
from juicebox_hsm.wire import requests as secrets
from juicebox_hsm.wire.client import ClientOutcome
from tests.fakes.random import SeededRandom
from tests.fakes.realm import FakeRealm, FakeTransport, make_realms
from tests.unit.client.test_flows import INFO, PIN, SECRET, WRONG, World


def answer(outcome: ClientOutcome) -> tuple[int, bytes]:
    """Return an outcome as an HTTP answer."""
    return wire.HTTP_STATUS[outcome], wire.encode_client_response(outcome)


async def test_one_handshake_serves_many_requests(autojump_clock: MockClock) -> None:
    """A first request travels in the handshake; everything after it in the session."""
    world = World(1)
    await world.register()
    await world.client.recover(PIN, INFO)
    await world.client.delete()
    kinds = ["Handshake Register1", "Register2", "Recover1", "Recover2", "Recover3", "Delete"]
    assert world.realms[0].kinds == kinds


async def test_idle_sessions_are_not_reused(autojump_clock: MockClock) -> None:
    """A session idle for its lifetime is replaced, one a moment younger is used."""
    world = World(1)
    await world.register()
    await trio.sleep(4.5)
    await world.client.delete()
    await trio.sleep(5)
    await world.client.delete()
    assert world.realms[0].kinds == ["Handshake Register1", "Register2", "Delete", "Handshake Delete"]


async def test_zero_lifetime(autojump_clock: MockClock) -> None:
    """With lifetime zero every request that needs a session opens one first."""
    world = World(1)
    world.realms[0].session_lifetime_ns = 0
    await world.register()
    assert await world.client.recover(PIN, INFO) == SECRET
    handshake = "HandshakeOnly"
    expected = ["Handshake Register1", handshake, "Register2", "Handshake Recover1", handshake, "Recover2"]
    assert world.realms[0].kinds == [*expected, handshake, "Recover3"]


async def test_missing_session_is_replaced_at_once(autojump_clock: MockClock) -> None:
    """A realm that forgot a cached session gets a new one without a pause, also for requests that need one."""
    world = World(1)
    await world.register()
    started = trio.current_time()
    for realm in world.realms:
        realm.sessions.clear()
    assert await world.client.recover(PIN, INFO) == SECRET
    assert trio.current_time() == started
    world.realms[0].kinds.clear()

    def forget_before_recover2(realm: FakeRealm, number: int) -> Any:
        if realm.kinds == ["Recover1"]:
            realm.sessions.clear()

    world.transport.fault = forget_before_recover2
    assert await world.client.recover(PIN, INFO) == SECRET
    assert world.realms[0].kinds == ["Recover1", "HandshakeOnly", "Recover2", "Recover3"]


async def test_missing_session_after_own_handshake(autojump_clock: MockClock) -> None:
    """A session that vanishes right after it was opened for this request is the realm's fault, not retried."""
    world = World(1)
    await world.register()

    def forget(realm: FakeRealm, number: int) -> Any:
        realm.sessions.clear()

    world.transport.fault = forget
    world.realms[0].session_lifetime_ns = 0
    client = world.new_client()
    posts = len(world.transport.posts)
    with pytest.raises(AssertionFailed):
        await client.recover(PIN, INFO)
    assert len(world.transport.posts) - posts == 3


async def test_missing_session_for_a_handshake(autojump_clock: MockClock) -> None:
    """MissingSession makes no sense as answer to a handshake."""
    world = World(1)
    world.fail({0: ClientOutcome.MISSING_SESSION})
    with pytest.raises(AssertionFailed):
        await world.client.delete()


async def test_five_attempts_with_growing_pauses(autojump_clock: MockClock) -> None:
    """Transient failures are retried four times after 5, 10, 15 and 20 ms."""
    world = World(1)
    times: list[float] = []

    def fault(realm: FakeRealm, number: int) -> str:
        times.append(trio.current_time())
        return "drop"

    world.transport.fault = fault
    with pytest.raises(Transient):
        await world.client.delete()
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses == pytest.approx([0.005, 0.010, 0.015, 0.020])


async def test_software_realm_attempts(autojump_clock: MockClock) -> None:
    """Software realms get two attempts, 5 ms apart, and answers in the clear."""
    world = World(1, software=1)
    world.fail({0: (503, b"")})
    with pytest.raises(Transient):
        await world.client.delete()
    assert len(world.transport.posts) == 2


@pytest.mark.parametrize("fails", [1, 2, 3, 4])
async def test_recovers_from_transient_failures(fails: int, autojump_clock: MockClock) -> None:
    """Up to four failing attempts in a row, of any transient kind, are bridged."""
    kinds: list[Any] = ["drop", answer(ClientOutcome.UNAVAILABLE), (500, b"oops"), (503, b"")]
    world = World(1)
    world.transport.fault = lambda realm, number: kinds[number - 1] if number <= fails else None
    await world.register()
    assert await world.client.recover(PIN, INFO) == SECRET


async def test_lost_recover2_answer_spends_a_second_guess(autojump_clock: MockClock) -> None:
    """A lost answer may cost a second guess, never fewer guesses than attempts; the message itself is never resent."""
    world = World(1)
    await world.register(num_guesses=3)
    lost: list[int] = []

    def lose_once(realm: FakeRealm, number: int) -> Any:
        if realm.kinds[-1:] == ["Recover1"] and not lost:
            lost.append(number)
            return "lose"
        return None

    world.transport.fault = lose_once
    with pytest.raises(InvalidPin) as wrong:
        await world.client.recover(WRONG, INFO)
    assert lost
    assert wrong.value.guesses_remaining == 1
    bodies = [body for _, body in world.transport.posts]
    assert len(set(bodies)) == len(bodies)


@pytest.mark.parametrize("change", ["key", "ciphertext", "variant", "payload", "padding"])
async def test_broken_noise(change: str, autojump_clock: MockClock) -> None:
    """Answers that do not fit the handshake are assertions."""
    world = World(1)
    honest = world.realms[0].post

    def broken(headers: Any, body: bytes) -> tuple[int, bytes]:
        status, encoded = honest(headers, body)
        response = wire.decode_client_response(encoded)
        assert isinstance(response, wire.HandshakeResponse)
        key, ciphertext = response.server_ephemeral_public, response.payload_ciphertext
        changed: wire.ClientResponse = wire.TransportResponse(ciphertext)
        if change == "key":
            changed = wire.HandshakeResponse(bytes(32), ciphertext, 0)
        elif change == "ciphertext":
            changed = wire.HandshakeResponse(key, ciphertext[:-1] + b"?", 0)
        return status, wire.encode_client_response(changed)

    if change == "payload":
        world.realms[0]._answer = lambda user, inner: b"\x00"  # type: ignore[method-assign]
    elif change == "padding":
        world.realms[0]._answer = lambda user, inner: secrets.pad_secrets_response(b"\xff")  # type: ignore[method-assign]
    else:
        world.realms[0].post = broken  # type: ignore[method-assign]
    with pytest.raises(AssertionFailed):
        await world.client.delete()


async def test_handshake_only_answers_carry_nothing(autojump_clock: MockClock) -> None:
    """A payload in the answer to HandshakeOnly is refused; a handshake inside a session too."""
    realm = make_realms(1, SeededRandom(b"x"))[0]
    transport = FakeTransport([realm])
    exchange = Exchange(lambda _: "mario", transport, SeededRandom(b"y"))
    realm._handshake = _answer_with_payload(realm)  # type: ignore[method-assign]
    request = secrets.Recover3(b"v" * 16, b"t" * 16)
    with pytest.raises(AssertionFailed, match="payload"):
        await exchange.request(realm.realm, request)


def _answer_with_payload(realm: FakeRealm) -> Any:
    def handshake(request: wire.ClientRequest, message: wire.HandshakeRequest) -> wire.ClientResponse:
        pending = realm.responder.read(message.client_ephemeral_public, message.payload_ciphertext)
        ephemeral, ciphertext, _ = pending.finish(b"surprise", realm.random(32))
        return wire.HandshakeResponse(ephemeral, ciphertext, 0)

    return handshake


@pytest.mark.parametrize("change", ["variant", "ciphertext"])
async def test_broken_transport_answers(change: str, autojump_clock: MockClock) -> None:
    """Inside a session only a transport message that opens is an answer."""
    world = World(1)
    await world.register()
    honest = world.realms[0].post

    def broken(headers: Any, body: bytes) -> tuple[int, bytes]:
        status, encoded = honest(headers, body)
        response = wire.decode_client_response(encoded)
        assert isinstance(response, wire.TransportResponse)
        changed: wire.ClientResponse = wire.TransportResponse(response.ciphertext[:-1] + b"?")
        if change == "variant":
            changed = wire.HandshakeResponse(b"k" * 32, response.ciphertext, 0)
        return status, wire.encode_client_response(changed)

    world.realms[0].post = broken  # type: ignore[method-assign]
    with pytest.raises(AssertionFailed):
        await world.client.delete()


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        (["drop", "drop"], Transient),
        (["drop", None], None),
        ([(200, b"junk")], AssertionFailed),
        ([(401, b"")], InvalidAuth),
    ],
)
async def test_software_realm_answers(
    answers: list[Any], error: type[ClientError] | None, autojump_clock: MockClock
) -> None:
    """Software realms follow the same table, with their two attempts."""
    world = World(1, software=1)
    world.transport.fault = lambda realm, number: answers[number - 1]
    if error is None:
        await world.client.delete()
    else:
        with pytest.raises(error):
            await world.client.delete()
    assert len(world.transport.posts) == len(answers)


async def test_failure_leaves_no_session(autojump_clock: MockClock) -> None:
    """After any failure the next request starts with a handshake."""
    world = World(1)
    await world.register()
    world.fail({0: ClientOutcome.RATE_LIMIT_EXCEEDED})
    with pytest.raises(ClientError):
        await world.client.delete()
    world.fail({})
    await world.client.delete()
    assert world.realms[0].kinds == ["Handshake Register1", "Register2", "Handshake Delete"]


async def test_cancelled_request_leaves_no_session(autojump_clock: MockClock) -> None:
    """A request given up by its caller has perhaps used the session; it is not used again."""
    world = World(1)
    await world.register()
    world.fail({0: "hang"})
    with trio.move_on_after(1):
        await world.client.delete()
    world.fail({})
    await world.client.delete()
    assert world.realms[0].kinds[-1] == "Handshake Delete"


async def test_headers(autojump_clock: MockClock) -> None:
    """Requests carry the protocol version and a user agent; software realms also the token, hardware realms never."""
    seen: list[dict[str, str]] = []
    world = World(2, software=1)
    for realm in world.realms:
        realm.post = _recording(realm, seen)  # type: ignore[method-assign]
    await world.client.delete()
    hardware, software = sorted(seen, key=len)
    assert hardware["x-juicebox-version"] == software["x-juicebox-version"] == "0.3.7"
    assert "authorization" not in hardware
    assert software["authorization"] == "Bearer mario"


def _recording(realm: FakeRealm, seen: list[dict[str, str]]) -> Any:
    honest = realm.post

    def post(headers: Any, body: bytes) -> tuple[int, bytes]:
        seen.append(dict(headers))
        return honest(headers, body)

    return post
