"""What operators get wrong: one line that names it, the documented exit code, and never a traceback."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from juicebox_hsm.adapters.hsm_directory.hsm_host import generate_keys, init_hsm_dir, open_hsm_dir
from juicebox_hsm.adapters.tls.certificates import CaKind, init_ca, issue, issue_edge
from roles.cli import cli, main
from tests.patience import PROGRAM_S

REALM = "00" * 16
CONFIGURATION = {
    "realms": [{"id": REALM, "address": "https://127.0.0.1:1/", "public_key": "09" + "00" * 31}],
    "register_threshold": 1, "recover_threshold": 1, "pin_hashing_mode": "FastInsecure",
}  # fmt: skip
AGENT = "--role agent --store sqlite:my.db --cluster-tls tls/agent --hsm-dir hsm --listen 127.0.0.1:0 --allow-loopback"
LB = (
    "--role lb --store sqlite:my.db --cluster-tls tls/lb --secrets-file s.json --tls-key edge.key --tls-cert edge.pem "
    "--listen 127.0.0.1:0 --allow-loopback"
)
MANAGER = "--role manager --store sqlite:my.db --cluster-tls tls/manager --listen 127.0.0.1:0 --allow-loopback"
LOG = "tenant-log serve --store sqlite:st.db --secrets-file s.json --port 0"
CLUSTER = "--store sqlite:st.db --cluster-tls tls/operator"


@pytest.mark.parametrize("module", ["agent.main", "lb.balancer", "manager.main", "tenant_log.main"])
@pytest.mark.parametrize("form", ["bare", "group"])
def test_bugs_are_one_line_of_json(
    place: Path, module: str, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A service that meets an error nobody foresaw says so in one line and ends with 70, in a nursery or not."""

    def fail(*_: object, **__: object) -> None:
        raise KeyError("odd") if form == "bare" else ExceptionGroup("g", [KeyError("odd")])

    commands = {"agent.main": AGENT, "lb.balancer": LB, "manager.main": MANAGER}
    tenant_log = "tenant-log serve --store sqlite:st.db --secrets-file s.json --port 0"
    monkeypatch.chdir(place)
    monkeypatch.setattr(f"roles.{module}.open_store", fail)
    with pytest.raises(SystemExit) as ended:
        main(commands.get(module, tenant_log).split())
    assert ended.value.code == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["reason"] == "KeyError: 'odd'"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everything right, and some files that are wrong."""
    path = tmp_path_factory.mktemp("mistakes")
    init_ca(path / "ca")
    init_ca(path / "edge-ca", kind=CaKind.EDGE)
    for role in ("agent", "lb", "manager", "operator"):
        issue(path / "ca", role, role, path / "tls" / role)
    for name in ("edge", "other"):
        issue_edge(path / "edge-ca", ["localhost"], path / f"{name}.pem", path / f"{name}.key")
    generate_keys(path / "k", "test")
    init_hsm_dir(path / "k", path / "hsm")
    for command in (
        "secrets init-record-id --file s.json",
        "secrets add-tenant test-acme --file s.json",
        "store init --store sqlite:st.db",
    ):
        with chdir(path), pytest.raises(SystemExit) as ended:
            main(command.split())
        assert ended.value.code == 0
    (path / "bad.toml").write_text("x = [")
    (path / "unknown.toml").write_text('stroe = "x"')
    (path / "two.toml").write_text('stroe = "x"\nname = 5\n')
    (path / "bad.json").write_text("{")
    shutil.copytree(path / "tls" / "operator", path / "damaged")
    (path / "damaged" / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    (path / "text.db").write_text("this is no database\n" * 100)
    (path / "client.json").write_text(json.dumps(CONFIGURATION))
    (path / "directory").mkdir()
    (path / "token").write_text("garbage")
    (path / "empty").touch()
    init_hsm_dir(path / "k", path / "locked")
    issue(path / "ca", "agent", "agent", path / "tls" / "mixed")
    (path / "tls" / "mixed" / "key.pem").write_bytes((path / "tls" / "agent" / "key.pem").read_bytes())
    return path


@pytest.fixture(autouse=True)
def _inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("JUICEBOX_CLIENT_JSON", raising=False)


TOOLS = [
    # command, exit code, what is said
    ("nosuch", 2, "No such command 'nosuch'; see `juicebox-hsm --help`"),
    ("clustr", 2, "No such command 'clustr'; did you mean 'cluster'"),
    ("cluster agnets", 2, "No such command 'agnets'; did you mean 'agents'?; see `juicebox-hsm cluster --help`"),
    ("cluster tenant set-capcity", 2, "did you mean 'set-capacity'?"),
    ("cluster agents --stor x", 2, "No such option '--stor'; did you mean '--store'"),
    ("--rol agent", 2, "No such option '--rol'; did you mean '--role'?"),
    ("--role", 2, "'--role' requires an argument"),
    ("--role nobody", 2, "choose one of agent, lb, manager"),
    ("--help --role nobody", 2, "choose one of agent, lb, manager"),
    ("cluster agents", 2, "--cluster-tls DIR is required"),
    ("cluster agents --cluster-tls tls/operator", 2, "--store URL is required"),
    ("cluster agents --store nonsense --cluster-tls tls/operator", 1, "expected sqlite:PATH"),
    ("cluster agents --store sqlite:/nowhere/s.db --cluster-tls tls/operator", 1, "/nowhere does not exist"),
    ("cluster agents --store sqlite:mistyped.db --cluster-tls tls/operator", 3, "mistyped.db: there is no such file"),
    ("cluster request-counts --store sqlite:mistyped.db --cluster-tls tls/operator", 3, "`juicebox-hsm store init`"),
    ("cluster agents --cluster-tls tls/operator --bigtable-url grpc://h", 2, "--bigtable-url grpc://h: expected http"),
    ("cluster agents --store sqlite:st.db --cluster-tls nodir", 4, "nodir/ca.pem: No such file"),
    ("cluster agents --store sqlite:st.db --cluster-tls tls/agent", 4, "tls/agent/cert.pem: is for role agent"),
    ("cluster agents --config nofile", 2, "--config nofile: No such file"),
    ("cluster agents --config directory", 2, "directory"),
    ("cluster agents --config bad.toml", 2, "--config bad.toml: not TOML"),
    ("cluster agents --config unknown.toml", 2, "unknown setting 'stroe'"),
    (f"cluster new-realm {CLUSTER} tls://127.0.0.1:1", 4, "Connection refused"),
    (f"cluster new-realm {CLUSTER} http://agent", 4, "expected tls://HOST[:PORT]"),
    (f"cluster new-realm {CLUSTER} agent1", 3, "no agent is called 'agent1'; none answers"),
    (f"cluster drain {CLUSTER} agent1", 3, "no agent is called 'agent1', and it is no HSM id"),
    (f"cluster audit {CLUSTER} --since yesterday", 2, "'yesterday' is neither a duration"),
    (f"cluster audit {CLUSTER} --ca nodir", 3, "--ca nodir: no such directory"),
    ("cluster agents --store sqlite:st.db --cluster-tls damaged", 4, "damaged/ca.pem: not a PEM certificate"),
    (f"cluster transfer {CLUSTER} --realm zz --source aa --destination bb --start 00 --end 7fff", 2, "'zz'"),
    (f"cluster transfer {CLUSTER} --realm aa --source aa --destination bb --start 12 --end 7fff", 2, "'12' is short"),
    (f"cluster rebalance {CLUSTER}", 4, "no cluster manager in discovery"),
    (f"cluster rebalance {CLUSTER} -c tls://127.0.0.1:1", 4, "Connection refused"),
    (f"cluster stepdown {CLUSTER} abcd", 3, "no item with that ID"),
    (f"cluster tenant set-capacity {CLUSTER} bad! 5", 2, "'bad!' is not a tenant name"),
    (f"cluster tenant set-capacity {CLUSTER} acme x", 2, "'x'"),
    (f"cluster configuration {CLUSTER} https://x/", 3, "no realm found"),
    (f"cluster configuration {CLUSTER} not-a-url", 2, "'not-a-url': "),
    (f"cluster auth-token {CLUSTER} -t acme -u u -r aa --secrets-file s.json", 2, "tenants test-... only"),
    (f"cluster auth-token {CLUSTER} -t test-x -u u -r {REALM} --secrets-file s.json", 3, "no key tenant-test-x"),
    ("cluster ca init --dir ca", 1, "never overwritten"),
    ("cluster ca issue --dir nodir --role lb --name x --out o", 1, "cluster ca init"),
    (f"cluster user-summary {CLUSTER} --start 2026-01-01", 2, "both --start and --end"),
    (f"cluster request-counts {CLUSTER} --when this-month --end 2026-01-01", 2, "--when excludes"),
    (f"cluster request-counts {CLUSTER} --realm {REALM}", 3, "not in this store"),
    (f"cluster plan {CLUSTER} --groups 3", 1, "no HSM found"),
    (f"cluster drain {CLUSTER} tls://127.0.0.1:1", 4, "tls://127.0.0.1:1"),
    (f"cluster discovery remove {CLUSTER} foo", 3, "not registered"),
    (f"tokens create -u u -t bad! -r {REALM} -k 00 -a HS256", 2, "bad!"),
    (f"tokens create -u u -t acme -r {REALM} -k zz -a HS256", 2, "-k: not an even number"),
    (f"tokens create -u u -t acme -r {REALM} -a HS256 --key-file nofile", 1, "--key-file nofile: No such file"),
    (f"tokens create -u u -t acme -r {REALM}", 2, "give exactly one of"),
    ("secrets lint nofile", 1, "nofile: No such file"),
    ("secrets add-tenant Bad! --file s.json", 2, "Bad!"),
    ("secrets add-tenant test-acme --file s.json", 1, "secrets rotate test-acme"),
    ("secrets rotate nobody --file s.json", 3, "secrets add-tenant nobody"),
    ("secrets add-tenant new --algorithm EdDSA --file s.json", 2, "give --private-key FILE, or --print-private-key"),
    ("secrets add-tenant new --private-key p --file s.json", 2, "HS256 has one key"),
    ("secrets import new --file s.json", 2, "--public-key"),
    ("secrets import new --public-key nofile --file s.json", 1, "--public-key nofile: No such file"),
    ("secrets import new --public-key edge.key --file s.json", 1, "holds a private key"),
    ("secrets import new --public-key edge.pem --file s.json", 1, "holds a certificate"),
    ("secrets remove test-acme --file s.json", 2, "give either --version N or --all"),
    ("secrets remove test-acme --version 1 --file s.json", 1, "is the only one of tenant-test-acme"),
    ("secrets remove nobody --all --file s.json", 3, "the tenant has no key here"),
    ("secrets init-record-id --file /nowhere/s.json", 1, "--file /nowhere/s.json"),
    ("hsm keygen --out k", 1, "never overwritten"),
    ("hsm init --keys nofile --dir h9", 1, "nofile: No such file"),
    ("hsm init --keys k --dir hsm", 1, "exists already"),
    ("hsm info --dir nodir", 1, "hsm init"),
    ("hsm public-key", 2, "give one of --keys FILE and --dir DIR"),
    ("store check --store sqlite:nostore.db", 3, "no such file"),
    ("store backup --store sqlite:nostore.db x", 3, "no such file"),
    ("store restore --store sqlite:new.db nofile", 3, "no such file"),
    ("check --secrets-file s.json", 2, "give --configuration"),
    ("check --configuration @nofile --secrets-file s.json", 1, "@nofile: No such file"),
    ("check --configuration @bad.json --secrets-file s.json", 2, "not JSON"),
    ("check --configuration @client.json --secrets-file nofile --tenant test-acme", 1, "--secrets-file nofile"),
    ("check --configuration @client.json --secrets-file s.json --tenant acme", 2, "only tenants test-..."),
    ("check --configuration @client.json --secrets-file s.json --tls-certificate nofile", 1, "nofile: No such file"),
    ("check --configuration @client.json --secrets-file s.json --tls-certificate k", 2, "--tls-certificate k"),
    ("bench client --configuration @client.json", 2, "--secrets-file"),
    ("tenant-log serve --store sqlite:st.db", 2, "--secrets-file"),
    ("tenant-log tail --url foo --token x", 2, "--url 'foo'"),
    ("tenant-log tail --url https://x:99999/ --token x", 2, "the port must be a number from 1 to 65535"),
    ("tenant-log tail --url http://[::1 --token x", 2, "--url 'http://[::1' is not a URL"),
    ("tenant-log tail --url http://dd..agent/ --token x", 2, "'dd..agent' is neither an IP address nor a host name"),
    (f"cluster configuration http://[::1 {CLUSTER}", 2, "'http://[::1' is not a URL"),
    ("secrets add-tenant \udcff --file s.json", 2, "is not UTF-8 text"),
    ("tenant-log tail --url http://127.0.0.1:1 --token x", 4, "Connection refused"),
    ("tenant-log tail --url http://127.0.0.1:1", 2, "--token"),
    ("tenant-log tail --url http://127.0.0.1:1 --token-file nofile", 2, "--token-file nofile"),
    ("demo --agents 0", 2, "--agents 0"),
    ("demo --state-dir text.db", 2, "'text.db' is a file"),
    # a place that cannot be: like a directory this user may not enter
    ("cluster ca init --dir text.db/ca", 1, "text.db/ca"),
    ("cluster ca issue --dir ca --role lb --name x --out text.db/tls", 1, "text.db"),
    ("demo --state-dir text.db/demo", 1, "text.db/demo"),
    ("chaos --duration 5 --state-dir text.db/chaos", 1, "text.db/chaos"),
    ("hsm keygen --out text.db/k", 1, "text.db/k"),
    ("hsm init --keys k --dir text.db/h", 1, "text.db"),
    ("hsm info --dir text.db/h", 1, "text.db/h"),
    ("store init --store sqlite:text.db/s.db", 1, "text.db"),
    ("store check --store sqlite:text.db/s.db", 3, "text.db/s.db"),
    ("secrets init-record-id --file text.db/s.json", 1, "text.db/s.json"),
    ("cluster agents --store sqlite:st.db --cluster-tls text.db/tls", 4, "text.db/tls"),
    ("chaos --only nothing --plan-only", 2, "'nothing'"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "code", "said"), TOOLS, ids=[command for command, _, _ in TOOLS])
def test_tools(command: str, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A tool says in one line of stderr what is wrong, and exits with the code of the table in the guide."""
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    errors = capsys.readouterr().err
    assert said in errors
    assert ended.value.code == code
    lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, errors
    assert lines[0].startswith("juicebox-hsm: ")


def test_a_directory_that_cannot_be_used_is_told_once() -> None:
    """A flag whose value is wrong is not also reported as missing."""
    ended = CliRunner().invoke(cli, ["config", "check", "--role", "manager", "--cluster-tls", "text.db"])
    assert sum("--cluster-tls" in line for line in ended.stdout.splitlines()) == 1, ended.stdout


@pytest.fixture(scope="module")
def _predecessor(place: Path) -> Iterator[None]:
    """Somebody who still has the HSM directory `locked`."""
    with open_hsm_dir(place / "locked"):
        yield


@pytest.fixture(scope="module")
def busy() -> Iterator[int]:
    """A port on which somebody listens."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


ROLES = [
    (AGENT.replace(" --store sqlite:my.db", ""), 2, "--store is required"),
    (f"{AGENT} --event-retention 6d", 2, "at least 7d and at most 31d"),
    (f"{AGENT} --event-retention 32d", 2, "at least 7d and at most 31d"),
    (f"{AGENT} --hsm-dir nodir", 69, "--hsm-dir nodir: no such directory"),
    (f"{AGENT} --hsm-dir locked", 69, "locked: this HSM is run"),
    (f"{AGENT} --store sqlite:nodir/my.db", 69, "the directory nodir does not exist"),
    (f"{AGENT} --cluster-tls nodir", 69, "nodir/ca.pem: No such file"),
    (f"{AGENT} --cluster-tls tls/mixed", 69, "tls/mixed/cert.pem: key.pem does not match"),
    (f"{AGENT} --listen 192.0.2.1:7 --http-listen 127.0.0.1:0", 69, "cannot listen on 192.0.2.1:7"),
    (f"{AGENT} --listen nobody.invalid:7 --http-listen 127.0.0.1:0", 69, "cannot listen on nobody.invalid:7"),
    (f"{AGENT} --store sqlite:directory", 78, "directory"),
    (f"{AGENT} --cluster-tls tls/lb", 78, "tls/lb/cert.pem: is for role lb, agent is needed"),
    (f"{AGENT} --config nofile", 69, "--config nofile: No such file"),
    (f"{LOG} --config nofile", 69, "--config nofile: No such file"),
    (f"{AGENT} --config two.toml", 78, "unknown setting 'stroe'"),
    (f"{AGENT} --listen 127.0.0.1:BUSY --http-listen 127.0.0.1:0", 69, "--listen: cannot listen on 127.0.0.1:BUSY"),
    (f"{MANAGER} --store sqlite:text.db", 78, "not an SQLite database"),
    (f"{MANAGER} --http-listen 127.0.0.1:BUSY", 69, "--http-listen: cannot listen on 127.0.0.1:BUSY"),
    (f"{MANAGER} --name \udcff", 78, "'\\udcff': an argument is not UTF-8 text"),
    (f"{MANAGER} --listen dd..agent:1", 2, "'dd..agent' is neither an IP address nor a host name"),
    (f"{MANAGER} --http-listen {'a' * 64}:1", 2, "is neither an IP address nor a host name"),
    (f"{LOG} --host dd..agent", 2, "'dd..agent' is neither an IP address nor a host name"),
    (f"DD_AGENT_HOST=dd..agent {MANAGER}", 78, "DD_AGENT_HOST: 'dd..agent' is neither"),
    (f"DD_DOGSTATSD_PORT=81250 {MANAGER}", 78, "DD_DOGSTATSD_PORT: '81250'"),
    (f"OTEL_EXPORTER_OTLP_ENDPOINT=http://[::1 {AGENT}", 78, "OTEL_EXPORTER_OTLP_ENDPOINT: 'http://[::1' is not"),
    (f"{MANAGER} --log-level loud", 78, "'loud' is unknown"),
    (f"{LB} --listen 127.0.0.1:BUSY --http-listen 127.0.0.1:0", 69, "--listen: cannot listen on 127.0.0.1:BUSY"),
    (f"{LB} --tls-key other.key", 69, "other.key does not match"),
    (f"{LB} --tls-key empty", 69, "empty is empty"),
    (f"{LB} --tls-key nofile", 69, "nofile: No such file"),
    (f"{LB} --secrets-file nofile", 69, "nofile: No such file"),
    (f"{LB} --listen nobody.invalid:7 --http-listen 127.0.0.1:0", 69, "cannot listen on nobody.invalid:7"),
    (f"{MANAGER} --http-listen nobody.invalid:7", 69, "--http-listen nobody.invalid:7"),
    (f"{LOG} --http-listen 127.0.0.1:BUSY", 69, "--http-listen: cannot listen on 127.0.0.1:BUSY"),
    (f"{LOG} --tls-key other.key --tls-cert edge.pem", 69, "other.key does not match"),
    (f"{LOG} --tls-key other.key", 78, "--tls-cert and --tls-key belong together"),
    (f"{LB} --tls-cert edge.key", 78, "TLS certificate file edge.key does not parse: it holds a private key"),
    (f"{LB} --tls-cert damaged/ca.pem", 78, "does not parse: it holds no whole certificate in PEM"),
    (f"{LOG} --tls-cert damaged/ca.pem --tls-key edge.key", 78, "does not parse: it holds no whole certificate"),
    (f"{LB} --secrets-file bad.json", 78, "bad.json"),
    (f"{LB} --idle-timeout 5", 2, "'5' is not a duration"),
    (f"{LB} --shutdown-timeout 20s", 78, "--shutdown-notice-period 30s is above --shutdown-timeout 20s"),
    (f"{LB} --advertise 0.0.0.0:1", 78, "--advertise 0.0.0.0:1"),
]


@pytest.mark.usefixtures("_predecessor")
@pytest.mark.parametrize(("command", "code", "said"), ROLES, ids=[f"{n}" for n in range(len(ROLES))])
def test_roles(command: str, code: int, said: str, busy: int) -> None:
    """A service that cannot start says in one line of stderr why; its code tells whether starting it again may help."""
    words = command.replace("BUSY", str(busy)).split()
    given = dict(word.split("=", 1) for word in itertools.takewhile(lambda word: "=" in word, words))
    ended = subprocess.run(
        [sys.executable, "-m", "roles", *words[len(given) :]],
        capture_output=True, text=True, timeout=PROGRAM_S, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), **given},
    )  # fmt: skip
    assert said.replace("BUSY", str(busy)) in ended.stderr
    assert ended.returncode == code
    assert len(ended.stderr.splitlines()) == 1, ended.stderr


def test_an_hsm_whose_memory_fails_at_start(place: Path) -> None:
    """NVRAM that cannot be written ends the agent with 75, at start as later, and the report names the same code."""
    (place / "hsm" / "nvram.new").mkdir()
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "roles", *AGENT.split()],
            capture_output=True, text=True, timeout=PROGRAM_S, check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        )  # fmt: skip
    finally:
        (place / "hsm" / "nvram.new").rmdir()
    report = json.loads(ended.stderr.splitlines()[-1])
    assert (ended.returncode, report["message"]) == (
        75,
        "process ends with code 75: NvramFailed: hsm/nvram: Is a directory",
    )
