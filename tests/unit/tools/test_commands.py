"""Commands as operators run them: exit codes, one-line errors, JSON; no cluster needed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from juicebox_hsm.client import Configuration
from juicebox_hsm.ids import RealmId
from juicebox_hsm.tenant_keys import parse_file
from roles.cli import cli
from roles.tools.bench import client as bench_client
from roles.tools.cluster import clients as cluster_clients
from roles.tools.demo import layout as demo_layout
from roles.tools.secrets_file import findings
from roles.tools.session import ToolFailure, first_leaf
from roles.tools.target import ENVIRONMENT, Target
from roles.tools.tokens import command as tokens

REALM = "0f" * 16


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def _store(tmp_path: Path) -> str:
    """Return the URL of an empty store, made at the first call."""
    url = f"sqlite:{tmp_path / 'store.db'}"
    assert _run("store", "init", "--store", url).exit_code == 0
    return url


def test_help_of_every_command() -> None:
    """Every command loads and describes itself."""
    listing = _run("cluster", "--help")
    assert listing.exit_code == 0
    for name in ("agents", "groups", "status", "new-realm", "transfer", "drain", "ca", "tenant", "auth-token", "plan"):
        assert name in listing.output
        assert _run("cluster", name, "--help").exit_code == 0
    for words in (
        ["tokens"],
        ["secrets"],
        ["demo"],
        ["bench", "client"],
        ["cluster", "tenant", "set-capacity"],
        ["cluster", "table-stats", "log"],
        ["cluster", "user-summary"],
        ["cluster", "request-counts"],
        ["cluster", "experimental", "assimilate"],
    ):
        assert _run(*words, "--help").exit_code == 0


def test_missing_store_is_usage() -> None:
    """Without a store the command says which flag is missing."""
    result = _run("cluster", "leases")
    assert result.exit_code == 2
    assert "--store" in result.output


def test_missing_certificate_is_usage(tmp_path: Path) -> None:
    """A command that talks to agents needs a certificate: exit 2 and how to get one."""
    result = _run("cluster", "agents", "--store", _store(tmp_path))
    assert result.exit_code == 2
    assert "cluster ca issue" in result.output
    result = _run("cluster", "agents", "--store", _store(tmp_path), "--cluster-tls", tmp_path / "none")
    assert result.exit_code == 4
    assert "none" in result.output


@pytest.mark.parametrize(
    ("text", "says"),
    [("store = ", "not TOML"), ("shop = 1", "unknown setting 'shop'"), ("store = 5", "store must be text")],
)
def test_bad_configuration_files(tmp_path: Path, text: str, says: str) -> None:
    """A configuration file that cannot be used is named, with what is wrong."""
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    result = _run("cluster", "leases", "--config", path)
    assert result.exit_code == 2
    assert str(path) in result.output
    assert says in result.output


def test_configuration_file_before_or_after_the_command(tmp_path: Path) -> None:
    """Connection flags are accepted in both places."""
    path = tmp_path / "cluster.toml"
    path.write_text(f'store = "{_store(tmp_path)}"\n')
    after = _run("cluster", "leases", "--json", "--config", path)
    before = _run("cluster", "--config", path, "leases", "--json")
    assert after.exit_code == before.exit_code == 0
    assert json.loads(after.output) == json.loads(before.output) == {"leases": []}


def test_empty_cluster(tmp_path: Path) -> None:
    """Without any service: empty lists, findings, and a manager that cannot be found."""
    flags = ("--store", _store(tmp_path), "--insecure-rpc")
    assert json.loads(_run("cluster", "agents", "--json", *flags).output) == {"agents": []}
    assert json.loads(_run("cluster", "groups", "--json", *flags).output) == {"realms": []}
    status = _run("cluster", "status", "--json", *flags)
    assert status.exit_code == 5
    assert json.loads(status.output)["ok"] is False
    rebalancing = _run("cluster", "rebalance", *flags)
    assert rebalancing.exit_code == 4
    assert "-c URL" in rebalancing.output
    assert _run("cluster", "stepdown", "abc", *flags).exit_code == 3
    assert _run("cluster", "configuration", "https://lb/", *flags).exit_code == 3
    assert _run("cluster", "discovery", "remove", "tls://x:1", *flags).exit_code == 3


def test_unreachable_agent(tmp_path: Path) -> None:
    """A realm cannot be made at an agent that does not answer: exit 4, naming it."""
    result = _run("cluster", "new-realm", "tcp://127.0.0.1:1", "--store", _store(tmp_path), "--insecure-rpc")
    assert result.exit_code == 4
    assert "tcp://127.0.0.1:1" in result.output


def test_tenant_limits(tmp_path: Path) -> None:
    """Limits are stored, listed, shown and removed."""
    flags = ("--store", _store(tmp_path), "--insecure-rpc")
    assert _run("cluster", "tenant", "set-capacity", "acme", "7", *flags).exit_code == 0
    listed = json.loads(_run("cluster", "tenant", "list", "--json", *flags).output)
    assert listed == {"tenants": [{"tenant": "acme", "capacity_ops_per_s": 7}]}
    assert "21 requests/s" in _run("cluster", "tenant", "get", "acme", *flags).output
    for change in (("set-capacity", "acme", "9"), ("unset", "acme")):
        tried = _run("cluster", "tenant", *change, "--dry-run", *flags)
        assert tried.output.startswith("Would ")
    assert "21 requests/s" in _run("cluster", "tenant", "get", "acme", *flags).output
    assert _run("cluster", "tenant", "unset", "acme", *flags).exit_code == 0
    assert _run("cluster", "tenant", "get", "acme", *flags).exit_code == 3
    assert _run("cluster", "tenant", "set-capacity", "a:b", "7", *flags).exit_code == 2


def test_pause_and_resume(tmp_path: Path) -> None:
    """The pause switch is a setting and excludes its opposite."""
    flags = ("--store", _store(tmp_path), "--insecure-rpc")
    assert _run("cluster", "rebalance", "--pause", *flags).exit_code == 0
    assert _run("cluster", "rebalance", "--resume", *flags).exit_code == 0
    assert _run("cluster", "rebalance", "--pause", "--resume", *flags).exit_code == 2


def test_bad_ranges_are_usage(tmp_path: Path) -> None:
    """A record id that cannot be read, and ends in the wrong order, never reach a manager."""
    flags = ("--store", _store(tmp_path), "--insecure-rpc", "--realm", REALM, "--source", "1", "--destination", "2")
    assert _run("cluster", "transfer", *flags, "--start", "12", "--end", "ff").exit_code == 2
    assert _run("cluster", "transfer", *flags, "--start", "ff", "--end", "00").exit_code == 2


def test_certificates(tmp_path: Path) -> None:
    """A CA is made once; certificates come from it."""
    ca, out = tmp_path / "ca", tmp_path / "operator"
    assert _run("cluster", "ca", "init", "--dir", ca).exit_code == 0
    again = _run("cluster", "ca", "init", "--dir", ca)
    assert again.exit_code != 0
    issued = _run("cluster", "ca", "issue", "--dir", ca, "--role", "operator", "--name", "me", "--out", out)
    assert issued.exit_code == 0
    assert {path.name for path in out.iterdir()} == {"ca.pem", "cert.pem", "key.pem"}
    result = _run("cluster", "agents", "--json", "--store", _store(tmp_path), "--cluster-tls", out)
    assert json.loads(result.output) == {"agents": []}


def test_client_configuration_rules() -> None:
    """Thresholds default to all realms, and impossible ones are refused."""
    realms = [{"id": f"{index:032x}", "address": "https://lb/", "public_key": "00" * 32} for index in range(3)]
    assert cluster_clients.client_configuration(realms)["recover_threshold"] == 3
    chosen = cluster_clients.client_configuration(realms, register_threshold=3, recover_threshold=2)
    assert (chosen["register_threshold"], chosen["recover_threshold"]) == (3, 2)
    for register, recover in ((2, 3), (4, 2), (3, 1)):
        with pytest.raises(ToolFailure, match="thresholds"):
            cluster_clients.client_configuration(realms, register_threshold=register, recover_threshold=recover)
    with pytest.raises(ToolFailure, match="twice"):
        cluster_clients.client_configuration([realms[0], realms[0]])


def test_first_leaf_prefers_bugs() -> None:
    """Among concurrent failures a bug is reported before an expected failure."""
    bug, expected = ZeroDivisionError(), ToolFailure("expected")
    assert first_leaf(BaseExceptionGroup("", [BaseExceptionGroup("", [expected]), bug])) is bug
    assert first_leaf(ExceptionGroup("", [expected])) is expected


# --- tokens and secrets ------------------------------------------------------------------------------

TOKEN_FLAGS = ("-r", REALM, "-t", "test-acme", "-u", "mario", "-a", "HS256", "-v", "1")


def test_token_round_trip() -> None:
    """A minted token is valid for what it was minted for, and every difference is named."""
    key = "ab" * 32
    token = _run("tokens", "create", "-k", key, *TOKEN_FLAGS).output.strip()
    good = _run("tokens", "validate", "-j", token, "-k", key, *TOKEN_FLAGS)
    assert good.exit_code == 0
    assert good.output.strip() == "valid"
    wrong_key = _run("tokens", "validate", "-j", token, "-k", "cd" * 32, *TOKEN_FLAGS)
    assert wrong_key.exit_code == 1
    assert "wrong key" in wrong_key.output
    other = ("-r", "1f" * 16, "-t", "test-acme", "-u", "luigi", "-a", "HS256", "-v", "2")
    differing = _run("tokens", "validate", "-j", token, "-k", key, *other)
    assert differing.exit_code == 1
    assert "audience" in differing.output
    assert "WARNING: sub is 'mario', expected 'luigi'" in differing.output
    assert "WARNING: version of kid" in differing.output


def test_token_sources(tmp_path: Path) -> None:
    """Exactly one key source; files work as well as flags; what is wrong is named."""
    key_file = tmp_path / "key"
    key_file.write_text("ab" * 32 + "\n")
    assert _run("tokens", "create", "--key-file", key_file, *TOKEN_FLAGS).exit_code == 0
    assert _run("tokens", "create", *TOKEN_FLAGS).exit_code == 2
    assert _run("tokens", "create", "-k", "xx", *TOKEN_FLAGS).exit_code == 2
    assert _run("tokens", "create", "--key-file", tmp_path / "none", *TOKEN_FLAGS).exit_code == 1
    assert _run("tokens", "create", "-k", "ab" * 32, *TOKEN_FLAGS, "--lifetime", "2d").exit_code == 1
    assert _run("tokens", "create", "-k", "ab" * 32, "-r", "12", *TOKEN_FLAGS[2:]).exit_code == 2
    assert "error" not in _run("tokens", "validate", "-j", "garbage", "-k", "ab" * 32, *TOKEN_FLAGS).output


@pytest.mark.parametrize("algorithm", ["HS256", "EdDSA"])
def test_drawn_keys_work(algorithm: str) -> None:
    """A drawn key signs, and its public half verifies."""
    document = json.loads(_run("tokens", "random", "-a", algorithm, "--json").output)
    flags = ("-r", REALM, "-t", "test-acme", "-u", "mario", "-a", algorithm)
    token = _run("tokens", "create", "-k", document["sign"]["data"], *flags).output.strip()
    verify = document.get("verify", document["sign"])["data"]
    assert _run("tokens", "validate", "-j", token, "-k", verify, *flags).exit_code == 0


def test_secrets_file_life(tmp_path: Path) -> None:
    """Initialise, add, rotate, lint: the file stays private, parses, and is never overwritten by accident."""
    path = tmp_path / "secrets.json"
    assert _run("secrets", "init-record-id", "--file", path).exit_code == 0
    assert _run("secrets", "init-record-id", "--file", path).exit_code == 1
    assert _run("secrets", "add-tenant", "acme", "--file", path).exit_code == 0
    assert _run("secrets", "add-tenant", "acme", "--file", path).exit_code == 1
    rotated = _run("secrets", "rotate", "acme", "--algorithm", "EdDSA", "--file", path, "--print-private-key")
    assert "private key for the tenant" in rotated.output
    assert _run("secrets", "rotate", "nobody", "--file", path).exit_code == 3
    assert sorted(parse_file(path.read_bytes())["tenant-acme"]) == [1, 2]
    assert path.stat().st_mode & 0o777 == 0o600
    assert _run("secrets", "lint", path).exit_code == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["secrets.json"]


def test_lint_findings(tmp_path: Path) -> None:
    """Each kind of mistake is one line; the exit code is 5."""
    path = tmp_path / "secrets.json"
    path.write_text(
        json.dumps(
            {
                "record-id-randomization": {"1": {"data": "00", "encoding": "Hex", "algorithm": "Blake2sMac256"}},
                "tenant-acme": {"1": {"data": "short", "encoding": "UTF8", "algorithm": "HmacSha256"}},
                "tenant-b": {"1": {"data": "00ff", "encoding": "Hex", "algorithm": "Edwards25519"}},
                "stray": {"1": {"data": "00", "encoding": "Hex", "algorithm": "HmacSha256"}},
            }
        )
    )
    path.chmod(0o644)
    result = _run("secrets", "lint", path)
    assert result.exit_code == 5
    for part in (
        "readable by others",
        "record-id-randomization version 1",
        "tenant-acme version 1",
        "tenant-b",
        "stray",
    ):
        assert part in result.output
    assert findings("{", 0o600) == ["secrets file: not JSON"]
    assert _run("secrets", "lint", tmp_path / "none").exit_code == 1


def test_auth_token_only_for_test_tenants(tmp_path: Path) -> None:
    """The operator mints for test tenants, with the latest version of their key."""
    path = tmp_path / "secrets.json"
    for _ in range(2):
        _run("secrets", "add-tenant" if not path.exists() else "rotate", "test-acme", "--file", path)
    flags = ("--store", _store(tmp_path), "--secrets-file", path, "-u", "mario", "-r", REALM)
    minted = _run("cluster", "auth-token", "-t", "test-acme", *flags)
    assert minted.exit_code == 0
    check = _run("tokens", "validate", "-j", minted.output.strip(), "--secrets-file", path, "-r", REALM,
                 "-t", "test-acme", "-u", "mario", "-v", "2")  # fmt: skip
    assert check.exit_code == 0
    assert _run("cluster", "auth-token", "-t", "acme", *flags).exit_code == 2
    assert tokens.ERROR_TEXTS.keys() == set(type(next(iter(tokens.ERROR_TEXTS))))


# --- bench and demo ----------------------------------------------------------------------------------


def test_summary_of_known_times() -> None:
    """Percentiles are nearest-rank; errors do not count as operations served."""
    load = bench_client.Load(100, 4, 0, "u", 0)
    times_ns = [ms * 1_000_000 for ms in range(100, 0, -1)]
    result = bench_client.summarize("recover", load, times_ns, 2, 2.0)
    assert (result.p50_ms, result.p90_ms, result.p95_ms, result.p99_ms) == (50.0, 90.0, 95.0, 99.0)
    assert (result.min_ms, result.max_ms, result.mean_ms) == (1.0, 100.0, 50.5)
    assert (result.per_second, result.errors, result.connections) == (50.0, 2, "new")
    assert bench_client.summarize("recover", load, [], 100, 0.0).p99_ms == 0.0


def test_minted_tokens_differ_by_user_and_can_be_spoiled() -> None:
    """Each user has a token of their own; bad ones differ only in the signature."""
    realm = RealmId(bytes.fromhex(REALM))
    configuration = Configuration.from_json({
        "realms": [{"id": REALM, "address": "https://127.0.0.1:1/", "public_key": "00" * 32}],
        "register_threshold": 1, "recover_threshold": 1, "pin_hashing_mode": "FastInsecure",
    })  # fmt: skip
    target = Target(configuration, None, lambda user, _: f"header.{user}.signature-{time.time() > 0}")
    load = bench_client.Load(2, 1, 1, "u", 5)
    good, bad = bench_client.mint(target, load), bench_client.mint(target, load, bad=True)
    assert [found[realm].split(".")[1] for found in good] == ["u5", "u6"]
    assert [found[realm].rpartition(".")[0] for found in bad] == [found[realm].rpartition(".")[0] for found in good]
    assert good != bad


@pytest.mark.parametrize(
    "arguments",
    [("--plan", "recover,fly"), ("--plan", ","), ("--connections", "many"), ("--count", "0"), ()],
)
def test_bench_usage(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong plans and missing configuration are usage errors."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert _run("bench", "client", *arguments).exit_code == 2


def test_bench_names_a_bad_client_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client.json that cannot be used is named."""
    path = tmp_path / "client.json"
    monkeypatch.setenv(ENVIRONMENT, str(path))
    assert str(path) in _run("bench", "client").output
    path.write_text("{}")
    result = _run("bench", "client")
    assert result.exit_code == 1
    assert str(path) in result.output


@pytest.mark.parametrize(
    "arguments",
    [("--agents", "0"), ("--agents", "10"), ("--groups", "0"), ("--realms", "17"), ("--port-base", "99")],
)
def test_demo_refuses_what_it_cannot_build(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Impossible sizes are refused before anything is started, naming the flag."""
    result = _run("demo", "--state-dir", tmp_path / "state", *arguments)
    assert result.exit_code != 0
    assert arguments[0] in result.output
    assert not (tmp_path / "state" / "logs").exists()


def test_demo_numbers_services_and_keeps_their_ports(tmp_path: Path) -> None:
    """Names and ports follow the options, and a second run takes the ports of the first."""
    options = demo_layout.DemoOptions(state_dir=tmp_path, realms=2, agents=2, load_balancers=2, port_base=20000)
    state = demo_layout.StateDir(tmp_path)
    found = demo_layout.services(options, state)
    names = ["agent1", "agent2", "agent3", "agent4", "manager1", "lb1", "lb2", "tenant-log1"]
    assert [service.name for service in found] == names
    assert [service.realm for service in found] == [0, 0, 1, 1, None, None, None, None]
    ports = [port for service in found for port in (service.port, service.http_port)]
    assert ports == list(range(20000, 20016))
    chosen = demo_layout.services(demo_layout.DemoOptions(state_dir=tmp_path), state)
    entries = [{"name": service.name, "address": service.address, "http": service.http} for service in chosen]
    state.processes_json.write_text(json.dumps(entries))
    again = demo_layout.services(demo_layout.DemoOptions(state_dir=tmp_path), state)
    assert [service.port for service in again] == [service.port for service in chosen]


def test_demo_state_is_made_once(tmp_path: Path) -> None:
    """Certificates are fresh at each start; CAs, realm keys and secrets stay."""
    state = demo_layout.StateDir(tmp_path)
    found = demo_layout.services(demo_layout.DemoOptions(state_dir=tmp_path, agents=2), state)
    demo_layout.prepare(state, found)
    kept = [state.secrets_file, state.keys(0), state.edge_ca, tmp_path / "ca" / "cluster" / "ca.pem"]
    before = [path.read_bytes() for path in kept]
    certificate = (state.operator / "cert.pem").read_bytes()
    demo_layout.prepare(state, found)
    assert [path.read_bytes() for path in kept] == before
    assert (state.operator / "cert.pem").read_bytes() != certificate
    assert state.secrets_file.stat().st_mode & 0o777 == 0o600
    assert findings(state.secrets_file.read_bytes(), 0o600) == []
