"""Tell a node that a store has kept from one that was damaged there."""

from __future__ import annotations

from juicebox_hsm.merkle.kernel import node_hash
from juicebox_hsm.merkle.nodes import KEY_BITS, BadEncoding
from juicebox_hsm.merkle.walk import Walk


def is_wanted(walk: Walk, node: bytes) -> bool:
    """Tell whether `node` is what the walk's next hash names; costs a hash, about 1 us."""
    bounds = walk.bounds if walk.depth == 0 else None
    try:
        return node_hash(node, walk.aim.to_bytes(KEY_BITS // 8, "big"), bounds) == walk.wanted
    except BadEncoding:
        return False
