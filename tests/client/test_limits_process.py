"""Real processes: rate limits over several balancers and agents, keys that rotate while clients are served, and logs
without secrets (agent.md 12, load-balancer.md 6 and 10)."""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import pytest
import trio

from juicebox_hsm.client import (
    Client,
    Configuration,
    HttpTransport,
    InvalidAuth,
    InvalidPin,
    RateLimitExceeded,
)
from juicebox_hsm.client.transport import Observation
from juicebox_hsm.host.services import TenantLimits
from juicebox_hsm.ids import RealmId
from juicebox_hsm.tenant_keys import TenantSecret, parse_file, tenant_secret_name
from juicebox_hsm.tokens import Scope, create
from juicebox_hsm.wire.client import (
    ClientOutcome,
    ClientRequest,
    HandshakeRequest,
    RequestKind,
    encode_client_request,
    encode_client_response,
)
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import KEY_VERSION, TENANT, DemoOptions, signing_key
from tests.patience import HANGS_S, PROGRAM_S

pytestmark = pytest.mark.processes

PIN, INFO = b"1234", b"limits"
REACHES_ALL_S = 5.0  # agent.md 12: limits are read every 5 s
REREAD_S = 5.0  # load-balancer.md 7.3: the secrets file is read every 5 s
SLACK_S = HANGS_S  # of a busy machine
USERS = 12


async def eventually(holds: Callable[[], bool | Awaitable[bool]], within_s: float, what: str) -> float:
    """Wait until `holds`; returns how long that took, in seconds."""
    began = trio.current_time()
    while True:
        answer = holds()
        if answer is True or (not isinstance(answer, bool) and await answer):
            return trio.current_time() - began
        assert trio.current_time() - began < within_s, f"not within {within_s} s: {what}"
        await trio.sleep(0.05)


async def run_tool(*arguments: str) -> str:
    """Run a command of ours as an operator types it."""
    command = [sys.executable, "-m", "roles", *arguments]
    done = await trio.to_thread.run_sync(
        partial(subprocess.run, command, capture_output=True, text=True, timeout=PROGRAM_S)
    )
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout


@dataclass
class Seen:
    """What a user who recovers for ever has seen."""

    last: str = "nothing"
    successes: list[float] = field(default_factory=list)
    refusals: list[Observation] = field(default_factory=list)

    def observe(self, answer: Observation) -> None:
        if answer.status == 429:
            self.refusals.append(answer)


async def loop_user(cluster: Cluster, seen: Seen, number: int, task_status: trio.TaskStatus[None]) -> None:
    """Recover for ever through one of the balancers; only a reached limit is a reason to be refused."""
    balancers = cluster.of_role("lb")
    document = json.loads(json.dumps(cluster.configuration))
    for realm in document["realms"]:
        realm["address"] = balancers[number % len(balancers)].service.url
    tokens = {realm: cluster.token(realm, f"limits{number}") for realm in cluster.realms}
    async with HttpTransport(ca_file=cluster.state.edge_ca, observe=seen.observe) as transport:
        client = Client(Configuration.from_json(document), tokens, transport=transport)
        await client.register(PIN, b"secret", INFO, 2)
        task_status.started()
        while True:
            try:
                assert await client.recover(PIN, INFO) == b"secret"
            except RateLimitExceeded:
                seen.last = "refused"
                await trio.sleep(0.05)
            else:
                seen.last = "success"
                seen.successes.append(trio.current_time())


async def test_a_limit_holds_over_all_agents_and_balancers(tmp_path: Path) -> None:
    """A tenant's limit reaches every agent within 5 s, counts over all of them together, and ends as it came."""
    options = DemoOptions(
        state_dir=tmp_path, agents=3, groups=3, load_balancers=2, pin_hashing="FastInsecure", tenant_log=False
    )
    async with launch(options) as cluster, trio.open_nursery() as nursery:
        users = [Seen() for _ in range(USERS)]
        for number, seen in enumerate(users):
            await nursery.start(loop_user, cluster, seen, number)
        set_capacity = partial(
            run_tool, "cluster", "tenant", "set-capacity", "--config", str(cluster.state.cluster_toml)
        )

        def all_saw(last: str) -> bool:
            return all(seen.last == last for seen in users)

        await eventually(lambda: all_saw("success"), HANGS_S, "everybody is served without a limit")
        # As if the operator's command had reached nobody: the agents find it in the store by themselves.
        await cluster.session.store.tenants.put(TENANT, TenantLimits(0))
        await eventually(lambda: all_saw("refused"), REACHES_ALL_S + SLACK_S, "a blocked tenant is refused everywhere")
        served = sum(len(seen.successes) for seen in users)
        await trio.sleep(0.5)
        assert sum(len(seen.successes) for seen in users) == served, "blocked is blocked"

        assert (await set_capacity(TENANT, "40")).count("reloaded") == 3
        await trio.sleep(1.0)
        began = trio.current_time()
        await trio.sleep(10.0)
        rate = sum(sum(1 for at in seen.successes if at >= began) for seen in users) / (trio.current_time() - began)
        # three leaders that did not know of each other would let 120 through
        assert 0 < rate <= 44, f"{rate:.1f} operations/s at a limit of 40"

        await set_capacity(TENANT, "100000")
        await eventually(lambda: all_saw("success"), SLACK_S, "the command itself tells the agents")
        nursery.cancel_scope.cancel()
    refusals = [answer for seen in users for answer in seen.refusals]
    assert refusals
    assert {dict(answer.headers).get("retry-after") for answer in refusals} == {"1"}


# --- tokens, keys, logs ---


def traces_of(secret: bytes) -> set[bytes]:
    """Return what a log line that holds `secret` in any usual writing would contain."""
    encoded = base64.urlsafe_b64encode(secret).rstrip(b"=")
    return {secret, secret.hex().encode(), secret.hex().upper().encode(), encoded, encoded.translate(_STANDARD)}


_STANDARD = bytes.maketrans(b"-_", b"+/")


def auth_failures(cluster: Cluster) -> Counter[str]:
    """Return the balancer's count of refused tokens by reason."""
    with urlopen(f"http://{cluster.process('lb1').service.http}/metrics", timeout=HANGS_S) as page:
        lines = page.read().decode().splitlines()
    found: Counter[str] = Counter()
    for line in lines:
        if line.startswith("load_balancer_auth_failures_total{"):
            found[line.split('reason="')[1].split('"')[0]] += int(float(line.rsplit(" ", 1)[1]))
    return found


def refused_tokens(key: TenantSecret, realm: RealmId, user: str) -> dict[str, str]:
    """Return tokens by the reason for which each is refused."""
    now_s = int(time.time())
    mint = partial(create, key, tenant=TENANT, version=KEY_VERSION, user=user, realm=realm, now_s=now_s)
    good = mint()
    return {
        "signature": good[:-8] + "AAAAAAAA",
        "expired": mint(now_s=now_s - 3600),
        "not_yet": mint(now_s=now_s + 3600),
        "audience": mint(realm=RealmId(bytes(16))),
        "unknown_key": mint(version=99),
        "scope": mint(scope=Scope.AUDIT),
        "malformed": "a.b.c",
        "too_long": good + "A" * 1000,
    }


async def test_keys_rotate_and_nothing_secret_is_told(tmp_path: Path) -> None:
    """A key is added and removed while clients are served; refusals say why to operators only; logs hold no secret."""
    debug: dict[str, tuple[str, ...]] = dict.fromkeys(
        ("agent", "manager", "lb", "tenant-log"), ("--log-level", "debug")
    )
    options = DemoOptions(state_dir=tmp_path, pin_hashing="FastInsecure", extra_flags=debug)
    pin, wrong, secret = (f"{kind}{secrets.token_hex(12)}".encode() for kind in ("pin", "wrong", "secret"))
    user = f"user{secrets.token_hex(12)}"
    told: set[str] = set()
    async with launch(options) as cluster, HttpTransport(ca_file=cluster.state.edge_ca) as transport:
        realm = cluster.realms[0]
        configuration = Configuration.from_json(cluster.configuration)

        def client_of(version: int) -> Client:
            key = parse_file(cluster.state.secrets_file.read_bytes())[tenant_secret_name(TENANT)][version]
            now_s = int(time.time())
            token = create(key, tenant=TENANT, version=version, user=user, realm=realm, now_s=now_s)
            told.add(token)
            return Client(configuration, {realm: token}, transport=transport)

        async def is_served(client: Client) -> bool:
            try:
                return await client.recover(pin, INFO) == secret
            except InvalidAuth:
                return False

        async def is_refused(client: Client) -> bool:
            return not await is_served(client)

        first = client_of(KEY_VERSION)
        await first.register(pin, secret, INFO, 5)
        with pytest.raises(InvalidPin):
            await first.recover(wrong, INFO)
        answers = set()
        before = auth_failures(cluster)
        refused = refused_tokens(signing_key(cluster.state), realm, user)
        for token in refused.values():
            told.add(token)
            body = ClientRequest(realm, token, 1, RequestKind.HANDSHAKE_ONLY, HandshakeRequest(bytes(32), bytes(16)))
            address = cluster.process("lb1").service.url + "/req"
            version = (("x-juicebox-version", "0.3.7"),)
            answers.add(await transport.post(address, version, encode_client_request(body), HANGS_S))
        assert answers == {(401, encode_client_response(ClientOutcome.INVALID_AUTH))}
        assert auth_failures(cluster) - before == Counter(refused.keys())

        await run_tool("secrets", "rotate", TENANT, "--file", str(cluster.state.secrets_file))
        second = client_of(KEY_VERSION + 1)
        await eventually(lambda: is_served(second), REREAD_S + SLACK_S, "the new key is known")
        assert await is_served(first), "the old key stays good"
        document = json.loads(cluster.state.secrets_file.read_text())
        keys = [bytes.fromhex(version["data"]) for versions in document.values() for version in versions.values()]
        del document[tenant_secret_name(TENANT)][str(KEY_VERSION)]
        cluster.state.secrets_file.write_text(json.dumps(document))
        await eventually(lambda: is_refused(first), REREAD_S + SLACK_S, "the old key is gone")
        assert await is_served(second)
        logs = b"".join(path.read_bytes() for path in sorted((tmp_path / "logs").iterdir()))
    assert b"token refused" in logs, "the logs are those of a run at level debug"
    parts = {part.encode() for token in told for part in token.split(".")[1:] if len(part) > 8}
    for forbidden in {user.encode()} | parts | set().union(*map(traces_of, (pin, wrong, secret, *keys))):
        assert forbidden not in logs, forbidden
