"""Row keys and path scans (merkle.md 12, P12, P13)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.ids import FULL_RANGE
from juicebox_hsm.merkle import kernel
from juicebox_hsm.merkle.walk import PathWalk, row_prefix, scan_end
from roles.tools.bench.memory_tree import MemoryTree
from tests.merkle_model import model
from tests.merkle_model.codec import base128, pack_bits, unpack_bits
from tests.property.merkle.forms import FORMS, fresh, keys, outcome, records, unpack_row

prefixes = st.text("01", max_size=256)


def row(bits: str, digest: bytes) -> bytes:
    return kernel.row_key(pack_bits(bits), len(bits), digest)


@given(first=prefixes, second=prefixes, digest=st.binary(min_size=32, max_size=32))
def test_p12_row_keys_are_injective_and_prefix_free(first: str, second: str, digest: bytes) -> None:
    """P12: different prefixes give different keys, none the start of another; the prefix can be read back."""
    one, two = row(first, digest), row(second, digest)
    assert (one == two) == (first == second)
    if first != second:
        assert not base128(first).startswith(base128(second))
    assert unpack_row(one) == (first, digest)
    assert len(one) == -(-len(first) // 7) + 1 + 32


@given(key=keys, prefix=prefixes, digest=st.binary(min_size=32, max_size=32))
def test_p12_scans_hold_exactly_their_position(key: bytes, prefix: str, digest: bytes) -> None:
    """P12: the scan of depth n finds the rows at the key's first n bits, and no others."""
    bits = unpack_bits(key, 256)
    starts = kernel.path_scan_starts(key, 0)
    for candidate in (prefix, bits[: len(prefix)], bits[: len(prefix)] + "1"):
        stored = row(candidate[:256], digest)
        found = [depth for depth, start in enumerate(starts) if start <= stored < scan_end(start)]
        assert found == ([len(candidate[:256])] if bits.startswith(candidate[:256]) else [])


@given(key=keys, first=st.integers(0, 256))
def test_p13_scan_starts_equal_the_reference(key: bytes, first: int) -> None:
    """P13: base128 of every length 0 to 256 equals the bit-by-bit reference."""
    bits = unpack_bits(key, 256)
    expected = [base128(bits[:depth]) for depth in range(first, 257)]
    assert kernel.path_scan_starts(fresh(key), first) == model.path_scan_starts(key, first) == expected
    for depth in range(first, 257, 5):
        assert row_prefix(int(bits[:depth] or "0", 2), depth) == expected[depth - first]
        packed = pack_bits(bits[:depth])
        assert [form.row_key(fresh(packed), depth, bytes(32))[:-32] for form in FORMS] == [expected[depth - first]] * 2


@given(packed=st.binary(max_size=33), nbits=st.integers(0, 257))
def test_row_keys_of_any_arguments_are_judged_alike(packed: bytes, nbits: int) -> None:
    """Lengths that do not fit and set padding bits are refused by both forms."""
    first, second = (outcome(lambda f=form: f.row_key(fresh(packed), nbits, bytes(32))) for form in FORMS)
    assert first == second


@given(stored=records, key=keys)
def test_p12_a_walk_asks_for_the_rows_its_scans_find(stored: dict[bytes, bytes], key: bytes) -> None:
    """P12: every row a path walk wants lies in the scan of its depth, so one round of scans serves it."""
    host = MemoryTree.build(FULL_RANGE, stored.items())
    starts = kernel.path_scan_starts(key, 0)
    walk = PathWalk(key, host.range, host.root)
    while walk.wanted is not None:
        wanted = walk.wanted_row
        assert starts[walk.depth] <= wanted < scan_end(starts[walk.depth])
        walk.feed(host.rows[wanted])
    assert walk.proof() == host.read(key)
