"""What is wrong with an operator's secrets file, for `secrets lint` and `config check`."""

from __future__ import annotations

from juicebox_hsm.errors import RealmError
from juicebox_hsm.tenant_keys import (
    RECORD_ID_KEY_NAME,
    TENANT_NAME_PREFIX,
    TenantSecret,
    is_tenant_name,
    parse_file,
    record_id_key,
    strength_warning,
)
from juicebox_hsm.tokens import BadKeyError, TokenKey


def findings(
    text: str | bytes, mode: int, *, forbidden: int = 0o077, record_id_version: int | None = None
) -> list[str]:
    """Return what is wrong with a secrets file, one line each. Pure; `mode` is the file's permissions.

    `forbidden` are the permissions it must not have: a service may share the file with its group. `record_id_version`
    is the version a balancer is told to use, None when it has to be the only one.
    """
    found = []
    if mode & forbidden:
        found.append(f"readable by others (mode {mode & 0o777:04o}); run chmod 600")
    try:
        parsed = parse_file(text)
    except RealmError as error:
        return [*found, str(error)]
    try:
        record_id_key(parsed.get(RECORD_ID_KEY_NAME, {}), record_id_version)
    except RealmError as error:
        found.append(str(error))
    for name, versions in sorted(parsed.items()):
        if name == RECORD_ID_KEY_NAME:
            continue
        tenant = name.removeprefix(TENANT_NAME_PREFIX)
        if not name.startswith(TENANT_NAME_PREFIX) or not is_tenant_name(tenant):
            found.append(f"{name}: neither {RECORD_ID_KEY_NAME} nor {TENANT_NAME_PREFIX}TENANT")
            continue
        for version, secret in sorted(versions.items()):
            found += [f"{name} version {version}: {problem}" for problem in _key_problems(secret)]
    return found


def _key_problems(secret: TenantSecret) -> list[str]:
    try:
        TokenKey(secret).verifier()
    except BadKeyError as error:
        return [str(error)]
    weak = strength_warning(secret)
    return [] if weak is None else [weak]
