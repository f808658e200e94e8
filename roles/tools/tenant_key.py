"""The signing key of a tenant, for commands that mint tokens: from a secrets file or Secret Manager."""

from __future__ import annotations

from pathlib import Path

from juicebox_hsm.adapters.observation.logging import get_logger
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.errors import RealmError
from juicebox_hsm.tenant_keys import TenantSecret, Versions, parse_file, tenant_secret_name
from roles.cloud_options import SECRETS, SecretsOptions, open_secrets
from roles.tools.session import ToolFailure, run


def latest_key(secrets: SecretsOptions, store_url: str, tenant: str) -> tuple[int, TenantSecret]:
    """Return the newest enabled version of a tenant's key, and its number.

    Raises `ToolFailure`: exit 3 when the tenant has none, 4 when Secret Manager does not answer.
    """
    if secrets.file is not None:
        return latest_in_file(secrets.file, tenant)

    async def read() -> Versions:
        async with open_secrets(secrets, store_url, metrics=Metrics(), log=get_logger("secrets")) as held:
            return held.versions(tenant_secret_name(tenant))

    return _newest(run(read), tenant, f"--{SECRETS}-project")


def latest_in_file(path: Path, tenant: str) -> tuple[int, TenantSecret]:
    """Return the newest version of a tenant's key in a secrets file. Raises `ToolFailure` that names the file."""
    try:
        versions = parse_file(path.read_bytes()).get(tenant_secret_name(tenant), {})
    except OSError as error:
        raise ToolFailure(f"--secrets-file {path}: {error.strerror}") from None
    except RealmError as error:
        raise ToolFailure(f"--secrets-file {path}: {error}") from None
    return _newest(versions, tenant, f"--secrets-file {path}")


def _newest(versions: Versions, tenant: str, where: str) -> tuple[int, TenantSecret]:
    if not versions:
        raise ToolFailure(f"{where}: no key {tenant_secret_name(tenant)}", ExitCode.ID)
    version = max(versions)
    return version, versions[version]
