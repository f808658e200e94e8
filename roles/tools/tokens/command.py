"""`juicebox-hsm tokens`: mint and examine auth tokens, draw keys for them (operator-tools.md 4)."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any, Final

import click

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.errors import DecodingError, RealmError
from juicebox_hsm.ids import RealmId, parse_id
from juicebox_hsm.tenant_keys import (
    TENANT_RULE,
    VERSION_MAX,
    TenantSecret,
    encode_payload,
    is_tenant_name,
    parse_file,
    strength_warning,
    tenant_secret_name,
)
from juicebox_hsm.tokens import LIFETIME_S_MAX, RejectionReason, Scope, TokenKey, create, problems
from roles.durations import DurationType
from roles.lazy import LazyCommand, LazyGroup
from roles.tools.drawn_keys import ALGORITHMS, draw_keys
from roles.tools.session import ToolFailure, end

ERROR_TEXTS: Final = {
    RejectionReason.TOO_LONG: "longer than a token may be",
    RejectionReason.MALFORMED: "not a JWT",
    RejectionReason.KID: "the key id is not TENANT:VERSION",
    RejectionReason.UNKNOWN_KEY: "signed with another key than the one given",
    RejectionReason.BAD_KEY: "the given key does not suit the algorithm",
    RejectionReason.SIGNATURE: "wrong key or algorithm: the signature does not verify",
    RejectionReason.EXPIRED: "expired",
    RejectionReason.NOT_YET: "not yet valid",
    RejectionReason.LIFETIME: f"lives longer than {LIFETIME_S_MAX} s",
    RejectionReason.AUDIENCE: "the audience is not the realm",
    RejectionReason.ISSUER: "the issuer is not the tenant of the key id",
    RejectionReason.SUBJECT: "the subject is missing or not text",
    RejectionReason.SCOPE: "the scope is not allowed here",
}


def _key_from_hex(text: str, flag: str, algorithm: str) -> TenantSecret:
    try:
        return TenantSecret(Secret(bytes.fromhex(text.strip())), ALGORITHMS[algorithm])
    except ValueError:
        raise ToolFailure(f"{flag}: not an even number of hex digits", ExitCode.USAGE) from None


def read_key(
    key: str | None, key_file: Path | None, secrets_file: Path | None, algorithm: str | None, tenant: str, version: int
) -> TenantSecret:
    """Return the key of exactly one source. Raises `ToolFailure` naming the flag or file."""
    given = [name for name, value in (("-k", key), ("--key-file", key_file), ("--secrets-file", secrets_file)) if value]
    if len(given) != 1:
        raise ToolFailure("give exactly one of -k HEX, --key-file FILE, --secrets-file FILE", ExitCode.USAGE)
    try:
        if secrets_file is not None:
            versions = parse_file(secrets_file.read_bytes()).get(tenant_secret_name(tenant), {})
            if version not in versions:
                raise ToolFailure(
                    f"--secrets-file {secrets_file}: no version {version} of {tenant_secret_name(tenant)}", ExitCode.ID
                )
            return versions[version]
        if algorithm is None:
            raise ToolFailure("-a ALG is required with a key in hex", ExitCode.USAGE)
        if key_file is not None:
            return _key_from_hex(key_file.read_text(encoding="ascii"), f"--key-file {key_file}", algorithm)
    except OSError as error:
        raise ToolFailure(f"{given[0]} {key_file or secrets_file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ToolFailure(f"--key-file {key_file}: not hex") from None
    return _key_from_hex(key or "", "-k", algorithm)


def _realm(text: str) -> RealmId:
    try:
        return RealmId(parse_id(text.lower()))
    except DecodingError as error:
        raise ToolFailure(f"-r: {error}", ExitCode.USAGE) from None


def _check_tenant(tenant: str) -> None:
    if not is_tenant_name(tenant):
        raise ToolFailure(f"-t {tenant[:40]!r}: {TENANT_RULE}", ExitCode.USAGE)


_key_options = (
    click.option("-k", "--key", help="Key in hex: the shared key, or DER (private to create, public to validate)."),
    click.option("--key-file", type=click.Path(path_type=Path, dir_okay=False), help="File with the key in hex."),
    click.option("--secrets-file", type=click.Path(path_type=Path, dir_okay=False), help="Secrets file with the key."),
    click.option("-a", "--algorithm", type=click.Choice(list(ALGORITHMS)), help="Algorithm of a key in hex."),
    click.option(
        "-v",
        "--version",
        type=click.IntRange(0, VERSION_MAX),
        default=1,
        show_default=True,
        help="Version of the tenant's key.",
    ),
    click.option("-r", "--realm", required=True, help="Realm id, 32 hex digits."),
    click.option("-t", "--tenant", required=True, help="Tenant."),
    click.option("-u", "--user", required=True, help="User id."),
)


def _with_key_options(function: Any) -> Any:
    for option in _key_options:
        function = option(function)
    return function


@click.command("create")
@_with_key_options
@click.option(
    "-s",
    "--scope",
    type=click.Choice(["user", "audit"]),
    default="user",
    show_default=True,
    help="What the token admits to: the realm, or the tenant log.",
)
@click.option(
    "--lifetime", type=DurationType(), default="10m", show_default=True, help="How long it is valid; at most 24h."
)
def create_command(
    key: str | None,
    key_file: Path | None,
    secrets_file: Path | None,
    algorithm: str | None,
    version: int,
    realm: str,
    tenant: str,
    user: str,
    scope: str,
    lifetime: float,
) -> None:
    """Mint a token, valid from now, and print it."""
    _check_tenant(tenant)
    signing = read_key(key, key_file, secrets_file, algorithm, tenant, version)
    weak = strength_warning(signing)
    if weak is not None:
        click.echo(f"WARNING: {weak}", err=True)
    try:
        token = create(
            signing,
            tenant=tenant,
            version=version,
            user=user,
            realm=_realm(realm),
            now_s=int(time.time()),
            lifetime_s=int(lifetime),
            scope=Scope(scope),
        )
    except RealmError as error:
        raise ToolFailure(str(error)) from None
    click.echo(token)


def _unverified(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return header and claims without checking anything; empty where they cannot be read."""
    parts: list[dict[str, Any]] = []
    for part in token.split(".")[:2]:
        try:
            loaded = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        except ValueError:
            loaded = {}
        parts.append(loaded if isinstance(loaded, dict) else {})
    return (parts[0], parts[1]) if len(parts) == 2 else ({}, {})


def warnings_of(token: str, tenant: str, user: str, version: int) -> list[str]:
    """Return where a token differs from what was expected without being invalid. Pure."""
    header, claims = _unverified(token)
    named_tenant, _, named_version = str(header.get("kid", "")).rpartition(":")
    found = []
    for what, actual, expected in (
        ("iss", claims.get("iss"), tenant),
        ("sub", claims.get("sub"), user),
        ("tenant of kid", named_tenant, tenant),
        ("version of kid", named_version, str(version)),
    ):
        if actual != expected:
            found.append(f"{what} is {actual!r}, expected {expected!r}")
    if "scope" not in claims:
        found.append("scope is missing; expect it to become mandatory")
    return found


@click.command("validate")
@click.option("-j", "--jwt", "token", required=True, help="The token.")
@_with_key_options
def validate_command(
    token: str,
    key: str | None,
    key_file: Path | None,
    secrets_file: Path | None,
    algorithm: str | None,
    version: int,
    realm: str,
    tenant: str,
    user: str,
) -> None:
    """Say everything that is wrong with a token; exit 1 when it would be refused."""
    _check_tenant(tenant)
    verifying = TokenKey(read_key(key, key_file, secrets_file, algorithm, tenant, version))
    _, claims = _unverified(token.strip())
    scope = Scope.AUDIT if claims.get("scope") == Scope.AUDIT.value else Scope.USER
    found = problems(
        token.strip(), realm=_realm(realm), now_s=time.time(), keys=lambda _tenant, _version: verifying, scope=scope
    )
    for reason in found:
        click.echo(f"ERROR: {ERROR_TEXTS[reason]}", err=True)
    for warning in warnings_of(token.strip(), tenant, user, version):
        click.echo(f"WARNING: {warning}")
    click.echo("invalid" if found else "valid")
    if found:
        end(ExitCode.FAILED)


@click.command("random")
@click.option("-a", "--algorithm", required=True, type=click.Choice(list(ALGORITHMS)), help="Kind of key.")
@click.option("--json", "as_json", is_flag=True, help="Print payloads ready for the secrets store.")
def random_command(algorithm: str, *, as_json: bool) -> None:
    """Draw a key: a shared one for HS256, a pair for RS256 (4096 bits) and EdDSA."""
    private, public = draw_keys(algorithm)
    if as_json:
        kind = ALGORITHMS[algorithm]
        document = {"sign": json.loads(encode_payload(TenantSecret(Secret(private), kind)))}
        if public is not None:
            document["verify"] = json.loads(encode_payload(TenantSecret(Secret(public), kind)))
        click.echo(json.dumps(document, indent=2))
    elif public is None:
        click.echo(private.hex())
    else:
        click.echo(f"private key: {private.hex()}\npublic key: {public.hex()}")


@click.group(
    cls=LazyGroup,
    lazy={
        "create": LazyCommand(__name__, "Mint a token.", "create_command"),
        "validate": LazyCommand(__name__, "Say everything that is wrong with a token.", "validate_command"),
        "random": LazyCommand(__name__, "Draw a key.", "random_command"),
    },
)
def command() -> None:
    """Create and validate auth tokens, and draw keys for them."""
