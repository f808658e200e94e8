"""The status page as HTML: pure, no script, everything escaped (manager.md 2).

Names, addresses and errors come from services and from whoever can register in discovery, so nothing reaches the page
but through `_text`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from juicebox_hsm.host.certificates import remaining_days
from juicebox_hsm.host.clocks import Reading, is_off
from juicebox_hsm.host.cluster.findings import Finding
from juicebox_hsm.host.cluster.ranges import show_range
from juicebox_hsm.host.cluster.verdict import (
    BalancerReport,
    Evidence,
    Verdict,
    cannot_commit,
    clock_offset_s,
    lag,
    moving_of,
    readings,
    transfer_age_s,
)
from juicebox_hsm.host.cluster.view import AgentView, GroupView, Member, hsm_work, owned_range
from juicebox_hsm.ids import RECORD_ID_BYTES, HsmId, OwnedRange, RealmId, uncovered
from juicebox_hsm.wire.rpc import GroupRole, LoopRun, RunningTransfer
from roles.durations import format_duration
from roles.manager.page_style import GROUP_COLOURS, STYLE
from roles.survey.shown import agent_pace, clock, led_by, short, tolerance
from roles.words import counted, moment, sentence, transfer

REFRESH_S: Final = 5
LABEL_SHARE_MIN: Final = 0.04  # of the bar's width; a number in less is not readable
TEXT_CHARS_MAX: Final = 300  # own: an error of a peer may be long
_SPACE: Final = 1 << (8 * RECORD_ID_BYTES)


@dataclass(frozen=True, slots=True)
class Own:
    """What the manager that renders the page knows of itself; `transfers` as in its status."""

    name: str
    url: str
    version: str
    leases: Sequence[str] = ()
    actions: Sequence[str] = ()
    loops: Sequence[LoopRun] = ()
    transfers: Sequence[RunningTransfer] = ()


def _text(value: object) -> str:
    """Return text that is safe between tags and in quoted attributes."""
    said = str(value)
    return html.escape(said if len(said) <= TEXT_CHARS_MAX else f"{said[:TEXT_CHARS_MAX]}...", quote=True)


def _id(value: bytes) -> str:
    """Return a short id whose whole is shown on pointing at it."""
    return f'<code title="{value.hex()}">{short(value)}</code>'


def render(evidence: Evidence, verdict: Verdict, own: Own) -> str:
    """Return the whole page."""
    view = evidence.view
    state = "healthy" if verdict.is_healthy else "trouble"
    badge = '<span class="badge">healthy</span>' if verdict.is_healthy else '<span class="badge bad">trouble</span>'
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{state} - juicebox-hsm</title>',
        f'<meta name="viewport" content="width=device-width"><meta http-equiv="refresh" content="{REFRESH_S}">',
        f"<style>{STYLE}</style></head><body>",
        f"<header><h1>Cluster</h1>{badge}<p>{_summary(evidence)}</p></header><main>",
        _lines("Problems", "problems", verdict.problems),
        _lines("Advice", "advice", verdict.advice),
        *(_realm(evidence, realm) for realm in view.realms),
        _agents(evidence),
        _balancers(evidence.balancers, evidence.now_ms),
        _managers(evidence, own),
        _work(own, evidence.now_ms),
        f"</main><footer>seen {moment(evidence.now_ms):%Y-%m-%d %H:%M:%S} UTC by {_text(own.name)},",
        f"version {_text(own.version)};",
        f"again every {REFRESH_S} s</footer></body></html>",
    ]
    return "\n".join(part for part in parts if part)


def render_trouble(message: str, own: Own) -> str:
    """Return the page for when the store cannot be read: nothing else is known."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>trouble - juicebox-hsm</title>'
        f'<meta name="viewport" content="width=device-width"><meta http-equiv="refresh" content="{REFRESH_S}">'
        f'<style>{STYLE}</style></head><body><header><h1>Cluster</h1><span class="badge bad">trouble</span></header>'
        f'<main><section class="problems"><ul class="lines"><li>the store cannot be read: {_text(message)}</li></ul>'
        f"</section></main><footer>{_text(own.name)}, version {_text(own.version)}</footer></body></html>"
    )


def _summary(evidence: Evidence) -> str:
    view = evidence.view
    counts = (
        (len(view.realms), "realm"),
        (len(view.groups), "group"),
        (len(view.hsms), "HSM"),
        (len(evidence.managers), "manager"),
        (len(evidence.balancers), "load balancer"),
    )
    rate = sum(group.requests_per_s for group in view.groups.values())
    told = ", ".join(counted(count, name) for count, name in counts)
    return f"{told}; {rate:.1f} requests/s"


def _lines(title: str, kind: str, findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    items = "".join(f"<li>{_text(sentence(found))}</li>" for found in findings)
    return f'<section class="{kind}"><h2>{title}</h2><ul class="lines">{items}</ul></section>'


def _table(columns: Sequence[tuple[str, bool]], rows: Iterable[tuple[str, Sequence[str]]], kind: str = "tall") -> str:
    """Return a table; a column is (title, numeric), a row (class, cells of finished HTML).

    On a narrow screen a `tall` table shows a line per cell, a `wide` one stays a table.
    """
    head = "".join(f"<th{' class=n' if numeric else ''}>{title}</th>" for title, numeric in columns)
    body = []
    for row, cells in rows:
        tds = "".join(
            f'<td data-label="{title}"{" class=n" if numeric else ""}><span>{cell}</span></td>'
            for (title, numeric), cell in zip(columns, cells, strict=True)
        )
        body.append(f'<tr class="{row}">{tds}</tr>' if row else f"<tr>{tds}</tr>")
    return f"<table class={kind}><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _realm(evidence: Evidence, realm: RealmId) -> str:
    groups = sorted(
        evidence.view.groups_of(realm),
        key=lambda group: (group.owned_range is None, group.owned_range.start if group.owned_range else b"", group.id),
    )
    drawn = [
        (number, group.owned_range, cannot_commit(group))
        for number, group in enumerate(groups)
        if group.owned_range is not None
    ]
    details = "".join(_group(evidence, number, group) for number, group in enumerate(groups))
    return f"<section><h2>Realm <code>{realm.hex()}</code></h2>{bar(drawn)}{details}</section>"


def bar(parts: Sequence[tuple[int, OwnedRange, bool]]) -> str:
    """Return the key space as a bar: numbered parts in their groups' colours, striped when its group is stuck.

    What nobody owns shows as background.
    """
    shapes = []
    for number, owned, stuck in parts:
        start = int.from_bytes(owned.start, "big") / _SPACE
        width = (int.from_bytes(owned.end, "big") + 1) / _SPACE - start
        label = f"group {number + 1}: {show_range(owned)}{', refuses its clients: no majority' if stuck else ''}"
        shapes.append(
            f'<rect class="g{number % GROUP_COLOURS}" x="{100 * start:.3f}%" y="0" width="{100 * width:.3f}%" '
            f'height="100%"><title>{_text(label)}</title></rect>'
        )
        if stuck:
            shapes.append(
                f'<line class="stuck" x1="{100 * start:.3f}%" x2="{100 * (start + width):.3f}%" y1="50%" y2="50%"/>'
            )
        if start > 0:
            shapes.append(f'<line x1="{100 * start:.3f}%" x2="{100 * start:.3f}%" y1="0" y2="100%"/>')
        if width >= LABEL_SHARE_MIN:
            mark = f"{number + 1} \u2716" if stuck else f"{number + 1}"
            shapes.append(f'<text x="{100 * (start + width / 2):.3f}%" y="50%">{mark}</text>')
    missing = uncovered([owned for _, owned, _ in parts])
    refusing = sum(stuck for _, _, stuck in parts)
    told = f"key space: {len(parts)} ranges" + (f", {len(missing)} without an owner" if missing else "")
    told += f", {refusing} without a majority" if refusing else ""
    if missing or refusing:
        ways = [(missing, "red: nobody serves it"), (refusing, "striped: its group has no majority")]
        legend = "; ".join(way for applies, way in ways if applies)
        shown = f'<p class="legend bad">{legend}</p>'
    else:
        shown = ""
    ticks = "".join(f"<span>{tick}</span>" for tick in ("00", "40", "80", "c0", "ff"))
    return (
        f'<svg class="bar" role="img" aria-label="{_text(told)}">{"".join(shapes)}</svg>'
        f'<div class="axis" aria-hidden="true">{ticks}</div>{shown}'
    )


def _group(evidence: Evidence, number: int, group: GroupView) -> str:
    owned = group.owned_range
    colour = f" g{number % GROUP_COLOURS}" if owned is not None else ""
    leader = group.leader
    led = f"<span{' class=bad' if leader is None else ''}>{_text(led_by(group))}</span>"
    holds = f"<span{' class=bad' if cannot_commit(group) else ''}>{_text(tolerance(group))}</span>"
    pending = moving_of(group)
    age_s = transfer_age_s(evidence, group)
    moving = "" if pending is None else f'<span class="moving">{_text(transfer(pending))}, {age_s or 0:.0f} s</span>'
    range_text = "owns nothing" if owned is None else _text(show_range(owned))
    title = (
        f'<h3><i class="dot{colour}">{number + 1}</i> group {_id(group.id)} <span>{range_text}</span>'
        f"{led}{holds}<span>{group.requests_per_s:,.1f} requests/s</span>{moving}</h3>"
    )
    columns = (
        ("HSM", False), ("Agent", False), ("Role", False), ("Captured (index)", True), ("Behind (entries)", True),
        ("Queued (entries)", True),
    )  # fmt: skip
    rows = [_member(evidence, group, hsm) for hsm in group.configuration]
    return f'<div class="group">{title}{_table(columns, rows, "wide")}</div>'


def _member(evidence: Evidence, group: GroupView, hsm: HsmId) -> tuple[str, list[str]]:
    member = group.member(hsm)
    if member is None:
        return "", [_id(hsm), '<span class="bad">does not answer</span>', "", "", "", ""]
    behind = lag(group, member)
    role = _text(_role(member)) + (" (drained)" if hsm in evidence.drained else "")
    return ("lead" if member.leads else ""), [
        _id(hsm),
        _text(member.name),
        role,
        "" if member.captured_index is None else f"{member.captured_index:,}",
        "" if behind is None else f"{behind:,}",
        "" if member.agent is None else f"{member.agent.append_queue_len:,}",
    ]


def _role(member: Member) -> str:
    names = {GroupRole.LEADER: "leader", GroupRole.WITNESS: "witness", GroupRole.STEPPING_DOWN: "stepping down"}
    return names[member.info.role.name]


def _agents(evidence: Evidence) -> str:
    columns = (
        ("Agent", False), ("Address", False), ("HSM", False), ("Realm", False), ("Up", True), ("Requests/s", True),
        ("Mean time (ms)", True), ("Work (units)", True), ("Clock", True), ("Version", False),
    )  # fmt: skip
    rows = [("", _agent(evidence, agent)) for agent in evidence.view.agents]
    return f"<section><h2>Agents</h2>{_table(columns, rows)}</section>"


def _agent(evidence: Evidence, agent: AgentView) -> list[str]:
    address = f"<code>{_text(agent.url)}</code>"
    told = agent.status
    if told is None:
        return [f'<span class="bad">does not answer: {_text(agent.error)}</span>', address, *[""] * 8]
    rate, latency_ms = agent_pace(told)
    up = format_duration(told.uptime_s)
    latency = "" if latency_ms is None else f"{latency_ms:,.1f}"
    ends = [_clock(evidence, agent.clock), _text(told.build)]
    hsm = None if told.hsm is None else evidence.view.hsms.get(HsmId(told.hsm.id))
    if hsm is None:
        return [_text(told.name), address, '<span class="bad">does not answer</span>', "", up, "", "", "", *ends]
    realm = '<span class="soft">none</span>' if hsm.realm is None else _id(hsm.realm)
    work = f"{hsm_work(evidence.view, hsm):,}"
    return [_text(told.name), address, _id(hsm.id), realm, up, f"{rate:,.1f}", latency, work, *ends]


def _clock(evidence: Evidence, reading: Reading | None) -> str:
    told = clock(clock_offset_s(evidence, reading))
    off = reading is not None and is_off(reading, readings(evidence))
    return f'<span class="bad">{told}</span>' if off else told


def _balancers(balancers: Sequence[BalancerReport], now_ms: int) -> str:
    columns = (
        ("Balancer", False), ("Address", False), ("State", False), ("Certificate ends", False), ("Version", False),
    )  # fmt: skip
    rows = []
    for balancer in balancers:
        if balancer.error:
            state = f'<span class="bad">{_text(balancer.error)}</span>'
        elif balancer.reasons:
            state = f'<span class="bad">{"<br>".join(_text(reason) for _, reason in balancer.reasons)}</span>'
        else:
            state = '<span class="good">ready</span>'
        end = ""
        end_ms = balancer.certificate_end_ms
        if end_ms is not None:
            end = f"{moment(end_ms):%Y-%m-%d} ({remaining_days(end_ms, now_ms):.0f} days)"
        address = f"<code>{_text(balancer.url)}</code>"
        rows.append(("", [_text(balancer.name), address, state, end, _text(balancer.version)]))
    table = _table(columns, rows) if rows else '<p class="bad">none</p>'
    return f"<section><h2>Load balancers</h2>{table}</section>"


def _managers(evidence: Evidence, own: Own) -> str:
    columns = (
        ("Manager", False), ("Address", False), ("State", False), ("Up", True), ("Clock", True), ("Version", False),
    )  # fmt: skip
    rows = []
    for manager in evidence.managers:
        state = '<span class="good">answers</span>'
        if manager.error:
            state = f'<span class="bad">{_text(manager.error)}</span>'
        elif manager.url == own.url:
            state = '<span class="good">shows this page</span>'
        up = "" if manager.uptime_s is None else format_duration(manager.uptime_s)
        cells = [_text(manager.name), f"<code>{_text(manager.url)}</code>", state, up]
        rows.append(("", [*cells, _clock(evidence, manager.clock), _text(manager.version)]))
    return f"<section><h2>Managers</h2>{_table(columns, rows)}</section>"


def _work(own: Own, now_ms: int) -> str:
    """Return what this manager is doing: actions, leases, and when its loops ran."""
    under_way = [*own.actions, *(f"holds lease {lease}" for lease in own.leases)]
    items = "".join(f"<li><code>{_text(line)}</code></li>" for line in under_way)
    doing = f'<ul class="lines">{items}</ul>' if items else '<p class="soft">nothing under way</p>'
    columns = (("Loop", False), ("Last run", False), ("Took", True), ("Result", False))
    rows = []
    for ran in own.loops:
        ago_s = max(0, now_ms - ran.at_ms) / 1000
        result = f'<span class="bad">{_text(ran.error)}</span>' if ran.error else '<span class="good">ok</span>'
        rows.append(("", [_text(ran.name), f"{ago_s:.0f} s ago", f"{ran.took_ms} ms", result]))
    loops = _table(columns, rows) if rows else ""
    return f"<section><h2>This manager</h2>{doing}{_running(own.transfers)}{loops}</section>"


def _running(transfers: Sequence[RunningTransfer]) -> str:
    """Return the transfers under way here with the step each is at."""
    if not transfers:
        return ""
    columns = (("Transfer", False), ("From", False), ("To", False), ("Step", False), ("Attempt", True), ("For", True))
    rows = []
    for running in transfers:
        moved = _text(show_range(owned_range(running.range)))
        cells = [moved, _id(running.source), _id(running.destination), running.step.value]
        rows.append(("", [*cells, f"{running.attempt:,}", f"{running.age_s:.1f} s"]))
    return _table(columns, rows)
