"""Faults on request: nothing without being asked, and exactly what the file asks for."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from juicebox_hsm.adapters.faults.nvram import with_nvram_faults
from juicebox_hsm.adapters.faults.store import with_faults
from juicebox_hsm.adapters.faults.switch import ENVIRONMENT, NO_FAULTS, Faults, FaultSwitch
from juicebox_hsm.adapters.hsm_directory.nvram import NvramFailed
from juicebox_hsm.host.services import Lease
from juicebox_hsm.ports.errors import StoreAmbiguous, StoreUnavailable
from juicebox_hsm.ports.store import Store
from tests.fakes.hsm import MemoryPlatform, realm_keys


class Port:
    """A port that counts what reaches it."""

    description = "a port"

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def append(self, value: str) -> str:
        self.calls.append(value)
        return f"appended {value}"

    async def read(self) -> str:
        self.calls.append("read")
        return "value"

    def peek(self) -> int:
        return len(self.calls)


def _store() -> tuple[Store, Port]:
    port = Port()
    fields = dict.fromkeys(Store.__dataclass_fields__, port) | {"description": "test"}
    return Store(**cast("dict[str, Any]", fields)), port


def _switch(faults: Faults) -> FaultSwitch:
    switch = FaultSwitch(Path("/nonexistent/faults.json"))
    switch._faults = faults
    switch._good_until = float("inf")
    return switch


def test_without_the_variable_nothing_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A role that was not started for chaos has its store and clock untouched."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    switch = FaultSwitch.from_environment("agent1")
    store, _ = _store()
    assert with_faults(store, switch) is store
    platform = MemoryPlatform(realm_keys())
    assert with_nvram_faults(platform, switch) is platform
    assert switch.now is NO_FAULTS
    assert abs(switch.now_ms() / 1000 - time.time()) < 5
    assert abs(switch.now_s() - time.time()) < 5


def test_the_file_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each role reads its own file; a missing or broken one means no faults."""
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    switch = FaultSwitch.from_environment("agent1")
    clock = [100.0]
    monkeypatch.setattr("juicebox_hsm.adapters.faults.switch.time.monotonic", lambda: clock[0])
    assert switch.now == NO_FAULTS
    wanted = Faults(clock_offset_ms=-5000, store_refuses=True)
    (tmp_path / "agent1.json").write_text(wanted.to_json())
    (tmp_path / "agent2.json").write_text(Faults(store_delay_ms=9).to_json())
    assert switch.now == NO_FAULTS, "the last look is still good"
    clock[0] += 1
    assert switch.now == wanted
    assert abs(switch.now_ms() / 1000 + 5 - time.time()) < 2
    assert abs(switch.now_s() + 5 - time.time()) < 2
    for broken in ("", "[]", '{"store_delay_ms": "x"}', '{"store_refuses": 1}'):
        (tmp_path / "agent1.json").write_text(broken)
        clock[0] += 1
        assert switch.now == NO_FAULTS
    (tmp_path / "agent1.json").write_text('{"later": 1, "store_delay_ms": 3}')
    clock[0] += 1
    assert switch.now == Faults(store_delay_ms=3)


async def test_a_refusing_store_applies_nothing() -> None:
    """A refused operation never reaches the back end; what is no operation passes."""
    store, port = _store()
    faulty = cast("Any", with_faults(store, _switch(Faults(store_refuses=True))))
    for operation in (faulty.log.append("x"), faulty.discovery.read()):
        with pytest.raises(StoreUnavailable):
            await operation
    assert port.calls == []
    assert faulty.log.peek() == 0
    assert faulty.description == "test"


async def test_lost_replies_are_applied_and_ambiguous() -> None:
    """Only appends have an ambiguous end; they are applied before the reply is lost."""
    store, port = _store()
    faulty = cast("Any", with_faults(store, _switch(Faults(store_loses_replies=True))))
    with pytest.raises(StoreAmbiguous):
        await faulty.log.append("x")
    assert await faulty.log.read() == "value"
    assert port.calls == ["x", "read"]


async def test_delay_comes_before_the_operation(autojump_clock: MockClock) -> None:
    """A slow store takes its time and then does what it should, with the same answer, until the switch changes."""
    store, port = _store()
    switch = _switch(Faults(store_delay_ms=700))
    faulty = cast("Any", with_faults(store, switch))
    begun = trio.current_time()
    assert await faulty.log.append("x") == "appended x"
    assert trio.current_time() - begun == pytest.approx(0.7)
    switch._faults = replace(NO_FAULTS)
    assert await faulty.log.append("y") == "appended y"
    assert trio.current_time() - begun == pytest.approx(0.7)
    assert port.calls == ["x", "y"]


class OneLease:
    """Leases of a store in which somebody else holds everything."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def obtain(self, name: str, owner: str, now_ms: int, length_ms: int) -> Lease | None:
        self.calls.append(f"obtain {name}")
        return None

    async def extend(self, lease: Lease, now_ms: int, length_ms: int) -> Lease | None:
        self.calls.append(f"extend {lease.name}")
        return lease

    async def terminate(self, lease: Lease) -> None:
        self.calls.append(f"terminate {lease.name}")

    async def list(self) -> list[Lease]:
        return []


async def test_ignored_leases_are_granted_to_everybody() -> None:
    """A grant without the store never touches it and ends with the fault; real leases go on as they were."""
    store, _ = _store()
    port = OneLease()
    switch = _switch(Faults(ignores_leases=True))
    leases = with_faults(replace(store, leases=port), switch).leases
    grants = [await leases.obtain("group", owner, 1000, 3000) for owner in ("one", "two")]
    assert [grant.expires_ms for grant in grants if grant is not None] == [4000, 4000]
    made_up = grants[0]
    assert made_up is not None
    extended = await leases.extend(made_up, 2000, 3000)
    assert extended == replace(made_up, expires_ms=5000)
    real = Lease("group", "three", "5" * 32, 9000)
    assert await leases.extend(real, 2000, 3000) == real
    switch._faults = NO_FAULTS
    assert await leases.extend(made_up, 3000, 3000) is None
    await leases.terminate(made_up)
    await leases.terminate(real)
    assert await leases.obtain("group", "one", 3000, 3000) is None
    assert port.calls == ["extend group", "terminate group", "obtain group"]


def test_failing_nvram_keeps_what_it_had() -> None:
    """A write that is told to fail stores nothing; everything else is the platform's own, before and after."""
    platform = MemoryPlatform(realm_keys(), clock_start=7)
    switch = _switch(Faults(nvram_fails=True))
    faulty = with_nvram_faults(platform, switch)
    platform.nvram_write(b"before")
    with pytest.raises(NvramFailed):
        faulty.nvram_write(b"lost")
    assert faulty.nvram_read() == b"before"
    assert (faulty.keys, faulty.clock_start) == (platform.keys, 7)
    assert len(faulty.random(8)) == 8
    switch._faults = NO_FAULTS
    faulty.nvram_write(b"after")
    assert platform.nvram_read() == b"after"
