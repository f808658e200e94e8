"""States of the cluster: too few members, an HSM that is there twice, a wrong clock, a demo started twice."""

from __future__ import annotations

import json
import shutil
import socket
from contextlib import closing
from dataclasses import replace
from typing import Final

import trio

from juicebox_hsm.adapters.faults.switch import NO_FAULTS, Faults
from roles.tools.demo.layout import HOST
from roles.tools.demo.processes import RunningService
from tests.client.bad_day.day import Channel, Day, State, leave_alone, start_victims
from tests.client.bad_day.listening import run_tool

CLOCK_AHEAD_S: Final = 25 * 60
"""Above every age that was ever judged by a wall clock (discovery: 21 minutes)."""


async def _kill_majority(day: Day) -> None:
    day.victims += (await day.followers())[:3]
    for name in day.victims:
        await day.cluster.process(name).kill()


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _copy(day: Day, name: str) -> RunningService:
    """Copy an agent's HSM directory while it runs; return a service on the copy, which is one of the cluster's now."""
    original = day.cluster.process(name).service
    directory = day.directory / "copied-hsm"
    shutil.copytree(day.cluster.state.hsm(name), directory)
    copy = replace(original, name="copy", port=_free_port(), http_port=_free_port())
    swaps = {
        str(day.cluster.state.hsm(name)): str(directory),
        original.address: copy.address,
        original.http: copy.http,
    }
    argv = tuple(swaps.get(word, word) for word in original.argv)
    return RunningService(replace(copy, argv=argv), day.directory / "copy.log", day.guard)


async def _start_copy(day: Day) -> None:
    copy = _copy(day, (await day.followers())[0])
    day.cluster.processes.append(copy)
    copy.start()
    await copy.wait_listening()


async def _stop_copy(day: Day) -> None:
    copy = day.cluster.processes.pop()
    await copy.kill()
    copy.close()


async def set_clock(day: Day) -> None:
    name = (await day.followers())[0]
    day.victims.append(name)
    day.set_faults(name, Faults(clock_offset_ms=CLOCK_AHEAD_S * 1000))


async def set_clock_right(day: Day) -> None:
    await trio.lowlevel.checkpoint()
    for name in day.victims:
        day.set_faults(name, NO_FAULTS)


async def _second_demo(day: Day) -> None:
    before = json.loads(day.cluster.state.processes_json.read_text())
    output = await run_tool("demo", "--state-dir", str(day.cluster.state.path), "--no-tenant-log")
    day.tool_output += output.splitlines()
    if json.loads(day.cluster.state.processes_json.read_text()) != before:
        day.tool_output.insert(0, "the second demo has replaced processes.json")


STATES: Final = (
    State(
        "majority-lost",
        "three of five agents are killed, and started again",
        {
            Channel.READY: r"cannot commit",
            Channel.METRICS: r"agent_group_stalled\{.*\} 1",
            Channel.LOG: r"group cannot commit",
            Channel.STATUS: r"cannot commit",
            Channel.CLIENT: r"",
        },
        _kill_majority,
        start_victims,
        agents=5,
    ),
    State(
        "hsm-copied",
        "the directory of a running HSM is copied and an agent started on the copy; it is stopped again",
        {
            Channel.READY: r"hsm_twice",
            Channel.METRICS: r"agent_hsm_copies 1",
            Channel.LOG: r"our HSM also runs elsewhere",
            Channel.STATUS: r"one is a copy|hsm-twice",
        },
        _start_copy,
        _stop_copy,
    ),
    State(
        "clock-ahead",
        "the clock of one agent that leads nothing is set 25 minutes ahead, and back",
        {
            Channel.READY: r"clock",
            Channel.METRICS: r"clock_offset 1[45]\d\d",
            Channel.LOG: r"clock is off",
            Channel.STATUS: r"clock is",
        },
        set_clock,
        set_clock_right,
    ),
    State(
        "second-demo",
        "a second demo is started on the state directory of one that runs",
        {Channel.TOOL: r"is in use by process \d+"},
        _second_demo,
        leave_alone,
    ),
)
