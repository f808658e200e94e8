"""Which metrics a role has, so that every series without tags exists, with value 0, from the start.

A rate or an alert over a series that appears with its first event misses that event. Series with tags whose values
are known only later (a tenant, a group, an address) appear when they are first counted; those with a known set of
values, as of the store's and the HSM's, are made by who counts them. `docs/metrics.md` explains every name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from juicebox_hsm.adapters.observation.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Names of the untagged series of one role, and of those that appear with tags."""

    counters: tuple[str, ...] = ()
    gauges: tuple[str, ...] = ()
    timers: tuple[str, ...] = ()
    tagged: tuple[str, ...] = ()
    known: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    """Counters of one tag with a known set of values: name, tag, values."""
    known_timers: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    """The same for timers."""


AGENT: Final = Catalogue(
    counters=(
        "agent.app.busy", "agent.app.no_quorum", "agent.app.rate_limited", "agent.append.conflict",
        "agent.append.given_up", "agent.commit.no_quorum", "agent.group_forgotten", "agent.leader_lost",
        "agent.leader_lost.undelivered", "agent.outbox.given_up", "agent.outbox.retry", "agent.outbox.set_aside",
        "agent.outbox.unknown", "agent.replicate.undecodable",
        "agent.start_app_request.damaged", "agent.start_app_request.exhausted", "agent.start_app_request.missing_node",
        "agent.start_app_request.stale_proof", "agent.tenants.failed", "agent.watchdog.crash", "bigtable.append.retry",
        "pubsub.publish_msg.exhausted_errors", "pubsub.publish_msg.fatal_errors",
    ),
    gauges=(
        "agent.accounting.batch_size", "agent.commit.log.index", "agent.compaction.compact_index",
        "agent.compaction.uncompacted_rows.count", "agent.compaction.uncompacted_rows.first_index",
        "agent.hsm.copies", "agent.outbox.backlog", "bigtable.append.batch.size", "bigtable.append.queue.size",
    ),
    timers=(
        "agent.catchup", "agent.commit.latency", "agent.handle_become_leader.hsm_request",
        "agent.handle_become_leader.read_log_entry", "agent.start_app_request", "bigtable.append.time",
        "pubsub.publish_msg.time", "service.uptime",
    ),
    known=(
        ("agent.catchup.jump", "result", ("ok", "retry")),
        ("agent.rate_limiter.state_update", "result", ("ok", "unreachable")),
        ("agent.replicate", "result", ("ok", "behind", "refused", "unreachable")),
        ("agent.stepdown", "forced", ("true", "false")),
    ),
    tagged=(
        "agent.group.commit_age", "agent.group.members", "agent.group.members_alive", "agent.group.stalled",
        "agent.push.refused", "agent.trouble", "realm.request.count", "reqwest.client.time",
    ),
)  # fmt: skip

LOAD_BALANCER: Final = Catalogue(
    counters=("load_balancer.connections.evicted", "load_balancer.retries", "secrets.refresh.failures"),
    gauges=(
        "load_balancer.connections.active", "load_balancer.routes", "load_balancer.stalled_routes",
        "load_balancer.tls_cert.remaining_days",
        "load_balancer.unrouted_ranges", "secrets.age_seconds",
    ),
    timers=("load_balancer.refresh.time", "service.uptime"),
    known=(
        ("load_balancer.connections.count", "protocol", ("h2", "http/1.1")),
        ("load_balancer.connections.errors", "protocol", ("h2", "http/1.1", "tls")),
    ),
    tagged=("load_balancer.auth.failures", "load_balancer.request.time", "reqwest.client.time"),
)  # fmt: skip

MANAGER: Final = Catalogue(
    counters=(
        "manager.leader.lost_hints", "manager.lease.busy", "manager.lease.lost", "manager.lease.obtained",
        "manager.rebalance.moves",
    ),
    gauges=("manager.transfer.pending",),
    timers=("service.uptime",),
    known=(("manager.loop.errors", "loop", ("leaders", "leader_lost", "rebalance", "transfers")),),
    known_timers=(("manager.loop.time", "loop", ("leaders", "rebalance", "transfers")),),
    tagged=(
        "manager.leader.assigned", "manager.leader.failed", "manager.transfer.time", "manager.workload",
        "reqwest.client.time",
    ),
)  # fmt: skip


def declare(metrics: Metrics, catalogue: Catalogue) -> None:
    """Make the role's series that can be known before anything happened."""
    for name in catalogue.counters:
        metrics.counter(name)
    for name in catalogue.gauges:
        metrics.gauge_of(name)
    for name in catalogue.timers:
        metrics.timer(name)
    for name, tag, values in catalogue.known:
        for value in values:
            metrics.counter(name, **{tag: value})
    for name, tag, values in catalogue.known_timers:
        for value in values:
            metrics.timer(name, **{tag: value})
