"""One run of the service check: operations as test users, per-step times, certificates (operator-tools.md 3)."""

from __future__ import annotations

import datetime as dt
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import trio

from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.observation.tracing import HEADER, Traces, active
from juicebox_hsm.client import Client, ClientError, HttpTransport, RateLimitExceeded
from juicebox_hsm.client.transport import Headers, Observation, Transport
from juicebox_hsm.host.certificates import DAYS_WARN
from juicebox_hsm.ids import RealmId
from roles.survey.balancers import certificate_end, probe_balancers
from roles.tools.target import Target

NUM_GUESSES: Final = 2
CERTIFICATES_EVERY_S: Final = 300.0
DAYS_OK: Final = 30.0
DAYS_FAIL: Final = 5.0
WHY_S: Final = 2.0
"""Longest wait for what a balancer says of itself after a run that failed."""
PER_S: Final = 9.0
"""Requests a second to each realm: agents let in 10 of a tenant that nobody gave a limit (agent.md 11)."""
REQUESTS: Final = {"register": 2, "recover": 3, "delete": 1}
"""What each step asks of each realm (client-protocol.md 11 to 13)."""
LIMITED_S: Final = 1.0
"""Pause before a step is tried once more when the tenant's limit was used by others, such as a second check (own)."""
CLEAN_UP_S: Final = 3.0
"""Longest time for deleting what a user that failed may have left, after its failure or the end of the run (own)."""
SLOW_NS: Final = 1_000_000_000
STEPS: Final = tuple(REQUESTS)
_TIMING_HEADERS: Final = ("server-timing", "cf-ray")
_EXEC_TIME: Final = "x-exec-time"
_DAY: Final = dt.timedelta(days=1)


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settings:
    """How to check. Times in seconds; `per_s` requests a second to each realm at most."""

    user: str
    count: int
    concurrency: int
    timeout_s: float
    http_timeout_s: float
    per_s: float = PER_S

    @property
    def shortest_s(self) -> float:
        """Return how long a run takes at least, for its pace."""
        return self.count * sum(REQUESTS.values()) / self.per_s


@dataclass(frozen=True, slots=True)
class Step:
    """How long one kind of step took, over the users with which it succeeded."""

    name: str
    count: int
    min_ms: float
    mean_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was found about the certificate behind one address."""

    url: str
    remaining_days: float | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What came of one run; `error` is the first one, "" when all went well."""

    error: str
    errors: int
    elapsed_s: float
    steps: tuple[Step, ...]
    certificates: tuple[Certificate, ...]

    @property
    def ok(self) -> bool:
        """Tell whether everything succeeded."""
        return not self.error


class Certificates:
    """The realms' certificates, looked at every five minutes; in between the last look counts."""

    def __init__(self, urls: Sequence[str], log: Callable[[str], None], metrics: Metrics) -> None:
        self._urls = sorted({url for url in urls if url.startswith("https:")})
        self._log = log
        self._metrics = metrics
        self._looked_at = -CERTIFICATES_EVERY_S
        self._found: tuple[Certificate, ...] = ()

    async def look(self) -> tuple[Certificate, ...]:
        """Return what is known, after a new look when it is time."""
        if trio.current_time() - self._looked_at >= CERTIFICATES_EVERY_S:
            self._looked_at = trio.current_time()
            self._found = tuple([await self._look_at(url) for url in self._urls])
        return self._found

    async def _look_at(self, url: str) -> Certificate:
        try:
            end = await certificate_end(url)
        except OSError as error:
            self._log(f"warning: {url}: certificate not seen: {error}")
            return Certificate(url, None, str(error))
        days = round((end - dt.datetime.now(dt.UTC)) / _DAY, 2)
        self._metrics.gauge("service_checker.tls_cert.remaining_days", days, url=url)
        if days <= DAYS_OK:
            level = "warning" if days > DAYS_WARN else "error"
            self._log(f"{level}: {url}: the certificate ends in {days:.0f} days")
        return Certificate(url, days)


class _Limited:
    """A transport whose requests never take longer than the check allows."""

    def __init__(self, inner: HttpTransport, timeout_s: float, traces: Traces | None) -> None:
        self._inner = inner
        self._timeout_s = timeout_s
        self._traces = traces

    async def post(self, url: str, headers: Headers, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Send one request, each in a trace of its own when traces are on. Raises `TransportError`."""
        timeout_s = min(timeout_s, self._timeout_s)
        span = None if self._traces is None else self._traces.background("check", 1.0)
        if span is None:
            return await self._inner.post(url, headers, body, timeout_s)
        with active(span):
            return await self._inner.post(url, [*headers, (HEADER, span.traceparent)], body, timeout_s)


class _Pace:
    """Spreads steps, so that each realm is asked `per_s` times a second at most, and what is timed is not the waiting.

    Realms count apart, and every step asks each of them equally often.
    """

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._due = -math.inf

    async def turn(self, step: str) -> None:
        """Wait until the step may begin."""
        begin = max(self._due, trio.current_time())
        self._due = begin + REQUESTS[step] / self._per_s
        await trio.sleep_until(begin)


class _Tally:
    """Times and errors of one run."""

    def __init__(self) -> None:
        self.times_ms: dict[str, list[float]] = {}
        self.problems: list[tuple[int, str]] = []  # by user, so that "the first error" does not depend on timing

    def steps(self) -> tuple[Step, ...]:
        """Return the figures of the steps that succeeded at least once, in the order they are made."""
        return tuple(
            Step(name, len(times), min(times), sum(times) / len(times), max(times))
            for name in STEPS
            if (times := self.times_ms.get(name))
        )


class Checker:
    """Runs the check against one target. `log` gets lines for people: slow requests, odd answers, certificates."""

    def __init__(
        self,
        target: Target,
        settings: Settings,
        metrics: Metrics,
        log: Callable[[str], None],
        traces: Traces | None = None,
    ) -> None:
        self.target = target
        self._traces = traces
        self._settings = settings
        self._metrics = metrics
        self._log = log
        self._pace = _Pace(settings.per_s)

    async def run(self, certificates: Certificates) -> Report:
        """Do one run; expected trouble is in the report."""
        begun = time.monotonic()
        found = await certificates.look()
        tally = _Tally()
        with trio.move_on_after(self._settings.timeout_s) as deadline:
            await self._users(tally)
        if deadline.cancelled_caught:
            tally.problems.append((-1, f"not finished within {self._settings.timeout_s:g} s"))
        for seen in found:
            if seen.remaining_days is not None and seen.remaining_days <= DAYS_FAIL:
                tally.problems.append((self._settings.count, f"the certificate of {seen.url} ends soon"))
        problems = [text for _, text in sorted(tally.problems)]
        if problems:
            problems[0] += await self._say_why()
        return Report(
            error=problems[0] if problems else "",
            errors=len(problems),
            elapsed_s=time.monotonic() - begun,
            steps=tally.steps(),
            certificates=found,
        )

    async def _say_why(self) -> str:
        """Log what the realms' balancers say of themselves; return the first of it, to follow the error."""
        addresses = (realm.address for realm in self.target.configuration.realms)
        told = []
        for report in await probe_balancers((url for url in addresses if url.startswith("https:")), WHY_S):
            told += [f"{report.url} is not ready: {reason}" for _, reason in report.reasons]
            if report.error:
                told.append(f"{report.url} does not answer: {report.error}")
        for line in told:
            self._log(f"error: {line}")
        return f"; {told[0]}" if told else ""

    async def _users(self, tally: _Tally) -> None:
        numbers = iter(range(self._settings.count))
        pool = HttpTransport(
            ca_file=self.target.ca_file,
            connections_per_host_max=self._settings.concurrency,
            observe=self._observe,
        )
        async with pool, trio.open_nursery() as nursery:
            transport = _Limited(pool, self._settings.http_timeout_s, self._traces)

            async def worker() -> None:
                for number in numbers:
                    await self._user(transport, number, tally)

            for _ in range(min(self._settings.concurrency, self._settings.count)):
                nursery.start_soon(worker)

    async def _user(self, transport: Transport, number: int, tally: _Tally) -> None:
        user = f"{self._settings.user}{number}"
        pin, info, secret = f"thepin{number}".encode(), f"user_info{number}".encode(), f"its secret{number}".encode()

        def token(realm: RealmId) -> str:
            return self.target.token(user, realm)

        client = Client(self.target.configuration, token, transport=transport)
        steps: dict[str, Callable[[], Awaitable[bytes | None]]] = {
            "register": lambda: client.register(pin, secret, info, NUM_GUESSES),
            "recover": lambda: client.recover(pin, info),
            "delete": client.delete,
        }
        is_gone = False
        try:
            for step, operation in steps.items():
                try:
                    result = await self._do(step, operation, tally)
                except ClientError as error:
                    tally.problems.append((number, f"{user}: {step}: {type(error).__name__}: {error}"))
                    return
                if step == "recover" and result != secret:
                    tally.problems.append((number, f"{user}: the recovered secret is not the registered one"))
            is_gone = True
        finally:
            if not is_gone:
                await self._clean_up(client, user)

    async def _do(self, step: str, operation: Callable[[], Awaitable[T]], tally: _Tally) -> T:
        """Carry out a step in its turn. Raises `ClientError`."""
        await self._pace.turn(step)
        try:
            with self._timed(step, tally):
                return await operation()
        except RateLimitExceeded:
            await trio.sleep(LIMITED_S)
        await self._pace.turn(step)
        with self._timed(step, tally):
            return await operation()

    async def _clean_up(self, client: Client, user: str) -> None:
        """Delete what a user that failed may have left, also when the run was cut short; in limited time."""
        problem = f"no answer within {CLEAN_UP_S:g} s"
        with trio.move_on_after(CLEAN_UP_S, shield=True):
            await self._pace.turn("delete")
            try:
                await client.delete()
                return
            except ClientError as error:
                problem = f"{type(error).__name__}: {error}"
        self._log(f"warning: {user}: a record may be left, as it cannot be deleted: {problem}")

    def _timed(self, step: str, tally: _Tally) -> _Timed:
        return _Timed(step, tally, self._metrics)

    def _observe(self, seen: Observation) -> None:
        """Count one answer, and tell about slow and odd ones."""
        headers = dict(seen.headers)
        tags = {"url": seen.url, "status_code": str(seen.status)}
        told = headers.get(_EXEC_TIME, "")
        executed_ns = min(int(told), seen.elapsed_ns) if told.isdigit() else 0
        self._metrics.timing("service_checker.http_send.network_latency.ns", seen.elapsed_ns - executed_ns, **tags)
        if told.isdigit():
            self._metrics.timing("service_checker.http_send.server_exec_time.ns", executed_ns, **tags)
        if seen.elapsed_ns >= SLOW_NS or seen.status != 200:
            extra = "".join(f" {name}={headers[name]}" for name in _TIMING_HEADERS if name in headers)
            self._log(f"warning: {seen.url}: status {seen.status} after {seen.elapsed_ns / 1e6:.0f} ms{extra}")


class _Timed:
    """Times one step; a step that fails counts for nothing."""

    def __init__(self, step: str, tally: _Tally, metrics: Metrics) -> None:
        self._step = step
        self._tally = tally
        self._metrics = metrics
        self._begun_ns = 0

    def __enter__(self) -> None:
        self._begun_ns = time.perf_counter_ns()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            elapsed_ns = time.perf_counter_ns() - self._begun_ns
            self._tally.times_ms.setdefault(self._step, []).append(elapsed_ns / 1e6)
            self._metrics.timing("service_checker.step.time.ns", elapsed_ns, step=self._step)
