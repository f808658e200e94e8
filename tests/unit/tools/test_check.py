"""The service check: what it reports, and to whom. The operations themselves run against a real realm elsewhere."""

from __future__ import annotations

import datetime as dt
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from trio.testing import MockClock

from juicebox_hsm.adapters.observation.dogstatsd import send_once, service_check
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.tls.certificates import CaKind, init_ca
from juicebox_hsm.client import Configuration
from juicebox_hsm.client.transport import Observation
from juicebox_hsm.ids import RealmId
from roles.cli import cli
from roles.tools.check import run as check_run
from roles.tools.check.command import report_json, roots
from roles.tools.check.run import Certificates, Checker, Settings
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
    """DER and PEM roots end up in one file; anything else is a usage error."""
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
    for path in (der, tmp_path / "absent"):
        with pytest.raises(ToolFailure) as caught, roots([path]):
            pass
        assert caught.value.exit_code == 2


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


def test_usage(tmp_path: Path) -> None:
    """No target, a tenant of real users and unreadable files are usage errors."""
    environment = {"JUICEBOX_CLIENT_JSON": None}
    assert CliRunner().invoke(cli, ["check"], env=environment).exit_code == 2
    real = ["check", "--configuration", "{}", "--secrets-file", str(tmp_path / "s"), "--tenant", "acme"]
    result = CliRunner().invoke(cli, real, env=environment)
    assert result.exit_code == 2
    assert "test-" in result.output
