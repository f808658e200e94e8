"""Secrets from Google Secret Manager (load-balancer.md 7; decision record 0016).

Listed are only secrets with our names and labels; used are only their enabled versions. A version never changes, so
each is read once. No emulator of the service exists: the tests run a server made of the library's own messages.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import trio
from google.cloud.secretmanager_v1.types import resources as _resources
from google.cloud.secretmanager_v1.types import service as _messages

from juicebox_hsm.adapters.google.calls import Access, GoogleCalls, Service, open_calls, scopes
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.tenants.secrets_file import HeldSecrets
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.retry import RetryProfile
from juicebox_hsm.ports.observation import Log, Meter
from juicebox_hsm.tenant_keys import (
    RECORD_ID_KEY_NAME,
    TENANT_NAME_PREFIX,
    TenantSecret,
    parse_payload,
    raw_payload,
)

HOST: Final = "secretmanager.googleapis.com"
REFRESH_S: Final = 60.0
READS_MAX: Final = 16
PAGE: Final = 1_000
VERSION_DIGITS_MAX: Final = 19
RETRY: Final = RetryProfile(first_s=0.05, attempts_max=200, total_s=120.0, spread=0.2)

RECORD_ID_KIND: Final = "record_id_randomization_key"
TENANT_KIND: Final = "tenant_auth_key"
FILTER: Final = (
    f"(name:{RECORD_ID_KEY_NAME} AND labels.kind={RECORD_ID_KIND})"
    f" OR (name:{TENANT_NAME_PREFIX} AND labels.kind={TENANT_KIND})"
)
"""Other secrets of the project are not even listed."""

_SERVICE: Final = "/google.cloud.secretmanager.v1.SecretManagerService"
LIST_SECRETS: Final = f"{_SERVICE}/ListSecrets"
LIST_VERSIONS: Final = f"{_SERVICE}/ListSecretVersions"
ACCESS_VERSION: Final = f"{_SERVICE}/AccessSecretVersion"
SECRET_MANAGER: Final = Service(
    "secret-manager",
    f"{HOST}:443",
    tuple(scopes("cloud-platform")),
    " or use --secrets-file",
    {
        LIST_SECRETS: "secret_manager.google.list_secrets",
        LIST_VERSIONS: "secret_manager.google.list_secret_versions",
        ACCESS_VERSION: "secret_manager.google.access_secret_version",
    },
)

_ListSecretsRequest: Final[Any] = _messages.ListSecretsRequest.pb()
_ListSecretsResponse: Final[Any] = _messages.ListSecretsResponse.pb()
_ListVersionsRequest: Final[Any] = _messages.ListSecretVersionsRequest.pb()
_ListVersionsResponse: Final[Any] = _messages.ListSecretVersionsResponse.pb()
_AccessRequest: Final[Any] = _messages.AccessSecretVersionRequest.pb()
_AccessResponse: Final[Any] = _messages.AccessSecretVersionResponse.pb()
_ENABLED: Final = int(_resources.SecretVersion.State.ENABLED)

_Version = tuple[str, int]


class CloudSecrets(HeldSecrets):
    """The secrets of one project. `raw` takes tenants' payloads that are not JSON for raw HMAC keys."""

    refresh_s = REFRESH_S

    def __init__(
        self,
        calls: GoogleCalls,
        project: str,
        *,
        raw: bool = False,
        metrics: Meter,
        log: Log,
        retry: RetryProfile = RETRY,
    ) -> None:
        super().__init__(metrics=metrics, log=log)
        self._calls = calls
        self._project = project
        self._raw = raw
        self._retry = retry
        self._good: dict[_Version, tuple[str, TenantSecret]] = {}
        self._complained: dict[_Version, str] = {}
        self._is_loaded = False

    async def load(self) -> None:
        """Read everything that is new.

        At first any failure is raised. Later an unreadable version keeps its last good value, or is left out, with a
        warning, and all others advance.
        """
        listed = await self._list()
        good: dict[_Version, tuple[str, TenantSecret]] = {}
        failures: dict[_Version, RealmError] = {}
        left = iter(listed.items())
        async with trio.open_nursery() as nursery:
            for _ in range(min(READS_MAX, len(listed))):
                nursery.start_soon(self._read_versions, left, good, failures)
        if failures and not self._is_loaded:
            raise next(iter(failures.values()))
        for version in failures:
            if version in self._good:
                good[version] = self._good[version]
        self._complain(failures)
        secrets: dict[str, dict[int, TenantSecret]] = {}
        for (name, number), (_, secret) in sorted(good.items(), key=lambda item: item[0]):
            secrets.setdefault(name, {})[number] = secret
        if self._good != good or not self._is_loaded:
            self._take(secrets)
        self._good, self._is_loaded = good, True
        self._loaded_at = trio.current_time()

    def _complain(self, failures: dict[_Version, RealmError]) -> None:
        """Count failures of single versions; warn once per cause."""
        reasons = {version: str(error) for version, error in failures.items()}
        for version, reason in reasons.items():
            self._metrics.count("secrets.refresh.failures")
            if self._complained.get(version) != reason:
                self._log.warning(
                    "a secret's version cannot be used; its last good value, if any, stays in use",
                    secret=version[0],
                    version=version[1],
                    reason=reason,
                )
        self._complained = reasons

    async def _read_versions(
        self,
        left: Iterator[tuple[_Version, tuple[str, str]]],
        good: dict[_Version, tuple[str, TenantSecret]],
        failures: dict[_Version, RealmError],
    ) -> None:
        """Read version after version until none is left."""
        for version, (resource, made) in left:
            known = self._good.get(version)
            if known is not None and known[0] == made:
                good[version] = known
                continue
            try:
                good[version] = (made, await self._read(version, resource))
            except RealmError as error:
                failures[version] = error

    async def _read(self, version: _Version, resource: str) -> TenantSecret:
        request = _AccessRequest(name=resource).SerializeToString()
        answer = await self._calls.unary(ACCESS_VERSION, request, ("name", resource), self._retry)
        payload: bytes = _AccessResponse.FromString(answer).payload.data
        name, number = version
        entry = f"Secret Manager, project {self._project}: {name} version {number}"
        if self._raw and name != RECORD_ID_KEY_NAME and not _is_json_object(payload):
            self._log.warning("secret taken for a raw HMAC key; store it as JSON", secret=name, version=number)
            return raw_payload(payload)
        return parse_payload(payload, entry)

    async def _list(self) -> dict[_Version, tuple[str, str]]:
        """Return the enabled versions of our secrets: (name, number) -> (resource, what tells re-made ones apart)."""
        parent = f"projects/{self._project}"
        found: dict[_Version, tuple[str, str]] = {}
        secrets: list[str] = []

        def page(token: str) -> bytes:
            request = _ListSecretsRequest(parent=parent, page_size=PAGE, page_token=token, filter=FILTER)
            encoded: bytes = request.SerializeToString()
            return encoded

        async for answer in self._pages(LIST_SECRETS, ("parent", parent), page, _ListSecretsResponse):
            secrets += [secret.name for secret in answer.secrets if _is_ours(secret)]
        left = iter(secrets)
        failures: list[RealmError] = []

        async def list_versions() -> None:
            for secret in left:
                try:
                    if not failures:
                        found.update(await self._list_versions(secret))
                except RealmError as error:
                    failures.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(min(READS_MAX, len(secrets))):
                nursery.start_soon(list_versions)
        if failures:
            raise failures[0]
        return found

    async def _list_versions(self, secret: str) -> dict[_Version, tuple[str, str]]:
        def page(token: str) -> bytes:
            request = _ListVersionsRequest(parent=secret, page_size=PAGE, page_token=token, filter="state:ENABLED")
            encoded: bytes = request.SerializeToString()
            return encoded

        found: dict[_Version, tuple[str, str]] = {}
        async for answer in self._pages(LIST_VERSIONS, ("parent", secret), page, _ListVersionsResponse):
            for version in answer.versions:
                number = version.name.rpartition("/")[2]
                if version.state == _ENABLED and number.isdecimal() and len(number) <= VERSION_DIGITS_MAX:
                    made = f"{version.create_time.seconds}.{version.create_time.nanos}"
                    found[_name(secret), int(number)] = (version.name, made)
        return found

    async def _pages(
        self, method: str, routing: tuple[str, str], page: Callable[[str], bytes], kind: Any
    ) -> AsyncIterator[Any]:
        """Yield all pages of a listing."""
        token = ""
        while True:
            answer = kind.FromString(await self._calls.unary(method, page(token), routing, self._retry))
            yield answer
            token = answer.next_page_token
            if not token:
                return


def _name(resource: str) -> str:
    return resource.rpartition("/")[2]


def _is_ours(secret: Any) -> bool:
    """Tell whether a secret has one of our names with its label, whatever the service makes of the filter."""
    name, kind = _name(secret.name), secret.labels.get("kind", "")
    if name == RECORD_ID_KEY_NAME:
        return bool(kind == RECORD_ID_KIND)
    return name.startswith(TENANT_NAME_PREFIX) and bool(kind == TENANT_KIND)


def _is_json_object(payload: bytes) -> bool:
    try:
        return isinstance(json.loads(payload), dict)
    except (ValueError, RecursionError):
        return False


@asynccontextmanager
async def open_secret_manager(access: Access, *, raw: bool, metrics: Metrics, log: Log) -> AsyncIterator[CloudSecrets]:
    """Connect to a project's secrets; nothing is read yet."""
    async with open_calls(SECRET_MANAGER, access, metrics) as calls:
        yield CloudSecrets(calls, access.project, raw=raw, metrics=metrics, log=log)
