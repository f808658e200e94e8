"""Remember tree nodes by a key that names their content (storage.md 4.4): never wrong, whoever writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Node = TypeVar("Node")


class NodeCache(Generic[Node]):
    """A least-recently-used cache in two generations: cheaper than exact order, at most `size` nodes.

    New and used nodes are in the young half; when it is full it becomes the old half and the former old half goes.
    """

    __slots__ = ("_half", "_old", "_young", "limit", "rotations")

    def __init__(self, size: int) -> None:
        self._half = max(1, size // 2)
        self.limit = size
        self.rotations = 0
        """How often the older half was dropped."""
        self._young: dict[bytes, Node] = {}
        self._old: dict[bytes, Node] = {}

    def __len__(self) -> int:
        """Return how many nodes are held, counting one in both halves twice."""
        return len(self._young) + len(self._old)

    def get(self, key: bytes) -> Node | None:
        """Return the node, if remembered, and keep it for longer."""
        node = self._young.get(key)
        if node is None:
            node = self._old.get(key)
            if node is not None:
                self.put(key, node)
        return node

    def put(self, key: bytes, node: Node) -> None:
        """Remember a node."""
        if len(self._young) >= self._half:
            self._old, self._young = self._young, {}
            self.rotations += 1
        self._young[key] = node

    def put_all(self, nodes: dict[bytes, Node]) -> None:
        """Remember many nodes."""
        if len(self._young) + len(nodes) > self._half:
            for key, node in nodes.items():
                self.put(key, node)
        else:
            self._young.update(nodes)

    def purge(self, key: bytes, is_gone: Callable[[Node], bool]) -> None:
        """Forget a node where it is one that `is_gone`."""
        for half in (self._young, self._old):
            if key in half and is_gone(half[key]):
                del half[key]
