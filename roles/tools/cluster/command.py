"""`juicebox-hsm cluster`: see and change a cluster (operator-tools.md 2). Each command is imported when asked for."""

from __future__ import annotations

from typing import Any

import click

from roles.lazy import LazyCommand, LazyGroup
from roles.tools.session import remember_connection

_SHOW = "roles.tools.cluster.show"
_STATUS = "roles.tools.cluster.status"
_PLAN = "roles.tools.cluster.plan"
_REPLACE = "roles.tools.cluster.replace"
_STATS = "roles.tools.cluster.stats"
_CHANGE = "roles.tools.cluster.change"
_LEADERS = "roles.tools.cluster.leaders"
_CLIENTS = "roles.tools.cluster.clients"
_ADMIN = "roles.tools.cluster.admin"
_AUDIT = "roles.tools.cluster.audit"


@click.group(
    cls=LazyGroup,
    lazy={
        "agents": LazyCommand(_SHOW, "Show every agent with its HSM.", "agents"),
        "groups": LazyCommand(_SHOW, "Show every group with its members.", "groups"),
        "status": LazyCommand(_STATUS, "Judge the cluster's health on one page; exit 5 on trouble.", "status"),
        "partitions": LazyCommand(_SHOW, "Show which group owns which range.", "partitions"),
        "audit": LazyCommand(_AUDIT, "Show who changed what, when, and with what result.", "audit"),
        "leases": LazyCommand(_ADMIN, "Show the management leases.", "leases"),
        "discovery": LazyCommand(_ADMIN, "List or remove service registrations.", "discovery"),
        "ca": LazyCommand(_ADMIN, "Make the cluster's certificate authority and certificates.", "ca"),
        "new-realm": LazyCommand(_CHANGE, "Create a realm at one agent.", "new_realm_command"),
        "join-realm": LazyCommand(_CHANGE, "Let HSMs join a realm; irreversible.", "join_realm_command"),
        "new-group": LazyCommand(_CHANGE, "Create a group over HSMs of a realm.", "new_group_command"),
        "transfer": LazyCommand(_CHANGE, "Move a key range from one group to another.", "transfer"),
        "retire": LazyCommand(_REPLACE, "End a group that owns nothing.", "retire"),
        "replace": LazyCommand(_REPLACE, "Replace a lost HSM in all its groups.", "replace"),
        "experimental": LazyCommand(_CHANGE, "Commands that may still change.", "experimental"),
        "plan": LazyCommand(_PLAN, "Lay a realm out over its HSMs: print or apply the commands.", "plan"),
        "stepdown": LazyCommand(_LEADERS, "Hand over what an HSM or a group leads.", "stepdown"),
        "rebalance": LazyCommand(_LEADERS, "Move one leadership to a less busy HSM.", "rebalance"),
        "drain": LazyCommand(_LEADERS, "Take an HSM out of leadership.", "drain"),
        "undrain": LazyCommand(_LEADERS, "Let a drained HSM lead again.", "undrain"),
        "table-stats": LazyCommand(_STATS, "Show what the store's tables hold for a realm.", "table_stats"),
        "user-summary": LazyCommand(_STATS, "Count each tenant's users in a period, as CSV.", "user_summary"),
        "request-counts": LazyCommand(_STATS, "Print each tenant's requests per day, as CSV.", "request_counts"),
        "tenant": LazyCommand(_CLIENTS, "Set and show tenants' limits.", "tenant"),
        "configuration": LazyCommand(_CLIENTS, "Print the client configuration.", "configuration"),
        "auth-token": LazyCommand(_CLIENTS, "Mint a token for a test tenant.", "auth_token"),
    },
)
@remember_connection
def command(**values: Any) -> None:
    """See and change a cluster: agents, realms, groups, leaders, limits, certificates."""
