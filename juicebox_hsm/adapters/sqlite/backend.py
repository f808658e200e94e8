"""Open one SQLite file as a `ports.Store` (storage.md 10)."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import apsw

from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.process.passing_trouble import local_error
from juicebox_hsm.adapters.process.threads import in_thread
from juicebox_hsm.adapters.sqlite.accounting import SqliteAccounting
from juicebox_hsm.adapters.sqlite.audit import SqliteAudit
from juicebox_hsm.adapters.sqlite.cluster import (
    SqliteDiscovery,
    SqliteLeases,
    SqliteRealms,
    SqliteSettings,
    SqliteTenants,
)
from juicebox_hsm.adapters.sqlite.gc import Maintenance
from juicebox_hsm.adapters.sqlite.log import SqliteLog
from juicebox_hsm.adapters.sqlite.nodes import TreeNodes
from juicebox_hsm.adapters.sqlite.outbox import SqliteOutbox
from juicebox_hsm.adapters.sqlite.published import SqlitePublished
from juicebox_hsm.adapters.sqlite.reads import Reads
from juicebox_hsm.adapters.sqlite.schema import WRITER_CACHE_KIB, connect, prepare_file, prepare_tables, translate
from juicebox_hsm.adapters.sqlite.stats import SqliteStats
from juicebox_hsm.adapters.sqlite.writer import FileLock, Writer
from juicebox_hsm.adapters.stores.embedded_bus import EmbeddedBus
from juicebox_hsm.adapters.stores.node_tuning import DEFAULT_NODE_TUNING, NodeTuning
from juicebox_hsm.errors import LocalError, NoStore, NotYet
from juicebox_hsm.ports.store import Store


def _open_files(path: Path, *, must_exist: bool = False) -> tuple[FileLock, apsw.Connection, bool]:
    """Lock, create if needed (then True), connect and check; closes what it opened when something is wrong."""
    if must_exist and path.parent.is_dir() and not path.exists():
        raise NoStore(f"sqlite:{path}: there is no such file; `juicebox-hsm store init` makes a new, empty store")
    try:
        lock = FileLock(path.with_name(path.name + ".lock"))
    except FileNotFoundError:
        raise NotYet(f"sqlite:{path}: the directory {path.parent} does not exist") from None
    except OSError as error:
        raise local_error(f"sqlite:{path}: cannot open the lock file beside it: {error.strerror}", error) from None
    connection: apsw.Connection | None = None
    try:
        with lock:
            is_new = prepare_file(path)
            connection = connect(path, WRITER_CACHE_KIB)
            prepare_tables(connection, path)
            return lock, connection, is_new
    except BaseException as error:
        if connection is not None:
            connection.close()
        lock.close()
        if isinstance(error, apsw.NotADBError):
            raise LocalError(f"sqlite:{path}: is not an SQLite database") from None
        if isinstance(error, apsw.CantOpenError) and not os.access(path, os.R_OK | os.W_OK):
            raise LocalError(f"sqlite:{path}: cannot open the file: check its permissions") from None
        if isinstance(error, apsw.Error):
            raise translate(error, path) from error
        raise


@asynccontextmanager
async def open_sqlite(
    path: Path,
    *,
    node_tuning: NodeTuning = DEFAULT_NODE_TUNING,
    metrics: Metrics | None = None,
    must_exist: bool = False,
) -> AsyncIterator[Store]:
    """Open `path`; on leaving, queued writes are committed and the file is left in one piece.

    A missing file is made, unless it `must_exist`. Raises `LocalError` for what the operator must mend and
    `StoreUnavailable` for what may pass. No operation may be started after leaving; those in progress finish.
    """
    lock, connection, is_new = await in_thread(partial(_open_files, path, must_exist=must_exist))
    maintenance = Maintenance()
    writer = Writer(path, connection, lock, maintenance.next, maintenance.wait_s)
    writer.start()
    try:
        reads = Reads(path, writer.identity)
    except apsw.Error as error:
        await writer.close()
        raise translate(error, path) from error
    try:
        nodes = TreeNodes(reads, node_tuning.cache_nodes)
        metrics = Metrics() if metrics is None else metrics
        yield Store(
            log=SqliteLog(writer, reads, nodes, metrics),
            nodes=nodes,
            outbox=SqliteOutbox(writer, reads),
            accounting=SqliteAccounting(writer, reads),
            discovery=SqliteDiscovery(writer, reads),
            leases=SqliteLeases(writer, reads),
            settings=SqliteSettings(writer, reads),
            tenants=SqliteTenants(writer, reads),
            realms=SqliteRealms(writer, reads),
            audit=SqliteAudit(writer, reads),
            description=f"sqlite:{path}",
            stats=SqliteStats(reads),
            bus=EmbeddedBus(SqlitePublished(writer, reads)),
            is_new=is_new,
        )
    finally:
        reads.close()
        await writer.close()
