"""`POST /req`: order of checks, statuses, what is logged and counted (client-protocol.md 5)."""

from __future__ import annotations

import io
import json

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from juicebox_hsm.adapters.observation import logging
from juicebox_hsm.adapters.observation.tracing import Traces, make_provider
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.ids import RealmId
from juicebox_hsm.tenant_keys import SecretAlgorithm, TenantSecret, event_user_id, record_id
from juicebox_hsm.tokens import RejectionReason, TokenKey
from juicebox_hsm.wire.client import (
    ClientOutcome,
    TransportResponse,
    decode_client_response,
    decode_noise_response,
    encode_client_response,
)
from juicebox_hsm.wire.rpc import Refusal
from roles.lb.service import OK_PREFIX
from tests.unit.lb.harness import (
    NOISE,
    NOW_S,
    REALM,
    RECORD_KEY,
    TENANT_KEY,
    Balancer,
    FakeAgent,
    FakeRequest,
    body,
    refuse,
    token,
)

OTHER_REALM = RealmId(b"O" * 16)


@pytest.mark.parametrize(
    ("version", "accepted"),
    [
        (None, False),
        ("", False),
        ("junk", False),
        ("0.3", False),
        ("0.2.9", False),
        ("0.3.0", True),
        ("0.4.0", True),
        ("1.0.0", True),
        ("0.3.0-rc.1", True),
        ("0.3.7+build", True),
    ],
)
async def test_version_gate(nursery: trio.Nursery, autojump_clock: object, version: str | None, accepted: bool) -> None:
    """Old, missing and malformed versions get 426 with a text no client decodes, before the body is read."""
    balancer = Balancer(FakeAgent("tls://a"))
    await balancer.start(nursery, settle=False)
    request = FakeRequest(body=body(), version=version)
    response = await balancer.service.answer(request)
    assert response.status == (200 if accepted else 426)
    assert request.body_read is accepted
    assert (b"access-control-allow-origin", b"*") in response.headers
    if not accepted:
        assert response.body == b"SDK upgrade required to version >=0.3"


async def test_ok(nursery: trio.Nursery, autojump_clock: object) -> None:
    """A good request is forwarded under the right record id and user id, and the answer decodes."""
    agent = FakeAgent("tls://a")
    balancer = Balancer(agent)
    await balancer.start(nursery, settle=False)
    response = await balancer.service.answer(FakeRequest(body=body()))
    assert (response.status, decode_client_response(response.body)) == (200, TransportResponse(b"answer"))
    assert (b"content-type", b"application/octet-stream") in response.headers
    (app,) = agent.asked
    assert app.record_id == record_id(RECORD_KEY, "test-acme", "mario")
    assert (app.tenant, app.user) == ("test-acme", event_user_id("test-acme", "mario"))
    counts = balancer.recorder.counts
    assert counts["load_balancer.request.time.ns/result=Ok"] == 1
    assert counts["load_balancer.request.time.ns/tenant=test-acme"] == 1


async def test_a_sampled_request_is_traced_into_the_agent(nursery: trio.Nursery, autojump_clock: object) -> None:
    """The client's trace id goes on to the agent with our span; what is not sampled leaves no trace anywhere."""
    exporter = InMemorySpanExporter()
    provider = make_provider("load_balancer", "1", exporter)
    header = (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")
    for rate in (1.0, 0.0):
        balancer = Balancer(FakeAgent("tls://a"), traces=Traces(provider), trace_rate=rate)
        await balancer.start(nursery, settle=False)
        request = FakeRequest(body=body())
        request.headers = [*request.headers, header]
        assert (await balancer.service.answer(request)).status == 200
        (given,) = balancer.rpc.traces
        assert (given is not None) == bool(rate)
        if given is not None:
            assert given.split("-")[1] == "0af7651916cd43dd8448eb211c80319c"
    provider.shutdown()
    *steps, span = exporter.get_finished_spans()
    assert span.name == "POST /req"
    assert [step.name for step in steps] == ["body", "token", "forward"]
    assert {step.parent and step.parent.span_id for step in steps} == {span.context and span.context.span_id}
    assert dict(span.attributes or {})["status_code"] == 200
    assert "mario" not in str(span.attributes)


async def test_strangers_make_no_series(nursery: trio.Nursery, autojump_clock: object) -> None:
    """What is said without a good token is in no tag of a metric or a span: anyone could make them without end."""
    exporter = InMemorySpanExporter()
    provider = make_provider("load_balancer", "1", exporter)
    balancer = Balancer(FakeAgent("tls://a"), traces=Traces(provider), trace_rate=1.0)
    await balancer.start(nursery, settle=False)
    known = set(balancer.recorder.counts)
    foreign = TenantSecret(Secret(b"of-nobody"), SecretAlgorithm.HMAC_SHA256)
    for number in range(3):
        realm = RealmId(bytes([number]) * 16)
        strangers = [
            body(token(tenant=f"stranger{number}"), realm=realm),
            body(token(secret=foreign, user=f"stranger{number}"), realm=realm),
            body(token(realm=realm, version=99), realm=realm),
            body("no.token.atall", realm=realm),
            b"garbage",
            bytes(2049),
        ]
        for each in strangers:
            assert (await balancer.service.answer(FakeRequest(body=each))).status in {400, 401, 413}
    provider.shutdown()
    reasons = {f"load_balancer.auth.failures/{reason.value}" for reason in RejectionReason}
    made = set(balancer.recorder.counts) - known - reasons
    allowed = ("load_balancer.auth.failures", "load_balancer.request.time.ns")
    results = tuple(f"{allowed[1]}/{tag}=" for tag in ("result", "success"))
    assert [name for name in made if name not in allowed and not name.startswith(results)] == []
    assert {key for span in exporter.get_finished_spans() for key in span.attributes or {}} == {"status_code"}


def test_ok_prefix() -> None:
    """Prefixing the agent's bytes is the same as decoding and encoding them."""
    assert encode_client_response(decode_noise_response(NOISE)) == OK_PREFIX + NOISE


async def test_body_sizes(nursery: trio.Nursery, autojump_clock: object) -> None:
    """2049 bytes are PayloadTooLarge, 2048 of garbage a DecodingError, 2048 with a good request in front are served."""
    balancer = Balancer(FakeAgent("tls://a"))
    await balancer.start(nursery, settle=False)
    too_large = await balancer.service.answer(FakeRequest(body=bytes(2049)))
    assert (too_large.status, decode_client_response(too_large.body)) == (413, ClientOutcome.PAYLOAD_TOO_LARGE)
    garbage = await balancer.service.answer(FakeRequest(body=b"\xff" * 2048))
    assert (garbage.status, decode_client_response(garbage.body)) == (400, ClientOutcome.DECODING_ERROR)
    assert (await balancer.service.answer(FakeRequest(body=body(size=2048)))).status == 200


@pytest.mark.parametrize(
    ("refusal", "status", "outcome"),
    [
        (Refusal.MISSING_SESSION, 400, ClientOutcome.MISSING_SESSION),
        (Refusal.SESSION_ERROR, 400, ClientOutcome.SESSION_ERROR),
        (Refusal.DECODING_ERROR, 400, ClientOutcome.DECODING_ERROR),
        (Refusal.RATE_LIMIT_EXCEEDED, 429, ClientOutcome.RATE_LIMIT_EXCEEDED),
        (Refusal.BUSY, 503, ClientOutcome.UNAVAILABLE),
    ],
)
async def test_statuses(
    nursery: trio.Nursery, autojump_clock: object, refusal: Refusal, status: int, outcome: ClientOutcome
) -> None:
    """Every outcome has its status; 429 and 503 say when to come back."""
    balancer = Balancer(FakeAgent("tls://a", script=[refuse(refusal)]))
    await balancer.start(nursery)
    response = await balancer.service.answer(FakeRequest(body=body()))
    assert (response.status, decode_client_response(response.body)) == (status, outcome)
    assert ((b"retry-after", b"1") in response.headers) is (status in {429, 503})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "malformed"),
        ("a.b", "malformed"),
        ("x" * 1001, "too_long"),
        (token(user="u", now_s=int(NOW_S) - 9000), "expired"),
        (token(user="u", now_s=int(NOW_S) + 9000), "not_yet"),
        (token(realm=OTHER_REALM), "audience"),
        (token(version=9), "unknown_key"),
        (token(secret=TenantSecret(Secret(b"k" * 32), SecretAlgorithm.HMAC_SHA256)), "signature"),
    ],
)
async def test_refused_tokens(nursery: trio.Nursery, autojump_clock: object, text: str, reason: str) -> None:
    """A bad token is InvalidAuth, says no more to the client, counts its reason, and asks no agent anything."""
    agent = FakeAgent("tls://a")
    balancer = Balancer(agent)
    await balancer.start(nursery, settle=False)
    response = await balancer.service.answer(FakeRequest(body=body(text)))
    assert (response.status, decode_client_response(response.body)) == (401, ClientOutcome.INVALID_AUTH)
    assert balancer.recorder.counts[f"load_balancer.auth.failures/{reason}"] == 1
    assert agent.asked == []


async def test_unknown_realm_without_valid_token(nursery: trio.Nursery, autojump_clock: object) -> None:
    """An unauthenticated request for a random realm costs no poll and no look at discovery."""
    agent = FakeAgent("tls://a")
    balancer = Balancer(agent)
    await balancer.start(nursery, settle=False)
    polls, reads = agent.polls, balancer.discovery.reads
    began = trio.current_time()
    response = await balancer.service.answer(FakeRequest(body=body(token(), realm=OTHER_REALM)))
    assert response.status == 401
    assert (agent.polls, balancer.discovery.reads, trio.current_time()) == (polls, reads, began)


async def test_unknown_realm_with_valid_token(nursery: trio.Nursery, autojump_clock: object) -> None:
    """A tenant's request for a realm that is not here is Unavailable after one look."""
    agent = FakeAgent("tls://a")
    balancer = Balancer(agent)
    await balancer.start(nursery, settle=False)
    reads = balancer.discovery.reads
    response = await balancer.service.answer(FakeRequest(body=body(token(OTHER_REALM), realm=OTHER_REALM)))
    assert (response.status, decode_client_response(response.body)) == (503, ClientOutcome.UNAVAILABLE)
    assert balancer.discovery.reads == reads + 1
    assert agent.asked == []


async def test_realm_that_appears_later(nursery: trio.Nursery, autojump_clock: object) -> None:
    """A realm created while the balancer runs is served at its first request."""
    agent = FakeAgent("tls://a", realm=None)
    balancer = Balancer(agent)
    await balancer.start(nursery)
    agent.realm = REALM
    assert (await balancer.service.answer(FakeRequest(body=body()))).status == 200


async def test_fingerprint_mismatch(nursery: trio.Nursery, autojump_clock: object) -> None:
    """A realm that was used with another record-id key is refused with a clear error; another realm is served."""
    wrong = FakeAgent("tls://a", realm=OTHER_REALM)
    right = FakeAgent("tls://b")
    balancer = Balancer(wrong, right)
    balancer.settings.values[f"record-id-key/{OTHER_REALM.hex()}"] = b"12345678"
    await balancer.start(nursery, settle=False)
    assert (await balancer.service.answer(FakeRequest(body=body()))).status == 200
    refused = await balancer.service.answer(FakeRequest(body=body(token(OTHER_REALM), realm=OTHER_REALM)))
    assert refused.status == 503
    assert wrong.asked == []
    assert balancer.recorder.counts["load_balancer.refresh.time.ns"] == 1  # the one at start: looking again is no use
    assert any(level == "error" and "NOT served" in text for level, text in balancer.recorder.lines)
    assert len(balancer.settings.values[f"record-id-key/{REALM.hex()}"]) == 8


async def test_fingerprint_waits_for_the_store(nursery: trio.Nursery, autojump_clock: object) -> None:
    """While the store cannot be asked the realm is not served; once it answers it is, without a request's help."""
    balancer = Balancer(FakeAgent("tls://a"))
    balancer.settings.down = True
    await balancer.start(nursery, settle=False)
    assert (await balancer.service.answer(FakeRequest(body=body()))).status == 503
    balancer.settings.down = False
    await trio.sleep(3)
    assert REALM in balancer.guard.realms.allowed


async def test_bad_tenant_key_isolates(nursery: trio.Nursery, autojump_clock: object) -> None:
    """A stored key that does not parse refuses its own tenant's tokens, with a warning, and nobody else's."""
    bad = TenantSecret(Secret(b"not der"), SecretAlgorithm.EDWARDS25519)
    keys = {("test-acme", 1): TokenKey(TENANT_KEY), ("broken", 1): TokenKey(bad)}
    balancer = Balancer(FakeAgent("tls://a"), keys=keys)
    await balancer.start(nursery, settle=False)
    other = token(tenant="broken")
    assert (await balancer.service.answer(FakeRequest(body=body(other)))).status == 401
    assert ("warning", "unusable tenant key") in balancer.recorder.lines
    assert (await balancer.service.answer(FakeRequest(body=body()))).status == 200


async def test_disabled_key_ends_cached_tokens(nursery: trio.Nursery, autojump_clock: object) -> None:
    """A token verified before is refused as soon as its key version is gone."""
    balancer = Balancer(FakeAgent("tls://a"))
    await balancer.start(nursery, settle=False)
    assert (await balancer.service.answer(FakeRequest(body=body()))).status == 200
    balancer.keys.clear()
    assert (await balancer.service.answer(FakeRequest(body=body()))).status == 401


async def test_handshake_only_with_transport(nursery: trio.Nursery, autojump_clock: object) -> None:
    """HandshakeOnly with a transport message is malformed."""
    balancer = Balancer(FakeAgent("tls://a"))
    await balancer.start(nursery, settle=False)
    twisted = body().replace(b"\x6eSecretsRequest", b"\x6dHandshakeOnly")
    assert (await balancer.service.answer(FakeRequest(body=twisted))).status == 400


async def test_nothing_secret_is_logged(nursery: trio.Nursery, autojump_clock: object) -> None:
    """A request on its way shows neither its message nor its user."""
    from tests.unit.lb.harness import job

    assert "noise" not in repr(job()).replace("NoiseRequest", "")
    assert "0000" not in repr(job())


@pytest.fixture
def log() -> io.StringIO:
    """Give balancers the real log, at its most talkative, and return what it writes."""
    output = io.StringIO()
    logging.configure("trace", json=True, stream=output)
    return output


async def test_lines_name_the_request(nursery: trio.Nursery, autojump_clock: object, log: io.StringIO) -> None:
    """A line about a client's request has the request's id, realm and, once the key id was read, tenant: no more."""
    balancer = Balancer(FakeAgent("tls://a"))
    balancer.service._log = logging.get_logger("lb")
    await balancer.start(nursery, settle=False)
    wrong = token(user="mario", secret=TenantSecret(Secret(b"k" * 32), SecretAlgorithm.HMAC_SHA256))
    for text in ("a.b.c", wrong):
        await balancer.service.answer(FakeRequest(body=body(text)))
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    first, second = [line for line in lines if line["message"] == "token refused"]
    assert (first["reason"], first["realm"], "tenant" in first) == ("malformed", REALM.hex(), False)
    assert (second["reason"], second["realm"], second["tenant"]) == ("signature", REALM.hex(), "test-acme")
    assert len(first["request"]) == 16
    assert first["request"] != second["request"]
    for secret in ("mario", wrong, wrong.split(".")[1], wrong.split(".")[2]):
        assert secret not in log.getvalue()


async def test_what_goes_wrong_in_a_request_names_it(
    nursery: trio.Nursery, autojump_clock: object, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once authenticated, lines name the realm, also the report of an error nobody foresaw; then no more."""
    speaker = logging.get_logger("test")
    balancer = Balancer(FakeAgent("tls://a"))
    await balancer.start(nursery)

    async def fail(_: object) -> bytes:
        await trio.lowlevel.checkpoint()
        speaker.info("forwarding")
        raise KeyError("odd")

    assert (await balancer.service.answer(FakeRequest(body=body()))).status == 200
    speaker.info("between requests")
    monkeypatch.setattr(balancer.service._forwarder, "forward", fail)
    with pytest.raises(KeyError):
        await balancer.service.answer(FakeRequest(body=body()))
    speaker.info("reported")
    said = {line["message"]: line for line in map(json.loads, log.getvalue().splitlines())}
    assert "request" not in said["between requests"]
    for message in ("forwarding", "reported"):
        line = said[message]
        assert (line["realm"], "tenant" in line) == (REALM.hex(), False), "tenants are named at debug only"
    assert said["forwarding"]["request"] == said["reported"]["request"]


@given(data=st.one_of(st.binary(max_size=300), st.binary(max_size=40).map(lambda tail: body()[:-20] + tail)))
def test_random_bodies(data: bytes) -> None:
    """Any body is answered with one of the documented statuses and a decodable response."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            balancer = Balancer(FakeAgent("tls://a"))
            await balancer.start(nursery, settle=False)
            response = await balancer.service.answer(FakeRequest(body=data))
            assert response.status in {200, 400, 401, 503}
            decode_client_response(response.body)
            nursery.cancel_scope.cancel()

    trio.run(main)
