"""Every metric family, by who has it, so that each is explained and exists, with value 0, from the start.

A rate or an alert over a series that appears with its first event misses that event. Series with tags whose values
are known only later (a tenant, a group, an address) appear when they are first counted; those with a known set of
values, as of the HSM's, are made by who counts them. A histogram with labels is shown from its first value on:
thousands of empty buckets would be most of a scrape. A test holds docs/metrics.md to these tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from juicebox_hsm.adapters.observation.families import (
    COUNTS,
    FINE,
    LONG,
    PER_PEER,
    SHORT,
    Family,
    Kind,
    of_operation,
    repeated,
)

COUNT, GAUGE, DURATION, DISTRIBUTION = Kind.COUNT, Kind.GAUGE, Kind.DURATION, Kind.DISTRIBUTION

ANY_SERVICE: Final = (
    Family("service.uptime", DURATION, "Time since the start, told once a second", bounds=()),
    Family("log.lines_dropped", COUNT, "Log lines that nobody will see: stdout was not read in time, or is closed"),
    Family("metrics.series_dropped", COUNT, "Values lost because there were 10,000 series already"),
    Family("service.ready", GAUGE, "1 while `/readyz` says so, else 0", late=True),
    Family(
        "service.reason",
        GAUGE,
        "1 while `/readyz` gives a reason or a warning with this code (docs/json.md), 0 after; absent if never",
        ("code", "severity"),
    ),
    Family(
        "store_client.answer_age",
        GAUGE,
        "Seconds since the store last did what this service asked it; services ask every second or two. Not in the "
        "tenant log",
        late=True,
    ),
    Family(
        "memory.guarded",
        GAUGE,
        "1 while no core file is written and no other process of the same user reads our memory, 0 where the system "
        "refused that; of services that hold keys",
        late=True,
    ),
    Family("events", COUNT, "Events told to DogStatsD", ("title",)),
    Family(
        "reqwest.client.time",
        DURATION,
        "Calls to other services, by their outcome. The name is the one that existing dashboards use",
        ("method", "url", "status_code", "err"),
        bounds=PER_PEER,
    ),
    Family("rpc.server.time", DURATION, "Calls served", ("method", "result")),
    Family("rpc.server.refusals", COUNT, "Calls refused before or instead of an answer", ("code",)),
    Family("rpc.server.connections.active", GAUGE, "Streams of other services", late=True),
    Family(
        "rpc.server.connections.errors", COUNT, "Streams that were refused or never introduced themselves", late=True
    ),
    Family(
        "cluster_tls.cert.remaining_days",
        GAUGE,
        "Days until the cluster certificate in service ends; absent without TLS and in the tenant log, which has none",
        late=True,
    ),
    Family(
        "clock.offset",
        GAUGE,
        "Seconds by which this wall clock is ahead of the middle of those it knows, of agents and itself; not in the "
        "tenant log",
        late=True,
    ),
    Family("store_client.merkle_cache.limit", GAUGE, "Tree nodes that the cache may hold", late=True),
    Family("store_client.merkle_cache.nodes", GAUGE, "Tree nodes in the cache", late=True),
    Family("store_client.merkle_cache.lru_age", GAUGE, "Age in seconds of what the cache drops next", late=True),
    Family(
        "store_client.merkle_delete.queue",
        GAUGE,
        "Obsolete tree nodes that wait to be deleted; Bigtable only",
        late=True,
    ),
    Family("store_client.merkle_delete.leaked", GAUGE, "Obsolete tree nodes left behind; Bigtable only", late=True),
    Family(
        "agent.merkle_read.proof_nodes",
        DISTRIBUTION,
        "Nodes of a path, the first of each batch",
        late=True,
        bounds=COUNTS,
    ),
    Family(
        "agent.merkle_read.extraneous_nodes", DISTRIBUTION, "Nodes read in vain, per batch", late=True, bounds=COUNTS
    ),
    Family("agent.merkle_read.has_leaf", COUNT, "Whether the record existed, the first of each batch", ("value",)),
)
"""What any service has, or whoever opens a store."""

PROCESS: Final = (
    Family("juicebox_hsm_build_info", GAUGE, "Always 1; what is running", ("version", "commit", "python")),
    Family("process_cpu_seconds", COUNT, "CPU time of the process, user and system"),
    Family("process_resident_memory_bytes", GAUGE, "Memory of the process that is in RAM"),
    Family("process_virtual_memory_bytes", GAUGE, "Address space of the process"),
    Family("process_open_fds", GAUGE, "Open file descriptors, sockets among them"),
    Family("process_max_fds", GAUGE, "Most file descriptors that the process may open"),
    Family("process_start_time_seconds", GAUGE, "Unix time at which the process started"),
)
"""For the scrape only (`process_metrics`)."""


def _retried(cause: str, meaning: str) -> Family:
    return Family(
        f"agent.start_app_request.{cause}",
        COUNT,
        meaning,
        shown="agent_start_app_request_troubles",
        fixed=(("cause", cause),),
        together="Requests tried again, or given up, before the HSM could answer them",
    )


def _refused(reason: str, meaning: str, *tags: str) -> Family:
    return Family(
        f"agent.app.{reason}",
        COUNT,
        meaning,
        tags,
        shown="agent_app_refusals",
        fixed=(("reason", reason),),
        together="Requests refused",
    )


def _published(failure: str | None, meaning: str) -> Family:
    """Return a family of publications: they exist from the start, and their times have no results."""
    return replace(of_operation("pubsub", "publish_msg", failure, meaning), tags=(), late=False)


AGENT: Final = (
    Family(
        "realm.request.count",
        COUNT,
        "Requests answered after their commit: register1, register2, recover1, recover2, recover3, delete. For "
        "billing; stable",
        ("realm", "tenant", "type"),
    ),
    Family("hsm.handle", DURATION, "Requests to the HSM, as the host sees them", ("req_name",), bounds=SHORT),
    Family("hsm.wait", DURATION, "Requests that waited for the HSM to be free", bounds=SHORT),
    Family("agent.start_app_request", DURATION, "A batch of requests: proofs read and HSM asked"),
    _retried("stale_proof", "Requests tried again with a newer proof"),
    _retried("missing_node", "Requests tried again because a tree node was gone"),
    _retried("exhausted", "Requests given up after several tries"),
    Family(
        "agent.store.damaged",
        COUNT,
        "Something damaged was met in the store; the log and `/readyz` say where",
        ("kind",),
        ("node", "log", "certificate", "event", "file"),
    ),
    Family(
        "agent.commit.latency",
        DURATION,
        "From a request's arrival to its commit; the first of each batch",
        bounds=FINE,
    ),
    Family("agent.commit.log.index", GAUGE, "Last committed index"),
    Family(
        "agent.commit.no_quorum",
        COUNT,
        "Times that a group this agent leads became unable to commit, and commits the HSM refused",
    ),
    Family("agent.group.members", GAUGE, "HSMs of a group this agent leads", ("realm", "group")),
    Family(
        "agent.group.members_alive",
        GAUGE,
        "Of these, those that answer the leader, itself included. Without a strict majority nothing is committed",
        ("realm", "group"),
    ),
    Family(
        "agent.group.commit_age",
        GAUGE,
        "Seconds that entries of a group this agent leads have waited without any progress, 0 while none waits",
        ("realm", "group"),
    ),
    Family(
        "agent.group.stalled",
        GAUGE,
        "1 while a group this agent leads cannot commit and its clients are refused, else 0",
        ("realm", "group"),
    ),
    Family("agent.catchup", DURATION, "Jumps over compacted entries", bounds=LONG),
    Family("agent.catchup.jump", COUNT, "Tries of jumps over compacted entries", ("result",), ("ok", "retry")),
    Family("agent.compaction.compact_index", GAUGE, "Index up to which the log is compacted"),
    Family(
        "agent.compaction.uncompacted_rows.count",
        GAUGE,
        "Log rows that are not compacted",
        shown="agent_compaction_uncompacted_rows",
    ),
    Family("agent.compaction.uncompacted_rows.first_index", GAUGE, "First index that is not compacted"),
    Family("agent.handle_become_leader.read_log_entry", DURATION, "Part of becoming leader: reading the log's end"),
    Family("agent.handle_become_leader.hsm_request", DURATION, "Part of becoming leader: asking the HSM"),
    Family(
        "agent.rate_limiter.state_update", COUNT, "Limits heard from other agents", ("result",), ("ok", "unreachable")
    ),
    Family("agent.accounting.batch_size", GAUGE, "Accounting records written at once"),
    _refused("rate_limited", "Requests refused: limit of the tenant", "tenant"),
    _refused("busy", "Requests refused: too much uncommitted"),
    _refused("no_quorum", "Requests refused: group that cannot commit"),
    Family("agent.append.conflict", COUNT, "Leaderships lost to another writer"),
    Family("agent.append.given_up", COUNT, "Leaderships given up on store trouble"),
    Family("agent.group_forgotten", COUNT, "Retired groups that the HSM has forgotten"),
    Family("agent.leader_lost", COUNT, "Lost leaders told to managers"),
    Family("agent.leader_lost.undelivered", COUNT, "Lost leaders of which no manager took notice"),
    Family(
        "agent.hsm.copies",
        GAUGE,
        "Other addresses at which this agent's HSM answers from another process; more than 0 is a copy, see the "
        "operator guide",
    ),
    Family("agent.outbox.backlog", GAUGE, "Tenant events not published yet"),
    Family("agent.outbox.oldest_age", GAUGE, "Seconds for which the oldest of them has waited, 0 while none waits"),
    _published(None, "Publications, a page of up to 1,000 events each; nearly nothing with the store's own bus"),
    _published("exhausted", "Pages not published although repeated; they stay in the outbox and are tried again"),
    _published("fatal", "Pages not published and not worth repeating; they stay in the outbox and are tried again"),
    Family("agent.outbox.retry", COUNT, "Writes of tenant events that were repeated"),
    Family("agent.outbox.given_up", COUNT, "Writes of tenant events that were given up"),
    Family("agent.outbox.unknown", COUNT, "Tenant events of unknown outcome"),
    Family("agent.outbox.set_aside", COUNT, "Tenant events set aside because no row can carry their tenant"),
    Family("agent.replicate", COUNT, "Pushes to members", ("result",), ("ok", "behind", "refused", "unreachable")),
    Family("agent.replicate.undecodable", COUNT, "Pushes whose answer could not be read"),
    Family("agent.push.refused", COUNT, "Pushes this agent's HSM could not use", ("outcome",)),
    Family("agent.stepdown", COUNT, "Leaderships left", ("forced",), ("true", "false")),
    Family("agent.tenants.failed", COUNT, "Tenants' limits not read"),
    Family("agent.trouble", COUNT, "Trouble being retried, by its code (docs/json.md)", ("what",)),
    Family(
        "agent.watchdog.crash",
        COUNT,
        "Agent and HSM disagreed for 5 s and the agent ended; DogStatsD also gets the event `Agent watchdog triggered`",
    ),
    Family("bigtable.append.time", DURATION, "Appends to the log, whatever the store", bounds=FINE),
    Family("bigtable.append.batch.size", GAUGE, "Entries of the last append"),
    Family("bigtable.append.queue.size", GAUGE, "Entries that waited behind the last append"),
    Family("bigtable.append.retry", COUNT, "Appends that were repeated"),
)

LOAD_BALANCER: Final = (
    Family(
        "load_balancer.request.time",
        DURATION,
        "Client requests; realm, tenant, missing_scope and group once known",
        ("result", "success", "realm", "tenant", "missing_scope", "group"),
        bounds=FINE,
    ),
    Family("load_balancer.connections.active", GAUGE, "Open client connections"),
    Family("load_balancer.connections.count", COUNT, "Connections accepted", ("protocol",), ("h2", "http/1.1")),
    Family(
        "load_balancer.connections.errors",
        COUNT,
        "Connections broken, or failed in the handshake",
        ("protocol",),
        ("h2", "http/1.1", "tls"),
    ),
    Family(
        "load_balancer.connections.evicted", COUNT, "Connections closed at `--max-connections`, the one idle longest"
    ),
    Family("load_balancer.auth.failures", COUNT, "Tokens refused", ("reason",)),
    Family("load_balancer.retries", COUNT, "Requests that needed a second look at the routes"),
    Family("load_balancer.refresh.time", DURATION, "Looks at all agents"),
    Family("load_balancer.routes", GAUGE, "Groups that can be routed to"),
    Family("load_balancer.unrouted_ranges", GAUGE, "Gaps between them: parts of the key space that nobody serves"),
    Family(
        "load_balancer.stalled_routes", GAUGE, "Leaders that say they cannot commit; their ranges are among the gaps"
    ),
    Family("load_balancer.tls_cert.remaining_days", GAUGE, "Days until the edge certificate ends"),
    Family("secrets.age_seconds", GAUGE, "Age of the tenants' keys in use; also in the tenant log"),
    Family("secrets.refresh.failures", COUNT, "Refreshes of the tenants' keys that failed; also in the tenant log"),
)

LOOPS: Final = ("leaders", "rebalance", "transfers")


def _lease(result: str, meaning: str) -> Family:
    fixed = (("result", result),)
    return Family(f"manager.lease.{result}", COUNT, meaning, shown="manager_leases", fixed=fixed, together="Leases")


def _appointment(result: str, meaning: str) -> Family:
    return Family(
        f"manager.leader.{result}",
        COUNT,
        meaning,
        ("realm", "group"),
        shown="manager_appointments",
        fixed=(("result", result),),
        together="Appointments of leaders",
    )


MANAGER: Final = (
    _appointment("assigned", "Leaders appointed"),
    _appointment("failed", "Appointments that failed"),
    Family("manager.leader.lost_hints", COUNT, "Lost leaders heard of from agents"),
    _lease("obtained", "Leases obtained"),
    _lease("busy", "Leases that another manager held"),
    _lease("lost", "Leases lost"),
    Family("manager.loop.time", DURATION, "Passes", ("loop",), LOOPS),
    Family("manager.loop.errors", COUNT, "Passes that failed, or a part of one", ("loop",), (*LOOPS, "leader_lost")),
    Family("manager.rebalance.moves", COUNT, "Leaderships moved"),
    Family("manager.transfer.pending", GAUGE, "Range transfers found under way"),
    Family("manager.transfer.time", DURATION, "Range transfers", ("result",), bounds=LONG),
    Family(
        "cluster.reason",
        GAUGE,
        "1 while the verdict on the cluster (`cluster status`) has a finding with this code (docs/json.md), 0 "
        "after; absent if never",
        ("code", "severity"),
    ),
    Family("cluster.verdict_age", GAUGE, "Seconds since this manager last saw the whole cluster", late=True),
    Family("cluster.group.members", GAUGE, "HSMs of a group", ("realm", "group")),
    Family("cluster.group.members_alive", GAUGE, "Of these, those that answer this manager", ("realm", "group")),
    Family(
        "cluster.group.losses_tolerated",
        GAUGE,
        "How many more of them may be lost until nothing can be committed; negative when that is so already",
        ("realm", "group"),
    ),
    Family("cluster.group.led", GAUGE, "1 while somebody leads the group, else 0", ("realm", "group")),
    Family("manager.workload", GAUGE, "Measured work of an HSM", ("hsm",)),
)

TENANT_LOG: Final = (
    Family("tenant_log.tls_cert.remaining_days", GAUGE, "Days until the certificate that auditors see ends", late=True),
    Family("realm.tenant_log.count", COUNT, "Requests of auditors, by path", ("tenant", "type")),
)

CHECK: Final = (
    Family(
        "service_checker.http_send.network_latency",
        DURATION,
        "`check`: a request without the time the server says it took",
        ("url", "status_code"),
    ),
    Family("service_checker.http_send.server_exec_time", DURATION, "`check`: that time", ("url", "status_code")),
    Family("service_checker.step.time", DURATION, "`check`: register, recover, delete", ("step",)),
    Family(
        "service_checker.tls_cert.remaining_days", GAUGE, "`check`: days until a realm's certificate ends", ("url",)
    ),
)

_BY_NAME: Final = {
    family.name: family for family in (*ANY_SERVICE, *AGENT, *LOAD_BALANCER, *MANAGER, *TENANT_LOG, *CHECK)
}


def find(name: str) -> Family | None:
    """Return the family of a dotted name, None for one that nobody has explained."""
    return _BY_NAME.get(name) or repeated(name)


def from_the_start(families: Iterable[Family]) -> Iterable[tuple[Family, dict[str, str]]]:
    """Yield the series that are known before anything happened: the family, and the tags."""
    for family in families:
        if family.late:
            continue
        if not family.tags:
            yield family, {}
        for value in family.values:
            yield family, {family.tags[0]: value}
