"""What a batch of a thousand seeds must have seen at least once (simulation.md 4)."""

from __future__ import annotations

from collections.abc import Mapping

from juicebox_hsm.wire.methods import AGENT_METHODS, MANAGER_METHODS
from roles.tools.simulate.tricks import TRICKS


def expected() -> list[str]:
    """Return the counters that may not be zero: every trick, every method answered."""
    names = [f"trick.{name}" for name in TRICKS]
    methods = [name for table in (AGENT_METHODS, MANAGER_METHODS) for name in table]
    names += [f"rpc.{name}" for name in methods]
    names += [f"http.{status}" for status in (200, 401, 429, 503)]
    names += [
        f"client.{op}.{end}" for op in ("register", "recover", "delete") for end in ("ok", "given up", "Transient")
    ]
    names += ["client.recover.invalid pin", "client.recover.not registered", "client.recover.replaced"]
    names += ["client.two_devices", "client.expired_token"]
    names += ["network.lost", "network.refused", "network.unreachable", "network.repeated", "network.request_dropped"]
    return sorted(names)


def missing(counts: Mapping[str, int]) -> list[str]:
    """Return what was expected and never happened. A name stands for all that begin with it and a dot."""
    heads = {
        ".".join(parts[:end]) for name in counts for parts in (name.split("."),) for end in range(1, len(parts) + 1)
    }
    return [name for name in expected() if name not in heads]
