"""The in-memory store of whole trees."""

from __future__ import annotations

import pytest

from juicebox_hsm.errors import InvariantViolation
from juicebox_hsm.ids import FULL_RANGE, OwnedRange, RecordId
from juicebox_hsm.merkle.walk import MissingNode
from roles.tools.bench.memory_tree import MemoryTree

KEYS = [bytes((first,)) + bytes(31) for first in (0x00, 0x01, 0x80)]


def test_build_refuses_what_is_no_set_of_records() -> None:
    """A key twice, or outside the range, is a mistake of the caller."""
    with pytest.raises(InvariantViolation):
        MemoryTree.build(FULL_RANGE, [(KEYS[0], b"a"), (KEYS[0], b"b")])
    with pytest.raises(InvariantViolation):
        MemoryTree.build(OwnedRange(RecordId(KEYS[1]), FULL_RANGE.end), [(KEYS[0], b"a")])


def test_a_tree_without_records_is_the_empty_root() -> None:
    """Building from nothing gives the empty tree."""
    assert MemoryTree.build(FULL_RANGE, []).rows == MemoryTree.empty(FULL_RANGE).rows


def test_a_root_that_is_not_there_cannot_be_read() -> None:
    """Reading at an unknown root says which node is missing."""
    host = MemoryTree.build(FULL_RANGE, [(key, b"") for key in KEYS])
    with pytest.raises(MissingNode):
        MemoryTree(FULL_RANGE, bytes(32), host.rows).read(KEYS[0])
