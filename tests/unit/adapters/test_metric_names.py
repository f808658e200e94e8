"""Metric names: declared at the start, told in the documentation, and what the store and the HSM are measured by."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trio

from juicebox_hsm.adapters.metric_names import AGENT, LOAD_BALANCER, MANAGER, Catalogue, declare
from juicebox_hsm.adapters.metrics import Metrics
from juicebox_hsm.adapters.store import open_store
from juicebox_hsm.adapters.store_metrics import NAMES, RESULTS, CacheGauges, with_metrics
from juicebox_hsm.errors import RealmError
from juicebox_hsm.ports import ServiceKind, StoreUnavailable

ROOT = Path(__file__).parent.parent.parent.parent
USED = re.compile(
    r"(?:\.count|\.gauge|\.timing|\.timer|\.counter|\.gauge_of|\.distribution_of|\.distribution)\(\s*(?:#[^\n]*\s*)?"
    r'"([a-z_0-9.]+\.[a-z_0-9.]+)"'
)


def _names(catalogue: Catalogue) -> set[str]:
    return {
        *catalogue.counters, *catalogue.gauges, *catalogue.timers, *catalogue.tagged,
        *(name for name, _, _ in catalogue.known),
    }  # fmt: skip


def _used(*folders: str) -> set[str]:
    found = set()
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            found |= {name.removesuffix(".ns") for name in USED.findall(path.read_text())}
    return found


@pytest.mark.parametrize(("role", "catalogue"), [("agent", AGENT), ("lb", LOAD_BALANCER), ("manager", MANAGER)])
def test_a_role_declares_what_it_counts(role: str, catalogue: Catalogue) -> None:
    """No metric of a role appears only with its first event unless its tags are unknown before."""
    assert _used(f"roles/{role}") - _names(catalogue) == set()


def test_every_metric_is_documented() -> None:
    """`docs/metrics.md` names every metric in the code and none that is gone."""
    text = (ROOT / "docs" / "metrics.md").read_text().split("## Traces")[0]
    told: set[str] = set()
    for line in text.splitlines():
        last = ""
        for name in re.findall(r"`([a-z_0-9.]+)`", line.split("|")[1]) if line.startswith("| `") else ():
            full = last.rsplit(".", 1)[0] + name if name.startswith(".") else name
            told.add(full)
            last = full
    operations = {
        f"store_client.{name}" for name in re.findall(r"`([a-z_.]+)`", text.split("is one of:")[1].split("\n\n")[0])
    }
    assert operations == {name for names in NAMES.values() for name in names.values()}
    names = _used("roles", "juicebox_hsm").union(*map(_names, (AGENT, LOAD_BALANCER, MANAGER)))
    names = {name for name in names if not name.startswith("bench")} | {"events"}
    assert names - told == set()
    assert {name for name in told if not name.startswith(".")} - names == set()


def test_declared_series_are_zero() -> None:
    """What an alert looks at exists before anything happened."""
    metrics = Metrics()
    declare(metrics, AGENT)
    text = metrics.render()
    assert "agent_append_conflict_total 0" in text
    assert 'agent_replicate_total{result="unreachable"} 0' in text
    assert "agent_commit_latency_seconds_count 0" in text
    assert "bigtable_append_queue_size 0" in text


async def test_store_operations_are_measured(tmp_path: Path) -> None:
    """Each operation counts by its result, and everything else of a port is untouched."""
    metrics = Metrics()
    async with open_store(f"sqlite:{tmp_path}/x.db") as plain:
        store = with_metrics(plain, metrics)
        text = metrics.render()
        for name in (name for names in NAMES.values() for name in names.values()):
            prometheus = name.replace(".", "_")
            assert f"{prometheus}_fatal_errors_total 0" in text
            for result in RESULTS:
                assert f'{prometheus}_time_seconds_count{{result="{result}"}} 0' in text
        await store.realms.create_shared()
        await store.discovery.register(ServiceKind.AGENT, "tls://a:1", 1)
        assert metrics.timer("store_client.discovery.set_address.time", result="ok").count == 1
        assert store.nodes.cache is plain.nodes.cache  # type: ignore[attr-defined]
        gauges = CacheGauges(store, metrics, trio.current_time())
        plain.nodes.cache.put(b"h", b"n")  # type: ignore[attr-defined]
        gauges.sample(trio.current_time() + 5)
        assert metrics.gauge_of("store_client.merkle_cache.limit").value == 25_000
        assert metrics.gauge_of("store_client.merkle_cache.nodes").value == 1
        assert metrics.gauge_of("store_client.merkle_cache.lru_age").value >= 5


class _Port:
    """A port all of whose operations fail as told."""

    def __init__(self, operations: Any, error: Exception) -> None:
        for operation in operations:
            setattr(self, operation, self._fail)
        self._error = error

    async def _fail(self, *_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise self._error


@pytest.mark.parametrize(
    ("error", "result", "counter"),
    [(StoreUnavailable("gone"), "exhausted", "exhausted_errors"), (RealmError("odd"), "fatal", "fatal_errors")],
)
async def test_store_errors_are_counted(tmp_path: Path, error: RealmError, result: str, counter: str) -> None:
    """An error passes unchanged and is counted as what it is."""
    metrics = Metrics()
    async with open_store(f"sqlite:{tmp_path}/x.db") as plain:
        broken = {name: _Port(names, error) for name, names in NAMES.items()}
        fields = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
        store = with_metrics(type(plain)(**{**fields, **broken}), metrics)
        with pytest.raises(RealmError) as caught:
            await store.leases.obtain("a", "b", 1, 2)
    assert caught.value is error
    assert metrics.timer("store_client.obtain_lease.time", result=result).count == 1
    assert metrics.counter(f"store_client.obtain_lease.{counter}").value == 1
