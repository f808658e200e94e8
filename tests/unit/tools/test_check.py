"""The service check: what it reports, and to whom. The operations themselves run against a real realm elsewhere."""

from __future__ import annotations

import datetime as dt
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from trio.testing import MockClock

from juicebox_hsm.adapters.observation.dogstatsd import send_once, service_check
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.tls.certificates import CaKind, init_ca
from juicebox_hsm.client import Configuration, RateLimitExceeded, Transient
from juicebox_hsm.client.transport import Observation
from juicebox_hsm.ids import RealmId
from roles.cli import cli
from roles.tools.check import run as check_run
from roles.tools.check.command import report_json, roots
from roles.tools.check.run import CLEAN_UP_S, REQUESTS, Certificates, Checker, Settings
from roles.tools.session import ToolFailure
from roles.tools.target import Target

URL = "https://127.0.0.1:1/"
CONFIGURATION = Configuration.from_json(
    {
        "realms": [{"id": "0f" * 16, "address": URL, "public_key": "aa" * 32}],
        "register_threshold": 1,
        "recover_threshold": 1,
        "pin_hashing_mode": "FastInsecure",
    }
)


def _token(user: str, realm: RealmId) -> str:
    return f"{user}-{realm.hex()}"


def _checker(lines: list[str], metrics: Metrics, **changes: float) -> Checker:
    settings = Settings("Mario", 3, 2, changes.get("timeout_s", 5.0), changes.get("http_timeout_s", 1.0))
    return Checker(Target(CONFIGURATION, None, _token), settings, metrics, lines.append)


def _ends_in(monkeypatch: pytest.MonkeyPatch, days: float) -> list[str]:
    """Let every certificate end in so many days; return the addresses that were looked at."""
    asked: list[str] = []

    async def end(url: str) -> dt.datetime:
        asked.append(url)
        return dt.datetime.now(dt.UTC) + dt.timedelta(days=days)

    monkeypatch.setattr(check_run, "certificate_end", end)
    return asked


def test_service_check_packet() -> None:
    """The message is reduced to harmless characters, so that it cannot add fields or packets."""
    packet = service_check("healthcheck.register_recover", {"env": "dev"}, ok=False, message="a|b\n#c: 5 ms")
    assert packet == b"_sc|healthcheck.register_recover|2|#env:dev|m:a_b__c_ 5 ms"
    assert b"|0|" in service_check("x", {"env": "dev"}, ok=True)


def test_packets_go_where_the_environment_says() -> None:
    """Without DD_AGENT_HOST nothing is sent; with it each packet arrives; a bad host is no failure."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as agent:
        agent.bind(("127.0.0.1", 0))
        agent.settimeout(2)
        port = str(agent.getsockname()[1])
        assert send_once([b"one", b"two"], {"DD_AGENT_HOST": "127.0.0.1", "DD_DOGSTATSD_PORT": port})
        assert [agent.recv(100), agent.recv(100)] == [b"one", b"two"]
    assert not send_once([b"one"], {})
    assert not send_once([b"one"], {"DD_AGENT_HOST": "no-such-host.invalid"})


def test_roots_in_either_form(tmp_path: Path) -> None:
    """DER and PEM roots end up in one file; anything else is a usage error, but a file that may still come is none."""
    init_ca(tmp_path / "ca", kind=CaKind.EDGE)
    pem = tmp_path / "ca" / "ca.pem"
    der = tmp_path / "ca.der"
    der.write_bytes(x509.load_pem_x509_certificate(pem.read_bytes()).public_bytes(Encoding.DER))
    with roots([pem, der]) as bundle:
        assert bundle is not None
        assert len(x509.load_pem_x509_certificates(bundle.read_bytes())) == 2
    with roots([]) as none:
        assert none is None
    der.write_bytes(b"neither")
    for path, code in ((der, 2), (tmp_path / "absent", 1)):
        with pytest.raises(ToolFailure) as caught, roots([path]):
            pass
        assert caught.value.exit_code == code


async def test_an_unreachable_realm_fails_with_the_first_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every user is tried; the report names the first one, its step and why, whatever order they ended in."""
    _ends_in(monkeypatch, 60)
    lines: list[str] = []
    metrics = Metrics()
    report = await _checker(lines, metrics).run(Certificates([URL], lines.append, metrics))
    assert not report.ok
    assert report.errors == 3
    assert report.error.startswith("Mario0: register: Transient")
    assert report.steps == ()
    document = report_json(report)
    assert document["ok"] is False
    assert document["certificates"][0]["remaining_days"] > 59


async def test_a_run_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that takes too long fails, and says so before anything else."""
    _ends_in(monkeypatch, 60)
    metrics = Metrics()
    report = await _checker([], metrics, timeout_s=0.0).run(Certificates([URL], print, metrics))
    assert report.error.startswith("not finished within 0 s; ")


@pytest.mark.parametrize(
    ("days", "level", "fails"), [(31, "", False), (25, "warning", False), (10, "error", False), (4, "error", True)]
)
async def test_certificate_levels(monkeypatch: pytest.MonkeyPatch, days: float, level: str, fails: bool) -> None:
    """Over 30 days is fine, over 20 a warning, below an error, and from 5 on the check fails."""
    _ends_in(monkeypatch, days)
    lines: list[str] = []
    metrics = Metrics()
    checker = _checker([], metrics)
    report = await checker.run(Certificates([URL], lines.append, metrics))
    assert [line.split(":")[0] for line in lines] == ([level] if level else [])
    assert report.errors == (4 if fails else 3)  # three users cannot reach anybody


async def test_certificates_are_looked_at_every_five_minutes(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """The first run looks, later ones use what was found until five minutes are over; plain http has none."""
    asked = _ends_in(monkeypatch, 60)
    certificates = Certificates([URL, URL, "http://127.0.0.1:2/"], print, Metrics())
    await certificates.look()
    await certificates.look()
    assert asked == [URL]
    autojump_clock.jump(301)
    assert (await certificates.look())[0].remaining_days == pytest.approx(60, abs=0.1)
    assert asked == [URL, URL]


def test_slow_and_odd_answers_are_told() -> None:
    """Anything but 200, and anything slow, is a line with the proxy's own timings; each answer is measured."""
    lines: list[str] = []
    metrics = Metrics()
    checker = _checker(lines, metrics)
    for status, elapsed_ns in ((200, 5_000_000), (200, 2_000_000_000), (503, 1_000)):
        headers = (("x-exec-time", "1000000"), ("cf-ray", "77"))
        checker._observe(Observation(URL, status, elapsed_ns, headers))
    assert lines == [
        f"warning: {URL}: status 200 after 2000 ms cf-ray=77",
        f"warning: {URL}: status 503 after 0 ms cf-ray=77",
    ]
    assert 'service_checker_http_send_server_exec_time_seconds_count{status_code="200"' in metrics.render()


class _Realm:
    """What a realm saw of the check: operations with their moments, and records that are left."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, str]] = []
        self.records: set[str] = set()
        self.failing: dict[str, Exception | None] = {}
        """Operations that fail, or that hang where there is no error."""

    async def ask(self, user: str, step: str) -> None:
        """Carry out an operation."""
        await trio.lowlevel.checkpoint()
        self.seen.append((trio.current_time(), step))
        if step == "register":
            self.records.add(user)
        if step in self.failing:
            error = self.failing[step]
            if isinstance(error, RateLimitExceeded):
                del self.failing[step]
            if error is None:
                await trio.sleep_forever()
            else:
                raise error
        if step == "delete":
            self.records.discard(user)


def _with_realm(monkeypatch: pytest.MonkeyPatch) -> _Realm:
    """Let clients speak to a realm in memory."""
    realm = _Realm()

    class FakeClient:
        def __init__(self, _configuration: object, token: Callable[[RealmId], str], *, transport: object) -> None:
            self._user = token(RealmId(bytes(16)))
            self._secret = b""

        async def register(self, _pin: bytes, secret: bytes, _info: bytes, _guesses: int) -> None:
            self._secret = secret
            await realm.ask(self._user, "register")

        async def recover(self, _pin: bytes, _info: bytes) -> bytes:
            await realm.ask(self._user, "recover")
            return self._secret

        async def delete(self) -> None:
            await realm.ask(self._user, "delete")

    monkeypatch.setattr(check_run, "Client", FakeClient)
    _ends_in(monkeypatch, 60)
    return realm


@pytest.mark.usefixtures("autojump_clock")
async def test_a_run_keeps_the_default_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second of a run, and no two runs in a row, has more requests than agents let in by default."""
    realm = _with_realm(monkeypatch)
    settings = Settings("Mario", 5, 4, 10.0, 5.0)
    checker = Checker(Target(CONFIGURATION, None, _token), settings, Metrics(), print)
    for _ in range(2):
        report = await checker.run(Certificates([], print, Metrics()))
        assert report.ok
        assert report.steps[1].max_ms < 1000, "waiting for a turn is no time of a step"
    assert len(realm.seen) == 2 * 5 * 3
    for at, _ in realm.seen:
        asked = sum(REQUESTS[step] for moment, step in realm.seen if at <= moment < at + 1.0)
        assert asked <= 10 + 2, "an account may go into debt by an operation that has begun"
    assert not realm.records


@pytest.mark.usefixtures("autojump_clock")
async def test_a_limit_that_others_used_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One refusal for the tenant's limit is no failure: a second check may run elsewhere."""
    realm = _with_realm(monkeypatch)
    realm.failing = {"recover": RateLimitExceeded("too many")}
    assert (await _checker([], Metrics()).run(Certificates([], print, Metrics()))).ok


@pytest.mark.usefixtures("autojump_clock")
@pytest.mark.parametrize("step", ["register", "recover", "delete"])
@pytest.mark.parametrize("error", [Transient("down"), None], ids=["fails", "hangs"])
async def test_who_fails_leaves_no_records(monkeypatch: pytest.MonkeyPatch, step: str, error: Exception | None) -> None:
    """Whatever step fails, or hangs until the run is cut short, what was registered is deleted, or told to be left."""
    realm = _with_realm(monkeypatch)
    realm.failing = {step: error}
    lines: list[str] = []
    began = trio.current_time()
    report = await _checker(lines, Metrics()).run(Certificates([], print, Metrics()))
    assert not report.ok
    assert trio.current_time() - began < 5.0 + CLEAN_UP_S + 1
    told = {line.split(":")[1].strip() for line in lines if "a record may be left" in line}
    assert {user.partition("-")[0] for user in realm.records} == told
    assert bool(told) == (step == "delete")


def test_usage(tmp_path: Path) -> None:
    """No target, a tenant of real users and unreadable files are usage errors."""
    environment = {"JUICEBOX_CLIENT_JSON": None}
    assert CliRunner().invoke(cli, ["check"], env=environment).exit_code == 2
    real = ["check", "--configuration", "{}", "--secrets-file", str(tmp_path / "s"), "--tenant", "acme"]
    result = CliRunner().invoke(cli, real, env=environment)
    assert result.exit_code == 2
    assert "test-" in result.output
