"""The port to the nodes of a realm's tree (storage.md part A)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from juicebox_hsm.consensus.types import Partition
from juicebox_hsm.ids import RealmId, RecordId
from juicebox_hsm.merkle.walk import Lost, Side


class NodeStore(Protocol):
    """The tree nodes of a realm; written only through `LogStore.append`."""

    async def read_proofs(
        self, realm: RealmId, partition: Partition, records: Sequence[RecordId]
    ) -> list[bytes | Lost]:
        """Return for each record an encoded read proof (merkle.md 3.2) against the partition's root.

        The node that is missing where the root is no longer current, or it is damaged. One snapshot for the call.
        """
        ...

    async def read_edge_proof(self, realm: RealmId, partition: Partition, side: Side) -> bytes:
        """Return the encoded edge proof (merkle.md 4.2). Raises `MissingNode`."""
        ...
