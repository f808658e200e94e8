"""Notice damage wherever a store is read: the ports of `ports.Store` around those of a real back end.

What an operation answers or raises is never changed; who asked deals with it, and here it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, cast

from juicebox_hsm.host.damage import node_place
from juicebox_hsm.merkle.walk import Lost, Walk
from juicebox_hsm.ports.errors import StoreDamaged
from juicebox_hsm.ports.store import Store
from juicebox_hsm.wire.rpc import DamageKind, StoreDamage

READS: Final[Mapping[str, tuple[str, ...]]] = {
    "log": ("append", "read_last", "read_from", "read_intents", "read_certificate"),
    "nodes": ("read_proofs", "read_edge_proof"),
    "outbox": ("record", "read", "cursors", "advance", "settled"),
}
"""Port -> operations that decode what is stored. An append reads the tail and the tree's pages."""


def damaged_node(walk: Walk, why: Exception) -> StoreDamaged:
    """Return the error for a node that a walk got and cannot follow."""
    return StoreDamaged(DamageKind.NODE, node_place(Lost(walk.depth, walk.wanted or b"")), why=str(why))


def telling(store: Store, tell: Callable[[StoreDamage], None]) -> Store:
    """Return a store that calls `tell` for everything damaged that is met."""
    ports: dict[str, Any] = {
        name: _TellingPort(getattr(store, name), operations, tell) for name, operations in READS.items()
    }
    return replace(store, **ports)


class _TellingPort:
    """Stands for one port: the named methods tell, everything else is the port's own."""

    def __init__(self, port: Any, operations: tuple[str, ...], tell: Callable[[StoreDamage], None]) -> None:
        self._port = port
        for operation in operations:
            setattr(self, operation, _told(port, operation, tell))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._port, name)


def _told(port: Any, operation: str, tell: Callable[[StoreDamage], None]) -> Any:
    async def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return await getattr(port, operation)(*args, **kwargs)
        except StoreDamaged as error:
            tell(error.damage)
            raise

    return cast("Any", told)
