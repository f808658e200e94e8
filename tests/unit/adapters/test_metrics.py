"""Metrics: names, text form, bounds, and what goes to DogStatsD."""

from __future__ import annotations

import math
import socket

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from juicebox_hsm.adapters.observation import metrics as metrics_module
from juicebox_hsm.adapters.observation.dogstatsd import PACKET_BYTES_MAX, drain, open_endpoint, send_metrics
from juicebox_hsm.adapters.observation.metric_names import AGENT
from juicebox_hsm.adapters.observation.metrics import Metrics


def packets(metrics: Metrics) -> list[str]:
    """Return the lines a sender would send, without the common tags."""
    return b"\n".join(drain(metrics, {})).decode().split("\n")


def test_prometheus_text() -> None:
    """The text is exactly what a scraper expects: types, `_total`, cumulative buckets, seconds."""
    metrics = Metrics()
    metrics.counter("realm.request.count", realm="00", tenant="acme", type="recover1")
    metrics.count("realm.request.count", 2, type="recover2", realm="00", tenant='a"c\\m\ne')
    metrics.gauge("load_balancer.routes", 2.5)
    metrics.timing("agent.commit.latency.ns", 1_500_000)
    metrics.timing("agent.commit.latency", 2_000_000_000)
    metrics.distribution("agent.merkle_read.proof_nodes", 3, has_leaf=True)
    text = metrics.render()
    assert text.startswith(
        "# HELP metrics_series_dropped_total Values lost because there were 10,000 series already\n"
        "# TYPE metrics_series_dropped_total counter\nmetrics_series_dropped_total 0\n"
    )
    assert (
        "# TYPE realm_request_count_total counter\n"
        'realm_request_count_total{realm="00",tenant="acme",type="recover1"} 0\n'
        'realm_request_count_total{realm="00",tenant="a\\"c\\\\m\\ne",type="recover2"} 2\n'
    ) in text
    assert "# TYPE load_balancer_routes gauge\nload_balancer_routes 2.5\n" in text
    assert "# TYPE agent_commit_latency_seconds histogram\n" in text
    assert 'agent_commit_latency_seconds_bucket{le="0.001"} 0\n' in text
    assert 'agent_commit_latency_seconds_bucket{le="0.0025"} 1\n' in text
    assert 'agent_commit_latency_seconds_bucket{le="2.5"} 2\n' in text
    assert 'agent_commit_latency_seconds_bucket{le="+Inf"} 2\n' in text
    assert "agent_commit_latency_seconds_sum 2.0015" in text
    assert "agent_commit_latency_seconds_count 2\n" in text
    assert 'agent_merkle_read_proof_nodes_bucket{has_leaf="True",le="4"} 1\n' in text
    assert text.endswith("\n")


def test_same_name_and_tags_are_one_series() -> None:
    """The order of tags does not matter, and a tag of None is left out."""
    metrics = Metrics()
    assert metrics.counter("x", a="1", b="2") is metrics.counter("x", b="2", a=1)
    assert metrics.counter("x", a="1", tenant=None) is metrics.counter("x", a="1")
    assert metrics.timer("x.ns") is metrics.timer("x")


@given(st.lists(st.integers(0, 10**12), max_size=30))
def test_buckets_count_every_value_once(values: list[int]) -> None:
    """Every bucket holds the values up to its bound; an oracle that compares one by one agrees."""
    metrics = Metrics()
    timer = metrics.timer("x")
    for value in values:
        timer.observe_ns(value)
    assert sum(timer.counts) == timer.count == len(values)
    running = 0
    for bound, count in zip((*timer.bounds, math.inf), timer.counts, strict=True):
        running += count
        assert running == sum(value <= bound * 1e9 for value in values)


def test_series_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tags from outside cannot fill memory: beyond the bound new series vanish, and their number is shown."""
    monkeypatch.setattr(metrics_module, "SERIES_MAX", 5)
    metrics = Metrics()
    for number in range(20):
        metrics.count("x", tag=number)
    assert metrics.render().count("x_total{") == 4
    assert "metrics_series_dropped_total 16\n" in metrics.render()


def test_remove() -> None:
    """Gauges of things that are gone can be taken away."""
    metrics = Metrics()
    metrics.gauge("x", 1, group="a")
    metrics.gauge("y", 1)
    metrics.remove("x")
    assert "x{" not in metrics.render()
    assert "y 1" in metrics.render()


@pytest.mark.parametrize(("value", "text"), [(math.inf, "+Inf"), (-math.inf, "-Inf"), (math.nan, "NaN"), (1e300, "1")])
def test_odd_values(value: float, text: str) -> None:
    """A gauge of no finite value does not break the page."""
    metrics = Metrics()
    metrics.gauge("x", value)
    assert f"\nx {text}" in metrics.render()


def test_dogstatsd_sends_changes_once() -> None:
    """Counters go out as differences, gauges as they are, durations in ns as single values; then nothing is left."""
    metrics = Metrics()
    metrics.timing("early", 1)
    metrics.enable_samples()
    metrics.count("realm.request.count", 3, tenant="Acme Corp", type="recover1")
    metrics.gauge("routes", 2)
    metrics.timing("commit.latency", 1500)
    metrics.timing("commit.latency", 123_456_789)
    metrics.event("Agent watchdog triggered", "group\nx")
    assert packets(metrics) == [
        "realm.request.count:3|c|#tenant:acme_corp,type:recover1",
        "events:1|c|#title:agent_watchdog_triggered",
        "routes:2|g",
        "commit.latency.ns:1500:123456789|d",
        "_e{24,8}:Agent watchdog triggered|group\\nx",
    ]
    assert packets(metrics) == ["routes:2|g"]
    metrics.count("realm.request.count", 1, tenant="Acme Corp", type="recover1")
    assert packets(metrics)[0] == "realm.request.count:1|c|#tenant:acme_corp,type:recover1"


def test_dogstatsd_packets_are_bounded() -> None:
    """However much changed, packets fit an Ethernet frame, and values beyond the bound go into the sample rate."""
    metrics = Metrics()
    metrics.enable_samples()
    for number in range(1000):
        metrics.count("some.counter", tag=f"{number}")
        metrics.timing("t", 1_000_000_000 + number)
    sent = list(drain(metrics, {"service": "agent"}))
    assert max(map(len, sent)) <= PACKET_BYTES_MAX
    lines = b"\n".join(sent).decode().split("\n")
    assert sum(line.startswith("some.counter:1|c|#service:agent,tag:") for line in lines) == 1000
    timings = [line for line in lines if line.startswith("t.ns:")]
    assert sum(line.split("|")[0].count(":") for line in timings) == metrics_module.SAMPLES_MAX
    assert all("|d|@0.512000|#service:agent" in line for line in timings)


async def test_sender_is_off_without_an_agent() -> None:
    """Without DD_AGENT_HOST nothing is sent and no samples are kept."""
    metrics = Metrics()
    await send_metrics(metrics, {}, {})
    metrics.timing("x", 1)
    assert metrics.timer("x").samples is None


async def test_sender_survives_having_nobody_listening(autojump_clock: trio.testing.MockClock) -> None:
    """Failures to send are nobody's business."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    metrics = Metrics()
    with trio.move_on_after(10):
        metrics.count("x")
        await send_metrics(metrics, {}, {"DD_AGENT_HOST": "127.0.0.1", "DD_DOGSTATSD_PORT": str(port)})
    assert metrics.counter("x").sent == 1


async def test_what_was_counted_last_is_sent(mock_clock: trio.testing.MockClock) -> None:
    """A service that ends within the second sends what it counted in it: billing loses nothing at a clean stop."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as agent:
        agent.bind(("127.0.0.1", 0))
        agent.settimeout(5)
        environment = {"DD_AGENT_HOST": "127.0.0.1", "DD_DOGSTATSD_PORT": str(agent.getsockname()[1])}
        metrics = Metrics()
        metrics.count("x")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_metrics, metrics, {}, environment)
            assert await trio.to_thread.run_sync(agent.recv, 2000) == b"x:1|c"
            metrics.count("realm.request.count", 3)
            nursery.cancel_scope.cancel()
        assert agent.recv(2000) == b"realm.request.count:3|c"


def test_numbers_are_sent_in_full() -> None:
    """Gauges and values arrive as they are: a log index is not rounded to six digits; what is no number is not sent."""
    metrics = Metrics()
    metrics.enable_samples()
    metrics.gauge("index", 12345678)
    metrics.gauge("share", 0.1234567890123)
    metrics.gauge("unknown", math.nan)
    metrics.timing("long", 12_345_678_901)
    assert packets(metrics) == ["index:12345678|g", "share:0.1234567890123|g", "long.ns:12345678901|d"]


@pytest.mark.parametrize("silent", ["127.0.0.2", "::1"])
def test_an_address_where_nobody_listens_is_passed_over(silent: str) -> None:
    """Of several addresses of a name, the agent's is used, wherever it stands; with none listening, an IPv4 one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as agent:
        agent.bind(("127.0.0.1", 0))
        agent.settimeout(5)
        port = agent.getsockname()[1]
        found = [socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0] for host in (silent, "127.0.0.1")]
        with open_endpoint(found) as endpoint:
            endpoint.send(b"x:1|c")
        assert agent.recv(100).strip() + agent.recv(100) == b"x:1|c"
    with open_endpoint(found) as endpoint:
        assert endpoint.family == socket.AF_INET


async def test_sender_sends_every_second() -> None:
    """What changed arrives at the agent, with the common tags."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as agent:
        agent.bind(("127.0.0.1", 0))
        agent.settimeout(5)
        metrics = Metrics()
        metrics.count("x", 2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                send_metrics,
                metrics,
                {"service": "agent", "version": "1"},
                {"DD_AGENT_HOST": "127.0.0.1", "DD_DOGSTATSD_PORT": str(agent.getsockname()[1])},
            )
            assert await trio.to_thread.run_sync(agent.recv, 2000) == b"x:2|c|#service:agent,version:1"
            nursery.cancel_scope.cancel()


@given(st.lists(st.integers(0, 10**11), max_size=30), st.text(max_size=20))
def test_a_scraper_reads_everything(values: list[int], tag: str) -> None:
    """Another implementation reads back what was counted: meaning, kind, labels, cumulative buckets up to +Inf."""
    metrics = Metrics()
    metrics.declare(AGENT)
    for value in values:
        metrics.timing("hsm.handle", value, req_name=tag)
        metrics.distribution("agent.merkle_read.proof_nodes", value % 50)
        metrics.count("agent.app.busy", value)
    metrics.gauge("agent.hsm.copies", len(values))
    found = {family.name: family for family in text_string_to_metric_families(metrics.render())}
    assert all(family.documentation and family.type != "unknown" for family in found.values())
    assert found["agent_hsm_copies"].samples[0].value == len(values)
    refusals = {sample.labels["reason"]: sample.value for sample in found["agent_app_refusals"].samples}
    assert refusals == {"busy": sum(values), "no_quorum": 0}
    assert ("hsm_handle_seconds" in found) == bool(values)
    if not values:
        return
    samples = found["hsm_handle_seconds"].samples
    assert {sample.labels["req_name"] for sample in samples} == {tag}
    buckets = {float(each.labels["le"]): each.value for each in samples if each.name.endswith("_bucket")}
    assert list(buckets) == sorted(buckets)
    assert buckets == {bound: sum(value <= bound * 1e9 for value in values) for bound in buckets}
    (total,) = (each.value for each in samples if each.name.endswith("_count"))
    assert buckets[math.inf] == total == len(values)


def test_histograms_are_shown_when_they_have_values() -> None:
    """Of the series with labels only those that saw a value take lines, and all of a family have the same buckets."""
    metrics = Metrics()
    metrics.timer("rpc.server.time", method="app", result="failed")
    metrics.timing("rpc.server.time", 1, method="app", result="ok")
    metrics.timing("rpc.server.time", 10**12, method="status", result="ok")
    text = metrics.render()
    assert "failed" not in text
    assert text.count('le="0.005"') == text.count('le="1"') == text.count('le="+Inf"') == 2
