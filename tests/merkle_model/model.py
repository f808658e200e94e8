"""State the Merkle-radix tree in plain Python: the executable model (merkle.md 1 to 8).

This is the oracle the C kernel is compared with, byte for byte. It says each rule the way the specification does,
with bit strings and dictionaries, and has the kernel's names and errors. A `Tree` remembers only its latest root
and an overlay of recent deltas; records reach it as proofs.

Order of refusals, the same in both forms: malformed bytes, then an unknown root (cheap, before any hashing),
then a foreign range, then whatever the proof fails to show.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from blake3 import blake3

from juicebox_hsm.errors import check
from juicebox_hsm.ids import OwnedRange, RecordId
from juicebox_hsm.merkle.nodes import (
    CAPACITY_MAX,
    HASH_BYTES,
    KEY_BITS,
    KEY_BYTES,
    BadEncoding,
    InvalidProof,
    NotAdjacent,
    StaleProof,
)
from tests.merkle_model.codec import (
    BitsDelta,
    BitsKey,
    Branch,
    Interior,
    Leaf,
    Node,
    Proof,
    decode_delta,
    decode_node,
    decode_proof,
    delta_rows,
    pack_bits,
    path_scan_starts,
    require_size,
    require_value,
    row_key,
    squash,
    unpack_bits,
)

__all__ = [
    "Half",
    "Refreshed",
    "Tree",
    "check_node",
    "decode_delta",
    "delta_rows",
    "empty_root",
    "node_hash",
    "path_scan_starts",
    "row_key",
    "squash",
]

_ABSENT: Final = bytes(2 + HASH_BYTES)  # B(absent): no bits, zero hash
Half = tuple[OwnedRange, bytes]


def _bits(key: bytes) -> str:
    return unpack_bits(key, KEY_BITS)


def _common(a: str, b: str) -> int:
    """Return how many leading bits `a` and `b` share; they do differ somewhere."""
    return next(at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def _branch_bytes(branch: Branch | None) -> bytes:
    if branch is None:
        return _ABSENT
    return len(branch.prefix).to_bytes(2, "big") + pack_bits(branch.prefix) + branch.hash


def _leaf_hash(key: bytes, value: bytes) -> bytes:
    return blake3(b"leaf" + key + len(value).to_bytes(8, "big") + value).digest()


def _interior_hash(node: Interior, bounds: tuple[bytes, bytes] | None) -> bytes:
    """Hash an interior node, or a root when its range `bounds` is given (merkle.md 2)."""
    left, right = _branch_bytes(node.left), _branch_bytes(node.right)
    tag = b"interior" if bounds is None else b"root" + bounds[0] + bounds[1]
    return blake3(tag + bytes((len(left), len(right))) + left + right).digest()


def node_hash(node: bytes, key: bytes, bounds: OwnedRange | None) -> bytes:
    """Return a node's 32-byte hash (merkle.md 2).

    `key` is the record id of a leaf and ignored for interior nodes, whose hash does not contain their
    position; `bounds` is the tree's range if the node is its root. Raises `BadEncoding` for malformed bytes,
    a key that is not 32 bytes, and an interior node without both branches (only a root may lack one).
    """
    decoded = decode_node(node)
    if isinstance(decoded, Leaf):
        require_size("key", key, KEY_BYTES)
        return _leaf_hash(key, decoded.value)
    if bounds is not None:
        _require_bounds(bounds.start, bounds.end)
        return _interior_hash(decoded, (bounds.start, bounds.end))
    if decoded.left is None or decoded.right is None:
        raise BadEncoding("only a root may lack a branch")
    return _interior_hash(decoded, None)


def check_node(node: bytes) -> None:
    """Raise `BadEncoding` unless `node` is a canonical node encoding."""
    decode_node(node)


def _require_bounds(start: bytes, end: bytes) -> None:
    require_size("range start", start, KEY_BYTES)
    require_size("range end", end, KEY_BYTES)
    if start > end:
        raise BadEncoding("range starts after its end")


def empty_root(start: bytes, end: bytes) -> tuple[bytes, bytes]:
    """Return (root hash, delta) of the tree without records over `[start, end]`."""
    _require_bounds(start, end)
    node = Interior(None, None)
    root = _interior_hash(node, (start, end))
    return root, BitsDelta({("", root): node.encode()}, set()).encode()


@dataclass(frozen=True, slots=True)
class _Step:
    """One interior node of a verified path: its full prefix, hash and content."""

    prefix: str
    hash: bytes
    node: Interior


@dataclass(frozen=True, slots=True)
class _Verified:
    """What a proof was found to show: the path of `key` in the tree `root`, and its leaf."""

    key: bytes
    root: bytes
    steps: tuple[_Step, ...]
    leaf: Leaf | None

    @property
    def removed_path(self) -> set[BitsKey]:
        """Return the keys of all interior nodes of the path."""
        return {(step.prefix, step.hash) for step in self.steps}


def _verify(proof: Proof) -> _Verified:
    """Check a proof against the root it names (merkle.md 4.1); raises `InvalidProof`."""
    if proof.start > proof.end or not proof.start <= proof.key <= proof.end:
        raise InvalidProof("key is outside the range")
    key = _bits(proof.key)
    pos, want = 0, proof.root
    steps: list[_Step] = []
    last = len(proof.path) - 1
    for index, node in enumerate(proof.path):
        if pos >= KEY_BITS:
            raise InvalidProof("path is longer than the key")
        for branch in (node.left, node.right):
            if branch is None and index > 0:
                raise InvalidProof("only a root may lack a branch")
            if branch is not None and pos + len(branch.prefix) > KEY_BITS:
                raise InvalidProof("branch reaches beyond the key")
        if _interior_hash(node, None if index else (proof.start, proof.end)) != want:
            raise InvalidProof("node does not have the hash its parent names")
        steps.append(_Step(key[:pos], want, node))
        towards = node.branch(key[pos])
        rest = key[pos:]
        if index < last:
            if towards is None or not rest.startswith(towards.prefix):
                raise InvalidProof("path continues where the key does not")
            pos += len(towards.prefix)
            want = towards.hash
        elif proof.leaf is not None:
            if towards is None or rest != towards.prefix:
                raise InvalidProof("leaf is not at the end of the path")
            if _leaf_hash(proof.key, proof.leaf.value) != towards.hash:
                raise InvalidProof("leaf does not have the hash its parent names")
        elif towards is not None and rest.startswith(towards.prefix):
            raise InvalidProof("path is cut short")
    return _Verified(proof.key, proof.root, tuple(steps), proof.leaf)


class Refreshed:
    """A proof brought up to a tree's latest root: what the tree holds at `key` now.

    `leaf` is the stored value, or None if the tree has no record there; `root` is the root it speaks of.
    """

    __slots__ = ("_verified", "key", "leaf", "root")

    def __init__(self, verified: _Verified) -> None:
        self._verified = verified
        self.key = verified.key
        self.root = verified.root
        self.leaf = None if verified.leaf is None else verified.leaf.value


class _Overlay:
    """The last `capacity` deltas: nodes by hash with reference counts, and the roots before each delta."""

    def __init__(self, root: bytes, capacity: int) -> None:
        self.latest = root
        self._capacity = capacity
        self._kept: deque[tuple[bytes, list[bytes]]] = deque()
        self._roots: Counter[bytes] = Counter()  # counted, because values may return to a former state
        self._references: Counter[bytes] = Counter()
        self._nodes: dict[bytes, Node] = {}

    def knows(self, root: bytes) -> bool:
        return root == self.latest or root in self._roots

    def roots(self) -> set[bytes]:
        return {self.latest, *self._roots}

    def node(self, node_hash: bytes) -> Node | None:
        return self._nodes.get(node_hash)

    def push(self, root: bytes, added: dict[bytes, Node]) -> None:
        self._kept.append((self.latest, list(added)))
        self._roots[self.latest] += 1
        self._references.update(added.keys())
        self._nodes.update(added)
        self.latest = root
        if len(self._kept) > self._capacity:
            before, hashes = self._kept.popleft()
            self._roots[before] -= 1
            if not self._roots[before]:
                del self._roots[before]
            for old in hashes:
                self._references[old] -= 1
                if not self._references[old]:
                    del self._references[old], self._nodes[old]


class Tree:
    """An authenticated tree of which only the latest root and recent changes are remembered.

    `root` over `[start, end]` MUST come from a trusted place; `capacity` (1..65535) is how many deltas stay
    refreshable. A fresh tree knows exactly its initial root. Raises `BadEncoding` for sizes out of bounds.
    Every method that raises leaves the tree as it was.
    """

    def __init__(self, root: bytes, start: bytes, end: bytes, capacity: int) -> None:
        require_size("root", root, HASH_BYTES)
        _require_bounds(start, end)
        if not 1 <= capacity <= CAPACITY_MAX:
            raise BadEncoding(f"overlay of {capacity} deltas, must be 1..{CAPACITY_MAX}")
        self.range = OwnedRange(RecordId(start), RecordId(end))
        self._overlay = _Overlay(root, capacity)

    @property
    def root(self) -> bytes:
        """Return the latest root hash."""
        return self._overlay.latest

    def valid_roots(self) -> set[bytes]:
        """Return the roots a proof may be against: the latest, and the one before each retained delta."""
        return self._overlay.roots()

    def latest(self, proof: bytes) -> Refreshed:
        """Verify a proof and bring it up to the latest root (merkle.md 5).

        Raises `BadEncoding`, `StaleProof` (root not known, before any hashing) or `InvalidProof`.
        """
        return Refreshed(self._refresh(decode_proof(proof)))

    def insert(self, refreshed: Refreshed, value: bytes) -> tuple[bytes, bytes]:
        """Set the value at the proof's key and return (new root, delta); the tree moves to the new root.

        An equal value changes nothing and gives an empty delta. Raises `StaleProof` unless `refreshed` is at
        the latest root, `BadEncoding` if the value exceeds 65535 bytes.
        """
        require_value(value)
        verified = refreshed._verified
        if verified.root != self.root:
            raise StaleProof("the tree has moved on since this proof was refreshed")
        if verified.leaf is not None and verified.leaf.value == value:
            return self.root, BitsDelta({}, set()).encode()
        added, removed = self._changes(verified, Leaf(value))
        root = next(node_hash for prefix, node_hash in added if not prefix)
        delta = BitsDelta({key: node.encode() for key, node in added.items()}, removed).normalised()
        self._overlay.push(root, {key[1]: node for key, node in added.items() if key in delta.adds})
        return root, delta.encode()

    def update(self, proof: bytes, value: bytes) -> tuple[bytes, bytes]:
        """Do `insert(latest(proof), value)` in one call."""
        require_value(value)
        return self.insert(self.latest(proof), value)

    def split(self, proof: bytes) -> tuple[Half, Half, bytes]:
        """Return ((range, root), (range, root), delta) of both halves, the right one starting at the key.

        The tree itself is unchanged. Raises `BadEncoding`, `StaleProof`, or `InvalidProof`, the last also
        if the key is the first of the range, for then one half would be nothing.
        """
        decoded = decode_proof(proof)
        verified = self._refresh(decoded)
        middle = verified.key
        if middle == self.range.start:
            raise InvalidProof("a tree cannot be split at its first key")
        before = RecordId((int.from_bytes(middle, "big") - 1).to_bytes(KEY_BYTES, "big"))
        left_range = OwnedRange(self.range.start, before)
        right_range = OwnedRange(RecordId(middle), self.range.end)
        bits = _bits(middle)
        lower: list[Branch] = []
        upper: list[Branch] = []
        for branch in _hanging(verified):
            (lower if branch.prefix < bits[: len(branch.prefix)] else upper).append(branch)
        left_root, left_adds = _assemble(left_range, lower)
        right_root, right_adds = _assemble(right_range, upper)
        delta = BitsDelta(left_adds | right_adds, verified.removed_path).normalised()
        return (left_range, left_root), (right_range, right_root), delta.encode()

    def merge(
        self, own: bytes, other: bytes, other_root: bytes, other_range: OwnedRange
    ) -> tuple[OwnedRange, bytes, bytes]:
        """Return (range, root, delta) of this tree joined with an adjacent one (merkle.md 7).

        `other_root` and `other_range` MUST be authenticated by the caller; both proofs are edge proofs. The
        tree itself is unchanged. Raises `BadEncoding`; `StaleProof` if the own proof is too old or its edge
        may have moved; `NotAdjacent`; else `InvalidProof`.
        """
        require_size("other root", other_root, HASH_BYTES)
        _require_bounds(other_range.start, other_range.end)
        mine, theirs = decode_proof(own), decode_proof(other)
        own_path = self._refresh(mine)
        if (theirs.root, theirs.start, theirs.end) != (other_root, other_range.start, other_range.end):
            raise InvalidProof("the other proof is not against the root or range it must be against")
        other_path = _verify(theirs)
        joined = self.range.join(other_range)
        if joined is None:
            raise NotAdjacent("the ranges do not touch")
        own_side, other_side = ("1", "0") if joined.start == self.range.start else ("0", "1")
        if not _is_edge(other_path, other_side):
            raise InvalidProof("the other proof is not of the edge towards this tree")
        if not _is_edge(own_path, own_side):
            if mine.root != self.root:
                raise StaleProof("the edge may have moved since the proof was made")
            raise InvalidProof("the own proof is not of the edge towards the other tree")
        root, adds = _assemble(joined, _hanging(own_path) + _hanging(other_path))
        delta = BitsDelta(adds, own_path.removed_path | other_path.removed_path).normalised()
        return joined, root, delta.encode()

    def _refresh(self, proof: Proof) -> _Verified:
        if not self._overlay.knows(proof.root):
            raise StaleProof("root is not one of the recent ones")
        if (proof.start, proof.end) != (self.range.start, self.range.end):
            raise InvalidProof("proof is for another range")
        verified = _verify(proof)
        if verified.root == self.root:
            return verified
        known: dict[bytes, Node] = {step.hash: step.node for step in verified.steps}
        if verified.leaf is not None:
            known[_leaf_hash(proof.key, verified.leaf.value)] = verified.leaf

        def find(node_hash: bytes) -> Node:
            node = self._overlay.node(node_hash) or known.get(node_hash)
            if node is None:
                raise StaleProof("a node of the latest path is neither recent nor in the proof")
            return node

        key = _bits(proof.key)
        pos, want = 0, self.root
        steps: list[_Step] = []
        while pos < KEY_BITS:
            node = find(want)
            if not isinstance(node, Interior):
                raise StaleProof("a leaf in place of an interior node")
            steps.append(_Step(key[:pos], want, node))
            branch = node.branch(key[pos])
            if branch is None or not key[pos:].startswith(branch.prefix):
                return _Verified(proof.key, self.root, tuple(steps), None)
            pos += len(branch.prefix)
            want = branch.hash
        leaf = find(want)
        if not isinstance(leaf, Leaf):
            raise StaleProof("an interior node in place of a leaf")
        return _Verified(proof.key, self.root, tuple(steps), leaf)

    def _changes(self, verified: _Verified, leaf: Leaf) -> tuple[dict[BitsKey, Node], set[BitsKey]]:
        """Return nodes added and node keys removed by setting `leaf` at the verified key (merkle.md 6)."""
        key = _bits(verified.key)
        child = _leaf_hash(verified.key, leaf.value)
        added: dict[BitsKey, Node] = {(key, child): leaf}
        removed = verified.removed_path
        *_, last = verified.steps
        tail = key[len(last.prefix) :]
        branch = last.node.branch(tail[0])
        if verified.leaf is not None:
            removed.add((key, _leaf_hash(verified.key, verified.leaf.value)))
        if branch is not None and branch.prefix != tail:
            shared = _common(tail, branch.prefix)
            mine, sibling = Branch(tail[shared:], child), Branch(branch.prefix[shared:], branch.hash)
            fork = Interior(mine, sibling) if mine.prefix[0] == "0" else Interior(sibling, mine)
            child = _interior_hash(fork, None)
            added[key[: len(last.prefix) + shared], child] = fork
            tail = tail[:shared]
        for step in reversed(verified.steps):
            bit = key[len(step.prefix)]
            if step is not last:
                kept = step.node.branch(bit)
                check(kept is not None, "a verified path continues along a branch")
                tail = "" if kept is None else kept.prefix
            node = step.node.replace(bit, Branch(tail, child))
            child = _interior_hash(node, None if step.prefix else (self.range.start, self.range.end))
            added[step.prefix, child] = node
        return added, removed


def _hanging(verified: _Verified) -> list[Branch]:
    """Return the branches not taken, with full prefixes: together they hold every record (merkle.md 7)."""
    key = _bits(verified.key)
    found: list[Branch] = []
    for index, step in enumerate(verified.steps):
        for bit in "01":
            branch = step.node.branch(bit)
            taken = index < len(verified.steps) - 1 and bit == key[len(step.prefix)]
            if branch is not None and not taken:
                found.append(Branch(step.prefix + branch.prefix, branch.hash))
    return found


def _is_edge(verified: _Verified, side: str) -> bool:
    """Tell whether a path is the tree's outermost one on `side` (merkle.md 4.2)."""
    key = _bits(verified.key)
    root = verified.steps[0].node
    for step in verified.steps:
        if key[len(step.prefix)] != side and not (step.prefix == "" and root.branch(side) is None):
            return False
    return verified.leaf is not None or root == Interior(None, None)


def _assemble(bounds: OwnedRange, branches: list[Branch]) -> tuple[bytes, dict[BitsKey, bytes]]:
    """Build the radix tree over disjoint subtrees; return its root hash and the nodes made (merkle.md 7)."""
    ordered = sorted(branches, key=lambda branch: branch.prefix)
    for low, high in pairwise(ordered):
        if high.prefix.startswith(low.prefix):
            raise InvalidProof("subtrees overlap")
    made: dict[BitsKey, bytes] = {}

    def build(part: list[Branch], depth: int) -> Branch | None:
        """Return one branch, relative to `depth`, that holds all of `part`."""
        if not part:
            return None
        if len(part) == 1:
            return Branch(part[0].prefix[depth:], part[0].hash)
        prefix = part[0].prefix
        fork = _common(prefix, part[-1].prefix)
        cut = next(at for at, branch in enumerate(part) if branch.prefix[fork] == "1")
        node = Interior(build(part[:cut], fork), build(part[cut:], fork))
        node_hash = _interior_hash(node, None)
        made[prefix[:fork], node_hash] = node.encode()
        return Branch(prefix[depth:fork], node_hash)

    left = build([branch for branch in ordered if branch.prefix[0] == "0"], 0)
    right = build([branch for branch in ordered if branch.prefix[0] == "1"], 0)
    root = Interior(left, right)
    root_hash = _interior_hash(root, (bounds.start, bounds.end))
    made["", root_hash] = root.encode()
    return root_hash, made
