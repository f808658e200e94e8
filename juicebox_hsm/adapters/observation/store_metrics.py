"""Times and errors of every store operation under the names of operator-tools.md 9.2, and the node cache's state.

The ports of `ports.Store` around those of a real back end: what an operation answers is never changed. A back end
retries by itself, so an error that leaves it is either fatal or the last of its retries.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Final, cast

from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.observation.retry_metrics import Family
from juicebox_hsm.errors import RealmError
from juicebox_hsm.merkle.nodes import read_proof_shape
from juicebox_hsm.ports.store import Store

NAMES: Final[Mapping[str, Mapping[str, str]]] = {
    "log": {
        "append": "store_client.append_log",
        "read_last": "store_client.read_last_log_entry",
        "read_from": "store_client.read_log_entries",
        "read_intents": "store_client.read_log_intents",
        "list_rows": "store_client.list_log_rows",
        "compact": "store_client.replace_oldest_rows_with_tombstones",
        "write_certificate": "store_client.write_certificate",
        "read_certificate": "store_client.read_certificate",
    },
    "nodes": {"read_proofs": "store_client.path_lookup", "read_edge_proof": "store_client.read_tree_side"},
    "outbox": {
        "record": "store_client.outbox.record",
        "read": "store_client.outbox.read",
        "advance": "store_client.outbox.advance",
        "remove_published": "store_client.outbox.remove_published",
    },
    "accounting": {
        "write": "store_client.write_user_accounting",
        "count_users": "store_client.count_realm_users",
    },
    "discovery": {
        "list": "store_client.discovery.get_addresses",
        "register": "store_client.discovery.set_address",
        "deregister": "store_client.discovery.delete_address",
        "forget": "store_client.discovery.delete_expired",
    },
    "leases": {
        "obtain": "store_client.obtain_lease",
        "extend": "store_client.extend_lease",
        "terminate": "store_client.terminate_lease",
    },
    "tenants": {"list": "store_client.tenants.get_tenants", "put": "store_client.tenant.write"},
}
"""Port -> operation -> family; operations that are not here are not measured."""

INNER_NAMES: Final = frozenset({"store_client.append_inner", "store_client.log_append"})
"""What a back end measures itself, where there is such a part: see `docs/metrics.md`."""


class Answers:
    """When a store last did what it was asked, on the clock of `time.perf_counter`."""

    def __init__(self) -> None:
        self.last_ns: int | None = None
        """None before the first answer."""

    def tell_age(self, metrics: Metrics) -> None:
        """Set the gauge; there is none before the first answer: a service that cannot open its store does not run."""
        if self.last_ns is not None:
            metrics.gauge("store_client.answer_age", (time.perf_counter_ns() - self.last_ns) / 1e9)


def with_metrics(store: Store, metrics: Metrics, answers: Answers | None = None) -> Store:
    """Return a store whose operations are measured; all series exist from now on. Their answers go to `answers`."""
    answers = Answers() if answers is None else answers
    ports: dict[str, Any] = {}
    for field in fields(store):
        port = getattr(store, field.name)
        names = NAMES.get(field.name)
        if names is not None and port is not None:
            ports[field.name] = _MeasuredPort(port, names, metrics, answers)
    nodes = ports["nodes"]
    ports["nodes"].read_proofs = _measured_reads(nodes.read_proofs, store.nodes, metrics)
    return replace(store, **ports)


class _MeasuredPort:
    """Stands for one port: the named coroutine methods are timed, everything else is the port's own."""

    def __init__(self, port: Any, names: Mapping[str, str], metrics: Metrics, answers: Answers) -> None:
        self._port = port
        for operation, name in names.items():
            found = getattr(port, operation)
            if inspect.iscoroutinefunction(found):
                setattr(self, operation, _timed(found, Family(metrics, name), answers))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._port, name)


def _timed(operation: Any, family: Family, answers: Answers) -> Any:
    @functools.wraps(operation)
    async def timed(*args: Any, **kwargs: Any) -> Any:
        began_ns = time.perf_counter_ns()
        try:
            result = await operation(*args, **kwargs)
        except RealmError as error:
            family.failed(error, time.perf_counter_ns() - began_ns)
            raise
        answers.last_ns = ended_ns = time.perf_counter_ns()
        family.succeeded(ended_ns - began_ns)
        return result

    return cast("Any", timed)


def _measured_reads(read_proofs: Any, nodes: Any, metrics: Metrics) -> Any:
    """Tell about the proofs read: of each batch the first one stands for all, a batch is what costs."""
    proof_nodes = metrics.distribution_of("agent.merkle_read.proof_nodes")
    extraneous = metrics.distribution_of("agent.merkle_read.extraneous_nodes")
    has_leaf = {
        found: metrics.counter("agent.merkle_read.has_leaf", value=str(found).lower()) for found in (True, False)
    }
    seen = 0

    @functools.wraps(read_proofs)
    async def measured(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        proofs = await read_proofs(*args, **kwargs)
        first = proofs[0] if proofs else None
        if isinstance(first, bytes):
            count, leaf = read_proof_shape(first)
            proof_nodes.observe(count)
            has_leaf[leaf].add()
        unused = getattr(nodes, "extraneous_nodes", 0)
        extraneous.observe(unused - seen)
        seen = unused
        return proofs

    return cast("Any", measured)


class CacheGauges:
    """`store_client.merkle_cache.{limit,nodes,lru_age}` and `store_client.merkle_delete.*` of a store's nodes.

    The cache has two halves and drops the older one when the younger is full: its oldest nodes are as old as the
    half before the last.
    """

    def __init__(self, store: Store, metrics: Metrics, now: float) -> None:
        """`now` is in seconds on the clock of `sample`."""
        self._nodes: Any = store.nodes
        self._limit = metrics.gauge_of("store_client.merkle_cache.limit")
        self._count = metrics.gauge_of("store_client.merkle_cache.nodes")
        self._age = metrics.gauge_of("store_client.merkle_cache.lru_age")
        self._waiting = metrics.gauge_of("store_client.merkle_delete.queue")
        self._leaked = metrics.gauge_of("store_client.merkle_delete.leaked")
        self._rotations = 0
        self._born = (now, now)

    def sample(self, now: float) -> None:
        """Take the state at `now`; once a second is meant."""
        cache = getattr(self._nodes, "cache", None)
        if cache is not None:
            if cache.rotations != self._rotations:
                self._rotations = cache.rotations
                self._born = (self._born[1], now)
            self._limit.set(cache.limit)
            self._count.set(len(cache))
            self._age.set(now - self._born[0])
        deletion = getattr(self._nodes, "deletion", None)
        if deletion is not None:
            self._waiting.set(deletion.waiting)
            self._leaked.set(deletion.leaked)
