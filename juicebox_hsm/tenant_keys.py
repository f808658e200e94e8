"""Secrets a realm's front ends share with tenants, and what is derived from them.

The codec of the JSON payload (client-protocol.md 14 "Tenant secrets", load-balancer.md 7.2 and 7.3), the names of
secrets, record ids (client-protocol.md 15) and the user ids of the tenant event log. Pure: reading files and asking
cloud services is the adapters' work. Errors name the entry and never show its data.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.errors import LocalError
from juicebox_hsm.ids import RecordId
from juicebox_hsm.wire import cbor

RECORD_ID_KEY_NAME: Final = "record-id-randomization"
TENANT_NAME_PREFIX: Final = "tenant-"
TEST_TENANT_PREFIX: Final = "test-"
RECORD_ID_KEY_BYTES: Final = 32

HMAC_KEY_BYTES_ADVISED: Final = 32
"""Shorter shared keys work but deserve a warning: a token's signature can be guessed offline."""

RSA_BITS_MIN: Final = 2048
"""The least that is still taken for safe; tokens of shorter keys are refused."""

VERSION_MAX: Final = 2**64 - 1

TENANT_CHARS_MAX: Final = 211
"""What the tightest carrier of the name takes: the 255 characters of a Pub/Sub subscription
`tenant-NAME-REALM-sub` with a realm of 32 hex digits. Row keys and names of secrets take more."""

TENANT_RULE: Final = f"a tenant name has 1 to {TENANT_CHARS_MAX} letters and digits, optionally behind test-"
"""What to tell whoever gave another name."""

_TENANT: Final = re.compile(r"(?:test-)?[a-zA-Z0-9]+")
_HASHED_USER: Final = re.compile(r"[0-9a-f]{64}")
_VERSION: Final = re.compile(r"0|[1-9][0-9]{0,19}")
_HEX: Final = re.compile(r"(?:[0-9a-fA-F]{2})*")
_FINGERPRINT_LABEL: Final = b"juicebox-record-id-key"
_FINGERPRINT_BYTES: Final = 8


class SecretAlgorithm(enum.Enum):
    """What a secret is for; values are the exact spellings of the payload."""

    HMAC_SHA256 = "HmacSha256"
    RSA_PKCS1_SHA256 = "RsaPkcs1Sha256"
    EDWARDS25519 = "Edwards25519"
    BLAKE2S_MAC256 = "Blake2sMac256"


class SecretError(LocalError, ValueError):
    """A stored secret is not usable; the message names the entry, never its data."""


@dataclass(frozen=True, slots=True)
class TenantSecret:
    """One version of a secret: its bytes (raw key or DER) and what they are for."""

    data: Secret
    algorithm: SecretAlgorithm


Versions = Mapping[int, TenantSecret]
"""The enabled versions of one secret."""


def is_tenant_name(name: str) -> bool:
    """Tell whether `name` is a tenant name: up to 211 letters and digits, optionally behind `test-`."""
    return len(name) <= TENANT_CHARS_MAX and _TENANT.fullmatch(name) is not None


def is_event_user_id(text: str) -> bool:
    """Tell whether `text` has the form that `event_user_id` gives: 64 lower-case hex digits."""
    return _HASHED_USER.fullmatch(text) is not None


def is_test_tenant(name: str) -> bool:
    """Tell whether `name` is one of the operators' own tenants, the only ones their tools mint tokens for."""
    return is_tenant_name(name) and name.startswith(TEST_TENANT_PREFIX)


def tenant_secret_name(tenant: str) -> str:
    """Return the name under which a tenant's keys are stored."""
    return TENANT_NAME_PREFIX + tenant


def parse_payload(payload: str | bytes, entry: str) -> TenantSecret:
    """Parse the JSON payload of one secret version. Raises `SecretError` naming `entry`."""
    return _secret(_load_json(payload, entry), entry)


def raw_payload(payload: bytes) -> TenantSecret:
    """Take a payload that is not JSON as a raw HMAC key: the explicit `--raw-secrets` migration aid, tenants only."""
    return TenantSecret(Secret(payload), SecretAlgorithm.HMAC_SHA256)


def encode_payload(secret: TenantSecret) -> str:
    """Return the JSON payload of a secret, hex-encoded. The result is as secret as the key."""
    return json.dumps({"data": secret.data.expose().hex(), "encoding": "Hex", "algorithm": secret.algorithm.value})


def parse_file(text: str | bytes) -> dict[str, dict[int, TenantSecret]]:
    """Parse a secrets file: name, then version as decimal text, then payload. One bad entry fails all of it.

    Raises `SecretError` naming the entry. Repeated names and versions are refused: the last would silently win.
    """
    names = _load_json(text, "secrets file")
    if not isinstance(names, dict):
        raise SecretError("secrets file: a JSON object of names was expected")
    parsed: dict[str, dict[int, TenantSecret]] = {}
    for name, versions in names.items():
        if name.startswith(TENANT_NAME_PREFIX) and not is_tenant_name(name.removeprefix(TENANT_NAME_PREFIX)):
            raise SecretError(f"{name[:40]!r}: {TENANT_RULE}")
        if not isinstance(versions, dict):
            raise SecretError(f"{name}: a JSON object of versions was expected")
        parsed[name] = {}
        for version, payload in versions.items():
            entry = f"{name} version {version}"
            if _VERSION.fullmatch(version) is None or int(version) > VERSION_MAX:
                raise SecretError(f"{entry}: the version is not a decimal 64-bit integer")
            parsed[name][int(version)] = _secret(payload, entry)
    return parsed


def strength_warning(secret: TenantSecret) -> str | None:
    """Return why a usable key is weaker than advised, or None."""
    size = len(secret.data)
    if secret.algorithm is SecretAlgorithm.HMAC_SHA256 and size < HMAC_KEY_BYTES_ADVISED:
        return f"an HMAC key of {size} bytes is shorter than the {HMAC_KEY_BYTES_ADVISED} advised"
    return None


def _load_json(text: str | bytes, entry: str) -> object:
    try:
        decoded = text if isinstance(text, str) else text.decode()
        loaded: object = json.loads(decoded, object_pairs_hook=_distinct)
    except SecretError as duplicate:
        raise SecretError(f"{entry}: {duplicate}") from None
    except (ValueError, RecursionError):
        raise SecretError(f"{entry}: not JSON") from None
    return loaded


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise SecretError("a JSON member appears twice")
    return members


def _secret(payload: object, entry: str) -> TenantSecret:
    if not isinstance(payload, dict):
        raise SecretError(f"{entry}: a JSON object with data, encoding and algorithm was expected")
    data, encoding, algorithm = (payload.get(key) for key in ("data", "encoding", "algorithm"))
    if not isinstance(data, str):
        raise SecretError(f"{entry}: data is not text")
    if encoding == "Hex":
        if _HEX.fullmatch(data) is None:
            raise SecretError(f"{entry}: data is not an even number of hex digits")
        raw = bytes.fromhex(data)
    elif encoding == "UTF8":
        try:
            raw = data.encode()
        except UnicodeEncodeError:
            raise SecretError(f"{entry}: data is not UTF-8 text") from None
    else:
        raise SecretError(f"{entry}: encoding is neither Hex nor UTF8")
    for known in SecretAlgorithm:
        if known.value == algorithm:
            return TenantSecret(Secret(raw), known)
    raise SecretError(f"{entry}: unknown algorithm")


# Record ids ---------------------------------------------------------------------------------------------------


def record_id_key(versions: Versions, version: int | None = None) -> Secret:
    """Choose the record-id key among its enabled versions. Raises `SecretError`.

    More than one enabled version is refused unless `version` names one: taking the latest would move every user to a
    new record id without a word (load-balancer.md 6.4).
    """
    if version is not None:
        if version not in versions:
            raise SecretError(f"{RECORD_ID_KEY_NAME}: version {version} is not enabled")
        chosen = version
    elif len(versions) == 1:
        chosen = next(iter(versions))
    elif not versions:
        raise SecretError(f"{RECORD_ID_KEY_NAME}: no enabled version")
    else:
        listed = ", ".join(str(each) for each in sorted(versions))
        raise SecretError(f"{RECORD_ID_KEY_NAME}: several enabled versions ({listed}); name one explicitly")
    secret = versions[chosen]
    if secret.algorithm is not SecretAlgorithm.BLAKE2S_MAC256:
        raise SecretError(f"{RECORD_ID_KEY_NAME} version {chosen}: the algorithm must be Blake2sMac256")
    if len(secret.data) != RECORD_ID_KEY_BYTES:
        raise SecretError(
            f"{RECORD_ID_KEY_NAME} version {chosen}: {len(secret.data)} bytes instead of {RECORD_ID_KEY_BYTES}"
        )
    return secret.data


def record_id_key_fingerprint(key: Secret) -> bytes:
    """Return the 8 bytes by which a realm's store recognises its record-id key without knowing it."""
    return hashlib.sha256(_FINGERPRINT_LABEL + key.expose()).digest()[:_FINGERPRINT_BYTES]


_TENANT_KEY: Final = cbor.map_head(2) + cbor.text("tenant")
_USER_KEY: Final = cbor.text("user")


def record_id(key: Secret, tenant: str, user: str) -> RecordId:
    """Return the 32-byte record id of a user: keyed BLAKE2s over the CBOR of tenant and user."""
    hashed = _TENANT_KEY + cbor.text(tenant) + _USER_KEY + cbor.text(user)
    return RecordId(hashlib.blake2s(hashed, key=key.expose()).digest())


def event_user_id(tenant: str, user: str) -> str:
    """Return the user's id in the tenant event log: 64 lower-case hex digits that tenants can recompute."""
    return hashlib.sha256(f"{tenant}:{user}".encode()).hexdigest()
