"""Real processes: a key that a tenant drew itself opens the realm from the import of its public half to the removal."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from juicebox_hsm.client import Client, Configuration, HttpTransport, InvalidAuth, RateLimitExceeded
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.tenant_keys import SecretAlgorithm, TenantSecret
from juicebox_hsm.tokens import Scope, create
from roles.cli import cli
from roles.tools.demo.launch import Cluster, launch
from roles.tools.demo.layout import DemoOptions
from tests.client.looking import eventually
from tests.patience import HANGS_S

pytestmark = pytest.mark.processes

TENANT = "acme"


async def _secrets(cluster: Cluster, *words: str) -> None:
    line = ["secrets", *words, "--file", str(cluster.state.secrets_file)]
    ended = await trio.to_thread.run_sync(partial(CliRunner().invoke, cli, line))
    assert ended.exit_code == 0, ended.output


async def _is_admitted(cluster: Cluster, key: TenantSecret) -> bool:
    """Register with a token that the tenant signed; tell whether the balancer took it."""
    tokens = {
        realm: create(
            key, tenant=TENANT, version=1, user="u", realm=realm, now_s=int(time.time()), lifetime_s=600,
            scope=Scope.USER,
        )
        for realm in cluster.realms
    }  # fmt: skip
    async with (
        HttpTransport(ca_file=cluster.state.edge_ca) as transport,
        Client(Configuration.from_json(cluster.configuration), tokens, transport=transport) as client,
    ):
        try:
            await client.register(b"1234", b"secret", b"info", 2)
        except InvalidAuth:
            return False
        except RateLimitExceeded:  # told to those only whose token was taken; the tenant has the default limit
            return True
    return True


async def test_a_tenants_own_key(tmp_path: Path) -> None:
    """A running balancer takes tokens signed with the private half after the import, and none after the removal."""
    pair = Ed25519PrivateKey.generate()
    public = tmp_path / "public.pem"
    public.write_bytes(pair.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    private = pair.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    key = TenantSecret(Secret(private), SecretAlgorithm.EDWARDS25519)
    options = DemoOptions(state_dir=tmp_path / "state", agents=1, pin_hashing="FastInsecure", tenant_log=False)
    async with launch(options) as cluster:
        assert not await _is_admitted(cluster, key)
        await _secrets(cluster, "import", TENANT, "--public-key", str(public))
        await eventually(lambda: _is_admitted(cluster, key), HANGS_S, "the imported key is taken")

        async def is_refused() -> bool:
            return not await _is_admitted(cluster, key)

        await _secrets(cluster, "remove", TENANT, "--all")
        await eventually(is_refused, HANGS_S, "the removed key is refused")
