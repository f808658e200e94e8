"""The verdict as programs read it: `cluster status --json` and `/status.json` of a manager (docs/json.md)."""

from __future__ import annotations

from juicebox_hsm.host.cluster.findings import Finding, OfService
from juicebox_hsm.host.cluster.verdict import Evidence, Verdict, cannot_commit, clock_offset_s
from juicebox_hsm.host.cluster.view import GroupView
from roles.survey.shown import agent_pace
from roles.words import sentence


def verdict_json(evidence: Evidence, verdict: Verdict) -> dict[str, object]:
    """Return the document."""
    view = evidence.view
    found = (*verdict.problems, *verdict.advice)
    return {
        "ok": verdict.is_healthy,
        "problems": [sentence(one) for one in verdict.problems],
        "advice": [sentence(one) for one in verdict.advice],
        "reasons": [_reason(one) for one in found],
        "agents": len(view.agents),
        "hsms": len(view.hsms),
        "managers": len(evidence.managers),
        "load_balancers": len(evidence.balancers),
        "realms": len(view.realms),
        "groups": len(view.groups),
        "group_health": [_group(group) for _, group in sorted(view.groups.items())],
        "services": _services(evidence),
    }


def _group(group: GroupView) -> dict[str, object]:
    leader, owned = group.leader, group.owned_range
    return {
        "realm": group.realm.hex(),
        "group": group.id.hex(),
        "owned_range": None if owned is None else {"start": owned.start.hex(), "end": owned.end.hex()},
        "leader": None if leader is None else leader.hsm.hex(),
        "members": len(group.configuration),
        "members_answering": len(group.members),
        "losses_tolerated": group.losses_tolerated,
        "cannot_commit": cannot_commit(group),
        "requests_per_s": round(group.requests_per_s, 2),
    }


def _services(evidence: Evidence) -> list[dict[str, object]]:
    """Return every service in discovery; what is not known of it is None."""
    found: list[dict[str, object]] = []
    for agent in evidence.view.agents:
        told = agent.status
        about = _service("agent", agent.url, agent.error, "" if told is None else told.name)
        if told is not None:
            rate, latency_ms = agent_pace(told)
            about |= {"version": told.build, "uptime_s": round(told.uptime_s, 1), "requests_per_s": round(rate, 2)}
            about["latency_ms"] = None if latency_ms is None else round(latency_ms, 1)
        found.append(about | {"clock_offset_s": clock_offset_s(evidence, agent.clock)})
    for manager in evidence.managers:
        about = _service("manager", manager.url, manager.error, manager.name)
        about |= {"version": manager.version or None, "clock_offset_s": clock_offset_s(evidence, manager.clock)}
        about["uptime_s"] = None if manager.uptime_s is None else round(manager.uptime_s, 1)
        found.append(about)
    for balancer in evidence.balancers:
        about = _service("lb", balancer.url, balancer.error, balancer.name)
        found.append(about | {"version": balancer.version or None})
    return found


def _service(kind: str, url: str, error: str, name: str) -> dict[str, object]:
    unknown = dict.fromkeys(("version", "uptime_s", "requests_per_s", "latency_ms", "clock_offset_s"))
    return {"kind": kind, "url": url, "name": name or None, "error": error or None, **unknown}


def _reason(found: Finding) -> dict[str, object]:
    because = found.because if isinstance(found, OfService) else None
    return {
        "code": found.code.word,
        "severity": found.code.severity.value,
        "because": None if because is None else because.word,
        "text": sentence(found),
    }
