"""The verdict as programs read it: `cluster status --json` and `/status.json` of a manager (docs/json.md)."""

from __future__ import annotations

from juicebox_hsm.host.cluster.findings import Finding, OfService
from juicebox_hsm.host.cluster.verdict import Evidence, Verdict
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
    }


def _reason(found: Finding) -> dict[str, object]:
    because = found.because if isinstance(found, OfService) else None
    return {
        "code": found.code.word,
        "severity": found.code.severity.value,
        "because": None if because is None else because.word,
        "text": sentence(found),
    }
