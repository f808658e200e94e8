"""A real Prometheus with the shipped rules watches a realm: it says when three of five agents die, and when it ends."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import trio
import yaml
from prometheus_client.parser import text_string_to_metric_families

from juicebox_hsm.client import Client, Configuration, HttpTransport
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions
from tests.client.looking import eventually, page_of
from tests.patience import HANGS_S
from tests.processes import end_group, start_group
from tests.prometheus import program

pytestmark = pytest.mark.processes

SHIPPED = Path(__file__).parent.parent.parent / "docs" / "monitoring"
RULES = SHIPPED / "juicebox-hsm.rules.yml"
EVERY = "2s"
"""Between two scrapes and between two looks at the rules; an operator has 15 s."""
SHORTER = 8
"""What `for` is divided by: so it takes as many looks as with an operator's Prometheus."""
SCRAPE_BYTES_MAX = 60_000
LEADER_BYTES = 20_000
"""More for one that made the realm and leads it, with a series for each kind of error that a busy machine causes."""
ONLY_IN_TROUBLE = {
    "Leaderships", "Refused by tenants' limits", "Share of Unavailable", "Store errors", "What services say",
    "What the cluster says",
}  # fmt: skip
"""Panels of the dashboard that may be empty while all is well."""
PIN, INFO, SECRET = b"1234", b"watched", b"its secret"


def _shorter(duration: str) -> str:
    number, unit = re.fullmatch(r"(\d+)([smh])", duration).groups()  # type: ignore[union-attr]  # promtool checked it
    return f"{max(1, int(number) * {'s': 1, 'm': 60, 'h': 3600}[unit] // SHORTER)}s"


def _configure(cluster: Cluster, folder: Path) -> None:
    """Write the shipped rules with shorter waits, and a configuration that names the realm's services."""
    folder.mkdir()
    rules = yaml.safe_load(RULES.read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"] if "for" in rule):
        rule["for"] = _shorter(rule["for"])
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    targets = [running.service.http for running in cluster.processes]
    configuration = {
        "global": {"scrape_interval": EVERY, "scrape_timeout": EVERY, "evaluation_interval": EVERY},
        "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": "juicebox-hsm", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Prometheus:
    """The server, asked over HTTP."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def ask(self, path: str, **words: str) -> Any:
        """Return the data of an answer; None while nobody listens."""

        def get() -> Any:
            try:
                with urlopen(f"http://{self._address}/api/v1/{path}?{urlencode(words)}", timeout=HANGS_S) as answer:
                    return json.load(answer)["data"]
            except (URLError, ConnectionError):
                return None

        return await trio.to_thread.run_sync(get)

    async def firing(self) -> list[dict[str, str]]:
        """Return the labels of the alerts that fire."""
        alerts = (await self.ask("alerts"))["alerts"]
        return [alert["labels"] for alert in alerts if alert["state"] == "firing"]


@asynccontextmanager
async def _watching(cluster: Cluster, folder: Path) -> AsyncIterator[Prometheus]:
    """Run Prometheus beside the realm until the block ends."""
    server = program("prometheus")
    _configure(cluster, folder)
    address = f"127.0.0.1:{_free_port()}"
    with (folder / "log").open("wb") as log:
        process = start_group(
            [server, "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"],
            cwd=folder, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            prometheus = Prometheus(address)

            async def answers() -> bool:
                assert process.poll() is None, (folder / "log").read_text()[-2000:]
                return bool(await prometheus.ask("status/runtimeinfo"))

            await eventually(answers, HANGS_S, "Prometheus answers")
            yield prometheus
        finally:
            await trio.to_thread.run_sync(partial(end_group, process))


async def _empty_panels(prometheus: Prometheus) -> set[str]:
    """Ask what every panel of the shipped dashboard asks; return the titles of those that have nothing to show."""
    dashboard = json.loads((SHIPPED / "juicebox-hsm.dashboard.json").read_text())
    empty = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
            found = await prometheus.ask("query", query=query)
            assert found is not None, query
            if not found["result"]:
                empty.add(panel["title"])
    return empty


@pytest.mark.time_limit(900)
async def test_the_alert_fires_and_ends(tmp_path: Path) -> None:
    """Nobody is woken while all is well; without a majority the alert names the group, and ends when it is back."""
    program("prometheus")
    options = DemoOptions(
        state_dir=tmp_path / "state", agents=5, load_balancers=2, managers=2, pin_hashing="FastInsecure"
    )
    async with (
        launch(options) as cluster,
        HttpTransport(ca_file=cluster.state.edge_ca) as transport,
        _watching(cluster, tmp_path / "prometheus") as prometheus,
    ):
        realm = cluster.realms[0]
        client = Client(
            Configuration.from_json(cluster.configuration), {realm: cluster.token(realm, "p")}, transport=transport
        )
        await client.register(PIN, SECRET, INFO, 5)
        assert await client.recover(PIN, INFO) == SECRET
        view = await cluster.view()
        group = next(group for group in view.groups_of(realm) if group.owned_range is not None)

        async def all_scraped() -> bool:
            targets = (await prometheus.ask("targets"))["activeTargets"]
            return len(targets) == len(cluster.processes) and all(target["health"] == "up" for target in targets)

        async def all_well() -> bool:
            loaded = await prometheus.ask(
                "query", query="min(cluster_group_losses_tolerated) and min(service_ready) == 1"
            )
            return bool(loaded["result"]) and not await prometheus.firing()

        await eventually(all_scraped, HANGS_S, "every service is scraped, in a form that Prometheus takes")
        await eventually(all_well, HANGS_S, "nothing fires while all is well")
        for running in cluster.processes:
            page = await page_of(running.service.http, "/metrics")
            leads = any(each.leader and each.leader.url == running.service.url for each in view.groups.values())
            bytes_max = SCRAPE_BYTES_MAX + (LEADER_BYTES if leads else 0)
            assert len(page) < bytes_max, (running.service.name, len(page))
            assert all(family.documentation for family in text_string_to_metric_families(page))
        rules = [rule for each in (await prometheus.ask("rules"))["groups"] for rule in each["rules"]]
        assert [rule for rule in rules if rule["health"] == "err"] == []

        async def all_shown() -> bool:  # a rate takes two scrapes
            return await _empty_panels(prometheus) <= ONLY_IN_TROUBLE

        await eventually(all_shown, HANGS_S, "the dashboard shows something in every panel")
        killed = cluster.of_role("agent")[:3]
        for victim in killed:
            await victim.kill()

        async def told() -> bool:
            expected = {
                "alertname": "JuiceboxNoQuorum",
                "realm": realm.hex(),
                "group": group.id.hex(),
                "severity": "page",
            }
            return expected in await prometheus.firing()

        await eventually(told, HANGS_S, "the lost majority is an alert")
        for victim in killed:
            await cluster.restart(victim.service.name)

        async def over() -> bool:
            names = {alert["alertname"] for alert in await prometheus.firing()}
            return not names & {"JuiceboxNoQuorum", "JuiceboxServiceDown"}

        await eventually(over, HANGS_S, "the alerts end")
        assert await client.recover(PIN, INFO) == SECRET
