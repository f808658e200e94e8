"""Record what a tool changes in the store itself; what it orders from a service, that service records (record 0035)."""

from __future__ import annotations

import getpass
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import click

from juicebox_hsm.ports.audit import AuditTrail

if TYPE_CHECKING:
    from roles.audit import Recorder

RECORDED_BY: Final = "command line"
NOT_TOLD: Final = "warning: done, but the audit trail could not be told, and shows it as unknown"


def user_and_host() -> str:
    """Return who is at which keyboard, as far as the machine knows."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


@asynccontextmanager
async def recorded(
    trail: AuditTrail, who: str, now_ms: Callable[[], int], action: str, **arguments: str
) -> AsyncIterator[None]:
    """Record a change that the body makes. Raises `NotRecorded` instead of beginning it, and whatever the body raises.

    `who` is the name of the operator's certificate, "" without one.
    """
    async with recorder_of(trail, now_ms).recorded(who, user_and_host(), action, tuple(arguments.items())):
        yield


def recorder_of(trail: AuditTrail, now_ms: Callable[[], int]) -> Recorder:
    """Return who writes entries for a tool."""
    from juicebox_hsm.adapters.observation.logging import get_logger
    from roles.audit import Recorder

    return Recorder(trail, RECORDED_BY, now_ms, get_logger("audit"), lambda: click.echo(NOT_TOLD, err=True))
