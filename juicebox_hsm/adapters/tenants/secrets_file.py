"""The local secrets file: loaded at start, read again every few seconds, last good content kept (load-balancer.md 7).

Lookups only ever read memory. A file that cannot be read or does not parse changes nothing and is warned about; the
warning names the entry, never its data.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import trio

from juicebox_hsm.adapters.process.passing_trouble import local_error
from juicebox_hsm.adapters.process.regular_file import open_regular, others_read
from juicebox_hsm.adapters.process.threads import in_thread_or_here
from juicebox_hsm.errors import LocalError, RealmError
from juicebox_hsm.ports.observation import Log, Meter
from juicebox_hsm.tenant_keys import (
    TENANT_NAME_PREFIX,
    TenantSecret,
    Versions,
    parse_file,
    strength_warning,
)
from juicebox_hsm.tokens import BadKeyError, TokenKey

REFRESH_S: Final = 5.0
"""Period of reading the file (load-balancer.md 7.3)."""

FILE_BYTES_MAX: Final = 16 << 20
"""Largest secrets file that is read (own): about 40,000 tenants."""


class HeldSecrets(abc.ABC):
    """All secrets of one source, held in memory. `load` first, then keep `refresh_forever` running."""

    refresh_s: float = REFRESH_S

    def __init__(self, *, metrics: Meter, log: Log) -> None:
        self._metrics = metrics
        self._log = log
        self._secrets: Mapping[str, Versions] = {}
        self._keys: dict[tuple[str, int], TokenKey] = {}
        self._loaded_at = 0.0
        self._failure = ""

    def versions(self, name: str) -> Versions:
        """Return the enabled versions of a secret, none for an unknown name."""
        return self._secrets.get(name, {})

    def token_key(self, tenant: str, version: int) -> TokenKey | None:
        """Return a tenant's key. The same object as long as the key does not change, so that verified tokens last."""
        return self._keys.get((tenant, version))

    def age_s(self) -> float:
        """Return the seconds since the source was last read and found good."""
        return trio.current_time() - self._loaded_at

    @abc.abstractmethod
    async def load(self) -> None:
        """Read the source; raises `RealmError` that names it, and keeps what was there before."""

    async def refresh_forever(self) -> None:
        """Read the source every `refresh_s`; failures keep the last good content."""
        while True:
            await trio.sleep(self.refresh_s)
            await self.refresh()

    async def refresh(self) -> None:
        """Read the source once; on failure count, warn (once per cause) and keep the last good content."""
        try:
            await self.load()
            self._failure = ""
        except RealmError as error:
            self._metrics.count("secrets.refresh.failures")
            if str(error) != self._failure:
                self._log.warning("secrets not refreshed; the last good ones stay in use", reason=str(error))
            self._failure = str(error)
        self._metrics.gauge("secrets.age_seconds", self.age_s())

    def _take(self, secrets: Mapping[str, Mapping[int, TenantSecret]]) -> None:
        keys: dict[tuple[str, int], TokenKey] = {}
        for name, versions in secrets.items():
            if not name.startswith(TENANT_NAME_PREFIX):
                continue
            tenant = name.removeprefix(TENANT_NAME_PREFIX)
            for version, secret in versions.items():
                fresh = TokenKey(secret)
                known = self._keys.get((tenant, version))
                if known == fresh and known is not None:
                    keys[tenant, version] = known
                    continue
                keys[tenant, version] = fresh
                self._judge(name, version, secret, fresh)
        self._secrets = secrets
        self._keys = keys

    def _judge(self, name: str, version: int, secret: TenantSecret, key: TokenKey) -> None:
        """Warn once about a new key that is weak or unusable; other tenants are not affected."""
        weakness = strength_warning(secret)
        if weakness is not None:
            self._log.warning("weak tenant key", secret=name, version=version, reason=weakness)
        try:
            key.verifier()
        except BadKeyError as error:
            self._log.warning(
                "unusable tenant key; its tokens are refused", secret=name, version=version, reason=str(error)
            )


class SecretsFile(HeldSecrets):
    """All secrets of one file."""

    def __init__(self, path: Path, *, metrics: Meter, log: Log) -> None:
        super().__init__(metrics=metrics, log=log)
        self.path = path
        self._content = b""
        self._others_warned = False

    async def load(self) -> None:
        """Read the file; raises `LocalError` that names file and entry, and keeps what was there before."""
        content, is_shared = await in_thread_or_here(self._read)
        if content != self._content or not self._secrets:
            try:
                secrets = parse_file(content)
            except LocalError as error:
                raise LocalError(f"secrets file {self.path}: {error}") from None
            self._take(secrets)
            self._content = content
        if is_shared and not self._others_warned:
            self._log.warning("secrets file is readable by others; restrict it to this user", path=str(self.path))
        self._others_warned = is_shared
        self._loaded_at = trio.current_time()

    def _read(self) -> tuple[bytes, bool]:
        try:
            with open_regular(self.path) as file:
                content = file.read(FILE_BYTES_MAX + 1)
            is_shared = others_read(self.path)
        except OSError as error:
            raise local_error(
                f"--secrets-file: cannot read secrets file {self.path}: {error.strerror}", error
            ) from None
        if len(content) > FILE_BYTES_MAX:
            raise LocalError(f"secrets file {self.path} is larger than {FILE_BYTES_MAX} bytes")
        return content, is_shared
