"""The status page: what it shows, and that nothing a peer says can become markup."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest
import trio
from quart_trio import QuartTrio

from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.observation.probes import make_app
from juicebox_hsm.host.clocks import DAY_MS, Reading
from juicebox_hsm.host.cluster.progress import TransferProgress
from juicebox_hsm.host.cluster.verdict import BalancerReport, Evidence, ManagerReport, judge
from juicebox_hsm.host.cluster.view import AgentView, build_view
from juicebox_hsm.host.codes import Code
from juicebox_hsm.host.readiness import Readiness
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ids import FULL_RANGE, OwnedRange
from juicebox_hsm.ports.errors import StoreUnavailable
from juicebox_hsm.wire import rpc
from juicebox_hsm.wire.rpc import TransferStep
from roles.manager.context import ManagerContext
from roles.manager.page import Own, bar, render
from roles.manager.status_page import HEADERS, StatusPage
from roles.words import readiness_text
from tests.host.cluster.agents import REALM, FakeAgent, group, hsm, record, three
from tests.unit.manager.fakes import make_context

NOW_MS = 1_793_491_200_000  # 1 November 2026
OWN = Own("manager1", "tls://m1", "1.0", actions=["rebalance"], leases=["a-lease"])
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"
VOID = {"meta", "rect", "line", "br", "img"}


class _Checker(HTMLParser):
    """Collects tags and text, and complains about tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def _parse(page: str) -> _Checker:
    checker = _Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def _evidence(agents: list[FakeAgent], **changes: Any) -> Evidence:
    view = build_view(
        [AgentView(agent.url, None, "down") if agent.down else AgentView(agent.url, agent.status()) for agent in agents]
    )
    values: dict[str, Any] = {
        "managers": (ManagerReport("tls://m1", version="1"), ManagerReport("tls://m2", error="gone")),
        "balancers": (BalancerReport("https://b1", version="1", certificate_end_ms=NOW_MS + 40 * DAY_MS),),
    }
    return Evidence(view=view, now_ms=NOW_MS, **{**values, **changes})


def _page(evidence: Evidence, own: Own = OWN) -> str:
    return render(evidence, judge(evidence), own)


def test_shows_what_an_operator_asks() -> None:
    """Realm, groups, ranges, leaders, members with lag, transfers, balancers, managers, warnings are all there."""
    agents = three(2)
    agents[0].lead(group(1), OwnedRange(record("00"), record("7f", 0xFF)))
    agents[1].lead(group(2), OwnedRange(record("80"), record("ff", 0xFF)))
    agents[0].groups[group(1)].captured = 2345
    bounds = rpc.Range(record("70"), record("7f", 0xFF))
    agents[0].groups[group(1)].transferring = rpc.TransferringInfo(rpc.Direction.OUT, group(2), bounds, 5, b"h" * 32)
    agents[2].down = True
    checker = _parse(_page(_evidence(agents, drained=frozenset({hsm(2)}))))
    text = " ".join("".join(checker.text).split())
    for said in (
        "trouble", "[0x00...-0x7fff...]", "[0x8000...-0xff...]", "led by tls://a1", "witness (drained)", "2,345",
        "does not answer", "is pending since index 5", "https://b1", "ready", "2026-12-11 (40 days)", "shows this page",
        "gone", "holds lease a-lease", "rebalance", "members down", "only one load balancer",
    ):  # fmt: skip
        assert said in text, said
    assert ("meta", {"http-equiv": "refresh", "content": "5"}) in checker.tags
    assert "2,340" in text, "the lag behind 2,345 of a member at 5"


def test_shows_how_far_its_transfers_are() -> None:
    """A transfer that runs here is listed with range, groups, step, attempt and duration."""
    low = OwnedRange(record("00"), record("7f", 0xFF))
    running = TransferProgress(REALM, group(1), group(2), low, begun_ms=1_000, step=TransferStep.OUT, attempt=3)
    checker = _parse(_page(_evidence(three(2)), replace(OWN, transfers=[running.to_wire(3_500)])))
    cells = " ".join("".join(checker.text).split())
    assert f"[0x00...-0x7fff...]{group(1).hex()[:8]}{group(2).hex()[:8]}out32.5 s" in cells
    assert "Attempt" not in _page(_evidence(three(2)))


def test_healthy_page_has_no_problems() -> None:
    """A cluster in order shows neither problems nor advice."""
    agents = three()
    agents[0].lead(group(1), FULL_RANGE)
    evidence = _evidence(
        agents,
        managers=tuple(ManagerReport(f"tls://m{number}", version="build") for number in (1, 2)),
        balancers=tuple(
            BalancerReport(f"https://b{number}", version="build", certificate_end_ms=NOW_MS + 40 * DAY_MS)
            for number in (1, 2)
        ),
    )
    page = _page(evidence)
    assert '<span class="badge">healthy</span>' in page
    assert "<h2>Problems</h2>" not in page
    assert "<h2>Advice</h2>" not in page


def test_hostile_text_stays_text() -> None:
    """Names, addresses, errors, versions and reasons from anywhere appear as they are and never as markup."""
    agents = three()
    agents[0].url = EVIL
    agents[0].lead(group(1), FULL_RANGE)
    evidence = _evidence(
        agents,
        managers=(ManagerReport(EVIL, error=EVIL), ManagerReport(EVIL, version=EVIL)),
        balancers=(BalancerReport(EVIL, error=EVIL), BalancerReport(EVIL, version=EVIL, reasons=((Code.OTHER, EVIL),))),
    )
    silent = AgentView(EVIL + "2", None, EVIL)
    evidence = replace(evidence, view=build_view([*evidence.view.agents, silent]))
    loops = [rpc.LoopRun(EVIL, 0, 1, EVIL)]
    checker = _parse(_page(evidence, Own(EVIL, EVIL, EVIL, leases=[EVIL], actions=[EVIL], loops=loops)))
    names = {tag for tag, _ in checker.tags}
    assert not names & {"script", "img", "iframe", "a", "form"}
    assert not [attrs for _, attrs in checker.tags if any(name.startswith("on") for name in attrs)]
    assert "".join(checker.text).count(EVIL) >= 10


def test_nothing_is_loaded_and_nothing_runs() -> None:
    """The page needs no script and no other request, and its policy allows only its own style sheet."""
    page = _page(_evidence(three()))
    assert not re.search(r"(src|href|url\()", page.replace("urls", ""))
    assert " style=" not in page, "the policy would ignore it"
    assert "default-src 'none'" in HEADERS["Content-Security-Policy"]


def test_bar_is_to_scale() -> None:
    """A part's place and width are its share of the key space; slivers have no number; gaps are told."""
    low, sliver = OwnedRange(record("00"), record("3f", 0xFF)), OwnedRange(record("fe"), record("fe", 0xFF))
    drawn = bar([(0, low, False), (9, sliver, False)])
    rects = [attrs for tag, attrs in _parse(drawn).tags if tag == "rect"]
    assert [(rect["x"], rect["width"], rect["class"]) for rect in rects] == [
        ("0.000%", "25.000%", "g0"),
        ("99.219%", "0.391%", "g1"),
    ]
    assert drawn.count("<text") == 1
    assert "2 ranges, 2 without an owner" in drawn
    assert "0 ranges, 1 without" in bar([])


def test_a_range_without_a_majority_looks_so() -> None:
    """Its part of the bar is striped and marked, the legend and the heading say why; others are as ever."""
    agents = three(2)
    agents[0].lead(group(1), OwnedRange(record("00"), record("7f", 0xFF)))
    agents[0].groups[group(1)].stalled_s = 4.0
    agents[1].lead(group(2), OwnedRange(record("80"), record("ff", 0xFF)))
    page = _page(_evidence(agents))
    checker = _parse(page)
    stripes = [attrs for tag, attrs in checker.tags if tag == "line" and attrs.get("class") == "stuck"]
    assert [(stripe["x1"], stripe["x2"]) for stripe in stripes] == [("0.000%", "50.000%")]
    text = " ".join("".join(checker.text).split())
    assert "striped: its group has no majority" in text
    assert "its leader reaches no majority" in text
    assert text.count("tolerates 1 more loss") == 1
    agents[1].down = agents[2].down = True
    assert "no majority: 1 of 3 members answer" in _page(_evidence(agents))
    assert "striped" not in _page(_evidence(three(2)))


def test_services_have_names_ages_and_clocks() -> None:
    """Services have names and uptimes, agents rates and times, clocks say how far off; a dead address stands once."""
    agents = three()
    agents[0].lead(group(1), FULL_RANGE)
    agents[2].down = True
    view = build_view(
        [
            AgentView(agent.url, None, "Connection refused")
            if agent.down
            else AgentView(
                agent.url,
                msgspec.structs.replace(agent.status(), uptime_s=3_700.0, latency_ms=12.34),
                clock=Reading(90_000 if agent is agents[1] else 0),
            )
            for agent in agents
        ]
    )
    managers = (ManagerReport("tls://m1", name="manager-one", uptime_s=60.0, clock=Reading(100)),)
    balancers = (BalancerReport("https://b1", name="balancer-one"),)
    evidence = replace(_evidence(agents, managers=managers, balancers=balancers), view=view)
    text = " ".join("".join(_parse(_page(evidence)).text).split())
    for said in ("balancer-one", "manager-one", "1h 1m 40s", "12.3", "+89.9 s", "1m 0s"):
        assert said in text, said
    dead = agents[2].url
    rows = text[text.index("Agents") :]
    assert rows.count(dead) == 1


async def _alive() -> tuple[bool, str]:
    return True, "ok"


async def _ready() -> Readiness:
    return Readiness()


def _app(context: ManagerContext) -> QuartTrio:
    app = make_app("m", livez=_alive, readyz=_ready, show=readiness_text, metrics=Metrics())
    StatusPage(context, "tls://m1").hook(app)
    return app


async def test_served_pages() -> None:
    """`/` is the page and `/status.json` the same verdict; one look serves everybody for a second."""
    agents = three()
    agents[0].lead(group(1), FULL_RANGE)
    context = make_context(agents)
    client = _app(context).test_client()
    page = await client.get("/")
    assert page.status_code == 200
    assert page.headers["Content-Security-Policy"] == HEADERS["Content-Security-Policy"]
    text = await page.get_data(as_text=True)
    assert "no load balancer in discovery" in text
    answer = json.loads(await (await client.get("/status.json")).get_data())
    assert answer["agents"] == 3
    assert answer["ok"] is False
    assert sorted(context.rpc.methods("status")) == [(agent.url, "status") for agent in agents]  # type: ignore[attr-defined]
    assert (await client.get("/livez")).status_code == 200


async def test_without_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that does not answer is said on the page, with status 503."""
    context = make_context(three())

    async def fail(kind: ServiceKind | None = None) -> Any:
        await trio.lowlevel.checkpoint()
        raise StoreUnavailable("disk <gone>")

    monkeypatch.setattr(context.store.discovery, "list", fail)
    client = _app(context).test_client()
    page = await client.get("/")
    assert page.status_code == 503
    assert "disk &lt;gone&gt;" in await page.get_data(as_text=True)
    assert json.loads(await (await client.get("/status.json")).get_data())["ok"] is False
