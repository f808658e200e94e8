"""Build requests of the Bigtable API and read its answers, as raw protobuf (storage.md 9.1, 9.5).

The only module that knows the library's message classes. They are taken below the library's wrapper, which costs more
than the encoding. Nothing here does I/O: a request is bytes, a response is bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from google.cloud.bigtable_v2.types import bigtable as _messages
from google.cloud.bigtable_v2.types import data as _data

from juicebox_hsm.ports.errors import StoreInvalid

READ_ROWS: Final = "/google.bigtable.v2.Bigtable/ReadRows"
MUTATE_ROW: Final = "/google.bigtable.v2.Bigtable/MutateRow"
MUTATE_ROWS: Final = "/google.bigtable.v2.Bigtable/MutateRows"
CHECK_AND_MUTATE_ROW: Final = "/google.bigtable.v2.Bigtable/CheckAndMutateRow"
PING_AND_WARM: Final = "/google.bigtable.v2.Bigtable/PingAndWarm"

SERVER_TIME: Final = -1
"""Timestamp of a cell that the service shall date itself."""
TIMESTAMP_MAX: Final = 2**63 - 1000

_ReadRowsRequest: Final[Any] = _messages.ReadRowsRequest.pb()
_ReadRowsResponse: Final[Any] = _messages.ReadRowsResponse.pb()
_MutateRowRequest: Final[Any] = _messages.MutateRowRequest.pb()
_MutateRowsRequest: Final[Any] = _messages.MutateRowsRequest.pb()
_MutateRowsResponse: Final[Any] = _messages.MutateRowsResponse.pb()
_CheckRequest: Final[Any] = _messages.CheckAndMutateRowRequest.pb()
_CheckResponse: Final[Any] = _messages.CheckAndMutateRowResponse.pb()
_PingRequest: Final[Any] = _messages.PingAndWarmRequest.pb()
_Filter: Final[Any] = _data.RowFilter.pb()


class Cell(NamedTuple):
    """One cell; `timestamp` in microseconds, `value` empty when it was stripped."""

    family: str
    qualifier: bytes
    timestamp: int
    value: bytes


class Row(NamedTuple):
    """One row with its cells by family, qualifier and descending timestamp; never without cells."""

    key: bytes
    cells: list[Cell]


# --- what callers say --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SetCell:
    """Write one cell; an equal (family, qualifier, timestamp) is overwritten."""

    family: str
    qualifier: bytes
    value: bytes
    timestamp: int = SERVER_TIME


@dataclass(frozen=True, slots=True)
class DeleteColumn:
    """Delete the cells of one column, only those from `since` on and older than `before` (microseconds) if given."""

    family: str
    qualifier: bytes
    before: int | None = None
    since: int | None = None


@dataclass(frozen=True, slots=True)
class DeleteFamily:
    """Delete all cells of one family."""

    family: str


@dataclass(frozen=True, slots=True)
class DeleteRow:
    """Delete all cells of the row."""


Mutation = SetCell | DeleteColumn | DeleteFamily | DeleteRow


@dataclass(frozen=True, slots=True)
class RowExists:
    """The row has any cell."""


@dataclass(frozen=True, slots=True)
class AnyTimestampAtLeast:
    """Some cell's timestamp is at or after `micros`."""

    micros: int


@dataclass(frozen=True, slots=True)
class AnyValueEquals:
    """Some cell's value is exactly `value`."""

    value: bytes


Predicate = RowExists | AnyTimestampAtLeast | AnyValueEquals


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Row keys from `start` to `end`; both ends are given, closed unless said otherwise."""

    start: bytes
    end: bytes
    start_open: bool = False
    end_open: bool = False

    @property
    def is_empty(self) -> bool:
        """Tell whether no key can be inside; the service refuses such ranges, the emulator does not."""
        return self.start > self.end or (self.start == self.end and (self.start_open or self.end_open))

    def after(self, key: bytes) -> KeyRange | None:
        """Return the part of the range after `key`, None if nothing is left."""
        if key < self.start:
            return self
        rest = KeyRange(key, self.end, True, self.end_open)
        return None if rest.is_empty else rest


@dataclass(frozen=True, slots=True)
class RowSet:
    """Which rows to read: single keys and ranges, not both empty."""

    keys: Sequence[bytes] = ()
    ranges: Sequence[KeyRange] = ()

    def after(self, key: bytes) -> RowSet | None:
        """Return what is left to read once all rows up to `key` have come; None for nothing."""
        keys = [wanted for wanted in self.keys if wanted > key]
        ranges = [rest for wanted in self.ranges if (rest := wanted.after(key)) is not None]
        return RowSet(keys, ranges) if keys or ranges else None


@dataclass(frozen=True, slots=True)
class Selection:
    """What to take of each row. `before` excludes cells at or after that time (microseconds)."""

    family: str | None = None
    qualifier: bytes | None = None
    before: int | None = None
    cells_per_column: int | None = None
    cells_per_row: int | None = None
    strip_values: bool = False


EVERYTHING: Final = Selection()


# --- requests ----------------------------------------------------------------------------------------


def _filters(selection: Selection) -> list[Any]:
    """Return the filters of a selection, in the order in which they narrow."""
    filters = []
    if selection.family is not None:
        filters.append(_Filter(family_name_regex_filter=selection.family))
    if selection.qualifier is not None:
        column = {
            "family_name": selection.family,
            "start_qualifier_closed": selection.qualifier,
            "end_qualifier_closed": selection.qualifier,
        }
        filters.append(_Filter(column_range_filter=column))
    if selection.before is not None:
        filters.append(_Filter(timestamp_range_filter={"end_timestamp_micros": selection.before}))
    if selection.cells_per_column is not None:
        filters.append(_Filter(cells_per_column_limit_filter=selection.cells_per_column))
    if selection.cells_per_row is not None:
        filters.append(_Filter(cells_per_row_limit_filter=selection.cells_per_row))
    if selection.strip_values:
        filters.append(_Filter(strip_value_transformer=True))
    return filters


def read_rows_request(table: str, profile: str, rows: RowSet, limit: int, selection: Selection) -> bytes:
    """Encode a ReadRows request; `limit` 0 means all rows of the set."""
    request = _ReadRowsRequest(table_name=table, app_profile_id=profile, rows_limit=limit)
    row_set = request.rows
    row_set.row_keys.extend(rows.keys)
    add = row_set.row_ranges.add
    for wanted in rows.ranges:
        message = add()
        if wanted.start_open:
            message.start_key_open = wanted.start
        else:
            message.start_key_closed = wanted.start
        if wanted.end_open:
            message.end_key_open = wanted.end
        else:
            message.end_key_closed = wanted.end
    filters = _filters(selection)
    if len(filters) == 1:
        request.filter.CopyFrom(filters[0])
    elif filters:
        request.filter.chain.filters.extend(filters)
    return bytes(request.SerializeToString())


def _fill(messages: Any, mutations: Iterable[Mutation]) -> None:
    """Append mutations to a repeated field."""
    for mutation in mutations:
        message = messages.add()
        match mutation:
            case SetCell(family, qualifier, value, timestamp):
                cell = message.set_cell
                cell.family_name = family
                cell.column_qualifier = qualifier
                cell.timestamp_micros = timestamp
                cell.value = value
            case DeleteColumn(family, qualifier, before, since):
                column = message.delete_from_column
                column.family_name = family
                column.column_qualifier = qualifier
                if before is not None:
                    column.time_range.end_timestamp_micros = before
                if since is not None:
                    column.time_range.start_timestamp_micros = since
            case DeleteFamily(family):
                message.delete_from_family.family_name = family
            case DeleteRow():
                message.delete_from_row.SetInParent()


def mutate_row_request(table: str, profile: str, key: bytes, mutations: Sequence[Mutation]) -> bytes:
    """Encode a MutateRow request."""
    request = _MutateRowRequest(table_name=table, app_profile_id=profile, row_key=key)
    _fill(request.mutations, mutations)
    return bytes(request.SerializeToString())


def mutate_rows_request(table: str, profile: str, rows: Sequence[tuple[bytes, Sequence[Mutation]]]) -> bytes:
    """Encode a MutateRows request."""
    request = _MutateRowsRequest(table_name=table, app_profile_id=profile)
    add = request.entries.add
    for key, mutations in rows:
        entry = add()
        entry.row_key = key
        _fill(entry.mutations, mutations)
    return bytes(request.SerializeToString())


def check_and_mutate_request(
    table: str,
    profile: str,
    key: bytes,
    predicate: Predicate,
    if_match: Sequence[Mutation],
    if_not: Sequence[Mutation],
) -> bytes:
    """Encode a CheckAndMutateRow request."""
    request = _CheckRequest(table_name=table, app_profile_id=profile, row_key=key)
    match predicate:
        case RowExists():
            pass  # no filter: the row has any cell
        case AnyTimestampAtLeast(micros):
            request.predicate_filter.timestamp_range_filter.start_timestamp_micros = micros
        case AnyValueEquals(value):
            exact = request.predicate_filter.value_range_filter
            exact.start_value_closed = value
            exact.end_value_closed = value
    _fill(request.true_mutations, if_match)
    _fill(request.false_mutations, if_not)
    return bytes(request.SerializeToString())


def ping_request(instance: str, profile: str) -> bytes:
    """Encode a PingAndWarm request."""
    return bytes(_PingRequest(name=instance, app_profile_id=profile).SerializeToString())


# --- responses ---------------------------------------------------------------------------------------


def decode_matched(response: bytes) -> bool:
    """Return whether the predicate of a CheckAndMutateRow held."""
    return bool(_CheckResponse.FromString(response).predicate_matched)


def decode_statuses(messages: Iterable[bytes]) -> dict[int, tuple[int, str]]:
    """Return place in the request -> (status code, message) of a MutateRows stream; 0 is success."""
    found: dict[int, tuple[int, str]] = {}
    for message in messages:
        for entry in _MutateRowsResponse.FromString(message).entries:
            found[entry.index] = (entry.status.code, entry.status.message)
    return found


class RowAssembler:
    """Assemble rows from the chunks of one ReadRows stream (storage.md 9.5). Raises `StoreInvalid` for nonsense."""

    __slots__ = ("_cells", "_family", "_key", "_last", "_qualifier", "_timestamp", "_value", "rows")

    def __init__(self, last: bytes | None = None) -> None:
        """`last` is the last row key of the stream that this one continues."""
        self.rows: list[Row] = []
        self._last = last
        self._reset()

    def _reset(self) -> None:
        self._key: bytes | None = None
        self._cells: list[Cell] = []
        self._family: str | None = None
        self._qualifier: bytes | None = None
        self._timestamp = 0
        self._value: list[bytes] = []

    def feed(self, message: bytes) -> None:
        """Take one message of the stream."""
        for chunk in _ReadRowsResponse.FromString(message).chunks:
            if chunk.reset_row:
                self._reset()
                continue
            self._take(chunk)

    def _take(self, chunk: Any) -> None:
        key: bytes = chunk.row_key
        if key:
            if self._key is None:
                if self._last is not None and key <= self._last:
                    raise StoreInvalid("rows did not come in the order of their keys")
                self._key = key
            elif key != self._key:
                raise StoreInvalid("a row began inside another")
        elif self._key is None:
            raise StoreInvalid("a row began without a key")
        if not self._value:
            if chunk.HasField("family_name"):
                self._family = chunk.family_name.value
                self._qualifier = None
            if chunk.HasField("qualifier"):
                self._qualifier = chunk.qualifier.value
            if self._family is None or self._qualifier is None:
                raise StoreInvalid("a cell came without its column")
            self._timestamp = chunk.timestamp_micros
        value: bytes = chunk.value
        if chunk.value_size > 0:
            self._value.append(value)
            if chunk.commit_row:
                raise StoreInvalid("a row ended inside a cell")
            return
        if self._value:
            value = b"".join((*self._value, value))
            self._value = []
        self._cells.append(Cell(self._family or "", self._qualifier or b"", self._timestamp, value))
        if chunk.commit_row:
            self._commit()

    def _commit(self) -> None:
        cells = self._cells
        if len(cells) > 1:  # the emulator varies the order of families from read to read
            cells.sort(key=lambda cell: (cell.family, cell.qualifier, -cell.timestamp))
        self._last = self._key
        self.rows.append(Row(self._key or b"", cells))
        self._reset()

    @property
    def last(self) -> bytes | None:
        """Return the key of the last complete row."""
        return self._last

    @property
    def is_inside(self) -> bool:
        """Tell whether a row has begun and not ended: then the stream must not end here."""
        return self._key is not None
