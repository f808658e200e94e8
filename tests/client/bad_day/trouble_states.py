"""States of one part in trouble: a paused leader, a full disk, NVRAM, clocks, a limit, a flood, a move cut off."""

from __future__ import annotations

import datetime as dt
import resource
import signal
import socket
from contextlib import ExitStack
from typing import Final

import trio

from juicebox_hsm.adapters.faults.switch import NO_FAULTS, Faults
from juicebox_hsm.adapters.tls.certificates import issue
from juicebox_hsm.host.cluster.recovery import pending
from juicebox_hsm.host.services import TenantLimits
from juicebox_hsm.ids import OwnedRange
from juicebox_hsm.wire.rpc import PeerRole
from roles.tools.cluster.change import transfer_range
from roles.tools.demo.layout import HOST, RATE_LIMIT_DEFAULT, TENANT
from roles.tools.session import ToolFailure
from tests.client.bad_day.cluster_states import set_clock_right
from tests.client.bad_day.day import ONLY_SQLITE, Channel, Day, State, start_victims
from tests.client.bad_day.listening import INFO, PIN, registered

BEHIND_S: Final = -25 * 60
HOUR_S: Final = 60 * 60
DISK_SLACK_BYTES: Final = 64 * 1024
"""How far a process with a full disk may still write beyond the size of its log: that stays readable."""
SLOW_STORE_MS: Final = 400
"""Makes each step of a move last long enough to be met."""
STEP_S: Final = 30.0
LEAVERS: Final = 1_200
"""More than a process has descriptors by default."""


async def _pause_leader(day: Day) -> None:
    name = await day.leader()
    day.victims.append(name)
    day.cluster.process(name).send(signal.SIGSTOP)


async def _go_on(day: Day) -> None:
    await trio.lowlevel.checkpoint()
    for name in day.victims:
        day.cluster.process(name).send(signal.SIGCONT)


async def fill_disk(day: Day) -> None:
    """Let no file of an agent or manager grow: what they write to the store fails in the middle, really."""
    async with registered(day.cluster) as user:  # the store's log outgrows theirs
        for _ in range(20):
            await user.client.recover(PIN, INFO)
    for running in [*day.cluster.of_role("agent"), *day.cluster.of_role("manager")]:
        _, hard = resource.prlimit(running.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (running.log.stat().st_size + DISK_SLACK_BYTES, hard))


async def empty_disk(day: Day) -> None:
    await trio.lowlevel.checkpoint()
    for running in [*day.cluster.of_role("agent"), *day.cluster.of_role("manager")]:
        _, hard = resource.prlimit(running.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (hard, hard))


async def _fail_nvram(day: Day) -> None:
    """Fail the next write of a member that leads nothing, and make it write."""
    name = (await day.followers())[0]
    day.victims.append(name)
    async with registered(day.cluster) as user:
        day.set_faults(name, Faults(nvram_fails=True))
        with trio.move_on_after(STEP_S):
            while day.cluster.process(name).is_running:
                await user.client.recover(PIN, INFO)


async def _replace_nvram(day: Day) -> None:
    for name in day.victims:
        day.set_faults(name, NO_FAULTS)
    await start_victims(day)


async def _set_behind(day: Day) -> None:
    leader = await day.leader()
    day.victims.append(leader)
    day.set_faults(leader, Faults(clock_offset_ms=BEHIND_S * 1000))


async def _set_all_ahead(day: Day) -> None:
    await trio.lowlevel.checkpoint()
    day.victims += [running.service.name for running in day.cluster.processes]
    for name in day.victims:
        day.set_faults(name, Faults(clock_offset_ms=HOUR_S * 1000))


async def _put_ended(day: Day) -> None:
    """Put a certificate that ended long ago in the place of the leader's, and have it read."""
    leader = await day.leader()
    day.victims.append(leader)
    ca, out = day.cluster.state.path / "ca" / "cluster", day.cluster.state.tls(leader)
    issue(ca, PeerRole.AGENT, leader, out, days=30, now=dt.datetime.now(dt.UTC) - dt.timedelta(days=60))
    day.cluster.process(leader).send(signal.SIGHUP)


async def _put_good(day: Day) -> None:
    await trio.lowlevel.checkpoint()
    for name in day.victims:
        issue(day.cluster.state.path / "ca" / "cluster", PeerRole.AGENT, name, day.cluster.state.tls(name))
        day.cluster.process(name).send(signal.SIGHUP)


async def _stop_bus(day: Day) -> None:
    await trio.lowlevel.checkpoint()
    if day.bus is not None:
        day.bus.signal(signal.SIGSTOP)


async def _start_bus(day: Day) -> None:
    await trio.lowlevel.checkpoint()
    if day.bus is not None:
        day.bus.signal(signal.SIGCONT)


async def _limit(day: Day) -> None:
    await day.cluster.session.store.tenants.put(TENANT, TenantLimits(0))


async def _lift_limit(day: Day) -> None:
    await day.cluster.session.store.tenants.put(TENANT, TenantLimits(RATE_LIMIT_DEFAULT))


async def _connect_and_leave(day: Day) -> None:
    """Connect to every port that anybody may connect to, more often than a process has descriptors, and be gone."""
    await trio.lowlevel.checkpoint()
    ports = [running.service.http_port for running in day.cluster.processes]
    ports += [running.service.port for running in day.cluster.of_role("lb")]
    for port in ports:
        with ExitStack() as stack:
            for _ in range(LEAVERS):
                visitor = stack.enter_context(socket.socket())
                visitor.setblocking(False)
                visitor.connect_ex((HOST, port))


async def cut_move(day: Day) -> None:
    """Kill all managers in the middle of a move between two groups, which slow stores make last."""
    view = await day.cluster.wait_leaders()
    source, destination = (group for group in view.groups.values() if group.owned_range is not None)
    assert source.owned_range is not None
    whole = OwnedRange(source.owned_range.start, source.owned_range.end)
    managers = day.cluster.of_role("manager")
    agents = [running.service.name for running in day.cluster.of_role("agent")]
    for name in agents:
        day.set_faults(name, Faults(store_delay_ms=SLOW_STORE_MS))

    async def move() -> None:
        try:
            await transfer_range(
                day.cluster.session, managers[0].service.url, source.realm, source.id, destination.id, whole
            )
        except ToolFailure:
            return  # its manager was killed

    async with trio.open_nursery() as nursery:
        nursery.start_soon(move)
        with trio.fail_after(STEP_S):
            while not pending(await day.cluster.view(), committed_only=False):  # noqa: ASYNC110 - other processes
                await trio.sleep(0.02)
        for manager in managers:
            await manager.kill()
        nursery.cancel_scope.cancel()
    for name in agents:
        day.set_faults(name, NO_FAULTS)
    day.victims += [manager.service.name for manager in managers]


STATES: Final = (
    State(
        "leader-paused",
        "the leader's process is stopped (SIGSTOP), and goes on",
        {
            Channel.METRICS: r"agent_leader_lost_total [1-9]",
            Channel.LOG: r"no leader heard",
            Channel.STATUS: r"does not answer",
        },
        _pause_leader,
        _go_on,
    ),
    State(
        "disk-full",
        "no file of agents and managers can grow any more, and then again",
        {
            Channel.READY: r"cannot commit.*the store fails|disk is full",
            Channel.METRICS: r"agent_group_stalled\{.*\} 1",
            Channel.LOG: r"disk is full|file too large|disk I/O error",
            Channel.STATUS: r"the store fails its leader|disk is full",
            Channel.CLIENT: r"",
        },
        fill_disk,
        empty_disk,
        stores=ONLY_SQLITE,
    ),
    State(
        "nvram-fails",
        "a write of one HSM's NVRAM fails; its agent is started again",
        {Channel.LOG: r"NVRAM|nvram", Channel.STATUS: r"does not answer|members down"},
        _fail_nvram,
        _replace_nvram,
    ),
    State(
        "clock-behind",
        "the clock of the leading agent is set 25 minutes back, and right again",
        {
            Channel.READY: r"clock",
            Channel.METRICS: r"clock_offset -1[45]\d\d",
            Channel.LOG: r"clock is off",
            Channel.STATUS: r"clock is .* behind",
        },
        _set_behind,
        set_clock_right,
    ),
    State(
        "clocks-ahead",
        "all clocks are set an hour ahead, as those of a machine that was resumed, and back",
        {},
        _set_all_ahead,
        set_clock_right,
        listen_s=12.0,
    ),
    State(
        "certificate-ended",
        "a certificate that ended is put in the leader's place and read (SIGHUP), then a good one",
        {Channel.LOG: r"valid from .* to |has ended|ended on"},
        _put_ended,
        _put_good,
        listen_s=5.0,
    ),
    State(
        "bus-stalled",
        "Pub/Sub is stopped (SIGSTOP), and goes on",
        {
            Channel.READY: r"events are not published|wait for publication",
            Channel.METRICS: r'service_reason\{.*code="bus".*\} 1',
            Channel.LOG: r"events not published",
        },
        _stop_bus,
        _start_bus,
        has_bus=True,
    ),
    State(
        "rate-limit",
        "the tenant's limit is set to 0, and lifted",
        {
            Channel.METRICS: r'agent_app_refusals_total\{.*reason="rate_limited".*\} [1-9]',
            Channel.CLIENT: r"RateLimit|rate",
        },
        _limit,
        _lift_limit,
    ),
    State(
        "connect-and-leave",
        f"{LEAVERS} strangers connect to each open port and leave",
        {},
        _connect_and_leave,
        agents=1,
        listen_s=8.0,
    ),
    State(
        "transfer-cut",
        "the manager is killed in the middle of a move between two groups, and started again",
        {Channel.STATUS: r"transfer (from|to) .* is pending"},
        cut_move,
        start_victims,
        groups=2,
    ),
)
