"""What a demo cluster consists of and what it is told: directories, certificates, secrets, ports, command lines.

Everything here is ordinary files and flags, the same an operator would write (decision record 0011): the demo adds
nothing that a real cluster does not have.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from juicebox_hsm.adapters.hsm_directory.hsm_host import generate_keys, init_hsm_dir
from juicebox_hsm.adapters.tls.certificates import CaKind, init_ca, issue, issue_edge
from juicebox_hsm.consensus.types import GROUP_MEMBERS_MAX, GROUPS_PER_HSM_MAX
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.errors import LocalError
from juicebox_hsm.tenant_keys import (
    RECORD_ID_KEY_NAME,
    SecretAlgorithm,
    TenantSecret,
    encode_payload,
    parse_file,
    tenant_secret_name,
)
from juicebox_hsm.wire.rpc import PeerRole

HOST: Final = "127.0.0.1"
TENANT: Final = "test-acme"
KEY_VERSION: Final = 1
KEY_BYTES: Final = 32
PORTS: Final = range(20000, 32000)  # below the range from which outgoing connections are numbered
PORT_ATTEMPTS_MAX: Final = 1000
RATE_LIMIT_DEFAULT: Final = 100_000
TENANT_LOG: Final = "tenant-log"
_SCHEMES: Final = {"agent": "tls", "manager": "tls", "lb": "https", TENANT_LOG: "http"}
EDGE_HOSTS: Final = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What to start. `port_base` None picks free ports; `rate_limit` is operations per second of tenant test-acme.

    `bus` is "embedded", "pubsub", or "" for what goes with the store. `extra_flags` are by role or by name.
    """

    state_dir: Path
    realms: int = 1
    agents: int = 1
    groups: int = 1
    load_balancers: int = 1
    managers: int = 1
    port_base: int | None = None
    pin_hashing: str = "Standard2019"
    rate_limit: int = RATE_LIMIT_DEFAULT
    store: str = "sqlite"
    bus: str = ""
    restart: bool = False
    tenant_log: bool = True
    extra_flags: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be built. Raises `LocalError` naming the flag."""
        if not 1 <= self.agents <= GROUP_MEMBERS_MAX:
            raise LocalError(f"--agents {self.agents}: a realm of the demo has 1 to {GROUP_MEMBERS_MAX}")
        if not 1 <= self.groups <= GROUPS_PER_HSM_MAX - 1:
            raise LocalError(f"--groups {self.groups}: a realm of the demo has 1 to {GROUPS_PER_HSM_MAX - 1}")
        for flag, count in (
            ("realms", self.realms),
            ("load-balancers", self.load_balancers),
            ("managers", self.managers),
        ):
            if not 1 <= count <= 16:
                raise LocalError(f"--{flag} {count}: the demo starts 1 to 16")


@dataclass(frozen=True, slots=True)
class Service:
    """One process to run. `realm` numbers the realms from 0; None for services that belong to all of them."""

    role: str
    name: str
    realm: int | None
    port: int
    http_port: int
    argv: tuple[str, ...]

    @property
    def address(self) -> str:
        """Return HOST:PORT of its RPC (the edge, for a balancer)."""
        return f"{HOST}:{self.port}"

    @property
    def http(self) -> str:
        """Return HOST:PORT of its probes."""
        return f"{HOST}:{self.http_port}"

    @property
    def url(self) -> str:
        """Return the address as discovery shows it; the tenant log's, which is in none, as its readers call it."""
        return f"{_SCHEMES[self.role]}://{self.address}"

    @property
    def is_started_late(self) -> bool:
        """Tell whether the realm serves without it, so that it starts once clients can be served."""
        return self.role == TENANT_LOG


@dataclass(frozen=True, slots=True)
class StateDir:
    """Where everything of a demo lies. `bigtable` is the store's URL if that is not the file here.

    `bus` are the flags of agents and tenant log that name the bus, none for the store's own.
    """

    path: Path
    bigtable: str = ""
    bus: tuple[str, ...] = ()

    @property
    def store_url(self) -> str:
        """Return the store."""
        return self.bigtable or f"sqlite:{self.path / 'store.db'}"

    @property
    def secrets_file(self) -> Path:
        """Return the secrets file of the balancers."""
        return self.path / "secrets.json"

    @property
    def operator(self) -> Path:
        """Return the operator's certificate."""
        return self.path / "tls" / "operator"

    @property
    def client_json(self) -> Path:
        """Return what clients are told."""
        return self.path / "client.json"

    @property
    def cluster_toml(self) -> Path:
        """Return what `cluster --config` reads."""
        return self.path / "cluster.toml"

    @property
    def processes_json(self) -> Path:
        """Return the list of running processes."""
        return self.path / "processes.json"

    def audit_token(self, realm: bytes) -> Path:
        """Return the file with a token that opens the tenant log of a realm."""
        return self.path / f"audit-{realm.hex()}.jwt"

    @property
    def edge_ca(self) -> Path:
        """Return the certificate that clients trust."""
        return self.path / "ca.pem"

    def tls(self, name: str) -> Path:
        """Return a service's cluster certificate."""
        return self.path / "tls" / name

    def log(self, name: str) -> Path:
        """Return a service's log."""
        return self.path / "logs" / f"{name}.log"

    def hsm(self, name: str) -> Path:
        """Return an agent's HSM directory."""
        return self.path / "hsm" / name

    def keys(self, realm: int) -> Path:
        """Return a realm's key bundle."""
        return self.path / "keys" / f"realm{realm + 1}.json"


def write_file(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace a file in one step, so that readers never see half of it."""
    staged = path.with_name(f".{path.name}.new")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    staged.replace(path)


def services(options: DemoOptions, state: StateDir) -> list[Service]:
    """Return the processes to run, on the ports of the last run where those are free."""
    names: list[tuple[str, str, int | None]] = []
    for realm in range(options.realms):
        names += [("agent", f"agent{realm * options.agents + index + 1}", realm) for index in range(options.agents)]
    names += [("manager", f"manager{index + 1}", None) for index in range(options.managers)]
    names += [("lb", f"lb{index + 1}", None) for index in range(options.load_balancers)]
    if options.tenant_log:
        names.append((TENANT_LOG, f"{TENANT_LOG}1", None))
    ports = _choose_ports(options, state, [name for _, name, _ in names])
    found = []
    for role, name, belongs_to in names:
        port, http_port = ports[name]
        argv = _argv(options, state, role, name, port, http_port)
        found.append(Service(role, name, belongs_to, port, http_port, argv))
    return found


def _argv(options: DemoOptions, state: StateDir, role: str, name: str, port: int, http_port: int) -> tuple[str, ...]:
    if role == TENANT_LOG:
        return (
            sys.executable, "-m", "roles", "tenant-log", "serve",
            "--name", name,
            "--host", HOST,
            "--port", str(port),
            "--http-listen", f"{HOST}:{http_port}",
            "--store", state.store_url,
            "--secrets-file", str(state.secrets_file),
            *state.bus,
            *options.extra_flags.get(role, ()),
        )  # fmt: skip
    common = [
        sys.executable, "-m", "roles", "--role", role,
        "--name", name,
        "--listen", f"{HOST}:{port}",
        "--http-listen", f"{HOST}:{http_port}",
        "--store", state.store_url,
        "--cluster-tls", str(state.tls(name)),
        "--allow-loopback",
    ]  # fmt: skip
    special: dict[str, list[str]] = {
        "agent": ["--hsm-dir", str(state.hsm(name)), *state.bus],
        "manager": [],
        "lb": [
            "--tls-cert", str(state.path / "edge" / "cert.pem"),
            "--tls-key", str(state.path / "edge" / "key.pem"),
            "--secrets-file", str(state.secrets_file),
            "--shutdown-notice-period", "0s",
            "--shutdown-timeout", "5s",
        ],
    }  # fmt: skip
    return (*common, *special[role], *options.extra_flags.get(role, ()), *options.extra_flags.get(name, ()))


def _choose_ports(options: DemoOptions, state: StateDir, names: list[str]) -> dict[str, tuple[int, int]]:
    """Return name -> (service port, probe port)."""
    if options.port_base is not None:
        base = options.port_base
        if not 1024 <= base <= 65535 - 2 * len(names):
            raise LocalError(f"--port-base {base}: give 1024 to {65535 - 2 * len(names)}")
        ports = {name: (base + 2 * index, base + 2 * index + 1) for index, name in enumerate(names)}
        for name, pair in ports.items():
            for port in pair:
                if not _is_free(port):
                    raise LocalError(f"{name}: address {HOST}:{port} is in use; stop who has it or give --port-base")
        return ports
    remembered = _remembered_ports(state)
    taken: set[int] = set()
    ports = {}
    for name in names:
        pair = remembered.get(name, (0, 0))
        ports[name] = (_free_port(pair[0], taken), _free_port(pair[1], taken))
    return ports


def _remembered_ports(state: StateDir) -> dict[str, tuple[int, int]]:
    """Return the ports of the last run, so that clients of a restarted demo find it again."""
    try:
        entries = json.loads(state.processes_json.read_text(encoding="utf-8"))
        return {
            entry["name"]: (int(entry["address"].rpartition(":")[2]), int(entry["http"].rpartition(":")[2]))
            for entry in entries
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_free(port: int) -> bool:
    """Tell whether a service could listen on `port` now.

    A demo that went on over somebody else's socket would talk to a stranger, and say what is wrong with him.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _free_port(wanted: int, taken: set[int]) -> int:
    """Return `wanted` if it is free, else some free port; never one twice."""
    chooser = random.SystemRandom()
    for attempt in range(PORT_ATTEMPTS_MAX):
        port = wanted if attempt == 0 and wanted else chooser.choice(PORTS)
        if port in taken:
            continue
        if not _is_free(port):
            continue
        taken.add(port)
        return port
    raise LocalError("no free port found; give --port-base")


def prepare(state: StateDir, found: list[Service]) -> None:
    """Make what is missing in the state directory and issue fresh certificates."""
    for name in ("ca", "tls", "edge", "logs", "hsm", "keys"):
        (state.path / name).mkdir(parents=True, exist_ok=True, mode=0o700)
    cluster_ca, edge_ca = state.path / "ca" / "cluster", state.path / "ca" / "edge"
    for directory, kind in ((cluster_ca, CaKind.CLUSTER), (edge_ca, CaKind.EDGE)):
        if not (directory / "ca.pem").exists():
            init_ca(directory, kind=kind)
    issue_edge(edge_ca, EDGE_HOSTS, state.path / "edge" / "cert.pem", state.path / "edge" / "key.pem")
    shutil.copyfile(edge_ca / "ca.pem", state.edge_ca)
    issue(cluster_ca, PeerRole.OPERATOR, "demo", state.operator)
    for service in found:
        if service.role == TENANT_LOG:
            continue  # it speaks to the store and to tenants, never to the cluster
        issue(cluster_ca, PeerRole(service.role), service.name, state.tls(service.name))
        if service.role == "agent" and service.realm is not None:
            keys = state.keys(service.realm)
            if not keys.exists():
                generate_keys(keys, f"demo{service.realm + 1}")
            if not state.hsm(service.name).exists():
                init_hsm_dir(keys, state.hsm(service.name))
    if not state.secrets_file.exists():
        document = {
            RECORD_ID_KEY_NAME: {"1": _new_secret(SecretAlgorithm.BLAKE2S_MAC256)},
            tenant_secret_name(TENANT): {str(KEY_VERSION): _new_secret(SecretAlgorithm.HMAC_SHA256)},
        }
        write_file(state.secrets_file, json.dumps(document, indent=2) + "\n", 0o600)
    write_file(
        state.cluster_toml,
        f"store = {json.dumps(state.store_url)}\ncluster_tls = {json.dumps(str(state.operator))}\n",
    )


def _new_secret(algorithm: SecretAlgorithm) -> Any:
    return json.loads(encode_payload(TenantSecret(Secret(os.urandom(KEY_BYTES)), algorithm)))


def signing_key(state: StateDir) -> TenantSecret:
    """Return the key that signs tokens of tenant test-acme. Raises `LocalError` naming the file."""
    try:
        return parse_file(state.secrets_file.read_bytes())[tenant_secret_name(TENANT)][KEY_VERSION]
    except KeyError:
        raise LocalError(f"{state.secrets_file}: no version {KEY_VERSION} of {tenant_secret_name(TENANT)}") from None
