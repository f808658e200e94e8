"""Bring a demo cluster up and wait until a recover would succeed: the harness of the demo, tests and benchmarks.

async with launch(DemoOptions(state_dir=path)) as cluster:
    ... cluster.client_json, cluster.process("agent1").kill(), cluster.restart("agent1") ...
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from juicebox_hsm.adapters.process.directory_lock import own_directory
from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.adapters.rpc import RpcPool
from juicebox_hsm.adapters.stores.opening import open_store
from juicebox_hsm.adapters.tls.cluster_tls import ClusterTls
from juicebox_hsm.client import HttpTransport, TransportError
from juicebox_hsm.crypto.noise import Initiator, NoiseError
from juicebox_hsm.errors import DecodingError
from juicebox_hsm.host.cluster.planning import Owner, even_partition, plan
from juicebox_hsm.host.cluster.view import ClusterView
from juicebox_hsm.host.services import TenantLimits
from juicebox_hsm.ids import GroupId, RealmId, uncovered
from juicebox_hsm.tokens import Scope, create
from juicebox_hsm.wire.client import (
    ClientRequest,
    HandshakeRequest,
    HandshakeResponse,
    RequestKind,
    decode_client_response,
    encode_client_request,
)
from juicebox_hsm.wire.methods import REBALANCE
from juicebox_hsm.wire.rpc import Empty, Refused
from roles.survey.overview import ask_agents
from roles.tools.cluster.change import transfer_range
from roles.tools.cluster.clients import client_configuration
from roles.tools.cluster.create import join_realm, new_group, new_realm
from roles.tools.demo.emulator import demo_store
from roles.tools.demo.layout import (
    KEY_VERSION,
    TENANT,
    DemoOptions,
    Service,
    StateDir,
    prepare,
    services,
    signing_key,
    write_file,
)
from roles.tools.demo.processes import OrphanGuard, RunningService, describe_exit, stop_all, watch
from roles.tools.demo.pubsub import demo_bus
from roles.tools.session import COMMAND_TIMEOUT_S, Session, ToolFailure, call_manager, first_leaf
from roles.tools.target import TOKEN_LIFETIME_S

READY_S: Final = 60.0
POLL_S: Final = 0.03
STATUS_S: Final = 2.0
HANDSHAKE_S: Final = 3.0
DEMO_USER: Final = "demo"
MOVES_MAX: Final = 64
_HEADERS: Final = (("x-juicebox-version", "0.3.7"),)


class Cluster:
    """A running cluster. `configuration` is the clients' JSON configuration."""

    def __init__(
        self,
        options: DemoOptions,
        state: StateDir,
        session: Session,
        found: Sequence[Service],
        guard: OrphanGuard,
    ) -> None:
        self.options = options
        self.state = state
        self.session = session
        self.processes = [RunningService(service, state.log(service.name), guard) for service in found]
        self.configuration: dict[str, Any] = {}
        self.realms: list[RealmId] = []
        self._public_keys: dict[RealmId, bytes] = {}

    def process(self, name: str) -> RunningService:
        """Return a service by name: agent1, lb1, manager1, ..."""
        return next(running for running in self.processes if running.service.name == name)

    def of_role(self, role: str) -> list[RunningService]:
        """Return the services of a role."""
        return [running for running in self.processes if running.service.role == role]

    async def restart(self, name: str) -> None:
        """Start a service again after it was killed, and wait until it listens."""
        running = self.process(name)
        running.start()
        self.write_processes()
        await running.wait_listening()

    async def view(self) -> ClusterView:
        """Ask all agents that run."""
        urls = [running.service.url for running in self.of_role("agent") if running.is_running]
        return await ask_agents(self.session.rpc, urls, STATUS_S)

    def write_processes(self) -> None:
        """Write processes.json, which names every process for tests that kill."""
        entries = [
            {
                "role": running.service.role,
                "name": running.service.name,
                "realm": running.realm,
                "hsm": running.hsm,
                "pid": running.pid,
                "address": running.service.address,
                "http": running.service.http,
            }
            for running in self.processes
            if running.pid
        ]
        write_file(self.state.processes_json, json.dumps(entries, indent=2) + "\n")

    async def wait_leaders(self) -> ClusterView:
        """Wait until every group of every realm has a leader that commits; return that view."""
        while True:
            view = await self.view()
            groups = list(view.groups.values())
            settled = [
                group for group in groups
                if group.leader is not None
                and group.leader.info.leader is not None
                and group.leader.info.leader.committed is not None
            ]  # fmt: skip
            if groups and len(settled) == len(groups) and len(view.hsms) == len(self.of_role("agent")):
                return view
            await trio.sleep(POLL_S)

    async def wait_ready(self) -> None:
        """Wait until a recover would succeed: all ranges led, and a handshake answered through every balancer."""
        while True:
            view = await self.wait_leaders()
            owned = {realm: [group.owned_range for group in view.groups_of(realm)] for realm in self.realms}
            if not any(uncovered([part for part in parts if part is not None]) for parts in owned.values()):
                break
            await trio.sleep(POLL_S)
        async with HttpTransport(ca_file=self.state.edge_ca) as transport, trio.open_nursery() as nursery:
            for balancer in self.of_role("lb"):
                for realm in self.realms:
                    nursery.start_soon(self._wait_routed, transport, balancer.service.url, realm)

    async def _wait_routed(self, transport: HttpTransport, url: str, realm: RealmId) -> None:
        token = self.token(realm, DEMO_USER)
        while True:
            if await self._handshake(transport, f"{url}/req", realm, token):
                return
            await trio.sleep(POLL_S)

    async def _handshake(self, transport: HttpTransport, url: str, realm: RealmId, token: str) -> bool:
        """Open a session with the leader through a balancer: changes nothing and is in nobody's counters."""
        initiator = Initiator(self._public_keys[realm], os.urandom(32))
        request = ClientRequest(
            realm,
            token,
            int.from_bytes(os.urandom(4), "little"),
            RequestKind.HANDSHAKE_ONLY,
            HandshakeRequest(*initiator.write(b"")),
        )
        try:
            _, body = await transport.post(url, _HEADERS, encode_client_request(request), HANDSHAKE_S)
            response = decode_client_response(body)
            if not isinstance(response, HandshakeResponse):
                return False
            initiator.read(response.server_ephemeral_public, response.payload_ciphertext)
        except (TransportError, DecodingError, NoiseError):
            return False
        return True

    def token(self, realm: RealmId, user: str, scope: Scope = Scope.USER) -> str:
        """Mint a token of the demo's tenant, valid for 24 h."""
        return create(
            signing_key(self.state),
            tenant=TENANT,
            version=KEY_VERSION,
            user=user,
            realm=realm,
            now_s=int(time.time()),
            lifetime_s=TOKEN_LIFETIME_S,
            scope=scope,
        )

    async def build(self) -> None:
        """Create what is missing of realms, groups and their ranges; then write client.json and processes.json."""
        async with trio.open_nursery() as nursery:
            for number in range(self.options.realms):
                nursery.start_soon(self._build_realm, number)
        view = await self.wait_leaders()
        for running in self.of_role("agent"):
            hsm = view.by_url(running.service.url)
            if hsm is not None and hsm.realm is not None:
                running.hsm, running.realm = hsm.id.hex(), hsm.realm.hex()
                self._public_keys[hsm.realm] = hsm.public_key
        self.realms = view.realms
        self._write_client_json()
        for realm in self.realms:
            write_file(self.state.audit_token(realm), self.token(realm, DEMO_USER, Scope.AUDIT) + "\n", 0o600)
        self.write_processes()

    async def _build_realm(self, number: int) -> None:
        urls = [running.service.url for running in self.of_role("agent") if running.service.realm == number]
        view = await ask_agents(self.session.rpc, urls, STATUS_S)
        realm = next(iter(view.realms), None)
        if realm is None:
            realm, _ = await new_realm(self.session, urls[0])
            view = await ask_agents(self.session.rpc, urls, STATUS_S)
        outside = [url for url in urls if (hsm := view.by_url(url)) is not None and hsm.realm is None]
        if outside:
            await join_realm(self.session, realm, outside, view)
        everyone = sorted(hsm.id for hsm in view.hsms.values())
        serving = [group.id for group in view.groups_of(realm) if list(group.configuration) == everyone]
        while len(serving) < self.options.groups:
            serving.append(await new_group(self.session, realm, _turned(urls, len(serving))))
        await self._spread_ranges(realm, urls, sorted(serving)[: self.options.groups])

    async def _spread_ranges(self, realm: RealmId, urls: list[str], serving: list[GroupId]) -> None:
        """Give each serving group its even part of the key space, through a manager."""
        for group, target in zip(serving, even_partition(len(serving)), strict=True):
            view = await self._led(realm, urls)
            owners = [
                Owner(found.id, owned) for found in view.groups_of(realm) if (owned := found.owned_range) is not None
            ]
            for step in plan(group, owners, target):
                await self.of_role("manager")[0].wait_listening()
                manager = self.of_role("manager")[0].service.url
                await transfer_range(self.session, manager, realm, step.source, step.destination, step.range)

    async def _led(self, realm: RealmId, urls: list[str]) -> ClusterView:
        """Wait until all groups of a realm have a leader."""
        while True:
            view = await ask_agents(self.session.rpc, urls, STATUS_S)
            groups = view.groups_of(realm)
            if groups and all(group.leader is not None for group in groups):
                return view
            await trio.sleep(POLL_S)

    async def balance(self) -> None:
        """Spread leaderships evenly where there are several groups; an uneven cluster works too."""
        manager = self.of_role("manager")[0].service.url
        for _ in range(MOVES_MAX):
            reply = await call_manager(self.session, manager, REBALANCE, Empty(), timeout_s=COMMAND_TIMEOUT_S)
            if isinstance(reply, Refused) or not reply.group:
                return

    def _write_client_json(self) -> None:
        balancers = self.of_role("lb")
        realms = [
            {
                "id": realm.hex(),
                "address": f"{balancers[index % len(balancers)].service.url}/",
                "public_key": self._public_keys[realm].hex(),
            }
            for index, realm in enumerate(self.realms)
        ]
        self.configuration = client_configuration(realms, pin_hashing_mode=self.options.pin_hashing)
        key = signing_key(self.state)
        document = {
            "configuration": self.configuration,
            "tokens": {realm.hex(): self.token(realm, DEMO_USER) for realm in self.realms},
            "signer": {"tenant": TENANT, "version": KEY_VERSION, "key_hex": key.data.expose().hex()},
            "ca": str(self.state.edge_ca),
        }
        write_file(self.state.client_json, json.dumps(document, indent=2) + "\n", 0o600)


def _turned(urls: list[str], turn: int) -> list[str]:
    """Return the agents starting with another one each time: the first leads the group it creates."""
    turn %= len(urls)
    return urls[turn:] + urls[:turn]


def _report(running: RunningService) -> None:
    """Say that a service ended, or runs again."""
    if running.is_running:
        print(f"demo: {running.service.name} runs again as process {running.pid}", file=sys.stderr)
    else:
        print(f"demo: {describe_exit(running)}", file=sys.stderr)


@asynccontextmanager
async def launch(
    options: DemoOptions, *, on_exit: Callable[[RunningService], None] = _report
) -> AsyncIterator[Cluster]:
    """Start a cluster, hand it over ready, and stop it afterwards. Raises `ToolFailure` and `LocalError`."""
    path = options.state_dir.resolve()
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (
        own_directory(path),
        demo_store(options.store, path) as used,
        demo_bus(options.bus, options.store) as bus,
    ):
        pids = [pid for pid in (used.pid, bus.pid) if pid]
        async with _launched(options, StateDir(path, used.url, bus.flags), pids, on_exit) as cluster:
            yield cluster


@asynccontextmanager
async def _launched(
    options: DemoOptions, state: StateDir, emulators: Sequence[int], on_exit: Callable[[RunningService], None]
) -> AsyncIterator[Cluster]:
    """Start the services on a store that runs."""
    failure: BaseException | None = None
    async with open_store(state.store_url) as store, trio.open_nursery() as nursery:
        found = services(options, state)
        prepare(state, found)
        await store.realms.create_shared()
        session = Session(store, RpcPool(nursery, ClusterTls.load(state.operator)))
        for entry in await store.discovery.list():
            await store.discovery.deregister(entry.kind, entry.url)  # left over from a run that was killed
        await store.tenants.put(TENANT, TenantLimits(options.rate_limit))
        guard = OrphanGuard()
        for pid in emulators:
            guard.watch(pid)
        cluster = Cluster(options, state, session, found, guard)
        try:
            for running in cluster.processes:
                if not running.service.is_started_late:
                    running.start()
            cluster.write_processes()
            await _bring_up(cluster)
            for running in cluster.processes:
                if running.service.is_started_late:
                    running.start()
            cluster.write_processes()
            for running in cluster.processes:
                nursery.start_soon(_watch, cluster, running, on_exit)
            yield cluster
        except Exception as error:  # noqa: BLE001 -- raised again below, outside the nursery that would wrap it
            failure = error
        finally:
            with trio.CancelScope(shield=True):
                await stop_all(cluster.processes)
                guard.close()
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _watch(cluster: Cluster, running: RunningService, on_exit: Callable[[RunningService], None]) -> None:
    def tell(changed: RunningService) -> None:
        on_exit(changed)
        cluster.write_processes()

    await watch(running, tell, restart=cluster.options.restart)


async def _bring_up(cluster: Cluster) -> None:
    """Wait for the processes, build the realms and wait until they serve; an exit meanwhile ends the wait."""
    problem: list[BaseException] = []
    done = False

    async def fail_on_exit(running: RunningService, scope: trio.CancelScope) -> None:
        await running.wait()
        problem.append(ToolFailure(describe_exit(running)))
        scope.cancel()

    async def build() -> None:
        try:
            async with trio.open_nursery() as waiting:
                for running in cluster.processes:
                    if running.service.role == "agent":
                        waiting.start_soon(running.wait_listening)
            await cluster.build()
            await cluster.wait_ready()
            if cluster.options.groups > 1:
                await cluster.balance()
                await cluster.wait_ready()
        except Exception as error:  # noqa: BLE001 -- one telling error leaves, not the nurseries' groups around it
            problem.append(first_leaf(error))

    async with trio.open_nursery() as nursery:
        for running in cluster.processes:
            if not running.service.is_started_late:
                nursery.start_soon(fail_on_exit, running, nursery.cancel_scope)
        with trio.move_on_after(READY_S):
            await build()
            done = True
        nursery.cancel_scope.cancel()
    if problem:
        raise problem[0]
    if not done:
        raise ToolFailure(
            f"not ready within {READY_S:.0f} s; look at the logs in {cluster.state.path / 'logs'}",
            ExitCode.UNREACHABLE,
        )
