"""Traces: who is sampled, what reaches a collector, and that nothing happens when they are off."""

from __future__ import annotations

import gzip
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from juicebox_hsm.adapters.observation.tracing import (
    BACKGROUND_RATE,
    Traces,
    active,
    current,
    endpoint_of,
    make_provider,
    open_traces,
    parse_traceparent,
)
from juicebox_hsm.adapters.rpc import RpcPool, serve_rpc
from juicebox_hsm.errors import LocalError
from juicebox_hsm.wire.methods import MANAGER_METHODS, MANAGER_STATUS
from juicebox_hsm.wire.rpc import Empty, ManagerStatus
from tests.patience import PROGRAM_S

TRACE = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = f"00-{TRACE}-b7ad6b7169203331-01"
UNSAMPLED = f"00-{TRACE}-b7ad6b7169203331-00"


@pytest.fixture
def traces() -> Iterator[Traces]:
    """A tracer whose spans go nowhere."""
    provider = make_provider("test", "1", InMemorySpanExporter())
    yield Traces(provider)
    provider.shutdown()


@pytest.mark.parametrize(
    "text",
    [
        None, "", "00", SAMPLED.upper(), SAMPLED[:-1], "ff" + SAMPLED[2:], f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-{TRACE}-{'0' * 16}-01", SAMPLED + "x", SAMPLED.replace("-", "_"),
    ],
)  # fmt: skip
def test_bad_headers_begin_a_new_trace(text: str | None) -> None:
    """What is no W3C trace context counts as none."""
    assert parse_traceparent(text) is None


@given(st.text(max_size=300))
def test_any_header_is_parsed_or_ignored(text: str) -> None:
    """Nothing a stranger sends as a header raises."""
    parse_traceparent(text)


def test_headers_of_later_versions_are_understood() -> None:
    """A header with more fields than we know still names its trace."""
    parent = parse_traceparent(f"01-{TRACE}-b7ad6b7169203331-03-what-comes-later")
    assert parent is not None
    assert (f"{parent.trace:032x}", parent.sampled) == (TRACE, True)


def test_a_stranger_cannot_force_a_trace(traces: Traces) -> None:
    """At the edge neither flag nor trace id decides; the rate does, and the trace id is kept."""
    assert traces.edge("x", SAMPLED, 0.0) is None
    span = traces.edge("x", UNSAMPLED, 1.0)
    assert span is not None
    assert span.traceparent.split("-")[1] == TRACE
    assert span.traceparent.endswith("-01")
    lowest = [f"00-{number:032x}-b7ad6b7169203331-01" for number in range(1, 401)]
    sampled = [text for text in lowest if traces.edge("x", text, 0.1) is not None]
    assert len(sampled) < 100, "small trace ids, which a ratio of the plain id would always take"
    assert sampled == [text for text in lowest if traces.edge("x", text, 0.1) is not None], "one answer per trace"


def test_services_follow_their_caller(traces: Traces) -> None:
    """Inside, the caller's flag decides; a call without a trace begins none."""
    assert traces.served("x", UNSAMPLED) is None
    assert traces.served("x", None) is None
    span = traces.served("x", SAMPLED)
    assert span is not None
    assert span.traceparent.split("-")[1] == TRACE
    assert traces.served("x", None, 1.0) is not None
    assert traces.background("x", 0.0) is None
    assert 0 < BACKGROUND_RATE < 0.01


async def test_a_block_gives_its_trace_to_its_calls(traces: Traces) -> None:
    """`active` holds for the block and its children only, also when the block fails."""
    span = traces.background("x", 1.0)
    assert span is not None
    with active(span):
        assert current() == span.traceparent
    assert current() is None

    def fail() -> None:
        with active(traces.background("x", 1.0)):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert current() is None
    with active(None):
        assert current() is None


async def test_spans_cross_an_rpc(traces: Traces, nursery: trio.Nursery) -> None:
    """A call inside a sampled block is continued by the server; outside it carries nothing."""
    exporter = InMemorySpanExporter()
    provider = make_provider("server", "1", exporter)
    seen: list[str | None] = []

    async def status(_: Empty, __: object) -> ManagerStatus:
        await trio.lowlevel.checkpoint()
        seen.append(current())
        return ManagerStatus("{}")

    async def serve(*, task_status: Any) -> None:
        await serve_rpc(
            ("127.0.0.1", 0), tls=None, methods=MANAGER_METHODS, handlers={"status": status}, traces=Traces(provider),
            task_status=task_status,
        )  # fmt: skip

    server = await nursery.start(serve)
    pool = RpcPool(nursery, None, passes_trace=True)
    url = f"tcp://127.0.0.1:{server.port}"
    await pool.call(url, MANAGER_STATUS, Empty(), timeout_s=5)
    span = traces.background("x", 1.0)
    assert span is not None
    with active(span):
        await pool.call(url, MANAGER_STATUS, Empty(), timeout_s=5)
    assert seen[0] is None
    assert seen[1] is not None
    assert seen[1].split("-")[1] == span.traceparent.split("-")[1]
    provider.force_flush()
    (finished,) = exporter.get_finished_spans()
    assert finished.name == "status"
    assert finished.parent is not None
    assert f"{finished.parent.span_id:016x}" == span.traceparent.split("-")[2]
    provider.shutdown()
    nursery.cancel_scope.cancel()


async def test_steps_follow_each_other() -> None:
    """A step is a child of the request's span and ends where the next begins; the last one ends with the request."""
    exporter = InMemorySpanExporter()
    provider = make_provider("server", "1", exporter)
    traces = Traces(provider)
    span = traces.background("request", 1.0)
    assert span is not None
    steps = traces.steps(span.traceparent)
    steps.end()
    for name in ("proofs", "hsm"):
        steps.enter(name)
    steps.end()
    steps.end()
    span.end()
    provider.force_flush()
    first, second, whole = exporter.get_finished_spans()
    assert (first.name, second.name, whole.name) == ("proofs", "hsm", "request")
    assert first.end_time is not None
    assert second.start_time is not None
    assert first.end_time <= second.start_time
    for step in (first, second):
        assert step.parent is not None
        assert f"{step.parent.span_id:016x}" == span.traceparent.split("-")[2]
    provider.shutdown()


def test_off_by_default() -> None:
    """Without an address, or with the off switch, there is no tracer, and no library is imported."""
    assert open_traces("x", "1", {}) is None
    assert open_traces("x", "1", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:4318", "OTEL_SDK_DISABLED": "true"}) is None
    program = (
        "import sys, roles.lb.main, roles.agent.main, roles.manager.main\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=PROGRAM_S).returncode == 0


@pytest.mark.parametrize("text", ["localhost:4317", "grpc://h:4317", "http://"])
def test_a_bad_address_is_named(text: str) -> None:
    """An address that is no URL of HTTP is a mistake of the configuration, told with its variable."""
    with pytest.raises(LocalError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT.*expected http"):
        endpoint_of({"OTEL_EXPORTER_OTLP_ENDPOINT": text})
    assert endpoint_of({"OPENTELEMETRY_ENDPOINT": "http://h:4318/"}) == "http://h:4318"


def test_a_missing_exporter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces that are asked for and not installed are told with what to install."""
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(LocalError, match=r"pip install 'juicebox-hsm\[traces\]'"):
        open_traces("x", "1", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:4318"})


@contextmanager
def _collector() -> Iterator[tuple[str, list[tuple[str, ExportTraceServiceRequest]]]]:
    """An OTLP collector over HTTP: yields its address and what it was sent."""
    received: list[tuple[str, ExportTraceServiceRequest]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def test_a_collector_gets_the_spans() -> None:
    """Closing sends what is left: name, ids, attributes, status, service and version."""
    with _collector() as (address, received):
        traces = open_traces("load_balancer", "1.2", {"OTEL_EXPORTER_OTLP_ENDPOINT": address})
        assert traces is not None
        span = traces.edge("POST /req", SAMPLED, 1.0)
        assert span is not None
        span.end(failed="Unavailable", tenant="test-acme", status_code=503)
        await traces.close()
    ((path, request),) = received
    assert path == "/v1/traces"
    (resource,) = request.resource_spans
    about = {entry.key: entry.value.string_value for entry in resource.resource.attributes}
    assert (about["service.name"], about["service.version"]) == ("load_balancer", "1.2")
    (sent,) = resource.scope_spans[0].spans
    assert (sent.name, sent.trace_id.hex(), sent.parent_span_id.hex()) == ("POST /req", TRACE, "b7ad6b7169203331")
    assert {entry.key for entry in sent.attributes} == {"tenant", "status_code"}
    assert (sent.status.message, sent.status.code) == ("Unavailable", 2)


async def test_a_dead_collector_holds_nobody_up(capsys: pytest.CaptureFixture[str]) -> None:
    """A collector that is not there costs a warning line; closing still ends in time."""
    traces = open_traces("agent", "1", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})
    assert traces is not None
    span = traces.background("x", 1.0)
    assert span is not None
    span.end()
    began = trio.current_time()
    await traces.close()
    assert trio.current_time() - began < 4
    assert "Traceback" not in capsys.readouterr().err
