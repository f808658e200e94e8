"""`juicebox-hsm tenant-log`: serve tenants' events, and read them (operator-tools.md 6.3, 6.4)."""

from __future__ import annotations

import click

from roles.commands import TENANT_LOG
from roles.lazy import LazyCommand, LazyGroup


@click.group(
    cls=LazyGroup,
    lazy={
        "ack": LazyCommand("roles.tools.tenant_log.client", "Acknowledge events by their ack ids.", "ack"),
        "serve": TENANT_LOG,
        "tail": LazyCommand("roles.tools.tenant_log.client", "Print a tenant's events, once or as they come.", "tail"),
    },
)
def command() -> None:
    """Serve and read tenants' event logs: who registered, guessed, recovered and deleted."""
