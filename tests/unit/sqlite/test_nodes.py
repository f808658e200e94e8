"""Tree rows against plain dictionaries, and the cache."""

from __future__ import annotations

import random

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.adapters.sqlite.layout import LAST_BITS, PAGE_BITS, is_bounded, plan_changes
from juicebox_hsm.adapters.sqlite.nodes import TreeNodes, decode_page
from juicebox_hsm.adapters.sqlite.reads import fetch
from juicebox_hsm.adapters.sqlite.schema import _TABLES
from juicebox_hsm.adapters.stores.node_cache import NodeCache
from juicebox_hsm.ids import FULL_RANGE, RecordId
from juicebox_hsm.merkle.kernel import Tree, decode_delta, empty_root, squash
from juicebox_hsm.merkle.nodes import BadEncoding
from juicebox_hsm.merkle.walk import Side
from roles.tools.bench.memory_tree import MemoryTree


def database() -> apsw.Connection:
    """Return an empty database in memory with our tables."""
    connection = apsw.Connection(":memory:")
    connection.execute(_TABLES)
    return connection


def stored(connection: apsw.Connection, realm: int) -> dict[bytes, bytes]:
    """Return all stored nodes of a realm by hash; hashes are unique in trees of distinct values."""
    nodes: dict[bytes, bytes] = dict(fetch(connection, "SELECT hash, node FROM roots WHERE realm = ?", (realm,)))
    for row, data in fetch(connection, "SELECT id, data FROM tree WHERE id >> 53 = ?", (realm,)):
        page = decode_page(row, data)
        assert page, "an empty page is deleted"
        assert all(isinstance(place, int if is_bounded(row) else bytes) for place in page)
        nodes |= {piece[:32]: piece[32:] for piece in page.values()}
    return nodes


def framed(delta_adds: dict[bytes, bytes]) -> dict[bytes, bytes]:
    return {node_hash: len(node).to_bytes(4, "big") + node for node_hash, node in delta_adds.items()}


@st.composite
def records(draw: st.DrawFn) -> RecordId:
    """Record ids of which many share long prefixes, around the boundaries of pages too."""
    shared = draw(st.sampled_from((0, 1, PAGE_BITS, 15, 16, 17, LAST_BITS - 1, LAST_BITS, LAST_BITS + 1, 130, 255)))
    stem = draw(st.sampled_from((0, (1 << 256) - 1, 0xA5 << 248)))
    rest = 256 - shared
    return RecordId((stem >> rest << rest | draw(st.integers(0, (1 << rest) - 1))).to_bytes(32, "big"))


class Host:
    """A tree whose nodes are kept twice: in the database and in a dictionary."""

    def __init__(self) -> None:
        self.connection = database()
        root, delta = empty_root(FULL_RANGE.start, FULL_RANGE.end)
        self.tree = Tree(root, FULL_RANGE.start, FULL_RANGE.end, 64)
        self.model = MemoryTree(FULL_RANGE, root, {})
        self.nodes: dict[bytes, bytes] = {}
        self.apply(delta)

    def apply(self, delta: bytes) -> None:
        decoded = decode_delta(delta)
        for removed in decoded.removes:
            del self.nodes[removed.hash]
        self.nodes |= {add.hash: add.node for add in decoded.adds}
        self.model.apply(self.tree.root, delta)
        changes = plan_changes(3, delta)
        assert changes.by_hash == {add.hash: add.node for add in decoded.adds}
        TreeNodes.apply(self.connection, changes)
        assert stored(self.connection, 3) == framed(self.nodes)

    def insert(self, keys: list[RecordId], seed: int) -> None:
        rng = random.Random(seed)
        deltas = [self.tree.update(self.model.read(key), rng.randbytes(20))[1] for key in keys]
        self.apply(squash(deltas))


@given(st.lists(st.lists(records(), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(0, 1 << 30))
def test_inserts_store_exactly_the_tree(batches: list[list[RecordId]], seed: int) -> None:
    """After every batch the rows hold the tree's nodes, all of them and nothing else."""
    host = Host()
    for number, keys in enumerate(batches):
        host.insert(keys, seed + number)


@given(st.lists(records(), min_size=1, max_size=12, unique=True), records(), st.integers(0, 1 << 30))
def test_split_and_merge_store_exactly_the_trees(keys: list[RecordId], middle: RecordId, seed: int) -> None:
    """Splitting and merging leave the nodes of both trees, then those of one, wherever the boundary is."""
    host = Host()
    host.insert(keys, seed)
    if middle == FULL_RANGE.start:
        return
    whole, before = host.tree.root, dict(host.nodes)
    (left_range, left), (right_range, right), delta = host.tree.split(host.model.read(middle))
    host.apply(delta)
    tree = Tree(left, left_range.start, left_range.end, 4)
    own = MemoryTree(left_range, left, host.model.rows).read_edge(Side.RIGHT)
    other = MemoryTree(right_range, right, host.model.rows).read_edge(Side.LEFT)
    _, root, delta = tree.merge(own, other, right, right_range)
    host.apply(delta)
    assert root == whole
    assert host.nodes == before


def test_realms_do_not_meet() -> None:
    """Trees of two realms over the same records share no row."""
    connection = database()
    root, delta = empty_root(FULL_RANGE.start, FULL_RANGE.end)
    tree = Tree(root, FULL_RANGE.start, FULL_RANGE.end, 4)
    model = MemoryTree(FULL_RANGE, root, {})
    model.apply(root, delta)
    first, second = RecordId(b"\x12" * 32), RecordId(b"\x13" * 32)
    deltas = [delta, tree.update(model.read(first), b"a")[1], tree.update(model.read(second), b"b")[1]]
    for realm in (1, 2, 1023):
        TreeNodes.apply(connection, plan_changes(realm, squash(deltas)))
    sizes = [len(stored(connection, realm)) for realm in (1, 2, 1023)]
    assert sizes == [4, 4, 4], "root, fork, two leaves"


def test_a_remove_spares_a_node_that_replaced_it() -> None:
    """A removal names a hash; what stands at its place under another hash stays."""
    host = Host()
    record = RecordId(b"\x77" * 32)
    host.insert([record], 1)
    late = b"".join((b"\x01\x50", bytes(4), (1).to_bytes(4, "big"), (256).to_bytes(2, "big"), record, b"\x01" * 32))
    TreeNodes.apply(host.connection, plan_changes(3, late))
    assert stored(host.connection, 3) == framed(host.nodes)


@given(st.binary(max_size=40), st.data())
def test_damaged_deltas_are_refused(garbage: bytes, data: st.DataObject) -> None:
    """Bytes that are not a whole delta raise BadEncoding before anything is written."""
    _, delta = empty_root(FULL_RANGE.start, FULL_RANGE.end)
    cut = data.draw(st.integers(0, len(delta) - 1))
    for bad in (delta[:cut], delta + b"\0", b"\x02" + delta[1:], garbage):
        with pytest.raises(BadEncoding):
            plan_changes(1, bad)


@given(st.integers(1, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=80))
def test_cache_is_bounded_and_truthful(size: int, steps: list[tuple[bool, int]]) -> None:
    """The cache never exceeds its size by more than rounding, and answers only what was put."""
    cache: NodeCache[bytes] = NodeCache(size)
    known: set[bytes] = set()
    for is_put, number in steps:
        key = bytes([number])
        if is_put:
            cache.put(key, key * 2)
            known.add(key)
            assert cache.get(key) == key * 2
        else:
            found = cache.get(key)
            assert found is None or (found == key * 2 and key in known)
        assert len(cache) <= max(size, 2)


def test_cache_keeps_what_is_used() -> None:
    """A node asked for again and again survives any number of others."""
    cache: NodeCache[bytes] = NodeCache(10)
    cache.put(b"root", b"node")
    for number in range(1000):
        cache.put_all({bytes([number & 255, number >> 8]): b"x"})
        assert cache.get(b"root") == b"node"
