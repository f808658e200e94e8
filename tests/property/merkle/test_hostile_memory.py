"""The C side alone, on exact-size blocks of the heap: no read passes the end of a view.

Python `bytes` carry a byte beyond their end and the shortest ones are shared constants, either of which hides
an over-read from a sanitizer. Here every input is a block of its own size; `scripts/sanitize` runs this under
address and undefined behaviour sanitizers, and shows that a removed bounds check is caught.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from juicebox_hsm.ids import FULL_RANGE
from juicebox_hsm.merkle import kernel
from juicebox_hsm.merkle._native import ffi, lib
from juicebox_hsm.merkle.walk import Side
from roles.tools.bench.memory_tree import MemoryTree
from tests.property.merkle.forms import number_key

BOUNDS = bytes(32) + b"\xff" * 32


def block(data: bytes) -> Any:
    """Return a heap block of exactly the size of `data`."""
    cdata = ffi.new("uint8_t[]", len(data))
    ffi.buffer(cdata)[:] = data  # type: ignore[index]
    return cdata


def host() -> MemoryTree:
    stored = [(number_key(n * 0x0123456789ABCDEF << 190), b"value %d" % n) for n in range(9)]
    return MemoryTree.build(FULL_RANGE, stored)


def tree_at(root: bytes) -> Any:
    out = ffi.new("jbm_tree **")
    assert lib.jbm_tree_new(root, 32, BOUNDS, 64, 4, out) == lib.JBM_OK
    return ffi.gc(out[0], lib.jbm_tree_free)


class _Inputs:
    """Out-parameters and a tree for one pass over one kind of input."""

    def __init__(self) -> None:
        self.host = host()
        self.tree = tree_at(self.host.root)
        self.buffer = ffi.gc(ffi.new("jbm_buffer *"), lib.jbm_buffer_free)
        self.out = ffi.new("uint8_t[96]")
        self.counts = ffi.new("uint32_t[2]")

    def latest(self, data: Any, size: int) -> int:
        path = ffi.new("jbm_path **")
        status = lib.jbm_tree_latest(self.tree, data, size, path)
        if status == lib.JBM_OK:
            lib.jbm_path_free(path[0])
        return status

    def squash(self, data: Any, size: int) -> int:
        return lib.jbm_squash(ffi.new("uint8_t *[]", [data]), ffi.new("size_t[]", [size]), 1, self.buffer)

    def merge(self, data: Any, size: int) -> int:
        other = self.host.read_edge(Side.LEFT)
        return lib.jbm_tree_merge(
            self.tree, data, size, other, len(other), self.host.root, 32, BOUNDS, 64, self.out, self.out, self.buffer
        )


def node_call(inputs: _Inputs) -> Callable[[Any, int], int]:
    return lambda data, size: lib.jbm_node_hash(data, size, BOUNDS, 32, BOUNDS, 64, inputs.out)


CALLS: dict[str, tuple[str, Callable[[_Inputs], Callable[[Any, int], int]]]] = {
    "check_node": ("node", lambda _: lib.jbm_check_node),
    "node_hash": ("node", node_call),
    "delta_index": ("delta", lambda i: lambda d, n: lib.jbm_delta_index(d, n, i.counts, i.buffer)),
    "delta_rows": ("delta", lambda i: lambda d, n: lib.jbm_delta_rows(d, n, i.counts, i.buffer)),
    "squash": ("delta", lambda i: i.squash),
    "latest": ("proof", lambda i: i.latest),
    "update": ("proof", lambda i: lambda d, n: lib.jbm_tree_update(i.tree, d, n, b"", 0, i.out, i.buffer)),
    "split": ("proof", lambda i: lambda d, n: lib.jbm_tree_split(i.tree, d, n, i.out, i.out, i.buffer)),
    "merge": ("proof", lambda i: i.merge),
}


def samples(kind: str) -> list[bytes]:
    """Return well-formed inputs of a kind."""
    stored = host()
    key = number_key(5 * 0x0123456789ABCDEF << 190)
    if kind == "proof":
        return [stored.read(key), stored.read(number_key(77))]
    if kind == "delta":
        _, delta = kernel.Tree(stored.root, bytes(32), b"\xff" * 32, 2).update(stored.read(key), b"changed")
        return [delta]
    return [*sorted(stored.rows.values(), key=len)[-2:], b"\x01\x10\x00\x00", b"\x01\x20"]


@pytest.mark.parametrize("name", CALLS)
def test_truncated_inputs_stay_inside_their_block(name: str) -> None:
    """Every prefix of a valid input, in a block of its own size, is refused without a look beyond."""
    kind, make = CALLS[name]
    call = make(_Inputs())
    for sample in samples(kind):
        for size in range(len(sample)):
            assert call(block(sample[:size]), size) == lib.JBM_BAD_ENCODING


@pytest.mark.parametrize("name", CALLS)
def test_changed_bytes_stay_inside_their_block(name: str) -> None:
    """Every byte set to all ones or zero, lengths among them, leaves the call inside its block."""
    kind, make = CALLS[name]
    documented = {lib.JBM_OK, lib.JBM_BAD_ENCODING, lib.JBM_INVALID_PROOF, lib.JBM_STALE_PROOF, lib.JBM_NOT_ADJACENT}
    for sample in samples(kind):
        call = make(_Inputs())
        for at in range(len(sample)):
            for byte in (0x00, 0xFF):
                data = sample[:at] + bytes((byte,)) + sample[at + 1 :]
                assert call(block(data), len(data)) in documented


def test_wrong_sizes_are_refused_again_in_c() -> None:
    """C checks the sizes kernel.py checks: the C half trusts nobody."""
    inputs = _Inputs()
    out, buffer, size = inputs.out, inputs.buffer, ffi.new("size_t *")
    short, tree = block(bytes(31)), ffi.new("jbm_tree **")
    bad = lib.JBM_BAD_ENCODING
    swapped = block(b"\xff" * 32 + bytes(32))
    assert lib.jbm_node_hash(b"\x01\x10\0\0", 4, short, 31, b"", 0, out) == bad
    assert lib.jbm_node_hash(b"\x01\x20", 2, b"", 0, short, 31, out) == bad
    assert lib.jbm_node_hash(b"\x01\x20", 2, b"", 0, swapped, 64, out) == bad
    assert lib.jbm_empty_root(short, 31, out, buffer) == bad
    assert lib.jbm_empty_root(swapped, 64, out, buffer) == bad
    assert lib.jbm_row_key(short, 31, 256, BOUNDS, 32, out, size) == bad
    assert lib.jbm_row_key(short, 31, 2**60, BOUNDS, 32, out, size) == bad
    assert lib.jbm_row_key(short, 31, 248, short, 31, out, size) == bad
    assert lib.jbm_path_scan_starts(short, 31, 0, buffer) == bad
    assert lib.jbm_path_scan_starts(BOUNDS, 32, 2**60, buffer) == bad
    assert lib.jbm_tree_new(short, 31, BOUNDS, 64, 1, tree) == bad
    assert lib.jbm_tree_new(BOUNDS, 32, short, 31, 1, tree) == bad
    assert lib.jbm_tree_new(BOUNDS, 32, swapped, 64, 1, tree) == bad
    assert lib.jbm_tree_new(BOUNDS, 32, BOUNDS, 64, 0, tree) == bad
    assert lib.jbm_tree_new(BOUNDS, 32, BOUNDS, 64, 2**40, tree) == bad
    proof = inputs.host.read(number_key(1))
    long = block(bytes(65_536))
    assert lib.jbm_tree_update(inputs.tree, proof, len(proof), long, 65_536, out, buffer) == bad
    arguments = (inputs.tree, proof, len(proof), proof, len(proof))
    assert lib.jbm_tree_merge(*arguments, short, 31, BOUNDS, 64, out, out, buffer) == bad
    assert lib.jbm_tree_merge(*arguments, BOUNDS, 32, short, 31, out, out, buffer) == bad
    assert lib.jbm_tree_merge(*arguments, BOUNDS, 32, swapped, 64, out, out, buffer) == bad
    path = ffi.new("jbm_path **")
    assert lib.jbm_tree_latest(inputs.tree, proof, len(proof), path) == lib.JBM_OK
    held = ffi.gc(path[0], lib.jbm_path_free)
    assert lib.jbm_tree_insert(inputs.tree, held, long, 65_536, out, buffer) == bad
    assert lib.jbm_path_value(held, size) == ffi.NULL
