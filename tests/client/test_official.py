"""The official client and ours against real realms: every scenario, a realm down, and a restart after a power cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions
from tests.client.drivers import Driver, Environment, official_driver, own_driver
from tests.client.scenarios import SCENARIOS, Stage, expect, kill_realm, one_realm_down

pytestmark = [pytest.mark.processes, pytest.mark.node]


def _options(path: Path, store: str = "sqlite") -> DemoOptions:
    return DemoOptions(state_dir=path, realms=3, pin_hashing="FastInsecure", store=store)


async def test_both_clients_pass_every_scenario(tmp_path: Path, store: str) -> None:
    """Both clients pass one list on three realms, each also reading what the other wrote, then with one realm dead.

    That holds on each kind of store.
    """
    async with launch(_options(tmp_path, store), on_exit=lambda _: None) as cluster:
        environment = Environment.load(cluster.state.client_json)
        async with official_driver(environment.ca) as official, own_driver(environment.ca) as own:
            pairs: list[tuple[Driver, Driver]] = [(official, own), (own, official)]
            for driver, other in pairs:
                stage = Stage(environment, driver, other)
                for scenario in SCENARIOS:
                    await scenario(stage)
            killed: list[str] = []

            def down() -> None:
                if not killed:
                    killed.append(environment.realms[2])
                    kill_realm(cluster.state.path, environment.realms[2])

            for driver, other in pairs:
                await one_realm_down(Stage(environment, driver, other), down)


async def _kill_everything(cluster: Cluster) -> None:
    for running in cluster.processes:
        await running.kill()


async def test_power_cut_keeps_secrets_and_counts(tmp_path: Path) -> None:
    """After kill -9 of all processes and a new start, secrets are recovered and spent guesses stay spent."""
    async with launch(_options(tmp_path), on_exit=lambda _: None) as cluster:
        environment = Environment.load(cluster.state.client_json)
        async with official_driver(environment.ca) as official, own_driver(environment.ca) as own:
            user = Stage(environment, official, own).user(name="survivor")
            expect(await user.register(b"1234", b"still here", 3))
            expect(await user.recover(b"0000"), "InvalidPin", guesses=2)
        await _kill_everything(cluster)
    async with launch(_options(tmp_path), on_exit=lambda _: None) as cluster:
        environment = Environment.load(cluster.state.client_json)
        async with official_driver(environment.ca) as official, own_driver(environment.ca) as own:
            user = Stage(environment, official, own).user(name="survivor")
            expect(await user.recover(b"0001"), "InvalidPin", guesses=1)
            expect(await user.recover(b"1234"), secret=b"still here")
