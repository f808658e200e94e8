"""A group of one, end to end: our client, the agent, the HSM core and SQLite in one process."""

from __future__ import annotations

import dataclasses
import datetime as dt
import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from juicebox_hsm.adapters.observation import logging
from juicebox_hsm.adapters.observation.tracing import Traces, active, make_provider
from juicebox_hsm.adapters.tls.certificate_end import to_unix_ms
from juicebox_hsm.client import InvalidPin, NotRegistered
from juicebox_hsm.host.events import EventKind
from juicebox_hsm.host.log import AppendOutcome
from juicebox_hsm.ids import RealmId
from juicebox_hsm.wire.rpc import AppOk, Empty
from tests.simulation.cluster import KEEP_EVENTS, TENANT, simulation


async def test_register_recover_delete(tmp_path: Path) -> None:
    """A registered secret comes back with the right PIN only, and is gone once deleted."""
    async with simulation(tmp_path) as sim:
        await sim.new_realm(1)
        client = sim.client("alice")
        await client.register(b"1234", b"secret", b"info", 3)
        assert await client.recover(b"1234", b"info") == b"secret"
        with pytest.raises(InvalidPin) as refused:
            await client.recover(b"9999", b"info")
        assert refused.value.guesses_remaining == 2
        await client.delete()
        with pytest.raises(NotRegistered):
            await client.recover(b"1234", b"info")


async def test_a_traced_request_tells_its_way(tmp_path: Path) -> None:
    """A request that its caller traces has a step for each place it passes, in order; others leave nothing behind."""
    exporter = InMemorySpanExporter()
    provider = make_provider("agent", "1", exporter)
    traces = Traces(provider)
    async with simulation(tmp_path) as sim:
        group = await sim.new_realm(1)
        (one,) = sim.agents
        one.agent.traces = traces
        assert isinstance(await one.call("app", sim.register1(group, "alice")), AppOk)
        span = traces.background("app", 1.0)
        assert span is not None
        with active(span):
            assert isinstance(await one.call("app", sim.register1(group, "bob")), AppOk)
        (driver,) = one.agent.drivers.values()
        assert not driver._traced, "nothing is kept of requests that are answered"
    provider.force_flush()
    names = [finished.name for finished in exporter.get_finished_spans()]
    assert sorted(names) == sorted(["queue", "proofs", "hsm", "append", "commit", "outbox", "app"])
    steps = sorted(exporter.get_finished_spans(), key=lambda each: each.start_time or 0)
    assert [step.name for step in steps[1:]] == ["queue", "proofs", "hsm", "append", "commit", "outbox"]
    provider.shutdown()


async def test_status_tells_the_end_of_the_certificate(tmp_path: Path) -> None:
    """What others judge the agent's cluster certificate by is in its status, as it stands at that moment."""
    async with simulation(tmp_path) as sim:
        await sim.new_realm(1)
        (one,) = sim.agents
        assert (await one.call("status", Empty())).certificate_end_ms is None
        end = dt.datetime(2026, 11, 20, tzinfo=dt.UTC)
        one.agent.config = dataclasses.replace(one.agent.config, certificate_end=lambda: end)
        assert (await one.call("status", Empty())).certificate_end_ms == to_unix_ms(end)


async def test_lines_about_a_group_name_it(tmp_path: Path) -> None:
    """What the tasks of a leadership log says which realm and group it is about, and so does its beginning."""
    output = io.StringIO()
    speaker = logging.get_logger("test")

    async def append(really: Callable[[], Awaitable[AppendOutcome]]) -> AppendOutcome:
        speaker.info("appending")
        return await really()

    logging.configure("info", json=True, stream=output)
    async with simulation(tmp_path) as sim:
        await sim.new_realm(1)
        (one,) = sim.agents
        (group,) = one.agent.groups
        one.log.on_append = append
        await sim.client("alice").register(b"1234", b"secret", b"info", 3)
        speaker.info("outside")
    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    about = {line["message"]: (line.get("realm"), line.get("group")) for line in lines}
    for message in ("leadership began", "appending"):
        assert about[message] == (group.realm.hex(), group.group.hex())
    assert about["outside"] == (None, None)


async def test_sixteen_clients_share_batches(tmp_path: Path) -> None:
    """Concurrent requests are committed in few appends and every client gets its own secret."""
    async with simulation(tmp_path, KEEP_EVENTS) as sim:
        await sim.new_realm(1)

        async def one(user: str) -> None:
            client = sim.client(user)
            await client.register(b"1234", user.encode(), b"info", 3)
            assert await client.recover(b"1234", b"info") == user.encode()

        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(one, f"user{number}")
        appends = sim.agents[0].log.appends
        assert sum(appends) >= 16 * 5
        assert max(appends) > 4
        events = await sim.store.outbox.read(RealmId(sim.realm), TENANT, 0, 1000)
        assert [event.seq for event in events] == list(range(1, 16 * 5 + 1))
        assert sum(event.new.kind is EventKind.RECOVER3 for event in events) == 16
