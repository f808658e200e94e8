"""Remember encoded nodes by hash (storage.md 4.4): never wrong, whoever writes, because a hash names its content."""

from __future__ import annotations


class NodeCache:
    """A least-recently-used cache in two generations: cheaper than exact order, at most `size` nodes.

    New and used nodes are in the young half; when it is full it becomes the old half and the former old half goes.
    """

    __slots__ = ("_half", "limit", "old", "rotations", "young")

    def __init__(self, size: int) -> None:
        self._half = max(1, size // 2)
        self.limit = size
        self.rotations = 0
        """How often the older half was dropped."""
        self.young: dict[bytes, bytes] = {}
        self.old: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        """Return how many nodes are held, counting one in both halves twice."""
        return len(self.young) + len(self.old)

    def get(self, node_hash: bytes) -> bytes | None:
        """Return the node, if remembered, and keep it for longer."""
        node = self.young.get(node_hash)
        if node is None:
            node = self.old.get(node_hash)
            if node is not None:
                self.put(node_hash, node)
        return node

    def put(self, node_hash: bytes, node: bytes) -> None:
        """Remember a node."""
        if len(self.young) >= self._half:
            self.old, self.young = self.young, {}
            self.rotations += 1
        self.young[node_hash] = node

    def put_all(self, nodes: dict[bytes, bytes]) -> None:
        """Remember many nodes."""
        if len(self.young) + len(nodes) > self._half:
            for node_hash, node in nodes.items():
                self.put(node_hash, node)
        else:
            self.young.update(nodes)
