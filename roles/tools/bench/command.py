"""`juicebox-hsm bench`: measurements as commands, never as timed tests."""

from __future__ import annotations

import click

from roles.lazy import LazyCommand, LazyGroup


@click.group(
    cls=LazyGroup,
    lazy={
        "client": LazyCommand("roles.tools.bench.client", "Register, recover and delete against a running realm."),
        "compare": LazyCommand("roles.tools.bench.compare", "Say whether a measurement became worse than a saved one."),
        "hsm": LazyCommand("roles.tools.bench.hsm", "Start a realm here and measure it end to end."),
        "tree": LazyCommand("roles.tools.bench.tree", "Verify and insert in the Merkle tree.", "bench_tree"),
        "store": LazyCommand("roles.tools.bench.store", "Appends and proof reads of the embedded store."),
        "rpc": LazyCommand("roles.tools.bench.rpc", "Round trips of the internal RPC."),
    },
)
def command() -> None:
    """Measure the realm and its parts; compare ratios rather than single figures: machines are noisy."""
