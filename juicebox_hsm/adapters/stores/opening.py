"""Open a store by its URL, `sqlite:PATH` or `bigtable:PROJECT/INSTANCE` (operator-tools.md 10)."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.sqlite.backend import open_sqlite
from juicebox_hsm.adapters.stores.node_tuning import DEFAULT_NODE_TUNING, NodeTuning
from juicebox_hsm.errors import LocalError
from juicebox_hsm.ports.store import Store


def open_store(
    url: str,
    *,
    node_tuning: NodeTuning = DEFAULT_NODE_TUNING,
    metrics: Metrics | None = None,
    must_exist: bool = False,
) -> AbstractAsyncContextManager[Store]:
    """Return the context manager that opens the store named by `url`.

    `node_tuning` says how this process reads tree nodes; `metrics` gets the times of what a back end does inside its
    operations, those of the operations themselves are `with_metrics`'. With `must_exist` a missing SQLite file is
    `NoStore` and not made; Bigtable's tables are never made here. Raises `LocalError`, in one line an operator can act
    on, for a URL, a file or an instance that cannot be used.
    """
    scheme, colon, rest = url.partition(":")
    if scheme == "sqlite" and rest and not rest.startswith((":", "//")):
        return open_sqlite(Path(rest), node_tuning=node_tuning, metrics=metrics, must_exist=must_exist)
    if scheme == "bigtable" and colon:
        # Google's libraries take half a second to import; only who uses them pays.
        from juicebox_hsm.adapters.bigtable.backend import open_bigtable

        return open_bigtable(rest, node_tuning=node_tuning, metrics=metrics)
    raise LocalError(
        f"not a store: {url!r}; expected sqlite:PATH, for example sqlite:/var/lib/juicebox/realm.db, or"
        " bigtable:PROJECT/INSTANCE"
    )
