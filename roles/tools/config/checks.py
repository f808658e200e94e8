"""Everything `config check` looks at beyond the flags themselves: files, keys, certificates, ports, store.

Each check stands alone: a mistake found by one never keeps another from looking. Nothing is changed, except that an
existing store file is opened as the role would.
"""

from __future__ import annotations

import datetime as dt
import difflib
import fcntl
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import trio
from cryptography import x509

from juicebox_hsm.adapters.edge.tls import load_edge_context
from juicebox_hsm.adapters.hsm_directory.hsm_host import KEYS_FILE, NVRAM_FILE, WRAPPING_KEY_FILE, directory_problem
from juicebox_hsm.adapters.hsm_directory.key_bundle import read_bundle
from juicebox_hsm.adapters.hsm_directory.nvram import read_nvram
from juicebox_hsm.adapters.observation.dogstatsd import agent_address
from juicebox_hsm.adapters.observation.logging import parse_level
from juicebox_hsm.adapters.observation.tracing import endpoint_of
from juicebox_hsm.adapters.process.regular_file import others_read
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.adapters.tls.cluster_tls import CA_FILE, CERT_FILE, KEY_FILE, ROLE_URI_PREFIX, ClusterTls
from juicebox_hsm.consensus.nvram import decode_state
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.addresses import Address
from juicebox_hsm.host.certificates import DAYS_WARN, is_valid
from roles.cloud_options import pubsub_problem, secrets_problem
from roles.commands import ROLES, TOOLS
from roles.options import (
    ENVIRONMENT_PREFIX,
    WORKER_VARIABLE,
    identity_problems,
    shutdown_problem,
    variable_of,
    workers_problem,
)
from roles.tools.config.parse import Parsed, path_of
from roles.tools.secrets_file import findings
from roles.tools.session import first_leaf
from roles.words import not_valid

OPEN_S: Final = 10.0
NEAR: Final = 0.85  # own: one or two letters of a variable's name
_OTHERS: Final = 0o007
# read by operator commands; by the copies of a balancer; by tests
_OTHER_VARIABLES: Final = frozenset({WORKER_VARIABLE, f"{ENVIRONMENT_PREFIX}_FAULTS_DIR"})
_TOOL_PREFIXES: Final = tuple(f"{ENVIRONMENT_PREFIX}_{name.replace('-', '_').upper()}_" for name in TOOLS)


def all_problems(parsed: Parsed) -> list[str]:
    """Return every mistake beyond the flags' own form, one line each."""
    problems = _common_problems(parsed)
    if parsed.role == "agent":
        directory = path_of(parsed, "hsm_dir")
        problems += [] if directory is None else hsm_problems(directory)
    if parsed.role == "lb":
        problems += _balancer_problems(parsed)
    if parsed.role == "agent" and (problem := pubsub_problem(parsed.values, parsed.common.store_url or "")):
        problems.append(problem)
    return [" ".join(problem.split()) for problem in problems]


def warnings(parsed: Parsed) -> list[str]:
    """Return what works and still deserves a look."""
    common = parsed.common
    lines = []
    if common.advertise.is_loopback and common.advertise.port and not common.allow_loopback:
        lines.append(f"--advertise {common.advertise}: only this machine can reach it")
    lines += unknown_variables(os.environ)
    now = dt.datetime.now(dt.UTC)
    files = [] if common.cluster_tls is None else [common.cluster_tls / CERT_FILE]
    edge = path_of(parsed, "tls_cert")
    for path in files if edge is None else [*files, edge]:
        leaf = _leaf(path)
        if leaf is not None and now <= leaf.not_valid_after_utc <= now + dt.timedelta(days=DAYS_WARN):
            lines.append(f"{path}: ends on {leaf.not_valid_after_utc:%Y-%m-%d}")
    return lines


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return which of our variables no program reads, with the name that is probably meant."""
    commands = [entry.load() for entry in ROLES.values()]
    known = {variable_of(parameter) for command in commands for parameter in command.params} | _OTHER_VARIABLES
    lines = []
    for name in sorted(environment):
        if not name.startswith(f"{ENVIRONMENT_PREFIX}_") or name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=NEAR)
        if near:
            lines.append(f"{name}: no flag has this name; {near[0]} is meant?")
        elif not name.startswith(_TOOL_PREFIXES):
            lines.append(f"{name}: no flag has this name")
    return lines


def metrics_problems(environment: Mapping[str, str]) -> list[str]:
    """Return what is wrong with the address that metrics are sent to."""
    try:
        agent_address(environment)
    except RealmError as error:
        return [str(error)]
    return []


def _common_problems(parsed: Parsed) -> list[str]:
    role, common = parsed.role, parsed.common
    problems = identity_problems(common, misread=parsed.misread) + metrics_problems(os.environ)
    if common.cluster_tls is not None:
        problems += cluster_certificate_problems(common.cluster_tls, role)
    if common.listen.port and common.listen == common.http_listen:
        problems.append(f"--http-listen {common.http_listen}: is the address of --listen")
    else:
        problems += _port_problems("--listen", common.listen) + _port_problems("--http-listen", common.http_listen)
    try:
        if common.log_level is not None or os.environ.get("LOGLEVEL"):
            parse_level(common.log_level or os.environ["LOGLEVEL"])
    except RealmError as error:
        problems.append(str(error))
    try:
        endpoint_of(os.environ)
    except RealmError as error:
        problems.append(str(error))
    return problems + (store_problems(common.store_url) if common.store_url else [])


def cluster_certificate_problems(directory: Path, role: str) -> list[str]:
    """Return what is wrong with a cluster identity: each missing file, a pair that does not match, another role."""
    problems = [
        problem
        for name in (CA_FILE, CERT_FILE, KEY_FILE)
        if (problem := _unreadable(directory / name, "--cluster-tls"))
    ]
    if not problems:
        try:
            ClusterTls.load(directory)
        except RealmError as error:
            problems.append(str(error))
        if others_read(directory / KEY_FILE):
            problems.append(f"{directory / KEY_FILE}: readable by others; run chmod 600")
    leaf = _leaf(directory / CERT_FILE)
    if leaf is not None:
        found = _roles_of(leaf)
        if len(found) == 1 and found != [role]:
            problems.append(f"{directory / CERT_FILE}: is for role {found[0]}, not {role}")
    return problems


def _unreadable(path: Path, flag: str) -> str:
    """Return why a file cannot be read, "" if it can."""
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        return f"{flag}: {path}: {error.strerror}"
    return ""


def _leaf(path: Path) -> x509.Certificate | None:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())[0]
    except (OSError, ValueError):
        return None


def _roles_of(leaf: x509.Certificate) -> list[str]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return [uri.removeprefix(ROLE_URI_PREFIX) for uri in uris if uri.startswith(ROLE_URI_PREFIX)]


def _port_problems(flag: str, address: Address, *, count: int = 1) -> list[str]:
    """Try to listen on `count` ports from the address's on; port 0 is always free."""
    problems = []
    for port in range(address.port, address.port + count) if address.port else ():
        place = Address(address.host, port)
        try:
            info = socket.getaddrinfo(address.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            with socket.socket(info[0], socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(info[4])
                probe.listen(1)
        except (OSError, OverflowError) as error:
            problems.append(f"{flag} {place}: {getattr(error, 'strerror', None) or error}")
    return problems


def store_problems(url: str) -> list[str]:
    """Return why the store cannot be opened. A store file that does not exist yet is not created."""
    scheme, _, rest = url.partition(":")
    path = Path(rest)
    if scheme == "sqlite" and rest and not path.exists():
        if not path.parent.is_dir():
            return [f"--store {url}: the directory {path.parent} does not exist"]
        if not os.access(path.parent, os.W_OK | os.X_OK):
            return [f"--store {url}: this user cannot create files in {path.parent}"]
        return []

    async def try_open() -> None:
        with trio.fail_after(OPEN_S):
            async with open_store(url, must_exist=True):
                pass

    try:
        trio.run(try_open)
    except trio.TooSlowError:
        return [f"--store {url}: does not open within {OPEN_S:.0f} s"]
    except (RealmError, BaseExceptionGroup) as error:
        problem = first_leaf(error)
        if not isinstance(problem, RealmError):
            raise
        return [f"--store {url}: {problem}"]
    return []


def hsm_problems(directory: Path) -> list[str]:
    """Return what is wrong with an HSM directory: missing, unreadable, damaged or in use."""
    flag = f"--hsm-dir {directory}"
    if problem := directory_problem(directory):
        return [f"{flag}: {problem}"]
    problems = []
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        problems.append(f"{flag}: this user cannot write there")
    try:
        read_bundle(directory / KEYS_FILE, directory / WRAPPING_KEY_FILE)
    except RealmError as error:
        problems.append(f"{flag}: {error}")
    try:
        decode_state(read_nvram(directory / NVRAM_FILE)[1])
    except RealmError as error:
        problems.append(f"{flag}: {error}")
    if _is_locked(directory):
        problems.append(f"{flag}: another process runs this HSM")
    return problems


def _is_locked(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False  # said already
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def _balancer_problems(parsed: Parsed) -> list[str]:
    problems = []
    key, cert = path_of(parsed, "tls_key"), path_of(parsed, "tls_cert")
    missing = [
        problem
        for flag, path in (("--tls-key", key), ("--tls-cert", cert))
        if path is not None and (problem := _unreadable(path, flag))
    ]
    problems += missing
    if key is not None and cert is not None and not missing:
        problems += _edge_problems(key, cert)
    secrets = path_of(parsed, "secrets_file")
    project, url = (parsed.values.get(f"secrets_manager_{name}") for name in ("project", "url"))
    raw = bool(parsed.values.get("raw_secrets"))
    if source := secrets_problem(secrets, project, url, parsed.common.store_url or "", raw=raw):
        problems.append(source)
    if secrets is not None:
        problems += _secrets_problems(secrets, parsed.values.get("record_id_key_version"))
    notice_s, timeout_s = (parsed.values.get(f"shutdown_{name}") for name in ("notice_period", "timeout"))
    if notice_s is not None and timeout_s is not None and (problem := shutdown_problem(notice_s, timeout_s)):
        problems.append(problem)
    workers: Any = parsed.values.get("workers")
    common = parsed.common
    if isinstance(workers, int) and workers > 1:
        if problem := workers_problem(workers, common.listen, common.http_listen):
            problems.append(problem)
        else:
            following = Address(common.http_listen.host, common.http_listen.port + 1)
            problems += _port_problems(f"--workers {workers}: --http-listen", following, count=workers - 1)
    return problems


def _edge_problems(key: Path, cert: Path) -> list[str]:
    try:
        _, leaf = load_edge_context(key, cert)
    except RealmError as error:
        return [str(error)]
    if others_read(key):
        return [f"--tls-key {key}: readable by others; run chmod 640"]
    now_ms = round(dt.datetime.now(dt.UTC).timestamp() * 1000)
    return [] if is_valid(*leaf.valid_ms, now_ms) else [not_valid(f"--tls-cert {cert}", *leaf.valid_ms, now_ms)]


def _secrets_problems(path: Path, record_id_version: int | None) -> list[str]:
    try:
        content, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        return [f"--secrets-file {path}: {error.strerror}"]
    return [
        f"--secrets-file {path}: {finding}"
        for finding in findings(content, mode, forbidden=_OTHERS, record_id_version=record_id_version)
    ]
