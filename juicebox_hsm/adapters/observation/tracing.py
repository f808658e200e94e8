"""Spans to an OTLP collector over HTTP, if the environment names one (operator-tools.md 9.3).

Off unless OTEL_EXPORTER_OTLP_ENDPOINT (or OPENTELEMETRY_ENDPOINT) is set: `open_traces` then returns None, nobody
holds a tracer, and a request costs one comparison. On, only sampled requests make spans; who is sampled is decided
before any library is asked. The exporter is an optional dependency (`pip install 'juicebox-hsm[traces]'`) and works in
a thread of its own; a collector that is down costs a warning and nothing else.

A balancer decides for itself: neither the flag nor the trace id that a client sends can force a trace. Others follow
their caller's flag.
"""

from __future__ import annotations

import logging as stdlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from hashlib import blake2s
from typing import TYPE_CHECKING, Any, Final

import trio

from juicebox_hsm.adapters.observation.logging import get_logger
from juicebox_hsm.adapters.process.threads import NoThread, in_thread, thread_needed
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.addresses import parse_url

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

ENDPOINT_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OPENTELEMETRY_ENDPOINT")
OFF_VARIABLE: Final = "OTEL_SDK_DISABLED"
ROOT_RATE: Final = 0.1  # operator-tools.md 9.3
BACKGROUND_RATE: Final = 0.005  # operator-tools.md 9.3
BATCH_SPANS: Final = 450  # operator-tools.md 9.3
BATCH_MS: Final = 2500  # operator-tools.md 9.3
QUEUE_SPANS: Final = 2048
EXPORT_S: Final = 5.0  # own
CLOSE_S: Final = 2.0  # own: flushing must not hold up a shutdown
HEADER: Final = "traceparent"

_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_NO_TRACE: Final = "0" * 32
_NO_SPAN: Final = "0" * 16
_SAMPLED: Final = 1

_current: ContextVar[str | None] = ContextVar("traceparent", default=None)
_log = get_logger("traces")


class Parent:
    """A valid W3C trace context: ids as integers, and whether its maker sampled it."""

    __slots__ = ("sampled", "span", "trace")

    def __init__(self, trace: int, span: int, *, sampled: bool) -> None:
        self.trace = trace
        self.span = span
        self.sampled = sampled


def trace_id(traceparent: str) -> str:
    """Return the trace id, in hex, of a header that we made."""
    return traceparent.split("-")[1]


def parse_traceparent(text: str | None) -> Parent | None:
    """Return the trace context of a header, None for none or a bad one, which then begins a new trace."""
    found = None if text is None else _TRACEPARENT.fullmatch(text)
    if found is None or found[1] == "ff" or found[2] == _NO_TRACE or found[3] == _NO_SPAN:
        return None
    return Parent(int(found[2], 16), int(found[3], 16), sampled=bool(int(found[4], 16) & _SAMPLED))


class Span:
    """A sampled piece of work. `traceparent` goes to whom we call. `end` it exactly once."""

    __slots__ = ("_span", "traceparent")

    def __init__(self, span: Any) -> None:
        self._span = span
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-01"

    def end(self, *, failed: str = "", **attributes: str | int | bool) -> None:
        """End the span; `failed` says what went wrong. Never pass what logs must not contain."""
        for name, value in attributes.items():
            self._span.set_attribute(name, value)
        if failed:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, failed))
        self._span.end()


class Steps:
    """What a request goes through, one step after the other: a child of its span for each. `end` the last one."""

    __slots__ = ("_parent", "_span", "_traces")

    def __init__(self, traces: Traces, traceparent: str) -> None:
        self._traces = traces
        self._parent = parse_traceparent(traceparent)
        self._span: Span | None = None

    def enter(self, name: str) -> None:
        """Begin a step, which ends the one before it."""
        self.end()
        self._span = self._traces.child(name, self._parent)

    def end(self) -> None:
        """End the step under way, if there is one."""
        span, self._span = self._span, None
        if span is not None:
            span.end()


class Traces:
    """Makes spans for one service. `close` sends what is left."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("juicebox_hsm")
        self._salt = secrets.token_bytes(16)

    def edge(self, name: str, header: str | None, rate: float) -> Span | None:
        """Continue or begin a trace for a stranger's request; a share of `rate` of all traces is sampled."""
        parent = parse_traceparent(header)
        trace = secrets.token_bytes(16) if parent is None else parent.trace.to_bytes(16, "big")
        # Keyed: with the plain id, as in a ratio sampler, whoever picks the id would pick the outcome.
        drawn = int.from_bytes(blake2s(trace, key=self._salt, digest_size=8).digest(), "big")
        return self._start(name, parent, server=True) if drawn < rate * 2**64 else None

    def served(self, name: str, traceparent: str | None, rate: float = 0.0) -> Span | None:
        """Continue a caller's trace if the caller sampled it; without one begin one with probability `rate`."""
        parent = parse_traceparent(traceparent)
        if parent is None:
            return self._start(name, None, server=True) if _draw(rate) else None
        return self._start(name, parent, server=True) if parent.sampled else None

    def background(self, name: str, rate: float = BACKGROUND_RATE) -> Span | None:
        """Begin a trace of work nobody asked for."""
        return self._start(name, None, server=False) if _draw(rate) else None

    def child(self, name: str, parent: Parent | None) -> Span:
        """Begin a part of a span's work."""
        return self._start(name, parent, server=False)

    def steps(self, traceparent: str) -> Steps:
        """Return the steps, none yet, of the span whose trace context this is."""
        return Steps(self, traceparent)

    def _start(self, name: str, parent: Parent | None, *, server: bool) -> Span:
        from opentelemetry import trace
        from opentelemetry.context import Context

        context = Context()
        if parent is not None:
            remote = trace.SpanContext(
                parent.trace, parent.span, is_remote=True, trace_flags=trace.TraceFlags(_SAMPLED)
            )
            context = trace.set_span_in_context(trace.NonRecordingSpan(remote), context)
        kind = trace.SpanKind.SERVER if server else trace.SpanKind.INTERNAL
        return Span(self._tracer.start_span(name, context=context, kind=kind))

    async def close(self) -> None:
        """Send what is left, for at most 2 s."""
        with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_S), suppress(NoThread):
            await in_thread(self._provider.shutdown, abandon_on_cancel=True)


def _draw(rate: float) -> bool:
    return rate > 0 and secrets.randbelow(1_000_000) < rate * 1_000_000


@contextmanager
def active(span: Span | None) -> Iterator[None]:
    """Make calls from the block part of `span`'s trace, and end it afterwards; None does nothing."""
    if span is None:
        yield
        return
    token = _current.set(span.traceparent)
    failed = ""
    try:
        yield
    except BaseException as error:
        failed = type(error).__name__
        raise
    finally:
        _current.reset(token)
        span.end(failed=failed)


def current() -> str | None:
    """Return the trace context that outgoing calls of this task should carry."""
    return _current.get()


def endpoint_of(environment: Mapping[str, str]) -> str:
    """Return the collector's address, "" when traces are off; raises `LocalError` for one that is no http(s) URL."""
    if environment.get(OFF_VARIABLE, "").lower() == "true":
        return ""
    for variable in ENDPOINT_VARIABLES:
        endpoint = environment.get(variable, "")
        if not endpoint:
            continue
        try:
            parse_url(endpoint, ("http", "https"))
        except ValueError as error:
            raise LocalError(f"{variable}: {error}; expected http://HOST:4318, a collector of OTLP over HTTP") from None
        return endpoint.rstrip("/")
    return ""


def open_traces(service: str, version: str, environment: Mapping[str, str] = os.environ) -> Traces | None:
    """Return the tracer of this process, None when traces are off.

    Raises `LocalError` for a bad address and when the exporter is not installed.
    """
    endpoint = endpoint_of(environment)
    if not endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise LocalError(
            f"{ENDPOINT_VARIABLES[0]} is set but the exporter is missing: pip install 'juicebox-hsm[traces]', "
            f"or set {OFF_VARIABLE}=true"
        ) from None
    _quieten()
    with thread_needed():
        return Traces(make_provider(service, version, OTLPSpanExporter(f"{endpoint}/v1/traces", timeout=EXPORT_S)))


def make_provider(service: str, version: str, exporter: SpanExporter) -> TracerProvider:
    """Return a provider that records everything it is given and exports in batches."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    provider = TracerProvider(
        sampler=ALWAYS_ON,
        resource=Resource.create({"service.name": service, "service.version": version}),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter, max_queue_size=QUEUE_SPANS, schedule_delay_millis=BATCH_MS, max_export_batch_size=BATCH_SPANS
        )
    )
    return provider


class _Quiet(stdlib.Handler):
    """Turns what the exporter complains about into warnings of ours, which are limited to one a second."""

    def emit(self, record: stdlib.LogRecord) -> None:
        """Pass on a line without its traceback."""
        _log.warning("spans not sent", error=record.getMessage())


def _quieten() -> None:
    logger = stdlib.getLogger("opentelemetry")
    if not any(isinstance(handler, _Quiet) for handler in logger.handlers):
        logger.addHandler(_Quiet(stdlib.WARNING))
    logger.propagate = False
