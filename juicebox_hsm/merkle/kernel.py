"""Give the library its Merkle tree."""

from __future__ import annotations

from juicebox_hsm.merkle.model import (
    Half,
    Refreshed,
    Tree,
    check_node,
    decode_delta,
    delta_rows,
    empty_root,
    node_hash,
    path_scan_starts,
    row_key,
    squash,
)
from juicebox_hsm.merkle.nodes import (
    BadEncoding,
    Delta,
    DeltaRows,
    InvalidProof,
    NodeAdd,
    NodeKey,
    NotAdjacent,
    StaleProof,
)
from juicebox_hsm.merkle.walk import (
    EdgeWalk,
    MissingNode,
    PathWalk,
    Side,
    Walk,
    build_read_proof,
    finish_walk,
    scan_end,
)

__all__ = [
    "BadEncoding",
    "Delta",
    "DeltaRows",
    "EdgeWalk",
    "Half",
    "InvalidProof",
    "MissingNode",
    "NodeAdd",
    "NodeKey",
    "NotAdjacent",
    "PathWalk",
    "Refreshed",
    "Side",
    "StaleProof",
    "Tree",
    "Walk",
    "build_read_proof",
    "check_node",
    "decode_delta",
    "delta_rows",
    "empty_root",
    "finish_walk",
    "node_hash",
    "path_scan_starts",
    "row_key",
    "scan_end",
    "squash",
]
