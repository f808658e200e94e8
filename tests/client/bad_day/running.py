"""Run states, each on a demo of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import trio

from juicebox_hsm.adapters.faults.switch import ENVIRONMENT
from juicebox_hsm.adapters.pubsub.bus import EMULATOR_VARIABLE
from roles.tools.demo.launch import launch
from roles.tools.demo.layout import DemoOptions
from roles.tools.demo.processes import OrphanGuard
from roles.tools.demo.pubsub import PubSubEmulator
from tests.client.bad_day import cluster_states, damage_states, store_states, tool_states, trouble_states
from tests.client.bad_day.day import BACK_S, SERVED_S, Channel, Day, Report, State
from tests.client.bad_day.listening import PAUSE_S, Ears, User, registered

STATES: Final = {
    state.name: state
    for state in (
        *cluster_states.STATES,
        *store_states.STATES,
        *damage_states.STATES,
        *trouble_states.STATES,
        *tool_states.STATES,
    )
}


async def run(state: State, store: str = "sqlite") -> Report:
    """Bring a demo up, cause the state, listen, mend it, and see that all is well again."""
    with (
        tempfile.TemporaryDirectory(prefix="bad-day-") as made,
        closing(OrphanGuard()) as guard,
        _bus_for(state) as bus,
    ):
        directory = Path(made)
        faults = directory / "faults"
        faults.mkdir()
        options = DemoOptions(
            directory / "state",
            agents=state.agents,
            groups=state.groups,
            store=store,
            pin_hashing="FastInsecure",
            tenant_log=False,
            bus="pubsub" if state.has_bus else "embedded",
        )
        with _faults_from(faults):
            async with (
                launch(options, on_exit=lambda running: None) as cluster,
                registered(cluster) as user,
                trio.open_nursery() as nursery,
            ):
                report = await _listen(state, Day(cluster, directory, faults, guard, bus), user, nursery)
                nursery.cancel_scope.cancel()
    return report


@contextmanager
def _bus_for(state: State) -> Iterator[PubSubEmulator | None]:
    """Start Pub/Sub for the states that need it, as a process of its own that can be stopped."""
    if not state.has_bus:
        yield None
        return
    bus = PubSubEmulator()
    os.environ[EMULATOR_VARIABLE] = bus.address
    try:
        bus.wait_started()
        yield bus
    finally:
        del os.environ[EMULATOR_VARIABLE]
        bus.stop()


@contextmanager
def _faults_from(directory: Path) -> Iterator[None]:
    """Let services that are started meanwhile look for faults in a directory."""
    os.environ[ENVIRONMENT] = str(directory)
    try:
        yield
    finally:
        del os.environ[ENVIRONMENT]


async def _listen(state: State, day: Day, user: User, nursery: trio.Nursery) -> Report:
    ears = Ears(day, user)
    ears.mark()
    begun_at = trio.current_time()
    await state.cause(day)
    caused_at = begun_at if day.tool_output else trio.current_time()  # what a tool causes begins with its start
    nursery.start_soon(user.call_for_ever)
    heard = await ears.hear(state, caused_at)
    await trio.sleep_until(caused_at + state.listen_s)
    client, longest_s = user.summary(), user.longest_s
    harmed = Channel.CLIENT not in state.says and bool(user.failures or longest_s > SERVED_S)
    back_s, amiss = None, ""
    if state.mend is not None:
        await state.mend(day)
        back_s, amiss = await _back(ears, user)
    mended = state.mend is not None
    return Report(state.name, state.what, heard, client, round(longest_s, 1), mended, back_s, amiss, harmed)


async def _back(ears: Ears, user: User) -> tuple[float | None, str]:
    """Return after how many s everything was ready and a client had been served, None if never, and what was amiss."""
    mended_at = trio.current_time()
    amiss = ""
    with trio.move_on_after(BACK_S):
        while amiss := await _amiss(ears, user, mended_at):  # noqa: ASYNC110 - other processes are looked at
            await trio.sleep(PAUSE_S)
        return round(trio.current_time() - mended_at, 1), ""
    return None, amiss


async def _amiss(ears: Ears, user: User, mended_at: float) -> str:
    """Return what is not right yet, "" when all is."""
    if user.served_at < mended_at:
        return f"no client was served; {user.summary()}"
    return await ears.not_ready()
