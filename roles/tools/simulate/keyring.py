"""Every key of a simulated realm: the HSMs', the balancers' and the tenants'."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Final

from juicebox_hsm.consensus.macs import Macs
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.hsm.keys import RealmKeys
from juicebox_hsm.ids import RealmId
from juicebox_hsm.tenant_keys import SecretAlgorithm, TenantSecret
from juicebox_hsm.tokens import TokenKey, create

TENANTS: Final = ("acme", "test-umbrella")
KEY_BYTES: Final = 32


class Keyring:
    """Keys drawn from a run's seed; `split` gives a generator by name."""

    def __init__(self, split: Callable[[str], random.Random]) -> None:
        self.realm = RealmKeys.generate(split("realm keys").randbytes)
        self.records = self.realm.record_key
        self.macs = Macs(self.realm.mac_key.expose())
        self.record_ids = Secret(split("record ids").randbytes(KEY_BYTES))
        self._tenants = {
            tenant: TenantSecret(Secret(split(f"tenant {tenant}").randbytes(KEY_BYTES)), SecretAlgorithm.HMAC_SHA256)
            for tenant in TENANTS
        }
        self._verifying = {tenant: TokenKey(secret) for tenant, secret in self._tenants.items()}

    def secrets(self) -> Iterator[tuple[str, bytes]]:
        """Return what may never stand in a log, with its name."""
        yield "the realm's communication key", self.realm.communication_secret.expose()
        yield "the realm's record key", self.records.expose()
        yield "the realm's MAC key", self.realm.mac_key.expose()
        yield "the record id key", self.record_ids.expose()
        for tenant, key in self._tenants.items():
            yield f"the token key of {tenant}", key.data.expose()

    def token_key(self, tenant: str, version: int) -> TokenKey | None:
        """Return the key that balancers check tokens with."""
        return self._verifying.get(tenant) if version == 1 else None

    def sign(self, tenant: str, user: str, realm: RealmId, now_s: float, lifetime_s: int) -> str:
        """Make a user's token."""
        return create(
            self._tenants[tenant],
            tenant=tenant,
            version=1,
            user=user,
            realm=realm,
            now_s=int(now_s),
            lifetime_s=lifetime_s,
        )
