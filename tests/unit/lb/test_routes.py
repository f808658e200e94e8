"""The public paths, to the byte (load-balancer.md 5), and readiness."""

from __future__ import annotations

import datetime as dt

import pytest
import trio

from juicebox_hsm.adapters.edge.drain import DrainController
from juicebox_hsm.adapters.edge.exchange import Request, Response
from juicebox_hsm.host.certificates import MOMENT_MS_MAX
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.readiness import OwnClockOff, Plain, Readiness, Reason
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.wire.rpc import Range
from roles.lb.readiness import BalancerReadiness
from roles.lb.routes import Routes
from roles.words import own_sentence
from tests.unit.lb.harness import REALM, Balancer, FakeAgent, FakeRequest


async def _req(_: Request) -> Response:
    return Response(200, b"answered")


def _routes(found: Readiness | None = None, *, rttest: bool = False) -> tuple[Routes, DrainController]:
    drain = DrainController()
    routes = Routes(
        _req,
        drain=drain,
        name="lb1",
        readiness=lambda: found or Readiness(),
        enable_rttest=rttest,
    )
    return routes, drain


def _told(reasons: tuple[Reason, ...]) -> list[str]:
    return [own_sentence(reason) for reason in reasons]


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        ("POST", "/req", 200, b"answered"),
        ("OPTIONS", "/req", 200, b"No Content"),
        ("GET", "/req", 405, b"Not Allowed"),
        ("HEAD", "/req", 405, b"Not Allowed"),
        ("PUT", "/req", 405, b"Not Allowed"),
        ("POST", "/livez", 405, b"Not Allowed"),
        ("POST", "/readyz", 405, b"Not Allowed"),
        ("GET", "/readyz", 200, b"ready\n"),
        ("GET", "/", 404, b"Not Found"),
        ("GET", "/req/", 404, b"Not Found"),
        ("POST", "/rttest", 404, b"Not Found"),
        ("GET", "/metrics", 404, b"Not Found"),
        ("OPTIONS", "*", 404, b"Not Found"),
    ],
)
async def test_table(method: str, path: str, status: int, body: bytes) -> None:
    """Each path and method has the documented answer."""
    routes, _ = _routes()
    response = await routes.answer(FakeRequest(method, path))
    assert (response.status, response.body) == (status, body)


async def test_preflight() -> None:
    """A browser's preflight is allowed to send POST with any header."""
    routes, _ = _routes()
    headers = dict((await routes.answer(FakeRequest("OPTIONS"))).headers)
    assert headers[b"access-control-allow-origin"] == b"*"
    assert headers[b"access-control-allow-headers"] == b"*"
    assert headers[b"access-control-allow-methods"] == b"POST"
    assert headers[b"access-control-max-age"] == b"600"


async def test_livez() -> None:
    """While live the text begins as ingress checks expect; from the notice on it is exactly `Shutting down`."""
    routes, drain = _routes()
    for method in ("GET", "HEAD"):
        response = await routes.answer(FakeRequest(method, "/livez"))
        assert response.status == 200
        assert response.body.startswith(b"Juicebox load balancer: ")
        assert response.body.split(b"\n")[1] == b"name: lb1"
    drain.begin_notice()
    response = await routes.answer(FakeRequest("GET", "/livez"))
    assert (response.status, response.body) == (200, b"Shutting down")


async def test_readyz_reasons() -> None:
    """Not ready is 503 with one reason per line, and their codes in the same order."""
    routes, _ = _routes(Readiness((Plain(Code.STOPPING), Plain(Code.NO_REALMS))))
    response = await routes.answer(FakeRequest("GET", "/readyz"))
    assert (response.status, response.body) == (503, b"shutting down\nno realms\n")
    assert (b"x-reasons", b"stopping,no-realms") in response.headers


@pytest.mark.parametrize(
    ("reasons", "status", "first"), [((), 200, b"ready"), ((Plain(Code.NO_REALMS),), 503, b"no realms")]
)
async def test_readyz_warnings(reasons: tuple[Reason, ...], status: int, first: bytes) -> None:
    """What somebody has to see to is told besides, and makes nobody take a serving balancer out of rotation."""
    routes, _ = _routes(Readiness(reasons, (OwnClockOff(7.0),)))
    response = await routes.answer(FakeRequest("GET", "/readyz"))
    assert (response.status, response.body) == (status, first + b"\nwarning: its clock is 7 s ahead of the others'\n")
    assert (b"x-warnings", b"clock") in response.headers


async def test_the_end_of_the_cluster_certificate_is_a_warning() -> None:
    """A balancer whose cluster certificate ends soon stays ready and says so; a reload with a new one ends that."""
    balancer = Balancer(FakeAgent("tls://a"))
    end = dt.datetime.now(dt.UTC) + dt.timedelta(days=3, hours=1)
    readiness = BalancerReadiness(
        drain=DrainController(),
        poller=balancer.poller,
        guard=balancer.guard,
        secrets_age_s=lambda: 0.0,
        cluster_end=lambda: end,
        edge_valid_ms=lambda: (0, MOMENT_MS_MAX),
    )
    assert _told(readiness.judge().warnings) == [f"the cluster certificate ends on {end:%Y-%m-%d}, in 3 days"]
    end -= dt.timedelta(days=4)
    assert _told(readiness.judge().warnings) == [f"the cluster certificate ended on {end:%Y-%m-%d}"]
    end += dt.timedelta(days=90)
    assert readiness.judge().warnings == ()


async def test_round_trip_probe(autojump_clock: object) -> None:
    """If enabled, /rttest reads the body, waits 100 ms and answers 167 bytes; too much is 413, never a crash."""
    routes, _ = _routes(rttest=True)
    began = trio.current_time()
    response = await routes.answer(FakeRequest("POST", "/rttest", b"x" * 2048))
    assert (response.status, response.body) == (200, b"A" * 167)
    assert trio.current_time() - began == pytest.approx(0.1)
    assert (await routes.answer(FakeRequest("POST", "/rttest", b"x" * 2049))).status == 413
    assert (await routes.answer(FakeRequest("GET", "/rttest"))).status == 404


async def test_readiness(nursery: trio.Nursery, autojump_clock: object) -> None:
    """Ready means live, fresh secrets and one realm whose whole key space is routed and may be served."""
    half = Range(start=bytes(32), end=b"\x7f" + b"\xff" * 31)
    agent = FakeAgent("tls://a", realm=None)
    balancer = Balancer(agent)
    drain = DrainController()
    age_s = 0.0
    readiness = BalancerReadiness(
        drain=drain,
        poller=balancer.poller,
        guard=balancer.guard,
        secrets_age_s=lambda: age_s,
        cluster_end=lambda: None,
        edge_valid_ms=lambda: (0, MOMENT_MS_MAX),
    )
    await balancer.start(nursery, settle=False)
    assert _told(readiness.judge().reasons) == ["no realms"]
    agent.realm, agent.range = REALM, half
    await trio.sleep(1)
    assert _told(readiness.judge().reasons) == [f"realm {REALM.hex()}: no leader for [0x8000...-0xff...]"]
    agent.leads = False
    await trio.sleep(1)
    assert _told(readiness.judge().reasons) == [f"realm {REALM.hex()}: no leader for [0x00...-0xff...]"]
    agent.leads, agent.range = True, Range(start=bytes(32), end=b"\xff" * 32)
    await trio.sleep(1)
    assert readiness.judge().is_ready
    age_s = 51.0
    drain.begin_notice()
    assert _told(readiness.judge().reasons) == ["shutting down", "secrets stale for 51s"]


async def test_a_group_that_cannot_commit_is_named(nursery: trio.Nursery, autojump_clock: object) -> None:
    """A leader without a majority is no leader to be ready with; the reason has the group and its range, no other."""
    half, other = Range(bytes(32), b"\x7f" + b"\xff" * 31), Range(b"\x80" + bytes(31), b"\xff" * 32)
    well, stalled = FakeAgent("tls://a", range=half), FakeAgent("tls://b", group=GroupId(b"S" * 16), range=other)
    balancer = Balancer(well, stalled)
    readiness = BalancerReadiness(
        drain=DrainController(),
        poller=balancer.poller,
        guard=balancer.guard,
        secrets_age_s=lambda: 0.0,
        cluster_end=lambda: None,
        edge_valid_ms=lambda: (0, MOMENT_MS_MAX),
    )
    await balancer.start(nursery, settle=False)
    assert readiness.judge().is_ready
    stalled.stalled_s = 0.1
    await trio.sleep(0.2)
    told = f"realm {REALM.hex()}: group {(b'S' * 16).hex()} ([0x8000...-0xff...]) cannot commit: "
    assert _told(readiness.judge().reasons) == [f"{told}2 of 5 members answer its leader"]
    well.leads = False
    await trio.sleep(0.2)
    assert [reason.split(": ", 1)[1].split(" (")[0] for reason in _told(readiness.judge().reasons)] == [
        f"group {(b'S' * 16).hex()}",
        "no leader for [0x00...-0x7fff...]",
    ]
    well.leads, stalled.stalled_s = True, None
    await trio.sleep(0.2)
    assert readiness.judge().is_ready


async def test_a_refused_realm_is_not_ready(nursery: trio.Nursery, autojump_clock: object) -> None:
    """A realm with another record-id key does not make the balancer ready; a second one does."""
    other = RealmId(b"O" * 16)
    second = FakeAgent("tls://b", realm=None)
    balancer = Balancer(FakeAgent("tls://a", realm=other), second)
    balancer.settings.values[f"record-id-key/{other.hex()}"] = b"12345678"
    readiness = BalancerReadiness(
        drain=DrainController(),
        poller=balancer.poller,
        guard=balancer.guard,
        secrets_age_s=lambda: 0.0,
        cluster_end=lambda: None,
        edge_valid_ms=lambda: (0, MOMENT_MS_MAX),
    )
    await balancer.start(nursery, settle=False)
    assert _told(readiness.judge().reasons) == [f"realm {other.hex()}: used with another record-id key"]
    second.realm = REALM
    await trio.sleep(1)
    assert readiness.judge().is_ready
