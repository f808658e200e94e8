"""What an operator sees of a running realm: metrics by their names, traces across processes, the check's reports."""

from __future__ import annotations

import http.server
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from juicebox_hsm.adapters.observation.families import Family, Kind
from juicebox_hsm.adapters.observation.metric_names import AGENT, LOAD_BALANCER, MANAGER, from_the_start
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions
from tests.patience import HANGS_S

pytestmark = pytest.mark.processes
ROLES = {"agent": AGENT, "lb": LOAD_BALANCER, "manager": MANAGER}
WAIT_S = HANGS_S
SCRAPE_BYTES_MAX = 60_000
"""Every scrape of every service is that much to send, parse and keep; it was 273,000."""


class Collector:
    """An OTLP collector over HTTP; `spans` are (service, name, trace id, parent span id, span id)."""

    def __init__(self) -> None:
        collector = self
        self.spans: list[tuple[str, str, bytes, bytes, bytes]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def take(self, request: ExportTraceServiceRequest) -> None:
        """Keep what was sent."""
        for resource in request.resource_spans:
            about = {entry.key: entry.value.string_value for entry in resource.resource.attributes}
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                self.spans.append((about["service.name"], span.name, span.trace_id, span.parent_span_id, span.span_id))


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector that runs."""
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield collector
    collector.server.shutdown()
    thread.join()
    collector.server.server_close()


def _expected(families: tuple[Family, ...]) -> set[str]:
    """Return the Prometheus families that must exist before anything happened."""
    known = {
        family.series
        for family, tags in from_the_start(families)
        if not tags or family.kind in {Kind.COUNT, Kind.GAUGE}
    }
    return known | {"store_client_time_seconds", "store_client_errors_total"}


def _families(cluster: Cluster, name: str) -> tuple[set[str], str]:
    entries = json.loads((cluster.state.path / "processes.json").read_text())
    (address,) = [entry["http"] for entry in entries if entry["name"] == name]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=HANGS_S) as answer:
        text = answer.read().decode()
    return {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}, text


def _check(cluster: Cluster, *more: str) -> list[str]:
    state = cluster.state.path
    return [
        sys.executable, "-m", "roles", "check", "--secrets-file", str(state / "secrets.json"), "--tenant", "test-acme",
        "--count", "2", *more,
    ]  # fmt: skip


async def test_metrics_traces_and_the_check(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running realm shows all declared metrics; the check's traces reach the agent; its reports reach DogStatsD."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server.server_port}")
    monkeypatch.setenv("JUICEBOX_HSM_TRACE_RATE", "1.0")
    statsd = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    statsd.bind(("127.0.0.1", 0))
    statsd.settimeout(WAIT_S)
    with statsd:
        async with launch(DemoOptions(state_dir=tmp_path / "state", pin_hashing="FastInsecure")) as cluster:
            monkeypatch.setenv("JUICEBOX_CLIENT_JSON", str(cluster.state.path / "client.json"))
            monkeypatch.setenv("DD_AGENT_HOST", "127.0.0.1")
            monkeypatch.setenv("DD_DOGSTATSD_PORT", str(statsd.getsockname()[1]))
            said = await trio.to_thread.run_sync(_forever, _check(cluster, "--forever", "--interval", "200ms"), statsd)
            for role, families in ROLES.items():
                with trio.move_on_after(WAIT_S):  # gauges are set once a second
                    missing = _expected(families)
                    while missing:
                        shown, text = await trio.to_thread.run_sync(_families, cluster, f"{role}1")
                        missing -= shown
                        await trio.sleep(0.1)
                assert missing == set(), role
                if role == "agent":
                    assert 'hsm_handle_seconds_count{req_name="AppRequest"}' in text
                    assert 'realm_request_count_total{realm="' in text
                    assert "agent_merkle_read_proof_nodes_count" in text
                assert len(text) < SCRAPE_BYTES_MAX
                assert all(family.documentation for family in text_string_to_metric_families(text)), role
    assert said.count("healthcheck.register_recover|0|#env:prod") >= 2
    for name in ("http_send.network_latency.ns", "http_send.server_exec_time.ns", "step.time.ns"):
        assert f"service_checker.{name}:" in said, name
    assert "service_checker.tls_cert.remaining_days:" in said
    by_id = {span[4]: span for span in collector.spans}
    apps = [span for span in collector.spans if span[:2] == ("agent", "app")]
    assert apps
    chains = [(by_id.get(app[3]), app) for app in apps]
    edges = [(edge, app) for edge, app in chains if edge is not None]
    assert edges, "the agent's spans belong to the balancer's"
    assert all(edge[:3] == ("load_balancer", "POST /req", app[2]) for edge, app in edges)
    checks = [by_id[edge[3]] for edge, _ in edges if edge[3] in by_id]
    assert [check for check in checks if check[0] == "service_checker"], "and those to the check's"


def _forever(command: list[str], statsd: socket.socket) -> str:
    """Run the check until it has reported twice, stop it, and return what DogStatsD got."""
    process = subprocess.Popen([*command, "--env", "prod"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = ""
    deadline = time.monotonic() + WAIT_S
    while said.count("healthcheck") < 2 and time.monotonic() < deadline:
        said += statsd.recv(65536).decode() + "\n"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, output + errors
    assert " ok; register " in output
    return said
