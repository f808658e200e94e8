"""Rows are assembled from chunks as the service may cut them, and requests say what was meant."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from google.cloud.bigtable_v2.types import bigtable
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.adapters.bigtable.codec import (
    AnyTimestampAtLeast,
    AnyValueEquals,
    Cell,
    DeleteColumn,
    DeleteRow,
    KeyRange,
    Row,
    RowAssembler,
    RowExists,
    RowSet,
    Selection,
    SetCell,
    check_and_mutate_request,
    read_rows_request,
)
from juicebox_hsm.ports.errors import StoreInvalid

Response: Any = bigtable.ReadRowsResponse.pb()
Check: Any = bigtable.CheckAndMutateRowRequest.pb()
Read: Any = bigtable.ReadRowsRequest.pb()


def chunk(value: bytes = b"", **fields: Any) -> dict[str, Any]:
    """Return one chunk; family and qualifier are wrapped as the message wants them."""
    for name in ("family_name", "qualifier"):
        if name in fields:
            fields[name] = {"value": fields[name]}
    return {"value": value, **fields}


def assemble(*messages: list[dict[str, Any]], last: bytes | None = None) -> RowAssembler:
    """Feed messages of chunks."""
    assembler = RowAssembler(last)
    for chunks in messages:
        assembler.feed(Response(chunks=chunks).SerializeToString())
    return assembler


FIRST = {"row_key": b"a", "family_name": "f", "qualifier": b"q", "timestamp_micros": 1000}


def test_what_a_chunk_may_leave_out() -> None:
    """Key, family and qualifier carry over within a row; a new family names its qualifier."""
    found = assemble(
        [
            chunk(b"1", **FIRST),
            chunk(b"2", qualifier=b"r", timestamp_micros=2000),
            chunk(b"3", timestamp_micros=1000),
            chunk(b"4", family_name="t", qualifier=b"t", timestamp_micros=0, commit_row=True),
        ],
        [chunk(b"5", row_key=b"b", family_name="f", qualifier=b"", timestamp_micros=5000, commit_row=True)],
    )
    assert found.rows == [
        Row(b"a", [Cell("f", b"q", 1000, b"1"), Cell("f", b"r", 2000, b"2"), Cell("f", b"r", 1000, b"3"),
                   Cell("t", b"t", 0, b"4")]),
        Row(b"b", [Cell("f", b"", 5000, b"5")]),
    ]  # fmt: skip
    assert not found.is_inside
    assert found.last == b"b"


def test_families_are_sorted() -> None:
    """Whatever the order in which families come, a row's cells are by family, column and time, newest first."""
    found = assemble(
        [
            chunk(b"t", row_key=b"a", family_name="t", qualifier=b"t", timestamp_micros=1000),
            chunk(b"f", family_name="f", qualifier=b"b", timestamp_micros=2000),
            chunk(b"old", timestamp_micros=1000),
            chunk(b"a", qualifier=b"a", timestamp_micros=0, commit_row=True),
        ]
    )
    assert [cell.value for cell in found.rows[0].cells] == [b"a", b"f", b"old", b"t"]


@given(st.binary(max_size=40), st.lists(st.integers(0, 40), max_size=6), st.booleans())
def test_values_in_pieces(value: bytes, cuts: list[int], reset: bool) -> None:
    """A value may come in any number of pieces and messages, also after a row that was begun and taken back."""
    places = sorted({min(cut, len(value)) for cut in cuts} | {0, len(value)})
    pieces = [value[low:high] for low, high in pairwise(places)] or [b""]
    chunks = [
        chunk(piece, **(FIRST if at == 0 else {}), value_size=len(value) if at < len(pieces) - 1 else 0)
        for at, piece in enumerate(pieces)
    ]
    chunks[-1]["commit_row"] = True
    begun = [chunk(b"xx", **FIRST, value_size=9), {"reset_row": True}] if reset else []
    found = assemble(begun, *[[one] for one in chunks])
    assert found.rows == [Row(b"a", [Cell("f", b"q", 1000, value)])]


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"1", family_name="f", qualifier=b"q")],
        [chunk(b"1", row_key=b"a", qualifier=b"q")],
        [chunk(b"1", row_key=b"a", family_name="f")],
        [chunk(b"1", **FIRST), chunk(b"2", family_name="t")],
        [chunk(b"1", **FIRST), chunk(b"2", row_key=b"b", family_name="f", qualifier=b"q")],
        [chunk(b"1", **FIRST, value_size=5, commit_row=True)],
        [chunk(b"1", **FIRST, commit_row=True), chunk(b"1", **FIRST, commit_row=True)],
    ],
)
def test_streams_that_make_no_sense(chunks: list[dict[str, Any]]) -> None:
    """Chunks that belong to no row or column, or rows out of order, are refused."""
    with pytest.raises(StoreInvalid):
        assemble(chunks)


def test_a_continued_stream_goes_on_behind_the_last_row() -> None:
    """The rows of a continued stream are larger than the last one of the former; an open row is seen."""
    with pytest.raises(StoreInvalid, match="order"):
        assemble([chunk(b"1", **FIRST, commit_row=True)], last=b"a")
    found = assemble([chunk(b"1", **FIRST)], last=b"A")
    assert found.is_inside
    assert found.rows == []
    assert found.last == b"A"


@given(st.integers(0, 2**32))
def test_what_is_left_of_a_row_set(seed: int) -> None:
    """After any key exactly the wanted keys behind it are left, and no range that the service would refuse."""
    rng = random.Random(seed)

    def key() -> bytes:
        return bytes([rng.randrange(97, 105)]) + (b"\x00" if rng.random() < 0.2 else b"")

    ranges = [KeyRange(key(), key(), rng.random() < 0.5, rng.random() < 0.5) for _ in range(3)]
    wanted = RowSet([key() for _ in range(2)], [each for each in ranges if not each.is_empty])
    universe = [bytes([number]) + tail for number in range(96, 106) for tail in (b"", b"\x00", b"\x00\x00")]

    def holds(rows: RowSet | None, one: bytes) -> bool:
        if rows is None:
            return False
        return one in rows.keys or any(
            (one >= each.start if not each.start_open else one > each.start)
            and (one <= each.end if not each.end_open else one < each.end)
            for each in rows.ranges
        )

    last = key()
    left = wanted.after(last)
    assert [one for one in universe if holds(left, one)] == [
        one for one in universe if one > last and holds(wanted, one)
    ]
    if left is not None:
        assert left.keys or left.ranges
        assert not any(each.is_empty for each in left.ranges)


def test_read_request() -> None:
    """Ranges keep their open and closed ends, and filters narrow in the order family, column, time, counts, strip."""
    rows = RowSet((b"k",), (KeyRange(b"a", b"b"), KeyRange(b"c", b"d", True, True)))
    selection = Selection("f", b"q", 5000, 1, 2, strip_values=True)
    request = Read.FromString(read_rows_request("table", "profile", rows, 7, selection))
    assert (request.table_name, request.app_profile_id, request.rows_limit) == ("table", "profile", 7)
    assert list(request.rows.row_keys) == [b"k"]
    closed, opened = request.rows.row_ranges
    assert (closed.start_key_closed, closed.end_key_closed) == (b"a", b"b")
    assert (opened.start_key_open, opened.end_key_open) == (b"c", b"d")
    kinds = [each.WhichOneof("filter") for each in request.filter.chain.filters]
    assert kinds == [
        "family_name_regex_filter", "column_range_filter", "timestamp_range_filter", "cells_per_column_limit_filter",
        "cells_per_row_limit_filter", "strip_value_transformer",
    ]  # fmt: skip
    single = Read.FromString(read_rows_request("t", "", rows, 0, Selection(cells_per_row=1)))
    assert single.filter.cells_per_row_limit_filter == 1
    assert not Read.FromString(read_rows_request("t", "", rows, 0, Selection())).HasField("filter")


def test_conditional_request() -> None:
    """Predicates become filters that mean exactly them; mutations keep their order."""
    mutations = (DeleteRow(), SetCell("f", b"q", b"v", 1000), DeleteColumn("f", b"q", 2000, since=1000))

    def ask(predicate: RowExists | AnyTimestampAtLeast | AnyValueEquals) -> Any:
        return Check.FromString(check_and_mutate_request("t", "", b"k", predicate, mutations, ()))

    request = ask(RowExists())
    assert not request.HasField("predicate_filter")
    assert [each.WhichOneof("mutation") for each in request.true_mutations] == [
        "delete_from_row", "set_cell", "delete_from_column"
    ]  # fmt: skip
    bounds = request.true_mutations[2].delete_from_column.time_range
    assert (bounds.start_timestamp_micros, bounds.end_timestamp_micros) == (1000, 2000)
    assert not request.false_mutations
    assert ask(AnyTimestampAtLeast(0)).predicate_filter.HasField("timestamp_range_filter")
    exact = ask(AnyValueEquals(b"")).predicate_filter.value_range_filter
    assert exact.WhichOneof("start_value") == "start_value_closed"
    assert exact.WhichOneof("end_value") == "end_value_closed"
