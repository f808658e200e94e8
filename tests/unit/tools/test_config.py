"""Settings of a role from flags, environment and file, and the commands that check and show them."""

from __future__ import annotations

import datetime as dt
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import roles.agent.main
import roles.lb.main
import roles.manager.main
from juicebox_hsm.adapters.hsm_directory.hsm_host import generate_keys, init_hsm_dir, open_hsm_dir
from juicebox_hsm.adapters.tls.certificates import CaKind, init_ca, issue, issue_edge
from roles.cli import cli
from roles.durations import DurationRange
from roles.options import flag_of, read_settings, variable_of
from roles.tools.config.parse import parse_role

COMMANDS = {
    "agent": roles.agent.main.command,
    "lb": roles.lb.main.command,
    "manager": roles.manager.main.command,
}
FLAGS = [
    (role, flag_of(parameter))
    for role, command in COMMANDS.items()
    for parameter in command.params
    if parameter.name != "config"
]


def _run(*arguments: str | Path, environment: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], env=environment)


def _parameter(role: str, flag: str) -> click.Parameter:
    return next(parameter for parameter in COMMANDS[role].params if flag_of(parameter) == flag)


def _sample(parameter: click.Parameter) -> tuple[str, object]:
    """Return a TOML value that is right for a flag, and what it means there."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return "true", True
    if isinstance(parameter.type, type(click.INT)):
        return "3", 3
    if isinstance(parameter.type, type(click.FLOAT)):
        return "0.5", 0.5
    if isinstance(parameter.type, DurationRange):
        return f'"{parameter.type.most_s:.0f}s"', parameter.type.most_s
    if parameter.type.name == "DUR":
        return '"3s"', 3.0
    if parameter.type.name == "HOST:PORT":
        return '"127.0.0.1:77"', "127.0.0.1:77"
    return '"warning"', "warning"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of every kind, made once."""
    path = tmp_path_factory.mktemp("pki")
    init_ca(path / "ca")
    init_ca(path / "edge-ca", kind=CaKind.EDGE)
    for role in ("agent", "lb", "manager"):
        issue(path / "ca", role, role, path / role)
    for name in ("edge", "other"):
        issue_edge(path / "edge-ca", ["localhost"], path / f"{name}.pem", path / f"{name}-key.pem")
    generate_keys(path / "realm.json", "test")
    return path


@pytest.fixture
def busy_port() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        yield listener.getsockname()[1]


@pytest.mark.parametrize(("role", "flag"), FLAGS)
def test_every_flag_is_a_setting_and_a_variable(
    role: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file and the environment know every flag by its own name, whatever the program calls the value."""
    parameter = _parameter(role, flag)
    toml, value = _sample(parameter)
    expected = tmp_path / str(value) if isinstance(parameter.type, click.Path) else value
    for spelling in {flag, flag.replace("-", "_")}:
        (tmp_path / "role.toml").write_text(f"{spelling} = {toml}\n")
        parsed = parse_role(role, ["--config", str(tmp_path / "role.toml")])
        assert {setting.flag: setting.origin for setting in parsed.settings}[flag] == "file"
        assert not [problem for problem in parsed.problems if "unknown" in problem]
        found = getattr(parsed.common, parameter.name or "", None)
        found = parsed.values.get(parameter.name or "") if found is None else found
        assert found == expected or str(found) == str(expected)
    monkeypatch.setenv(variable_of(parameter), toml.strip('"'))
    assert variable_of(parameter) == f"JUICEBOX_HSM_{flag.replace('-', '_').upper()}"
    parsed = parse_role(role, ["--config", str(tmp_path / "role.toml")])
    assert {setting.flag: setting.origin for setting in parsed.settings}[flag] == "environment"


def test_flag_before_environment_before_file(tmp_path: Path) -> None:
    """The nearest source wins."""
    file = tmp_path / "agent.toml"
    file.write_text('name = "of-file"\nmerkle-cache-size = 5\nlog-level = "error"\n')
    environment = {"JUICEBOX_HSM_NAME": "of-environment", "JUICEBOX_HSM_LOG_LEVEL": "debug"}
    result = _run(
        "config", "show", "--role", "agent", "--json", "--config", file, "--name", "of-flag", environment=environment
    )
    settings = json.loads(result.stdout)["settings"]
    assert settings["name"] == {"value": "of-flag", "origin": "flag"}
    assert settings["log-level"] == {"value": "debug", "origin": "environment"}
    assert settings["merkle-cache-size"] == {"value": 5, "origin": "file"}
    assert settings["default-rate-limit"] == {"value": 10, "origin": "default"}
    assert settings["http-listen"] == {"value": "127.0.0.1:9082", "origin": "default"}
    assert result.exit_code == 78  # store and HSM directory are missing
    assert "--hsm-dir is required" in "".join(json.loads(result.stdout)["problems"])


def test_a_file_with_several_mistakes(tmp_path: Path) -> None:
    """All mistakes of a file are told at once, and its good settings still count."""
    file = tmp_path / "lb.toml"
    file.write_text('workers = "two"\nshop = 1\nenable-rttest = "yes"\nname = 5\nstore = "sqlite:x"\n')
    values, problems = read_settings(file, COMMANDS["lb"].params)
    assert values == {"store_url": "sqlite:x"}
    assert [problem.split()[2] for problem in problems] == ["workers", "unknown", "enable-rttest", "name"]


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    """A file names what lies beside it; absolute paths stay."""
    file = tmp_path / "lb.toml"
    file.write_text('tls-key = "edge.key"\ntls-cert = "/etc/edge.pem"\n')
    values, _ = read_settings(file, COMMANDS["lb"].params)
    assert values == {"tls_key": str(tmp_path / "edge.key"), "tls_cert": "/etc/edge.pem"}


def _check(*arguments: str | Path) -> tuple[int, str]:
    result = _run("config", "check", *arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout


def test_check_accepts_a_good_configuration(pki: Path, tmp_path: Path) -> None:
    """Nothing to complain about: exit 0, and the store file is not created."""
    init_hsm_dir(pki / "realm.json", tmp_path / "hsm")
    store = f"sqlite:{tmp_path / 'realm.db'}"
    common = ("--store", store, "--listen", "127.0.0.1:0", "--allow-loopback")
    assert _check("--role", "agent", *common, "--cluster-tls", pki / "agent", "--hsm-dir", tmp_path / "hsm")[0] == 0
    assert _check("--role", "manager", *common, "--cluster-tls", pki / "manager")[0] == 0
    secrets = tmp_path / "secrets.json"
    assert _run("secrets", "init-record-id", "--file", secrets).exit_code == 0
    assert _run("secrets", "add-tenant", "acme", "--file", secrets).exit_code == 0
    edge = ("--tls-key", pki / "edge-key.pem", "--tls-cert", pki / "edge.pem", "--secrets-file", secrets)
    assert _check("--role", "lb", *common, "--cluster-tls", pki / "lb", *edge) == (0, "lb: no mistakes found\n")
    assert not (tmp_path / "realm.db").exists()


@pytest.mark.parametrize(("days", "said"), [(-30, "ended on "), (30, "is not valid before ")])
def test_a_certificate_that_no_client_accepts_is_a_mistake(pki: Path, tmp_path: Path, days: int, said: str) -> None:
    """An edge certificate that has ended and one that is not valid yet are both named, with the moment."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    issue_edge(pki / "edge-ca", ["localhost"], cert, key, 10, now=dt.datetime.now(dt.UTC) + dt.timedelta(days=days))
    _, output = _check("--role", "lb", "--tls-key", key, "--tls-cert", cert, "--store", f"sqlite:{tmp_path}/x.db")
    (line,) = [line for line in output.splitlines() if said in line]
    assert line.startswith(f"--tls-cert {cert} ")


def test_check_of_a_balancer_finds_every_mistake(pki: Path, tmp_path: Path, busy_port: int) -> None:
    """One run tells about flags, certificates, key pair, secrets, ports, store and address together."""
    secrets = tmp_path / "secrets.json"
    secrets.write_text("{}")
    secrets.chmod(0o644)
    code, output = _check(
        "--role", "lb", "--listen", f"127.0.0.1:{busy_port}", "--advertise", "0.0.0.0:443",
        "--store", f"sqlite:{tmp_path}/no/realm.db", "--cluster-tls", pki / "agent", "--workers", "0",
        "--idle-timeout", "5", "--tls-key", pki / "edge-key.pem", "--tls-cert", pki / "other.pem",
        "--secrets-file", secrets, "--log-level", "loud", "--no-such-flag", "7",
        "--shutdown-timeout", "20s",
    )  # fmt: skip
    assert code == 78
    lines = output.splitlines()
    for said in (
        "--no-such-flag: no such flag", "--workers", "--idle-timeout", "is for role agent, not lb",
        f"--listen 127.0.0.1:{busy_port}: Address already in use", "--advertise 0.0.0.0:443: others cannot reach",
        f"the directory {tmp_path}/no does not exist", "does not match the first certificate",
        "readable by others (mode 0644)",
        "no enabled version", "'loud' is unknown",
        "--shutdown-notice-period 30s is above --shutdown-timeout 20s",
    ):  # fmt: skip
        assert sum(said in line for line in lines) == 1, said
    assert len(lines) == 12


def test_check_of_an_agent_finds_every_mistake(pki: Path, tmp_path: Path) -> None:
    """Damaged HSM directories, missing certificate files and a store of another program are all named."""
    hsm = tmp_path / "hsm"
    init_hsm_dir(pki / "realm.json", hsm)
    (hsm / "nvram").write_bytes(b"x" * 100)
    (hsm / "wrapping.key").chmod(0o644)
    (tmp_path / "realm.db").write_text("this is a text file and no database\n" * 50)
    code, output = _check(
        "--role", "agent", "--hsm-dir", hsm, "--store", f"sqlite:{tmp_path}/realm.db", "--listen", "127.0.0.1:0",
        "--cluster-tls", tmp_path,
    )  # fmt: skip
    assert code == 78
    for said in ("ca.pem", "cert.pem", "key.pem", "NVRAM file is corrupt", "chmod 600", "not an SQLite database"):
        assert said in output
    assert len(output.splitlines()) == 6


def test_check_tells_that_an_hsm_runs(pki: Path, tmp_path: Path) -> None:
    """An HSM directory belongs to one process; a second agent on it would not start."""
    hsm = tmp_path / "hsm"
    init_hsm_dir(pki / "realm.json", hsm)
    flags = ("--role", "agent", "--hsm-dir", hsm, "--store", f"sqlite:{tmp_path}/realm.db", "--listen", "127.0.0.1:0")
    with open_hsm_dir(hsm):
        code, output = _check(*flags, "--insecure-rpc")
    assert code == 78
    assert output.splitlines() == [f"--hsm-dir {hsm}: another process runs this HSM"]
    assert _check(*flags, "--insecure-rpc")[0] == 0


@pytest.mark.parametrize("before", [True, False])
def test_a_flag_without_its_value_hides_nothing(before: bool, tmp_path: Path) -> None:
    """A missing value is one mistake: the file is read all the same, whichever comes first."""
    (tmp_path / "manager.toml").write_text(f'store = "sqlite:{tmp_path}/s.db"\ninsecure-rpc = true\n')
    file = ("--config", tmp_path / "manager.toml")
    words = ("--listen", *file) if before else (*file, "--listen")
    code, output = _check("--role", "manager", *words)
    assert code == 78
    assert output == "Option '--listen' requires an argument.\n"
    assert _check("--role", "manager", *file, "--store", "--name")[1].splitlines() == [
        "Option '--name' requires an argument.",
        "Option '--store' requires an argument.",
    ]
    assert _check("--role", "manager", "--insecure-rpc", "--listen", "127.0.0.1:0", "--store")[1].count("--store") == 1
    assert "'--allow-loopback' does not take a value" in _check("--role", "manager", *file, "--allow-loopback=x")[1]


@pytest.mark.parametrize("given", [("--cluster-tls", "FILE"), ("--cluster-tls",)])
def test_a_wrong_flag_is_not_also_missing(given: tuple[str, ...], tmp_path: Path) -> None:
    """One mistake is one line: a cluster identity that cannot be used is not also asked for."""
    (tmp_path / "FILE").touch()
    words = [tmp_path / word if word == "FILE" else word for word in given]
    code, output = _check("--role", "manager", *words, "--listen", "127.0.0.1:0", "--store", f"sqlite:{tmp_path}/r.db")
    assert code == 78
    lines = [line for line in output.splitlines() if "--cluster-tls" in line]
    assert len(lines) == 1, lines
    assert "is required" not in lines[0]


def test_check_knows_what_the_environment_gets_wrong(tmp_path: Path) -> None:
    """A misspelt variable is a warning with the right name; a port of the metrics' agent that is none is a mistake."""
    environment = {
        "JUICEBOX_HSM_LISTN": "127.0.0.1:1", "JUICEBOX_HSM_CLUSTER_TSL": "tls", "JUICEBOX_HSM_TLS_CERT": "edge.pem",
        "JUICEBOX_HSM_CHECK_COUNT": "3", "JUICEBOX_HSM_NONSENSE": "1", "DD_DOGSTATSD_PORT": "81250",
    }  # fmt: skip
    result = _run("config", "check", "--role", "manager", "--store", f"sqlite:{tmp_path}/s.db", "--insecure-rpc",
                  "--allow-loopback", "--listen", "127.0.0.1:0", environment=environment)  # fmt: skip
    assert result.exit_code == 78
    assert result.stdout == "DD_DOGSTATSD_PORT: '81250': the port must be a number from 1 to 65535\n"
    assert result.stderr.splitlines() == [
        "warning: JUICEBOX_HSM_CLUSTER_TSL: no flag has this name; JUICEBOX_HSM_CLUSTER_TLS is meant?",
        "warning: JUICEBOX_HSM_LISTN: no flag has this name; JUICEBOX_HSM_LISTEN is meant?",
        "warning: JUICEBOX_HSM_NONSENSE: no flag has this name",
    ]


def test_cluster_takes_the_environment_between_flags_and_file(tmp_path: Path) -> None:
    """Operator commands know JUICEBOX_HSM_STORE: it counts before a file and after a flag of the group."""
    (tmp_path / "cluster.toml").write_text(f'store = "sqlite:{tmp_path}/file/s.db"\n')
    environment = {"JUICEBOX_HSM_STORE": f"sqlite:{tmp_path}/variable/s.db"}
    file = ("--config", tmp_path / "cluster.toml")
    assert "variable" in _run("cluster", "leases", *file, environment=environment).output
    assert (
        "/flag" in _run("cluster", "--store", f"sqlite:{tmp_path}/flag/s.db", "leases", environment=environment).output
    )
    named = {"JUICEBOX_HSM_CONFIG": str(tmp_path / "cluster.toml")}
    assert "file" in _run("cluster", "leases", environment=named).output
