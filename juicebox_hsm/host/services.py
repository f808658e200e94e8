"""Who is registered, holds leases and is limited how: the cluster's own small facts."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class ServiceKind(enum.Enum):
    """Who registers in discovery."""

    AGENT = "a"
    MANAGER = "c"
    LOAD_BALANCER = "l"


@dataclass(frozen=True, slots=True)
class ServiceAddress:
    """One registration; `registered_ms` is the registrant's Unix time in ms.

    Others may take it for nothing but a reason to keep something longer (`host.clocks.past_ms`).
    """

    kind: ServiceKind
    url: str
    registered_ms: int


@dataclass(frozen=True, slots=True)
class Lease:
    """A granted lease; `id` is 32 hex digits, fresh per grant."""

    name: str
    owner: str
    id: str
    expires_ms: int


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """A tenant's configuration; `capacity_ops_per_s` 0 blocks the tenant."""

    capacity_ops_per_s: int
