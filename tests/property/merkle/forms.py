"""Shared parts of the Merkle tests: both forms of the tree, strategies, outcomes, and a structural check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from hypothesis import strategies as st

from juicebox_hsm.ids import FULL_RANGE, OwnedRange, RecordId
from juicebox_hsm.merkle import kernel
from juicebox_hsm.merkle.nodes import KEY_BITS
from roles.tools.bench.memory_tree import MemoryTree
from tests.merkle_model import model
from tests.merkle_model.codec import Interior, Leaf, decode_node, unpack_bits

FORMS: tuple[ModuleType, ...] = (kernel, model)
Records = dict[bytes, bytes]


def number_key(number: int) -> bytes:
    """Return a key from its number."""
    return number.to_bytes(32, "big")


# Random keys fork near the root; keys around a power of two, or that differ in the last bits, fork at any depth.
keys = st.one_of(
    st.binary(min_size=32, max_size=32),
    st.integers(0, 255).map(lambda bit: number_key(1 << bit)),
    st.integers(0, 255).map(lambda bit: number_key((1 << bit) - 1)),
    st.integers(0, 31).map(number_key),
    st.integers(0, 31).map(lambda low: number_key(2**256 - 1 - low)),
)
values = st.binary(max_size=40)
records = st.dictionaries(keys, values, max_size=12)


@st.composite
def ranges(draw: st.DrawFn) -> OwnedRange:
    """Draw a range: full, half, narrow or of one key."""
    if draw(st.booleans()):
        return FULL_RANGE
    start, end = sorted((draw(keys), draw(keys)))
    return OwnedRange(RecordId(start), RecordId(end))


@st.composite
def ranged_records(draw: st.DrawFn) -> tuple[OwnedRange, Records]:
    """Draw a range and records inside it."""
    bounds = draw(ranges())
    inside = {key: value for key, value in draw(records).items() if bounds.contains(key)}
    inside |= {key: draw(values) for key in (bounds.start, bounds.end) if draw(st.booleans())}
    return bounds, inside


def fresh(data: bytes) -> bytes:
    """Return an equal object on the heap of its own: the interpreter shares short constants."""
    return bytes(bytearray(data))


def outcome(call: Callable[[], Any]) -> Any:
    """Return a call's result, or the type of the documented error it raised; anything else passes through."""
    try:
        return call()
    except (kernel.BadEncoding, kernel.InvalidProof, kernel.StaleProof, kernel.NotAdjacent) as error:
        return type(error)


def new_tree(form: ModuleType, host: MemoryTree, capacity: int = 8) -> Any:
    """Return a form's tree at the host's root."""
    return form.Tree(host.root, host.range.start, host.range.end, capacity)


def unpack_row(row: bytes) -> tuple[str, bytes]:
    """Return (prefix bits, hash) of a row key, read bit by bit."""
    encoded, digest = row[:-32], row[-32:]
    groups = "".join(format(byte, "07b") for byte in encoded[:-1])
    used = encoded[-1] & 0x7F
    return (groups[: len(groups) - 7 + used] if used else ""), digest


def node_keys(rows: Mapping[bytes, bytes]) -> set[tuple[str, bytes]]:
    """Return the node keys of a set of rows."""
    return {unpack_row(row) for row in rows}


def check_structure(host: MemoryTree, expected: Records) -> None:
    """Assert T1 to T5, and that every stored node has its key's hash and is reachable exactly once."""
    rows = {unpack_row(row): node for row, node in host.rows.items()}
    assert len(rows) == len(host.rows)
    found: Records = {}
    todo = [("", host.root)]
    seen = set()
    while todo:
        place = todo.pop()
        assert place not in seen
        seen.add(place)
        prefix, digest = place
        node = decode_node(rows[place])
        if isinstance(node, Leaf):
            assert len(prefix) == KEY_BITS  # T3
            key = number_key(int(prefix, 2))
            assert host.range.contains(key)  # T4
            assert model.node_hash(rows[place], key, None) == digest
            found[key] = node.value
            continue
        assert isinstance(node, Interior)
        assert model.node_hash(rows[place], b"", None if prefix else host.range) == digest
        assert not prefix or (node.left and node.right)  # T1
        for branch, side in ((node.left, "0"), (node.right, "1")):
            if branch is not None:
                assert branch.prefix.startswith(side)  # T2
                todo.append((prefix + branch.prefix, branch.hash))
    assert seen == rows.keys()
    assert found == expected
    sides = {unpack_bits(key, 1) for key in expected}
    interiors = len(rows) - len(expected)
    assert interiors == (1 if not expected else len(expected) - (len(sides) == 2))  # T5
