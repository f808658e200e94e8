"""Read and write rows of one table: the back end's private driver of Bigtable semantics (storage.md 8).

Arguments are checked strictly here, because the emulator accepts what the service refuses and reports a programming
error (unknown family, odd timestamp) with a code that looks worth retrying. Errors: `StoreUnavailable` (the call is
harmless to repeat), `StoreAmbiguous` (a conditional write may have happened), `NoSuchTable`, `StoreInvalid`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final
from urllib.parse import quote

from juicebox_hsm.adapters.bigtable import codec
from juicebox_hsm.adapters.bigtable.auth import Authorization
from juicebox_hsm.adapters.bigtable.codec import (
    EVERYTHING,
    DeleteColumn,
    DeleteFamily,
    DeleteRow,
    KeyRange,
    Mutation,
    Predicate,
    Row,
    RowAssembler,
    RowSet,
    Selection,
    SetCell,
)
from juicebox_hsm.adapters.bigtable.driver import CallFailed, Metadata, Transport
from juicebox_hsm.adapters.bigtable.retry import BIGTABLE_RETRY, REFUSED, RETRYABLE, CallAttempts, translate
from juicebox_hsm.adapters.clock.retrying import budget
from juicebox_hsm.errors import check
from juicebox_hsm.host.retry import RetryProfile
from juicebox_hsm.ports.errors import StoreAmbiguous, StoreInvalid, StoreUnavailable

CALL_S: Final = 20.0
KEY_BYTES_MAX: Final = 4_096
QUALIFIER_BYTES_MAX: Final = 16_384
VALUE_BYTES_MAX: Final = 100 << 20
ROW_MUTATIONS_MAX: Final = 1_000
"""Ours; the service takes 100 000, but so many on one row take longer than a deadline."""
BULK_ROWS_MAX: Final = 10_000
BULK_BYTES_MAX: Final = 8 << 20
SCAN_ROWS: Final = 2_000
"""Rows per request of a whole-table scan, so that no answer grows without bound."""
PASSING: Final = frozenset((4, 10, 14))
"""Status codes of single rows that are worth a retry: DEADLINE_EXCEEDED, ABORTED, UNAVAILABLE (own)."""
FAMILIES: Final = frozenset(("f", "t", "n"))


class Endpoint:
    """One instance as its tables see it: transport, authorization, routing."""

    def __init__(
        self,
        transport: Transport,
        authorization: Authorization,
        instance: str,
        profile: str = "",
        call_s: float = CALL_S,
        retry: RetryProfile = BIGTABLE_RETRY,
    ) -> None:
        self.transport = transport
        self.authorization = authorization
        self.instance = instance
        self.profile = profile
        self.call_s = call_s
        self.retry = retry
        self.tables: set[str] = set()
        """Full names of the tables that were called."""
        self.self_test: Callable[[], Awaitable[bool]] | None = None
        """Tests that the instance decides conditional writes, until it once could; see `prove`."""

    async def prove(self) -> None:
        """Test conditional writes if there was no table to test with when the store was opened, and is one now.

        Raises what the test raises: `LocalError` if the instance does not decide, `StoreUnavailable`.
        """
        if self.self_test is not None and await self.self_test():
            self.self_test = None

    def routing(self, table: str) -> Metadata:
        """Return the header that routes a call; the generated client would add it (storage.md 9.1)."""
        value = f"table_name={quote(table, safe='')}&app_profile_id={quote(self.profile, safe='')}"
        return (("x-goog-request-params", value),)


class Table:
    """One table by its short name. Row keys, qualifiers and values are bytes."""

    def __init__(self, endpoint: Endpoint, name: str, retry: RetryProfile | None = None) -> None:
        self.name = name
        self._endpoint = endpoint
        self._full = f"{endpoint.instance}/tables/{name}"
        self._routing = endpoint.routing(self._full)
        self._retry = retry or endpoint.retry

    def _headers(self) -> Metadata:
        self._endpoint.tables.add(self._full)
        return self._routing + self._endpoint.authorization.metadata()

    def attempts(self, what: str) -> CallAttempts:
        """Begin to count the attempts of one operation on this table."""
        return CallAttempts(what, self._retry)

    def budget(self) -> AbstractContextManager[None]:
        """Let the calls of the block share the time that one of them has to be tried again."""
        return budget(self._retry.total_s)

    async def _after(self, failure: CallFailed, attempts: CallAttempts, renewed: list[bool]) -> None:
        """Wait for the next attempt of a call that may be repeated; raises what the failure means if there is none."""
        if failure.code == "UNAUTHENTICATED" and not renewed:
            renewed.append(True)
            if await self._endpoint.authorization.renew():
                return
        await attempts.after(failure)

    # --- reading ---------------------------------------------------------------------------------

    async def read_rows(self, rows: RowSet, *, limit: int = 0, selection: Selection = EVERYTHING) -> list[Row]:
        """Return the rows of the set in key order, at most `limit` unless it is 0. A row without cells is absent.

        A stream that breaks is continued after its last complete row.
        """
        _check_rows(rows)
        check(selection.qualifier is None or selection.family is not None, "a column is named with its family")
        endpoint = self._endpoint
        attempts, renewed = self.attempts(f"read {self.name}"), list[bool]()
        found: list[Row] = []
        left: RowSet | None = rows
        last: bytes | None = None
        while left is not None:
            request = codec.read_rows_request(
                self._full, endpoint.profile, left, limit - len(found) if limit else 0, selection
            )
            assembler = RowAssembler(last)
            try:
                messages = await endpoint.transport.stream(codec.READ_ROWS, request, self._headers(), endpoint.call_s)
            except CallFailed as failure:
                for message in failure.received:
                    assembler.feed(message)
                found += assembler.rows
                if assembler.rows:
                    last = assembler.last
                    left = None if limit and len(found) >= limit else rows.after(assembler.rows[-1].key)
                if left is not None:
                    await self._after(failure, attempts, renewed)
                continue
            for message in messages:
                assembler.feed(message)
            if assembler.is_inside:
                raise StoreInvalid(f"read {self.name}: the answer ended inside a row")
            found += assembler.rows
            break
        return found

    async def read_row(self, key: bytes, selection: Selection = EVERYTHING) -> Row | None:
        """Return one row, None if it has no selected cells."""
        rows = await self.read_rows(RowSet(keys=(key,)), selection=selection)
        return rows[0] if rows else None

    async def first(self, wanted: KeyRange, selection: Selection = EVERYTHING) -> Row | None:
        """Return the first row of a range."""
        rows = await self.read_rows(RowSet(ranges=(wanted,)), limit=1, selection=selection)
        return rows[0] if rows else None

    async def scan(
        self, wanted: KeyRange, selection: Selection = EVERYTHING, page_rows: int = SCAN_ROWS
    ) -> AsyncIterator[list[Row]]:
        """Yield all rows of a range in pages, each a request of its own: not one snapshot."""
        left: KeyRange | None = wanted
        while left is not None:
            page = await self.read_rows(RowSet(ranges=(left,)), limit=page_rows, selection=selection)
            if page:
                yield page
            if len(page) < page_rows:
                return
            left = left.after(page[-1].key)

    # --- writing ---------------------------------------------------------------------------------

    async def mutate_row(self, key: bytes, mutations: Sequence[Mutation]) -> None:
        """Apply mutations to one row, in order and atomically; the caller says with this call that it may repeat."""
        _check_row(key, mutations)
        check(mutations, "a row is changed by at least one mutation")
        endpoint = self._endpoint
        request = codec.mutate_row_request(self._full, endpoint.profile, key, mutations)
        attempts, renewed = self.attempts(f"write {self.name}"), list[bool]()
        while True:
            try:
                await endpoint.transport.unary(codec.MUTATE_ROW, request, self._headers(), endpoint.call_s)
                return
            except CallFailed as failure:
                await self._after(failure, attempts, renewed)

    async def mutate_rows(self, rows: Sequence[tuple[bytes, Sequence[Mutation]]]) -> None:
        """Apply mutations to many rows, each atomically, in no order among rows; all acknowledged or an error."""
        for chunk in _chunks(rows):
            await self._mutate_chunk(chunk)

    async def _mutate_chunk(self, rows: Sequence[tuple[bytes, Sequence[Mutation]]]) -> None:
        endpoint = self._endpoint
        request = codec.mutate_rows_request(self._full, endpoint.profile, rows)
        attempts, renewed = self.attempts(f"write {self.name}"), list[bool]()
        while True:
            try:
                messages = await endpoint.transport.stream(codec.MUTATE_ROWS, request, self._headers(), endpoint.call_s)
            except CallFailed as failure:
                await self._after(failure, attempts, renewed)
                continue
            statuses = codec.decode_statuses(messages)
            failed = {place: status for place, status in statuses.items() if status[0]}
            if failed and all(code in PASSING for code, _ in failed.values()):
                await attempts.after(CallFailed("UNAVAILABLE", next(iter(failed.values()))[1]))
                continue
            if failed:
                place, (code, message) = min(failed.items())
                raise StoreInvalid(
                    f"write {self.name}: {len(failed)} of {len(rows)} rows refused, row {place}: code {code}: {message}"
                )
            if len(statuses) == len(rows):
                return
            await attempts.after(CallFailed("INTERNAL", f"{len(statuses)} of {len(rows)} rows acknowledged"))

    async def check_and_mutate(
        self,
        key: bytes,
        predicate: Predicate,
        *,
        if_match: Sequence[Mutation] = (),
        if_not: Sequence[Mutation] = (),
        is_test: bool = False,
    ) -> bool:
        """Apply one list of mutations or the other, atomically; return whether the predicate held.

        Sent exactly once, and only `is_test` to an instance that is not known to decide. Raises `StoreAmbiguous` when
        the outcome is unknown, another error when nothing happened.
        """
        _check_row(key, (*if_match, *if_not))
        check(if_match or if_not, "a conditional write writes something")
        endpoint = self._endpoint
        if not is_test:
            await endpoint.prove()
        request = codec.check_and_mutate_request(self._full, endpoint.profile, key, predicate, if_match, if_not)
        try:
            response = await endpoint.transport.unary(
                codec.CHECK_AND_MUTATE_ROW, request, self._headers(), endpoint.call_s
            )
        except CallFailed as failure:
            what = f"conditional write {self.name}"
            if failure.code in RETRYABLE:
                raise StoreAmbiguous(f"{what}: {failure.code}: {failure.details}") from None
            if failure.code in REFUSED:
                if failure.code == "UNAUTHENTICATED":
                    await endpoint.authorization.renew()
                raise StoreUnavailable(f"{what}: {failure.code}: {failure.details}") from None
            raise translate(failure, what) from None
        return codec.decode_matched(response)


# --- validation --------------------------------------------------------------------------------------


def _check_rows(rows: RowSet) -> None:
    check(rows.keys or rows.ranges, "an empty row set would read the whole table")
    for key in rows.keys:
        check(0 < len(key) <= KEY_BYTES_MAX, "a row key has 1..4096 bytes")
    for wanted in rows.ranges:
        check(not wanted.is_empty, "a range starts before it ends")


def _check_row(key: bytes, mutations: Sequence[Mutation]) -> None:
    check(0 < len(key) <= KEY_BYTES_MAX, "a row key has 1..4096 bytes")
    check(len(mutations) <= ROW_MUTATIONS_MAX, "a row gets at most 1000 mutations at a time")
    for mutation in mutations:
        match mutation:
            case SetCell(family, qualifier, value, timestamp):
                check(family in FAMILIES, "families are f, t and n")
                check(len(qualifier) <= QUALIFIER_BYTES_MAX, "a qualifier has at most 16 KiB")
                check(len(value) <= VALUE_BYTES_MAX, "a value has at most 100 MiB")
                check(
                    timestamp == codec.SERVER_TIME or (0 <= timestamp <= codec.TIMESTAMP_MAX and timestamp % 1000 == 0),
                    "a timestamp is the server's, or whole milliseconds in microseconds",
                )
            case DeleteColumn(family, qualifier, before, since):
                check(family in FAMILIES, "families are f, t and n")
                check(len(qualifier) <= QUALIFIER_BYTES_MAX, "a qualifier has at most 16 KiB")
                check(before is None or (before > 0 and before % 1000 == 0), "a time bound is whole milliseconds")
                check(
                    since is None or (before is not None and 0 <= since < before and since % 1000 == 0),
                    "a time range has an end and contains whole milliseconds",
                )
            case DeleteFamily(family):
                check(family in FAMILIES, "families are f, t and n")
            case DeleteRow():
                pass


def _size(mutations: Sequence[Mutation]) -> int:
    return sum(len(mutation.value) + 64 for mutation in mutations if isinstance(mutation, SetCell)) + 128


def _chunks(
    rows: Sequence[tuple[bytes, Sequence[Mutation]]],
) -> list[list[tuple[bytes, Sequence[Mutation]]]]:
    """Split rows into requests of at most 10 000 mutations and about 8 MiB."""
    chunks: list[list[tuple[bytes, Sequence[Mutation]]]] = []
    chunk: list[tuple[bytes, Sequence[Mutation]]] = []
    count = size = 0
    for key, mutations in rows:
        _check_row(key, mutations)
        check(mutations, "a row is changed by at least one mutation")
        own = _size(mutations)
        if chunk and (count + len(mutations) > BULK_ROWS_MAX or size + own > BULK_BYTES_MAX):
            chunks.append(chunk)
            chunk, count, size = [], 0, 0
        chunk.append((key, mutations))
        count += len(mutations)
        size += own
    if chunk:
        chunks.append(chunk)
    return chunks
