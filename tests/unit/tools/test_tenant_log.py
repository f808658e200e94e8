"""The tenant log's HTTP interface, without sockets: routes, tokens, bodies, waiting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing

from juicebox_hsm.adapters.edge.tls import EdgeTls
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.process.supervision import StartPhase
from juicebox_hsm.adapters.stores.embedded_bus import EmbeddedBus
from juicebox_hsm.adapters.tls.certificates import CaKind, init_ca, issue_edge
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.host.events import OutboxEvent
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.ports.event_bus import BusEvent, EventBus, InvalidAcks
from juicebox_hsm.tenant_keys import SecretAlgorithm, TenantSecret
from juicebox_hsm.tokens import Scope, TokenKey, create
from roles.shell import Shell
from roles.tenant_log import service as tenant_log_service
from roles.tenant_log.main import KIND, tell_certificate_end
from roles.tenant_log.service import (
    PAGE_MAX,
    WAIT_S,
    Ask,
    BadRequest,
    Realms,
    TenantLogService,
    decode_ask,
)
from tests.sink import Sink

NOW_S: Final = 1_700_000_000
REALM: Final = RealmId(b"\x11" * 16)
SECOND: Final = RealmId(b"\x12" * 16)
KEY: Final = TenantSecret(Secret(b"k" * 32), SecretAlgorithm.HMAC_SHA256)


class Bus:
    """A bus that records calls and gives what it was told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.events: list[BusEvent] = []
        self.broken = False

    async def publish(self, realm: RealmId, tenant: str, rows: Sequence[OutboxEvent]) -> None:
        """Nobody publishes here."""

    async def pull(self, realm: RealmId, tenant: str, limit: int, wait_s: float) -> list[BusEvent]:
        """Return events, or wait in vain."""
        self.calls.append(("pull", realm, tenant, limit, wait_s))
        if self.broken:
            raise StoreUnavailable("the disk is full")
        if not self.events:
            await trio.sleep(wait_s)
        taken, self.events = self.events[:limit], self.events[limit:]
        return taken

    async def acknowledge(self, realm: RealmId, tenant: str, acks: Sequence[str]) -> None:
        """Refuse `bad`."""
        self.calls.append(("ack", realm, tenant, *acks))
        if "bad" in acks:
            raise InvalidAcks("not an acknowledgement")


def guess(seq: int = 7) -> BusEvent:
    """Return a guess."""
    body: dict[str, str | int] = {"event": "guess_used", "num_guesses": 5, "guess_count": 2}
    return BusEvent(str(seq), f"ack{seq}", seq, f"{'ab' * 16}:9", NOW_S * 1000 + 250, "cd" * 32, body)


class Caller:
    """The service and a client of it."""

    def __init__(self, bus: EventBus, realms: Sequence[RealmId] = (REALM,), in_store: Sequence[RealmId] = ()) -> None:
        self.metrics = Metrics()
        self.in_store = list(in_store)
        self.service = TenantLogService(
            bus,
            Realms(realms, self._list_realms),
            lambda tenant, version: TokenKey(KEY) if (tenant, version) in {("acme", 1), ("other", 1)} else None,
            now_s=lambda: float(NOW_S),
            metrics=self.metrics,
            log=Sink(),
        )
        self.client: Any = self.service.make_app().test_client()

    async def _list_realms(self) -> list[RealmId]:
        await trio.lowlevel.checkpoint()
        return self.in_store

    async def post(self, path: str, body: object, **token: Any) -> tuple[int, Any]:
        """Post a body with a token; returns status and decoded answer."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await self.client.post(path, data=raw, headers={"Authorization": f"Bearer {make_token(**token)}"})
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        return answer.status_code, await answer.get_json()


def make_token(
    tenant: str = "acme", realm: RealmId = REALM, scope: Scope | None = Scope.AUDIT, now_s: int = NOW_S
) -> str:
    """Return an auditor's token."""
    return create(KEY, tenant=tenant, version=1, user="auditor", realm=realm, now_s=now_s, scope=scope)


async def test_waiting_calls_are_limited(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound a call without events is answered at once and not refused; a place is given back at its end."""
    monkeypatch.setattr(tenant_log_service, "WAITING_MAX", 2)
    caller = Caller(Bus())
    took_s: list[float] = []

    async def pull() -> None:
        begun = trio.current_time()
        assert await caller.post("/tenant_log", {}) == (200, {"events": []})
        took_s.append(trio.current_time() - begun)

    for _ in range(2):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(pull)
        assert sorted(took_s) == pytest.approx([0, 0, 0, WAIT_S, WAIT_S])
        took_s.clear()


async def test_realms_are_asked_for_once() -> None:
    """Who comes while the realms are being listed waits for the answer; a store that failed is asked again at once."""
    asked: list[int] = []
    begun, go = trio.Event(), trio.Event()

    async def list_realms() -> list[RealmId]:
        asked.append(1)
        if len(asked) == 1:
            raise StoreUnavailable("down")
        begun.set()
        await go.wait()
        return [REALM]

    realms = Realms((), list_realms)
    with pytest.raises(StoreUnavailable):
        await realms.find(REALM.hex())
    found: list[RealmId | None] = []

    async def find() -> None:
        found.append(await realms.find(REALM.hex()))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(find)
        await begun.wait()
        await trio.testing.wait_all_tasks_blocked()
        go.set()
    assert found == [REALM] * 3
    assert len(asked) == 2


async def test_index_names_the_realm() -> None:
    """GET / is the liveness answer existing clients know; with several realms all are listed."""
    answer = await Caller(Bus()).client.get("/")
    assert (answer.status_code, await answer.get_json()) == (200, {"realmID": REALM.hex(), "realmIDs": [REALM.hex()]})
    answer = await Caller(Bus(), []).client.get("/")
    assert await answer.get_json() == {"realmID": None, "realmIDs": []}


async def test_pull_answers_events() -> None:
    """Acknowledgements come before the pull, for the token's tenant; an event has the documented fields."""
    bus = Bus()
    bus.events = [guess()]
    caller = Caller(bus)
    status, answer = await caller.post("/tenant_log", {"acks": ["a", "b"], "page_size": 5, "later": True})
    assert status == 200
    assert answer == {
        "events": [
            {
                "id": "7", "ack": "ack7", "when": "2023-11-14T22:13:20.250Z", "user_id": "cd" * 32,
                "event": "guess_used", "num_guesses": 5, "guess_count": 2, "seq": 7, "ref": f"{'ab' * 16}:9",
            }
        ]
    }  # fmt: skip
    assert bus.calls == [("ack", REALM, "acme", "a", "b"), ("pull", REALM, "acme", 5, 0)]
    assert 'realm_tenant_log_count_total{tenant="acme",type="/tenant_log"} 1' in caller.metrics.render()


async def test_strangers_make_no_series() -> None:
    """Tokens that are refused leave no tag in the metrics: anyone could make series without end."""
    caller = Caller(Bus())
    for changes in ({"tenant": "stranger"}, {"realm": SECOND}, {"scope": Scope.USER}, {"now_s": NOW_S + 10**6}):
        for path in ("/tenant_log", "/tenant_log/ack"):
            assert (await caller.post(path, {}, **changes))[0] == 401
    assert "tenant=" not in caller.metrics.render()


async def test_empty_page_waits_20_s_and_is_a_list(autojump_clock: trio.testing.MockClock) -> None:
    """Without events the answer is an empty array after 20 s, never null."""
    began = trio.current_time()
    assert await Caller(Bus()).post("/tenant_log", {}) == (200, {"events": []})
    assert trio.current_time() - began == pytest.approx(20)


async def test_stopping_releases_waiting_calls(autojump_clock: trio.testing.MockClock) -> None:
    """A shutdown ends waiting calls at once with an empty page, and later ones do not wait."""
    caller = Caller(Bus())
    answers: list[tuple[int, Any]] = []

    async def ask() -> None:
        answers.append(await caller.post("/tenant_log", {}))

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(1)
        caller.service.stop()
    await ask()
    assert answers == [(200, {"events": []})] * 2
    assert trio.current_time() - began < 2


async def test_ack_route() -> None:
    """POST /tenant_log/ack acknowledges and answers an empty object; `ack` is another name for `acks`."""
    bus = Bus()
    assert await Caller(bus).post("/tenant_log/ack", {"ack": ["x"]}) == (200, {})
    assert bus.calls == [("ack", REALM, "acme", "x")]


async def test_bad_acks_pull_nothing() -> None:
    """A refused acknowledgement is 400 and no event leaves."""
    bus = Bus()
    bus.events = [guess()]
    status, answer = await Caller(bus).post("/tenant_log", {"acks": ["bad"]})
    assert (status, list(answer)) == (400, ["message"])
    assert [call[0] for call in bus.calls] == ["ack"]


@pytest.mark.parametrize(
    ("body", "expect"),
    [
        (b"{}", Ask((), 1)),
        (b'{"page_size":0}', Ask((), 1)),
        (b'{"page_size":-3}', Ask((), 1)),
        (b'{"page_size":201}', Ask((), PAGE_MAX)),
        (b'{"page_size":null,"acks":null}', Ask((), 1)),
        (b'{"acks":["a"],"ack":["b"],"page_size":200}', Ask(("a", "b"), 200)),
    ],
)
def test_bodies(body: bytes, expect: Ask) -> None:
    """Page sizes are clamped to 1..200, absent members have defaults, both spellings of acks count."""
    assert decode_ask(body) == expect


@pytest.mark.parametrize(
    "body",
    [b"", b"[", b"[]", b"null", b'{"acks":"a"}', b'{"acks":[1]}', b'{"page_size":"5"}', b'{"page_size":1.5}',
     b'{"page_size":true}', b"\xff", b"[" * 10000],
)  # fmt: skip
async def test_bad_bodies(body: bytes) -> None:
    """What is not the documented object is 400 and reaches no bus."""
    with pytest.raises(BadRequest):
        decode_ask(body)
    bus = Bus()
    assert (await Caller(bus).post("/tenant_log", body))[0] == 400
    assert bus.calls == []


async def test_large_bodies() -> None:
    """A body over 32 KiB is 413, one of exactly that size is read."""
    bus = Bus()
    bus.events = [guess()]
    fits = json.dumps({"acks": []}).encode().ljust(32 << 10)
    assert (await Caller(bus).post("/tenant_log", fits))[0] == 200
    assert (await Caller(bus).post("/tenant_log", fits + b" "))[0] == 413


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ({"scope": Scope.USER}, "scope"),
        ({"scope": None}, "scope"),
        ({"now_s": NOW_S - 700}, "expired"),
        ({"realm": SECOND}, "not accepted"),
        ({"tenant": "stranger"}, "not accepted"),
    ],
)
async def test_tokens_that_do_not_audit(token: dict[str, Any], says: str) -> None:
    """Only a valid token of scope audit for a served realm opens a log: all else is 401 before anything is read."""
    bus = Bus()
    status, answer = await Caller(bus).post("/tenant_log", b"not json", **token)
    assert status == 401
    assert says in answer["message"]
    assert bus.calls == []


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Basic abc", "Bearer a.b.c", "Bearer \u00e9", "Bearer " + "x" * 2000]
)
async def test_no_token(header: str | None) -> None:
    """Missing, foreign and broken credentials are 401."""
    client = Caller(Bus()).client
    headers = {} if header is None else {"Authorization": header}
    for path in ("/tenant_log", "/tenant_log/ack"):
        assert (await client.post(path, data=b"{}", headers=headers)).status_code == 401


async def test_realm_by_audience() -> None:
    """With several realms the token's audience chooses; without --id a realm created later is served too."""
    bus = Bus()
    await Caller(bus, [REALM, SECOND]).post("/tenant_log/ack", {}, realm=SECOND)
    caller = Caller(bus, [], in_store=[REALM])
    assert (await caller.post("/tenant_log/ack", {}))[0] == 200
    assert [call[1] for call in bus.calls] == [SECOND, REALM]


async def test_bus_trouble_is_500() -> None:
    """An unavailable store is 500 with a message that tells nothing of it."""
    bus = Bus()
    bus.broken = True
    status, answer = await Caller(bus).post("/tenant_log", {})
    assert status == 500
    assert "disk" not in answer["message"]


async def test_other_routes_and_preflight() -> None:
    """Unknown paths and methods answer JSON; browsers may call from anywhere."""
    client = Caller(Bus()).client
    answer = await client.get("/tenant_log")
    assert (answer.status_code, await answer.get_json()) == (405, {"message": "Method Not Allowed"})
    assert (await client.post("/elsewhere")).status_code == 404
    answer = await client.options("/tenant_log")
    assert answer.status_code == 200
    assert "Authorization" in answer.headers["Access-Control-Allow-Headers"]


async def test_each_tenant_its_own_events(autojump_clock: trio.testing.MockClock) -> None:
    """A tenant's token opens that tenant's events and cannot acknowledge another's."""
    from tests.unit.adapters.test_embedded_bus import Published

    class PerTenant(Published):
        async def unacknowledged(self, realm: RealmId, tenant: str, after_seq: int, limit: int) -> list[OutboxEvent]:
            return await super().unacknowledged(realm, tenant, after_seq, limit) if tenant == "acme" else []

    caller = Caller(EmbeddedBus(PerTenant([1])))
    _, page = await caller.post("/tenant_log", {})
    ack = page["events"][0]["ack"]
    assert (await caller.post("/tenant_log", {}, tenant="other")) == (200, {"events": []})
    assert (await caller.post("/tenant_log/ack", {"acks": [ack]}, tenant="other"))[0] == 400
    assert (await caller.post("/tenant_log/ack", {"acks": [ack]}))[0] == 200


async def test_the_end_of_its_certificate_is_a_metric(tmp_path: Path) -> None:
    """An alert sees the certificate that auditors see end; without TLS there is no number that looks like an end."""
    await trio.lowlevel.checkpoint()
    shell = Shell(KIND, "tenant-log", None, StartPhase())
    tell_certificate_end(None, shell)
    assert "tls_cert" not in shell.metrics.render()
    init_ca(tmp_path / "ca", kind=CaKind.EDGE)
    issue_edge(tmp_path / "ca", ["localhost"], tmp_path / "cert.pem", tmp_path / "key.pem", days=10)
    tell_certificate_end(EdgeTls(tmp_path / "key.pem", tmp_path / "cert.pem"), shell)
    assert 9 < shell.metrics.gauge_of("tenant_log.tls_cert.remaining_days").value <= 10
