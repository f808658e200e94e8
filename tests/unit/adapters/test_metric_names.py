"""Metric names: declared at the start, told in the documentation, and what the store and the HSM are measured by."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trio

from juicebox_hsm.adapters.bigtable import auth
from juicebox_hsm.adapters.google.secret_manager import SECRET_MANAGER
from juicebox_hsm.adapters.observation.families import Family
from juicebox_hsm.adapters.observation.metric_names import (
    AGENT,
    ANY_SERVICE,
    CHECK,
    LOAD_BALANCER,
    MANAGER,
    PROCESS,
    TENANT_LOG,
    find,
)
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.observation.store_metrics import INNER_NAMES, NAMES, Answers, CacheGauges, with_metrics
from juicebox_hsm.adapters.pubsub.bus import PUBSUB
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.log import AppendOutcome
from juicebox_hsm.host.services import ServiceKind
from juicebox_hsm.ports.errors import StoreUnavailable
from tests.emulator.realm_data import REALM, append, batch
from tests.patience import HANGS_S

ROOT = Path(__file__).parent.parent.parent.parent
USED = re.compile(
    r"(?:\.count|\.gauge|\.timing|\.timer|\.counter|\.gauge_of|\.distribution_of|\.distribution)\(\s*(?:#[^\n]*\s*)?"
    r'"([a-z_0-9.]+\.[a-z_0-9.]+)"'
)


TABLES = {
    "Every service": ANY_SERVICE,
    "Process": PROCESS,
    "Agent": AGENT,
    "Load balancer": LOAD_BALANCER,
    "Manager": MANAGER,
    "Others": (*TENANT_LOG, *CHECK),
}
FAMILIES = [family for families in TABLES.values() for family in families]


def _names(families: tuple[Family, ...]) -> set[str]:
    return {family.name for family in families}


def _used(*folders: str) -> set[str]:
    sources = (path for folder in folders for path in _sources(folder))
    return {name.removesuffix(".ns") for path in sources for name in USED.findall(path.read_text())}


def _sources(folder: str) -> list[Path]:
    """Return the sources without the tables, and without the simulator, which counts in notes of its own."""
    found = (ROOT / folder).rglob("*.py")
    return [path for path in found if path.name != "metric_names.py" and "simulate" not in path.parts]


ROLES = {"agent": AGENT, "lb": LOAD_BALANCER, "manager": MANAGER, "tenant_log": TENANT_LOG}


@pytest.mark.parametrize("role", ROLES)
def test_a_role_declares_what_it_counts(role: str) -> None:
    """No metric of a role appears only with its first event unless its tags are unknown before."""
    assert _used(f"roles/{role}") - _names((*ROLES[role], *ANY_SERVICE)) == set()


def test_families_are_told_apart() -> None:
    """A name is one family; what Prometheus shows under one name has one kind, one meaning and labels that differ."""
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    shown: dict[str, list[Family]] = {}
    for family in FAMILIES:
        shown.setdefault(family.series, []).append(family)
        assert family.meaning
        assert not family.meaning.endswith(".")
        assert len(family.tags) == 1 or not family.values
    for operation in (*PUBSUB.families.values(), *SECRET_MANAGER.families.values(), auth.FAMILY):
        for ending in ("time", "retryable_errors", "exhausted_errors", "fatal_errors"):
            found = find(f"{operation}.{ending}")
            assert found is not None
            shown.setdefault(found.series, []).append(found)
    for families in shown.values():
        assert len({(family.kind, family.together or family.meaning, family.bounds) for family in families}) == 1
        assert len({family.fixed for family in families}) == len(families)


def test_histograms_have_few_buckets() -> None:
    """A line per bucket, series and scrape: only what clients wait for is looked at closely."""
    for family in FAMILIES:
        assert list(family.bounds) == sorted(family.bounds)
        assert len(family.bounds) <= (
            13 if family.name.endswith(("request.time", "commit.latency", "append.time")) else 9
        )


def _told_text() -> str:
    return (ROOT / "docs" / "metrics.md").read_text().split("## Traces")[0]


def _told(text: str) -> dict[str, str]:
    """Return the names in the tables of `docs/metrics.md`, each with its kind."""
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {row[0].removeprefix("| ").strip("`"): row[1] for row in rows}


def _row(family: Family) -> str:
    """Return the line of `docs/metrics.md` for a family."""
    labels = ",".join(f'{name}="{value}"' for name, value in family.fixed)
    shown = f"`{family.series}{{{labels}}}`" if labels else f"`{family.series}`"
    return f"| `{family.name}` | {family.kind.value} | {shown} | {', '.join(family.tags)} | {family.meaning} |"


@pytest.mark.parametrize("title", TABLES)
def test_documentation_has_the_tables(title: str) -> None:
    """`docs/metrics.md` tells of each family what the program tells with it, and nothing else."""
    part = _told_text().split(f"## {title}\n")[1].split("\n## ")[0]
    assert [line for line in part.splitlines() if line.startswith("| `")] == [_row(family) for family in TABLES[title]]


def _families_told(text: str) -> set[str]:
    """Return the operations whose four series `docs/metrics.md` tells of."""
    store, others = (text.split(mark)[1].split("\n\n", maxsplit=1)[0] for mark in ("is one of:", "The same four names"))
    names = re.compile(r"`([a-z_]+(?:\.[a-z_]+)*)`")
    return {f"store_client.{name}" for name in names.findall(store)} | set(names.findall(others))


SPECIFIED = (
    "service.uptime.ns", "load_balancer.request.time.ns", "load_balancer.connections.active",
    "load_balancer.connections.count", "load_balancer.connections.errors", "load_balancer.refresh.time.ns",
    "load_balancer.routes", "load_balancer.unrouted_ranges", "load_balancer.retries", "load_balancer.auth.failures",
    "load_balancer.tls_cert.remaining_days", "reqwest.client.time.ns", "realm.request.count", "agent.commit.latency",
    "agent.commit.log.index", "agent.compaction.compact_index", "agent.compaction.uncompacted_rows.count",
    "agent.compaction.uncompacted_rows.first_index", "agent.catchup", "agent.start_app_request",
    "agent.handle_become_leader.read_log_entry", "agent.handle_become_leader.hsm_request",
    "agent.rate_limiter.state_update", "agent.merkle_read.extraneous_nodes", "agent.merkle_read.proof_nodes",
    "agent.merkle_read.has_leaf", "agent.accounting.batch_size", "bigtable.append.batch.size",
    "bigtable.append.queue.size", "bigtable.append.time", "store_client.merkle_cache.limit",
    "store_client.merkle_cache.nodes", "store_client.merkle_cache.lru_age", "store_client.merkle_delete.*", "hsm.*",
    "pubsub.publish_msg.time",
)  # fmt: skip
"""The names of load-balancer.md 10, agent.md 16 and operator-tools.md 9.2; `.*` is any name below."""

SPECIFIED_FAMILIES = (
    "store_client.append_log", "store_client.append_inner", "store_client.log_append", "store_client.path_lookup",
    "store_client.obtain_lease", "store_client.extend_lease", "store_client.terminate_lease",
    "store_client.discovery.get_addresses", "store_client.discovery.set_address",
    "store_client.discovery.delete_expired", "store_client.tenants.get_tenants", "store_client.tenant.write",
    "store_client.write_user_accounting", "pubsub.create_topic", "pubsub.create_subscription",
    "secret_manager.google.list_secrets", "secret_manager.google.list_secret_versions",
    "secret_manager.google.access_secret_version", "gcp.get_token",
)  # fmt: skip
"""Of these operations, in the same places, there are time and errors."""


@pytest.mark.parametrize("name", SPECIFIED)
def test_specified_names_exist(name: str) -> None:
    """Dashboards and bills of existing realms find every name that the specification promises, with its kind."""
    told = _told(_told_text())
    if name.endswith(".*"):
        assert any(other.startswith(name[:-1]) for other in told)
    else:
        assert name.removesuffix(".ns") in told
    if name.endswith(".ns"):
        assert told[name.removesuffix(".ns")] == "duration"


@pytest.mark.parametrize("name", SPECIFIED_FAMILIES)
def test_specified_families_exist(name: str) -> None:
    """Operations that repeat themselves are measured under the specified names."""
    assert name in _families_told(_told_text())


def test_every_metric_is_explained() -> None:
    """Every metric in the code is in the tables, and none of them is gone from the code."""
    assert _families_told(_told_text()) == (
        {name for names in NAMES.values() for name in names.values()}
        | {*INNER_NAMES, *PUBSUB.families.values(), *SECRET_MANAGER.families.values(), auth.FAMILY}
    )
    used = {name for name in _used("roles", "juicebox_hsm") if not name.startswith("bench")}
    assert {name for name in used if find(name) is None} == set()
    written = "".join(path.read_text() for folder in ("roles", "juicebox_hsm") for path in _sources(folder))
    assert [family.name for family in FAMILIES if not re.search(rf'"{re.escape(family.name)}(\.ns)?"', written)] == []


def test_declared_series_are_zero() -> None:
    """What an alert looks at exists before anything happened."""
    metrics = Metrics()
    metrics.declare(AGENT)
    text = metrics.render()
    assert "agent_append_conflict_total 0" in text
    assert 'agent_replicate_total{result="unreachable"} 0' in text
    assert "agent_commit_latency_seconds_count 0" in text
    assert "bigtable_append_queue_size 0" in text
    assert 'agent_app_refusals_total{reason="no_quorum"} 0' in text


async def test_store_operations_are_measured(tmp_path: Path) -> None:
    """Each operation counts by its result, and everything else of a port is untouched."""
    metrics = Metrics()
    async with open_store(f"sqlite:{tmp_path}/x.db") as plain:
        answers = Answers()
        store = with_metrics(plain, metrics, answers)
        answers.tell_age(metrics)
        text = metrics.render()
        assert "store_client_answer_age" not in text
        for name in (name for names in NAMES.values() for name in names.values()):
            operation = name.removeprefix("store_client.")
            assert f'store_client_errors_total{{kind="fatal",operation="{operation}"}} 0' in text
        await store.realms.create_shared()
        await store.discovery.register(ServiceKind.AGENT, "tls://a:1", 1)
        assert metrics.timer("store_client.discovery.set_address.time", result="ok").count == 1
        shown = 'store_client_time_seconds_count{operation="discovery.set_address",result="ok"} 1'
        assert shown in metrics.render()
        assert store.nodes.cache is plain.nodes.cache  # type: ignore[attr-defined]
        answers.tell_age(metrics)
        assert 0 <= metrics.gauge_of("store_client.answer_age").value < HANGS_S
        gauges = CacheGauges(store, metrics, trio.current_time())
        plain.nodes.cache.put(b"h", b"n")  # type: ignore[attr-defined]
        gauges.sample(trio.current_time() + 5)
        assert metrics.gauge_of("store_client.merkle_cache.limit").value == 25_000
        assert metrics.gauge_of("store_client.merkle_cache.nodes").value == 1
        assert metrics.gauge_of("store_client.merkle_cache.lru_age").value >= 5


async def test_parts_of_store_operations_are_measured(tmp_path: Path) -> None:
    """The back end times an append's transaction."""
    metrics = Metrics()
    async with open_store(f"sqlite:{tmp_path}/x.db", metrics=metrics) as store:
        assert 'store_client_errors_total{kind="fatal",operation="append_inner"} 0' in metrics.render()
        await store.realms.create_shared()
        await store.realms.create_realm(REALM)
        assert await append(store, batch(1, 1)) is AppendOutcome.APPENDED
        assert metrics.timer("store_client.append_inner.time", result="ok").count == 1


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
        answers = Answers()
        store = with_metrics(type(plain)(**{**fields, **broken}), metrics, answers)
        with pytest.raises(RealmError) as caught:
            await store.leases.obtain("a", "b", 1, 2)
    assert answers.last_ns is None
    assert caught.value is error
    assert metrics.timer("store_client.obtain_lease.time", result=result).count == 1
    assert metrics.counter(f"store_client.obtain_lease.{counter}").value == 1
