"""The health verdict: every kind of trouble is told in one line, and a healthy cluster in none."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from juicebox_hsm.host.clocks import DAY_MS, Reading
from juicebox_hsm.host.cluster.findings import OfService
from juicebox_hsm.host.cluster.verdict import BalancerReport, Evidence, ManagerReport, judge
from juicebox_hsm.host.cluster.view import AgentView, build_view
from juicebox_hsm.host.codes import Code, code_of
from juicebox_hsm.ids import FULL_RANGE, OwnedRange
from juicebox_hsm.wire import rpc
from roles.survey.document import verdict_json
from roles.survey.evidence import read_manager_status
from roles.words import sentence
from tests.host.cluster.agents import REALM, FakeAgent, FakeGroup, group, hsm, record, three, view_of
from tests.host.test_readiness import every_reason

NOW_MS = 1_793_491_200_000  # 1 November 2026
END_MS = NOW_MS + 60 * DAY_MS
MANAGERS = (ManagerReport("tls://m1", version="build"), ManagerReport("tls://m2", version="build"))
BALANCERS = tuple(BalancerReport(f"https://b{number}", version="build", certificate_end_ms=END_MS) for number in (1, 2))


def _led() -> list[FakeAgent]:
    agents = three()
    agents[0].lead(group(1), FULL_RANGE)
    return agents


def _evidence(agents: list[FakeAgent], **changes: object) -> Evidence:
    found = Evidence(view_of(agents), MANAGERS, BALANCERS, NOW_MS, own_certificate_end_ms=END_MS)
    return replace(found, **changes)  # type: ignore[arg-type]  # names of fields


def _codes(evidence: Evidence) -> list[Code]:
    return [found.code for found in judge(evidence).findings]


def _problems(evidence: Evidence) -> tuple[str, ...]:
    return tuple(sentence(found) for found in judge(evidence).problems)


def _advice(evidence: Evidence) -> tuple[str, ...]:
    return tuple(sentence(found) for found in judge(evidence).advice)


def _only(evidence: Evidence) -> str:
    """Return the single problem."""
    problems = _problems(evidence)
    assert len(problems) == 1, problems
    return problems[0]


def test_healthy() -> None:
    """Nothing wrong: no problem and no advice."""
    verdict = judge(_evidence(_led()))
    assert verdict.is_healthy
    assert verdict.advice == ()


def test_silent_agent_and_member() -> None:
    """An agent that does not answer is named, and so is the member behind it; a lost majority is said."""
    agents = _led()
    agents[2].down = True
    problems = _problems(_evidence(agents))
    assert problems[0] == "agent tls://a3 does not answer: down"
    assert problems[1].endswith(f"members down: {hsm(3).hex()}")
    agents[1].down = True
    assert "fewer than a majority" in _problems(_evidence(agents))[2]


def test_silent_hsm() -> None:
    """An agent without its HSM is a problem of its own."""
    agents = _led()
    view = build_view([AgentView(agent.url, agent.status()) for agent in agents[:2]])
    gone = AgentView("tls://a3", replace_hsm(agents[2].status()))
    view = build_view([*view.agents, gone])
    assert _problems(_evidence(agents, view=view))[0] == "agent tls://a3: its HSM does not answer"


def replace_hsm(status: rpc.AgentStatus) -> rpc.AgentStatus:
    """Return a status whose HSM is gone."""
    return rpc.AgentStatus(status.uptime_s, None, status.name, status.build, [])


def test_no_agents() -> None:
    """An empty discovery is no healthy cluster."""
    assert _only(_evidence([])) == "no agent in discovery"


def test_leaderless_group() -> None:
    """A group nobody leads serves nothing: both are told."""
    problems = _problems(_evidence(three()))
    assert problems[0].endswith("nobody leads")
    assert problems[1].endswith("nobody serves [0x00...-0xff...]")


def test_a_leader_that_cannot_commit() -> None:
    """A leader's own word that it has no majority is a problem, though everybody answers us; the range is named."""
    agents = _led()
    known = agents[0].groups[group(1)]
    known.alive, known.stalled_s = 1, 12.4
    assert _codes(_evidence(agents)) == [Code.CANNOT_COMMIT]
    assert _only(_evidence(agents)) == (
        f"realm {REALM.hex()} group {group(1).hex()} ([0x00...-0xff...]): cannot commit for 12 s, "
        "1 of 3 members answer its leader tls://a1; clients are refused until a majority is back"
    )


def _copy() -> list[FakeAgent]:
    """Return a healthy group of three, and a process with a copy of the third one's HSM."""
    agents = _led()
    return [*agents, replace(agents[2], url="tls://copy")]


def test_a_copy_of_an_hsm() -> None:
    """Two processes with one HSM are a problem with both addresses; one process at two addresses is none."""
    assert _codes(_evidence(_copy())) == [Code.HSM_TWICE]
    said = _only(_evidence(_copy()))
    assert said.startswith(f"HSM {hsm(3).hex()} runs at tls://a3 and at tls://copy: one is a copy. Stop it for good")
    renamed = _copy()
    renamed[3].instance = b"tls://a3"
    assert _codes(_evidence(renamed)) == []
    moved = _copy()
    moved[2].down = True
    assert _codes(_evidence(moved)) == [Code.AGENT_SILENT], "the address it had is dead"


def test_range_without_owner_and_range_with_two() -> None:
    """Holes and overlaps of the key space are named by their range."""
    agents = three(2)
    agents[0].lead(group(1), OwnedRange(record("00"), record("7f", 0xFF)))
    agents[1].lead(group(2), OwnedRange(record("90"), record("ff", 0xFF)))
    assert _only(_evidence(agents)).endswith("nobody serves [0x8000...-0x8fff...]")
    agents[1].groups[group(2)].owned = OwnedRange(record("70"), record("ff", 0xFF))
    assert _only(_evidence(agents)).endswith("two groups claim [0x7000...-0x7fff...]")


@pytest.mark.parametrize(
    ("managers", "says"),
    [
        ((), "no cluster manager"),
        (MANAGERS[:1], "only one cluster manager"),
        ((MANAGERS[0], ManagerReport("tls://m2", error="no route")), "manager tls://m2 does not answer: no route"),
    ],
)
def test_managers(managers: tuple[ManagerReport, ...], says: str) -> None:
    """None, one, and a silent one are each a problem."""
    assert says in _only(_evidence(_led(), managers=managers))


def test_pending_transfer_by_age() -> None:
    """A transfer under way is advice, one older than a minute a problem; without managers nobody finishes it."""
    agents = _led()
    marker = rpc.TransferringInfo(
        rpc.Direction.OUT, group(2), rpc.Range(record("00"), record("0f", 0xFF)), 5, b"h" * 32
    )
    agents[0].groups[group(1)].transferring = marker
    young = _evidence(agents)
    assert judge(young).is_healthy
    assert "is pending since index 5" in _advice(young)[0]
    old = ManagerReport("tls://m1", version="build", pending={(REALM, group(1)): 61.0})
    assert _only(_evidence(agents, managers=(old, MANAGERS[1]))).endswith("is pending since index 5 for 61 s")
    assert "no manager answers" in _problems(_evidence(agents, managers=()))[-1]


def test_an_agent_in_trouble() -> None:
    """What an agent tries again is a problem that names the agent; programs have its code."""
    agents = _led()
    told = rpc.Told("log-not-followed", f"log {group(1).hex()}: database is locked")
    status = msgspec.structs.replace(agents[0].status(), troubles=(told, rpc.Told("of-tomorrow", "x")))
    view = build_view([AgentView("tls://a1", status), *(AgentView(a.url, a.status()) for a in agents[1:])])
    evidence = _evidence(agents, view=view)
    first, second = judge(evidence).problems
    assert sentence(first) == f"agent tls://a1 is not ready: log {group(1).hex()}: database is locked"
    assert [found.because for found in (first, second) if isinstance(found, OfService)] == [
        Code.LOG_NOT_FOLLOWED,
        Code.OTHER,
    ]


def test_balancers() -> None:
    """What `/readyz` says, silence, and the end of a certificate are told with the balancer's address."""
    one = replace(BALANCERS[0], reasons=((Code.SECRETS_STALE, "secrets stale for 60s"),))
    evidence = _evidence(_led(), balancers=(one, BALANCERS[1]))
    assert _only(evidence).endswith("is not ready: secrets stale for 60s")
    told = verdict_json(evidence, judge(evidence))["reasons"]
    assert isinstance(told, list)
    assert (told[0]["code"], told[0]["because"]) == ("load-balancer-not-ready", "secrets-stale")
    silent = BalancerReport("https://b1", error="refused")
    assert "does not answer: refused" in _only(_evidence(_led(), balancers=(silent, BALANCERS[1])))
    soon = replace(BALANCERS[0], certificate_end_ms=NOW_MS + 19 * DAY_MS)
    assert _only(_evidence(_led(), balancers=(soon, BALANCERS[1]))).endswith("ends on 2026-11-20, in 19 days")
    over = replace(BALANCERS[0], certificate_end_ms=NOW_MS - 1 * DAY_MS)
    assert _only(_evidence(_led(), balancers=(over, BALANCERS[1]))).endswith("ended on 2026-10-31")
    assert "no load balancer" in _only(_evidence(_led(), balancers=()))
    assert _advice(_evidence(_led(), balancers=BALANCERS[:1]))[0].startswith("only one load balancer")


@pytest.mark.parametrize(
    ("days", "says"),
    [(19, "ends on 2026-11-20, in 19 days"), (-1, "ended on 2026-10-31"), (21, ""), (None, "")],
)
def test_cluster_certificates(days: int | None, says: str) -> None:
    """The end of an agent's and of a manager's cluster certificate is told in time, with who it is that has it."""
    end_ms = None if days is None else NOW_MS + days * DAY_MS
    agents = _led()
    status = msgspec.structs.replace(agents[0].status(), certificate_end_ms=end_ms)
    view = build_view([AgentView("tls://a1", status), *(AgentView(a.url, a.status()) for a in agents[1:])])
    problems = _problems(_evidence(agents, view=view))
    assert problems == ((f"agent tls://a1: its cluster certificate {says}",) if says else ())
    managers = (replace(MANAGERS[0], certificate_end_ms=end_ms), MANAGERS[1])
    problems = _problems(_evidence(_led(), managers=managers))
    assert problems == ((f"manager tls://m1: its cluster certificate {says}",) if says else ())


def test_an_older_agent_tells_no_end() -> None:
    """A status without the end of the certificate, as older agents send it, is read and judged as before."""
    status = _led()[0].status()
    older = msgspec.msgpack.decode(msgspec.msgpack.encode(status))
    older = older[: rpc.AgentStatus.__struct_fields__.index("certificate_end_ms")]
    assert msgspec.convert(older, rpc.AgentStatus).certificate_end_ms is None


@pytest.mark.parametrize(
    ("last", "says"),
    [
        (0, "is empty, its HSM captured index 7"),
        (3, "ends at index 3, its HSM captured index 7"),
        (7, "has another entry at index 7 than its HSM captured"),
    ],
)
def test_a_store_that_the_hsm_does_not_know_is_named(last: int, says: str) -> None:
    """Not just that nobody leads, but why: the store is older than what an HSM captured, or another one."""
    problems = _problems(_another_store(last))
    told = f"the log of group {group(1).hex()} {says}: an older or another store; see `store check --hsm-dir`"
    assert problems == (f"agent tls://a1: {told}",)


def test_damage_is_named_once() -> None:
    """All agents read the same store: a damaged place is one problem, that of another group another one."""
    problems = _problems(_damaged())
    what = f"the log row of entry 7 of group {group(1).hex()} is damaged or missing; run `store check`"
    where = "the event 3 of tenant acme is damaged or missing; run `store check`"
    assert problems == (f"{what} (met by agent tls://a1)", f"{where} (met by agent tls://a2)")


def _damaged() -> Evidence:
    agents = _led()
    row = rpc.StoreDamage(rpc.DamageKind.LOG, "of entry 7", group(1))
    event = rpc.StoreDamage(rpc.DamageKind.EVENT, "3 of tenant acme")
    met = ((row,), (row, event), ())
    statuses = [msgspec.structs.replace(a.status(), damages=d) for a, d in zip(agents, met, strict=True)]
    views = [AgentView(a.url, status) for a, status in zip(agents, statuses, strict=True)]
    return _evidence(agents, view=build_view(views))


def _another_store(last: int) -> Evidence:
    agents = _led()
    status = msgspec.structs.replace(agents[0].status(), logs_behind=(rpc.LogBehind(group(1), 7, last),))
    views = [AgentView("tls://a1", status), *(AgentView(a.url, a.status()) for a in agents[1:])]
    return _evidence(agents, view=build_view(views))


def test_a_clock_that_is_off_is_named() -> None:
    """The service or the operator whose clock is far from the middle, by kind and address, and nobody else."""
    agents, right, wrong = _led(), Reading(7_000), Reading(7_000 + 1_500_000)

    def told(of_agent: Reading | None, of_manager: Reading | None, own: Reading | None) -> tuple[str, ...]:
        clocks = [of_agent, right, right]
        views = [AgentView(a.url, a.status(), clock=clock) for a, clock in zip(agents, clocks, strict=True)]
        managers = (replace(MANAGERS[0], clock=of_manager), MANAGERS[1])
        return _problems(_evidence(agents, view=build_view(views), managers=managers, own_clock=own))

    assert told(right, right, right) == told(None, None, None) == ()
    assert told(wrong, right, right) == ("agent tls://a1: its clock is 1,500 s ahead of the others'",)
    assert told(right, Reading(-20_000), None) == ("manager tls://m1: its clock is 27 s behind the others'",)
    assert told(right, right, wrong) == ("your clock is 1,500 s ahead of the others'",)


@pytest.mark.parametrize("sent", [-1, 1 << 62])
def test_an_end_that_is_no_moment(sent: int) -> None:
    """Whatever a peer sends as the end of its certificate, the verdict is made."""
    status = rpc.ManagerStatus("{}", version="build", certificate_end_ms=sent)
    assert read_manager_status("tls://m1", status) == ManagerReport("tls://m1", version="build")
    agents = _led()
    told = msgspec.structs.replace(agents[0].status(), certificate_end_ms=sent)
    view = build_view([AgentView("tls://a1", told), *(AgentView(a.url, a.status()) for a in agents[1:])])
    assert judge(_evidence(agents, view=view)).is_healthy


def test_balancer_warnings() -> None:
    """What a serving balancer warns of in /readyz is a problem that names it."""
    warned = replace(
        BALANCERS[0], warnings=((Code.CERTIFICATE, "the cluster certificate ends on 2026-11-20, in 19 days"),)
    )
    assert _only(_evidence(_led(), balancers=(warned, BALANCERS[1]))) == (
        "load balancer https://b1: the cluster certificate ends on 2026-11-20, in 19 days"
    )


def test_own_certificate() -> None:
    """The operator is told that the certificate in use ends."""
    near = NOW_MS + 2 * DAY_MS
    assert "operator's certificate ends" in _only(_evidence(_led(), own_certificate_end_ms=near))


def test_version_skew() -> None:
    """Services of different versions are told with how many run which."""
    balancers = (BALANCERS[0], replace(BALANCERS[1], version="newer"))
    assert _only(_evidence(_led(), balancers=balancers)) == (
        "services run different versions: build (3 agents, 2 managers, 1 load balancer), newer (1 load balancer)"
    )


def test_outbox_backlog() -> None:
    """Events that do not leave are told by number and age."""
    agents = _led()
    status = agents[0].status()
    late = rpc.AgentStatus(1.0, status.hsm, status.name, status.build, status.groups, rpc.OutboxInfo(7, 61.0))
    view = build_view([AgentView("tls://a1", late), *(AgentView(a.url, a.status()) for a in agents[1:])])
    assert _only(_evidence(agents, view=view)) == "agent tls://a1: 7 unpublished events, the oldest 61 s"


def test_advice_on_switches_and_members() -> None:
    """A drained HSM, paused rebalancing, a small group and a member far behind need nobody now, and are said."""
    agents = [FakeAgent("tls://a1", hsm(1)), FakeAgent("tls://a2", hsm(2))]
    for agent in agents:
        agent.groups = {group(1): three()[0].groups[group(1)].__class__([hsm(1), hsm(2)])}
    agents[0].groups[group(1)].captured = 2000
    agents[0].lead(group(1), FULL_RANGE)
    evidence = _evidence(agents, drained=frozenset({hsm(2)}), rebalancing_paused=True)
    assert judge(evidence).is_healthy
    text = "\n".join(_advice(evidence))
    for said in ("is drained", "paused", "2 members and tolerates 0", f"{hsm(2).hex()} is 1995 entries behind"):
        assert said in text
    assert len(_advice(evidence)) == 4


def test_an_ended_group_is_no_trouble() -> None:
    """A retired group that nobody leads, with members that are gone, needs nobody; who still knows it is said."""
    agents = _led()
    agents[0].groups[group(2)] = FakeGroup([hsm(1), hsm(9), hsm(8)], ended=True)
    evidence = _evidence(agents)
    assert judge(evidence).is_healthy
    [told] = _advice(evidence)
    assert "has been retired" in told
    assert hsm(1).hex() in told
    assert hsm(9).hex() not in told
    agents[0].groups[group(2)].ended = False
    assert not judge(_evidence(agents)).is_healthy, "the same group before its end"


@pytest.mark.parametrize(("size", "realm_hsms", "is_problem"), [
    (1, 1, False), (1, 2, False), (2, 2, False), (1, 3, True), (2, 3, True), (4, 5, True), (3, 5, False), (5, 5, False),
])  # fmt: skip
def test_too_few_members(size: int, realm_hsms: int, is_problem: bool) -> None:
    """A group that serves with one member or an even number is trouble where the realm has HSMs for a better one."""
    members: list[bytes] = [hsm(number) for number in range(1, size + 1)]
    agents = [FakeAgent(f"tls://a{number}", hsm(number)) for number in range(1, realm_hsms + 1)]
    for agent in agents[:size]:
        agent.groups = {group(1): FakeGroup(list(members))}
    agents[0].lead(group(1), FULL_RANGE)
    found = [code for code in _codes(_evidence(agents)) if code.word == "too-few-members"]
    said = [line for line in (*_problems(_evidence(agents)), *_advice(_evidence(agents))) if "serves with" in line]
    assert found == ([Code.TOO_FEW_MEMBERS] if is_problem else [Code.FEW_MEMBERS] if size < 3 else [])
    assert bool(said) == (is_problem or size < 3)
    agents[0].groups[group(1)].owned = None  # the group a realm began with, emptied: it serves nothing
    assert not any("serves with" in line for line in _problems(_evidence(agents)))


def _trouble_of_every_kind() -> list[Evidence]:
    """Return evidence that together provokes every line a verdict has."""
    low, high = OwnedRange(record("00"), record("7f", 0xFF)), OwnedRange(record("70"), record("ef", 0xFF))
    agents = [FakeAgent(f"tls://a{number}", hsm(number)) for number in (1, 2, 3)]
    pair: list[bytes] = [hsm(1), hsm(2)]
    for agent in agents[:2]:
        agent.groups = {group(1): FakeGroup(list(pair)), group(2): FakeGroup(list(pair)), group(3): FakeGroup(pair)}
    agents[0].groups[group(1)].captured = 2000
    agents[0].lead(group(1), low).lead(group(2), high)
    marker = rpc.TransferringInfo(
        rpc.Direction.OUT, group(2), rpc.Range(record("00"), record("0f", 0xFF)), 5, b"h" * 32
    )
    agents[0].groups[group(1)].transferring = marker
    status = agents[2].status()
    trouble = (rpc.Told("store", "store: down"),)
    silent_hsm = rpc.AgentStatus(1.0, None, "a3", "newer", [], rpc.OutboxInfo(7, 61.0), troubles=trouble)
    view = build_view([*(AgentView(a.url, a.status()) for a in agents[:2]), AgentView("tls://a3", silent_hsm),
                       AgentView("tls://a4", None, "down"), AgentView("tls://a5", status)])  # fmt: skip
    busy = Evidence(
        view, (ManagerReport("tls://m1", error="down"),),
        (BalancerReport("https://b1", error="down"),
         BalancerReport("https://b2", certificate_end_ms=NOW_MS, reasons=((Code.SECRETS_STALE, "secrets stale"),),
                        warnings=((Code.OTHER, "x"),))),
        NOW_MS, frozenset({hsm(2)}), rebalancing_paused=True, own_certificate_end_ms=NOW_MS + DAY_MS,
    )  # fmt: skip
    lost = three()
    lost[2].down = True
    half = three()
    half[1].down = half[2].down = True
    stalled = _led()
    stalled[0].groups[group(1)].stalled_s = 2.0
    alone = FakeAgent("tls://a1", hsm(1), groups={group(1): FakeGroup([hsm(1)])}).lead(group(1), FULL_RANGE)
    ended = three()
    for agent in ended:
        agent.groups[group(1)].ended = True
    return [
        busy,
        _evidence(ended),
        _evidence([alone]),
        replace(busy, view=build_view([]), managers=(), balancers=()),
        _evidence(lost),
        _evidence(half),
        _evidence(stalled),
        _evidence(_copy()),
        _evidence(_led(), managers=(replace(MANAGERS[0], clock=Reading(0)), MANAGERS[1]), own_clock=Reading(60_000)),
        _another_store(3),
        _damaged(),
        replace(busy, balancers=BALANCERS[:1]),
    ]


def test_every_code_is_found_and_has_a_sentence() -> None:
    """No code is left that nothing yields, none lacks a sentence, and each verdict lists its problems before advice."""
    evidences = _trouble_of_every_kind()
    own = {reason.code for reason in every_reason()}
    assert {code for evidence in evidences for code in _codes(evidence)} | own == set(Code)
    for evidence in evidences:
        for found in judge(evidence).findings:
            assert sentence(found)
    told = verdict_json(evidences[0], judge(evidences[0]))["reasons"]
    assert isinstance(told, list)
    assert {
        "code": "rebalancing-paused",
        "severity": "advice",
        "because": None,
        "text": "periodic rebalancing is paused; resume it with `cluster rebalance --resume`",
    } in told
    assert len(told) == len(judge(evidences[0]).findings)
    severities = [reason["severity"] for reason in told]
    assert severities == sorted(severities, reverse=True), "problems first"


def test_words_of_codes_are_told_apart_by_severity() -> None:
    """A word and a severity name one code; another service's word is read as the graver one, a strange one as other."""
    assert len({(code.word, code.severity) for code in Code}) == len(Code)
    assert code_of("too-few-members") is Code.TOO_FEW_MEMBERS
    assert code_of("transfer-pending") is Code.TRANSFER_STUCK
    assert code_of("certificate") is Code.CERTIFICATE
    assert code_of("") is code_of("no such thing") is Code.OTHER


def test_reading_a_managers_status() -> None:
    """The oldest transfer of a group counts; a manager of an older version, whose status is JSON, still answers."""
    seen = tuple(rpc.PendingTransfer(REALM, group(1), age_s) for age_s in (2.5, 1.0))
    found = read_manager_status("tls://m", rpc.ManagerStatus("{}", version="1", pending=seen))
    assert found == ManagerReport("tls://m", version="1", pending={(REALM, group(1)): 2.5})
    older = msgspec.convert(["ManagerStatus", '{"version": "0", "pending": []}'], rpc.ManagerStatus)
    assert read_manager_status("tls://m", older) == ManagerReport("tls://m")
