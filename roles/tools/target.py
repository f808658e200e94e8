"""The realm that a client command asks, and the tenant it asks as: for `bench`, `check` and whoever mints tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.client import Configuration, ConfigurationError
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.ids import RealmId
from juicebox_hsm.tenant_keys import SecretAlgorithm, TenantSecret
from juicebox_hsm.tokens import create
from roles.tools.session import ToolFailure
from roles.tools.tenant_key import latest_in_file

ENVIRONMENT: Final = "JUICEBOX_CLIENT_JSON"
TOKEN_LIFETIME_S: Final = 86_400


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to measure and as whom. `token` mints for (user, realm)."""

    configuration: Configuration
    ca_file: Path | None
    token: Callable[[str, RealmId], str]


def _signer(key: TenantSecret, tenant: str, version: int) -> Callable[[str, RealmId], str]:
    def token(user: str, realm: RealmId) -> str:
        now_s = int(time.time())
        return create(
            key, tenant=tenant, version=version, user=user, realm=realm, now_s=now_s, lifetime_s=TOKEN_LIFETIME_S
        )

    return token


def target_from_client_json(path: Path) -> Target:
    """Read what the demo wrote. Raises `ToolFailure` naming the file."""
    try:
        document: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        signer = document["signer"]
        key = TenantSecret(Secret(bytes.fromhex(signer["key_hex"])), SecretAlgorithm.HMAC_SHA256)
        configuration = Configuration.from_json(document["configuration"])
        ca = document.get("ca")
        return Target(
            configuration, None if ca is None else Path(ca), _signer(key, signer["tenant"], int(signer["version"]))
        )
    except OSError as error:
        raise ToolFailure(f"{ENVIRONMENT}={path}: {error.strerror}") from None
    except (ConfigurationError, ValueError, KeyError, TypeError) as error:
        raise ToolFailure(f"{ENVIRONMENT}={path}: not a client.json of the demo: {error}") from None


def _read_argument(text: str) -> str:
    """Return the text, or the content of FILE for @FILE."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except OSError as error:
        raise ToolFailure(f"--configuration {text}: {error.strerror}") from None


def target_from_flags(configuration: str, secrets_file: Path | None, tenant: str, certificate: Path | None) -> Target:
    """Build the target from --configuration, --secrets-file and --tenant. Raises `ToolFailure`."""
    if secrets_file is None:
        raise ToolFailure("--configuration needs --secrets-file FILE with the tenant's signing key", ExitCode.USAGE)
    return target_with_key(configuration, tenant, certificate, lambda: latest_in_file(secrets_file, tenant))


def target_with_key(
    configuration: str, tenant: str, certificate: Path | None, read_key: Callable[[], tuple[int, TenantSecret]]
) -> Target:
    """Build the target from --configuration and the tenant's signing key, which is read last. Raises `ToolFailure`."""
    try:
        checked = Configuration.from_json(_read_argument(configuration))
    except ConfigurationError as error:
        raise ToolFailure(f"--configuration: {error}", ExitCode.USAGE) from None
    version, key = read_key()
    return Target(checked, certificate, _signer(key, tenant, version))
