"""Real processes: a copy of an HSM directory that runs beside the original is noticed by both, and named."""

from __future__ import annotations

import shutil
import socket
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from juicebox_hsm.host.services import ServiceKind
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import HOST, DemoOptions
from roles.tools.demo.processes import OrphanGuard, RunningService
from tests.client.looking import eventually, page_of, status_of

pytestmark = pytest.mark.processes

TOLD_S = 10.0


def _port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _copy_of(cluster: Cluster, name: str, guard: OrphanGuard, tmp_path: Path) -> RunningService:
    """Copy an agent's HSM directory and return a process that is to run on it."""
    original = cluster.process(name).service
    directory = tmp_path / "copied hsm"
    shutil.copytree(cluster.state.hsm(name), directory)
    copy = replace(original, name="copy", port=_port(), http_port=_port())
    swaps = {
        str(cluster.state.hsm(name)): str(directory),
        original.address: copy.address,
        original.http: copy.http,
    }
    argv = tuple(swaps.get(word, word) for word in original.argv)
    return RunningService(replace(copy, argv=argv), tmp_path / "copy.log", guard)


async def test_a_copied_hsm_is_told_and_not_appointed(tmp_path: Path) -> None:
    """Both say `hsm_twice` and neither is made a leader, status has both addresses; it ends with the copy."""
    options = DemoOptions(state_dir=tmp_path / "state", agents=3, pin_hashing="FastInsecure", tenant_log=False)
    with closing(OrphanGuard()) as guard:
        async with launch(options) as cluster:
            view = await cluster.view()
            group = next(group for group in view.groups.values() if group.owned_range is not None)
            assert group.leader is not None
            victim = next(p for p in cluster.of_role("agent") if p.service.url != group.leader.url)
            copy = _copy_of(cluster, victim.service.name, guard, tmp_path)
            copy.start()
            try:
                await copy.wait_listening()

                async def told(service: RunningService, other: RunningService) -> bool:
                    page = await page_of(service.service.http, "/readyz")
                    return f"hsm_twice: our HSM also runs at {other.service.url}" in page

                await eventually(lambda: told(victim, copy), TOLD_S, "the original is not ready")
                await eventually(lambda: told(copy, victim), TOLD_S, "the copy is not ready")

                async def counted() -> bool:
                    return "agent_hsm_copies 1" in await page_of(victim.service.http, "/metrics")

                await eventually(counted, TOLD_S, "the gauge")
                status = await status_of(cluster)
                first, second = sorted([victim.service.url, copy.service.url])
                assert f"runs at {first} and at {second}: one is a copy" in " ".join(status.split())

                leader = next(p for p in cluster.of_role("agent") if p.service.url == group.leader.url)
                third = next(p for p in cluster.of_role("agent") if p not in {leader, victim})
                before = [len(manager.log.read_text()) for manager in cluster.of_role("manager")]
                await leader.kill()

                async def led_by_the_third() -> bool:
                    now = (await cluster.view()).groups[group.key].leader
                    return now is not None and now.url == third.service.url

                await eventually(led_by_the_third, TOLD_S, "a member without a copy leads")
                managers = zip(cluster.of_role("manager"), before, strict=True)
                log = "".join(manager.log.read_text()[told:] for manager, told in managers)
                assert "leader appointed" in log
                # a manager that asked the group's members it knows may have seen one address only: then it was refused
                assert not [line for line in log.splitlines() if "leader appointed" in line and victim.hsm in line]
                await cluster.restart(leader.service.name)
            finally:
                await copy.kill()
                copy.close()

            async def ready() -> bool:
                return (await page_of(victim.service.http, "/readyz")).startswith("ready")

            # its entry is still in discovery, as is that of any service that moved
            await eventually(ready, TOLD_S, "ready again")
            found = await cluster.session.store.discovery.list(ServiceKind.AGENT)
            assert copy.service.url in {entry.url for entry in found}
            assert "is a copy" not in await status_of(cluster)
