"""What docs/monitoring ships: alerts fire when they should, and nothing looks at a metric that is not there."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from juicebox_hsm.adapters.observation.families import Family, Kind, repeated
from juicebox_hsm.adapters.observation.metric_names import (
    AGENT,
    ANY_SERVICE,
    LOAD_BALANCER,
    MANAGER,
    PROCESS,
    TENANT_LOG,
)
from juicebox_hsm.host.codes import Code
from tests.patience import HANGS_S
from tests.prometheus import program

ROOT = Path(__file__).parent.parent.parent.parent
SHIPPED = ROOT / "docs" / "monitoring"
RULES = SHIPPED / "juicebox-hsm.rules.yml"
TESTS = SHIPPED / "juicebox-hsm.rules.test.yml"
DASHBOARD = SHIPPED / "juicebox-hsm.dashboard.json"
GUIDE = ROOT / "docs" / "operator-guide.md"
OF_TARGETS = {"job", "instance", "le"}
"""Labels that Prometheus and histograms add."""
WORDS = {"and", "or", "unless", "on", "by", "without", "bool", "ignoring", "group_left", "group_right", "offset"}


def _families() -> Iterator[Family]:
    yield from (*ANY_SERVICE, *PROCESS, *AGENT, *LOAD_BALANCER, *MANAGER, *TENANT_LOG)
    for name in ("store_client.append_log.time", "store_client.append_log.fatal_errors"):
        found = repeated(name)
        assert found is not None
        yield found


def _series() -> dict[str, set[str]]:
    """Return the series that exist, each with its labels."""
    found = {"up": set(OF_TARGETS)}
    for family in _families():
        endings = ("_bucket", "_sum", "_count") if family.kind in {Kind.DURATION, Kind.DISTRIBUTION} else ("",)
        for ending in endings:
            found.setdefault(family.series + ending, set(OF_TARGETS)).update(family.labels)
    return found


SERIES = _series()
LABELS = set().union(*SERIES.values())


def _check(query: str) -> set[str]:
    """Return the series that a query looks at; every one of them exists, has the labels, and codes are codes."""
    found = set()
    for name, matchers in re.findall(r"([a-zA-Z_]\w*)?\{([^}]*)\}", query):
        names = {name} if name else set(re.findall(r'__name__=~"([^"]*)"', matchers)[0].split("|"))
        found |= names
        for label, values in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
            assert label == "__name__" or all(label in SERIES[name] for name in names), (query, label)
            if label == "code":
                assert set(values.split("|")) <= {code.word for code in Code}, query
    rest = re.sub(r"\[[^\]]*\]", "", re.sub(r"([a-zA-Z_]\w*)?\{[^}]*\}", "", query))
    for listed in re.findall(r"\b(?:by|on|without) \(([^)]*)\)", rest):
        assert {label.strip() for label in listed.split(",")} <= LABELS, query
    rest = re.sub(r"\b(?:by|on|without) \([^)]*\)", "", rest)
    found |= {word for word in re.findall(r"\b([a-zA-Z_]\w*)\b(?!\s*\()", rest) if word not in WORDS}
    found = {word for word in found if not re.fullmatch(r"[\de.]+", word)}
    assert found <= set(SERIES), (query, found - set(SERIES))
    return found


def _alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_every_alert_can_be_acted_on() -> None:
    """An alert says what is wrong, what that means and what to do, with a place in the guide that names it."""
    alerts = _alerts()
    names = [alert["alert"] for alert in alerts]
    assert len(set(names)) == len(names) >= 15
    guide = GUIDE.read_text()
    sections = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-"): text
        for title, text in re.findall(r"^#+ ([^\n]*)\n(.*?)(?=^#|\Z)", guide, re.MULTILINE | re.DOTALL)
    }
    for alert in alerts:
        assert set(alert["annotations"]) == {"summary", "description", "runbook"}
        assert alert["labels"] in ({"severity": "page"}, {"severity": "ticket"})
        what, anchor = alert["annotations"]["runbook"].split(" docs/operator-guide.md#")
        assert what.endswith(".")
        assert anchor in sections, alert["alert"]
        assert alert["alert"] in guide.split("### When an alert fires")[1]
    assert set(re.findall(r"\bJuicebox[A-Z]\w+", guide)) == set(names)


def test_alerts_look_at_metrics_that_exist() -> None:
    """An alert on a name that is gone would be silent for ever."""
    for alert in _alerts():
        assert _check(alert["expr"]), alert


def test_every_alert_is_tested() -> None:
    """Each is seen well, firing, and well again."""
    tests = yaml.safe_load(TESTS.read_text())["tests"]
    seen = {}
    for test in tests:
        fired = [bool(look.get("exp_alerts")) for look in test["alert_rule_test"]]
        assert fired == [False, True, False]
        seen[test["alert_rule_test"][0]["alertname"]] = True
        for series in test["input_series"]:
            _check(series["series"])
    assert set(seen) == {alert["alert"] for alert in _alerts()}


def test_dashboard_looks_at_metrics_that_exist() -> None:
    """Every panel has something to show; panels do not lie on each other."""
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len(panels) >= 30
    for panel in panels:
        for target in panel["targets"]:
            assert _check(target["expr"].replace("vector(0)", "up").replace("time()", "up")), panel["title"]
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def _promtool(folder: Path, *words: str) -> tuple[int, str]:
    """Run Prometheus' own tool in a folder; return its exit code and all it said."""
    done = subprocess.run(
        [program("promtool"), *words], check=False, cwd=folder, capture_output=True, text=True, timeout=HANGS_S
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "words",
    [("check", "rules", RULES.name), ("check", "config", "prometheus.yml"), ("test", "rules", TESTS.name)],
    ids=["rules", "config", "alerts"],
)
def test_prometheus_takes_them(words: tuple[str, ...]) -> None:
    """Prometheus' own tool finds no fault, and with the shipped series every alert fires and ends."""
    code, said = _promtool(SHIPPED, *words)
    assert code == 0, said


def test_the_tests_can_fail(tmp_path: Path) -> None:
    """With an alert's bound moved, its test is red."""
    broken = RULES.read_text().replace("clock_offset) > 5", "clock_offset) > 5000")
    (tmp_path / RULES.name).write_text(broken)
    document = yaml.safe_load(TESTS.read_text())
    document["tests"] = [test for test in document["tests"] if "clock_offset" in str(test)]
    (tmp_path / TESTS.name).write_text(yaml.safe_dump(document))
    code, said = _promtool(tmp_path, "test", "rules", TESTS.name)
    assert code != 0
    assert "JuiceboxClockOff" in said
