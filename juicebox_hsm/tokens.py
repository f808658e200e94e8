"""Auth tokens: validation, caching and minting (client-protocol.md 14, load-balancer.md 6.1 to 6.3).

A token is a compact JWS whose `kid` names a tenant's key version. The algorithm always follows from that key, never
from the token. Every failure is a `TokenRejection` value with the reason for logs and counters; clients are told only
that authentication failed. Hostile tokens never raise. Signatures are PyJWT's work; parsing is done here because the
rules are stricter than a general library's (no duplicate members, canonical base64url, no NaN, exact claim types).
"""

from __future__ import annotations

import binascii
import enum
import json
import math
import re
from base64 import urlsafe_b64encode
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_private_key, load_der_public_key
from jwt.algorithms import HMACAlgorithm, OKPAlgorithm, RSAAlgorithm

from juicebox_hsm.errors import LocalError, check
from juicebox_hsm.ids import RealmId
from juicebox_hsm.tenant_keys import (
    RSA_BITS_MIN,
    TENANT_RULE,
    VERSION_MAX,
    SecretAlgorithm,
    TenantSecret,
    is_tenant_name,
)

TOKEN_CHARS_MAX: Final = 1000
LEEWAY_S: Final = 5
LIFETIME_S_MAX: Final = 86_400
CACHED_TOKENS_MAX: Final = 8192
"""Default bound of `TokenCache`: at 1000 characters per token about 16 MB."""


class Scope(enum.Enum):
    """What a token is for. A missing scope counts as `USER` until the protocol makes it mandatory."""

    USER = "user"
    AUDIT = "audit"


class RejectionReason(enum.Enum):
    """Why a token was refused; values are the tags of logs and counters (load-balancer.md 6.2)."""

    TOO_LONG = "too_long"
    MALFORMED = "malformed"
    KID = "kid"
    UNKNOWN_KEY = "unknown_key"
    BAD_KEY = "bad_key"
    SIGNATURE = "signature"
    EXPIRED = "expired"
    NOT_YET = "not_yet"
    LIFETIME = "lifetime"
    AUDIENCE = "audience"
    ISSUER = "issuer"
    SUBJECT = "subject"
    SCOPE = "scope"


@dataclass(frozen=True, slots=True)
class TokenRejection:
    """A refused token. `tenant` and `version` are set from UNKNOWN_KEY on, so that operators can be warned."""

    reason: RejectionReason
    tenant: str | None = None
    version: int | None = None


@dataclass(frozen=True, slots=True)
class ValidToken:
    """The claims of a verified token. Times are Unix seconds, fractions truncated; the user id is never logged."""

    tenant: str
    version: int
    user: str = field(repr=False)
    audience: str
    not_before: int
    expires: int
    issued_at: int | None
    scope: str | None


class BadKeyError(LocalError, ValueError):
    """A stored key does not suit its purpose: malformed, of another algorithm, or public where private is needed."""


class WeakKeyError(BadKeyError):
    """A key that somebody could find: its tokens are refused."""


# Keys ---------------------------------------------------------------------------------------------------------

_HMAC: Final = HMACAlgorithm(HMACAlgorithm.SHA256)
_RSA: Final = RSAAlgorithm(RSAAlgorithm.SHA256)
_OKP: Final = OKPAlgorithm()
_JWT_ALGORITHM: Final = {
    SecretAlgorithm.HMAC_SHA256: "HS256",
    SecretAlgorithm.RSA_PKCS1_SHA256: "RS256",
    SecretAlgorithm.EDWARDS25519: "EdDSA",
}
_ED25519_SEED_BYTES: Final = 32


class TokenKey:
    """A tenant's key version, parsed when first used. Parsing never raises: a bad key only refuses its own tokens."""

    __slots__ = ("_prepared", "_secret", "algorithm")

    def __init__(self, secret: TenantSecret) -> None:
        self._secret = secret
        self._prepared: Callable[[bytes, bytes], bool] | BadKeyError | None = None
        self.algorithm = _JWT_ALGORITHM.get(secret.algorithm)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenKey) and self._secret == other._secret

    __hash__ = None  # type: ignore[assignment]  # holds a secret

    def __repr__(self) -> str:
        return f"TokenKey({self._secret.algorithm.value})"

    def verifier(self) -> Callable[[bytes, bytes], bool]:
        """Return the function (message, signature) -> valid. Raises `BadKeyError`, every time, for a malformed key."""
        if self._prepared is None:
            try:
                self._prepared = _load_verifier(self._secret)
            except BadKeyError as error:
                self._prepared = error
            except Exception:  # noqa: BLE001 - whatever a parser raises, one bad key must not hurt other tenants
                self._prepared = BadKeyError(f"not a usable {self._secret.algorithm.value} verification key")
        if isinstance(self._prepared, BadKeyError):
            raise BadKeyError(str(self._prepared))
        return self._prepared


KeyLookup = Callable[[str, int], TokenKey | None]
"""Finds the key of (tenant, version). May raise its source's operational errors; those pass through."""


def _load_verifier(secret: TenantSecret) -> Callable[[bytes, bytes], bool]:
    data = secret.data.expose()
    if secret.algorithm is SecretAlgorithm.HMAC_SHA256:
        # PyJWT refuses empty keys and public keys in disguise (PEM, DER, JWK), which anyone could sign with.
        key = _HMAC.prepare_key(data)
        return lambda message, signature: _HMAC.verify(message, key, signature)
    if secret.algorithm is SecretAlgorithm.BLAKE2S_MAC256:
        raise BadKeyError("not a token algorithm")
    public = load_der_public_key(data)
    if secret.algorithm is SecretAlgorithm.RSA_PKCS1_SHA256 and isinstance(public, RSAPublicKey):
        _check_modulus(public.key_size)
        return lambda message, signature: _RSA.verify(message, public, signature)
    if secret.algorithm is SecretAlgorithm.EDWARDS25519 and isinstance(public, Ed25519PublicKey):
        return lambda message, signature: _OKP.verify(message, public, signature)
    raise BadKeyError("the key is of another type than its algorithm says")


def _check_modulus(bits: int) -> None:
    if bits < RSA_BITS_MIN:
        raise WeakKeyError(f"an RSA key of {bits} bits is too weak: {RSA_BITS_MIN} is the least")


def _load_signer(secret: TenantSecret) -> Callable[[bytes], bytes]:
    data = secret.data.expose()
    if secret.algorithm is SecretAlgorithm.HMAC_SHA256:
        key = _HMAC.prepare_key(data)
        return lambda message: _HMAC.sign(message, key)
    if secret.algorithm is SecretAlgorithm.EDWARDS25519 and len(data) == _ED25519_SEED_BYTES:
        seed_key = Ed25519PrivateKey.from_private_bytes(data)
        return lambda message: _OKP.sign(message, seed_key)
    private = load_der_private_key(data, None)
    if secret.algorithm is SecretAlgorithm.RSA_PKCS1_SHA256 and isinstance(private, RSAPrivateKey):
        _check_modulus(private.key_size)
        return lambda message: _RSA.sign(message, private)
    if secret.algorithm is SecretAlgorithm.EDWARDS25519 and isinstance(private, Ed25519PrivateKey):
        return lambda message: _OKP.sign(message, private)
    raise BadKeyError("the key is of another type than its algorithm says")


# Parsing ------------------------------------------------------------------------------------------------------


class _Malformed(Exception):
    """The token is not a well-formed JWS; internal."""


_BASE64URL_TO_BASE64: Final = str.maketrans("-_", "+/")
_KID: Final = re.compile(r"([^:]*):([0-9]{1,20})")


def _base64url(part: str) -> bytes:
    """Decode unpadded base64url, refusing every non-canonical form."""
    try:
        raw = binascii.a2b_base64(part.translate(_BASE64URL_TO_BASE64) + "=" * (-len(part) % 4), strict_mode=True)
    except ValueError:
        raise _Malformed from None
    if urlsafe_b64encode(raw).rstrip(b"=").decode() != part:
        raise _Malformed
    return raw


def _refuse_constant(_: str) -> NoReturn:
    raise _Malformed


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _Malformed
    return members


def _json_object(part: str) -> dict[str, Any]:
    try:
        loaded = json.loads(_base64url(part).decode(), object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise _Malformed from None
    if not isinstance(loaded, dict):
        raise _Malformed
    return loaded


def _seconds(value: object) -> int:
    """Read a numeric date; fractions are truncated."""
    if type(value) is int:
        return value
    if type(value) is float and math.isfinite(value):
        return int(value)
    raise _Malformed


def _is_jwt_type(typ: object) -> bool:
    return isinstance(typ, str) and (typ.upper() == "JWT" or typ.upper().endswith("+JWT"))


def _parse_kid(kid: object) -> tuple[str, int] | None:
    match = _KID.fullmatch(kid) if isinstance(kid, str) else None
    if match is None or not is_tenant_name(match[1]) or int(match[2]) > VERSION_MAX:
        return None
    return match[1], int(match[2])


def claimed_audience(token: str) -> str | None:
    """Return the audience a token claims, unverified: to choose the realm against which it is then validated."""
    if len(token) > TOKEN_CHARS_MAX:
        return None
    try:
        _, claims_part, _ = token.split(".")
        audience = _json_object(claims_part).get("aud")
    except (_Malformed, ValueError):
        return None
    if isinstance(audience, list) and len(audience) == 1:
        audience = audience[0]
    return audience if isinstance(audience, str) else None


# Validation ---------------------------------------------------------------------------------------------------


def validate(
    token: str, *, realm: RealmId, now_s: float, keys: KeyLookup, scope: Scope = Scope.USER
) -> ValidToken | TokenRejection:
    """Verify a token for `realm` at `now_s` (Unix seconds). Never raises for any token; `keys` may raise.

    A missing scope is accepted for `Scope.USER` only. Cost: HS256 about 25 us, EdDSA 120 us.
    """
    signed = _verify_signature(token, keys)
    if isinstance(signed, TokenRejection):
        return signed
    claims, tenant, version = signed
    reason = next(_problems(claims, tenant, realm, now_s, scope), None)
    return claims if reason is None else TokenRejection(reason, tenant, version)


def problems(
    token: str, *, realm: RealmId, now_s: float, keys: KeyLookup, scope: Scope = Scope.USER
) -> list[RejectionReason]:
    """Return everything that is wrong with a token, in the order of the checks, for people who debug their maker.

    Without a verified signature there is only the first problem: nothing else in the token means anything.
    """
    signed = _verify_signature(token, keys)
    if isinstance(signed, TokenRejection):
        return [signed.reason]
    claims, tenant, _ = signed
    return list(_problems(claims, tenant, realm, now_s, scope))


def _verify_signature(token: str, keys: KeyLookup) -> tuple[ValidToken, str, int] | TokenRejection:
    """Check form, key and signature; return the claims, not yet judged, with tenant and version of the `kid`."""
    if len(token) > TOKEN_CHARS_MAX:
        return TokenRejection(RejectionReason.TOO_LONG)
    try:
        header_part, claims_part, signature_part = token.split(".")
        signed_bytes = f"{header_part}.{claims_part}".encode("ascii")
        header = _json_object(header_part)
        signature = _base64url(signature_part)
    except (_Malformed, ValueError):
        return TokenRejection(RejectionReason.MALFORMED)
    if "crit" in header or not _is_jwt_type(header.get("typ", "JWT")):
        return TokenRejection(RejectionReason.MALFORMED)

    named = _parse_kid(header.get("kid"))
    if named is None:
        return TokenRejection(RejectionReason.KID)
    tenant, version = named
    key = keys(tenant, version)
    if key is None:
        return TokenRejection(RejectionReason.UNKNOWN_KEY, tenant, version)
    try:
        verify = key.verifier()
    except BadKeyError:
        return TokenRejection(RejectionReason.BAD_KEY, tenant, version)
    if header.get("alg") != key.algorithm or not verify(signed_bytes, signature):
        return TokenRejection(RejectionReason.SIGNATURE, tenant, version)
    try:
        return _read_claims(_json_object(claims_part), version), tenant, version
    except _Malformed:
        return TokenRejection(RejectionReason.MALFORMED, tenant, version)


_NO_TEXT: Final = ""
"""Stands for a claim that is missing or not text where text is required; no rule accepts it."""


def _read_claims(claims: Mapping[str, object], version: int) -> ValidToken:
    """Read the claims into types; raises `_Malformed` for times that are missing or not numbers."""
    audience = claims.get("aud")
    if isinstance(audience, list) and len(audience) == 1:
        audience = audience[0]
    user = claims.get("sub")
    scope = claims.get("scope")
    return ValidToken(
        tenant=_text(claims.get("iss")),
        version=version,
        user=user if isinstance(user, str) and _is_utf8(user) else _NO_TEXT,
        audience=_text(audience),
        not_before=_seconds(claims.get("nbf")),
        expires=_seconds(claims.get("exp")),
        issued_at=_seconds(claims["iat"]) if "iat" in claims else None,
        scope=_text(scope).strip() if "scope" in claims else None,
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else _NO_TEXT


def _is_utf8(text: str) -> bool:
    """Tell whether text survives encoding; JSON escapes can smuggle in lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _problems(claims: ValidToken, tenant: str, realm: RealmId, now_s: float, scope: Scope) -> Iterator[RejectionReason]:
    """Judge signed claims, in the order of load-balancer.md 6.2. `tenant` is the one the key belongs to."""
    now = int(now_s)
    if now - LEEWAY_S > claims.expires:
        yield RejectionReason.EXPIRED
    if now + LEEWAY_S < max(claims.not_before, claims.issued_at or claims.not_before):
        yield RejectionReason.NOT_YET
    if not 0 <= claims.expires - claims.not_before <= LIFETIME_S_MAX:
        yield RejectionReason.LIFETIME
    if claims.audience != realm.hex():
        yield RejectionReason.AUDIENCE
    if claims.tenant != tenant:
        yield RejectionReason.ISSUER
    if not claims.user:
        yield RejectionReason.SUBJECT
    if claims.scope != scope.value and not (claims.scope is None and scope is Scope.USER):
        yield RejectionReason.SCOPE


class TokenCache:
    """Verified tokens, least recently used dropped first. Successes only, so garbage costs no memory.

    Every hit checks time, realm, scope and that the tenant's key is still the one that verified the token, so a
    disabled key version takes effect at once. Not shared between threads.
    """

    __slots__ = ("_entries", "_entries_max")

    def __init__(self, entries_max: int = CACHED_TOKENS_MAX) -> None:
        check(entries_max >= 1, "a token cache holds at least one token")
        self._entries: OrderedDict[str, tuple[ValidToken, TokenKey]] = OrderedDict()
        self._entries_max = entries_max

    def __len__(self) -> int:
        return len(self._entries)

    def validate(
        self, token: str, *, realm: RealmId, now_s: float, keys: KeyLookup, scope: Scope = Scope.USER
    ) -> ValidToken | TokenRejection:
        """Answer exactly what `validate` would, at about 1 us for a token seen before."""
        entry = self._entries.get(token)
        if entry is not None:
            valid, key = entry
            current = keys(valid.tenant, valid.version)
            if current is key or current == key:
                problem = next(_problems(valid, valid.tenant, realm, now_s, scope), None)
                if problem is None:
                    self._entries.move_to_end(token)
                    return valid
            del self._entries[token]
        result = validate(token, realm=realm, now_s=now_s, keys=keys, scope=scope)
        if isinstance(result, ValidToken):
            verified_by = keys(result.tenant, result.version)
            if verified_by is not None:
                self._entries[token] = (result, verified_by)
                if len(self._entries) > self._entries_max:
                    self._entries.popitem(last=False)
        return result


# Minting ------------------------------------------------------------------------------------------------------


def create(
    secret: TenantSecret,
    *,
    tenant: str,
    version: int,
    user: str,
    realm: RealmId,
    now_s: int,
    lifetime_s: int = 600,
    scope: Scope | None = Scope.USER,
) -> str:
    """Mint a token valid from `now_s` for `lifetime_s` seconds. Raises `BadKeyError` or `LocalError`.

    `secret` holds the *signing* key: the shared key, PKCS#8 DER, or a 32-byte Ed25519 seed. A realm's stored entry for
    a production tenant is only a public key and gives `BadKeyError`.
    """
    if not is_tenant_name(tenant):
        raise LocalError(TENANT_RULE)
    if not user:
        raise LocalError("the user id is empty")
    if not 0 <= lifetime_s <= LIFETIME_S_MAX:
        raise LocalError(f"a token lives 0 to {LIFETIME_S_MAX} seconds, not {lifetime_s}")
    algorithm = _JWT_ALGORITHM.get(secret.algorithm)
    try:
        sign = _load_signer(secret)
    except WeakKeyError:
        raise
    except Exception:  # noqa: BLE001 - parsers of private keys raise many types; all mean the same to the caller
        raise BadKeyError(
            f"not a {secret.algorithm.value} signing key; a public key can verify tokens but not mint them"
        ) from None
    header = {"alg": algorithm, "kid": f"{tenant}:{version}", "typ": "JWT"}
    claims: dict[str, str | int] = {
        "iat": now_s,
        "exp": now_s + lifetime_s,
        "nbf": now_s,
        "iss": tenant,
        "sub": user,
        "aud": realm.hex(),
    }
    if scope is not None:
        claims["scope"] = scope.value
    message = f"{_encode_part(header)}.{_encode_part(claims)}"
    signature = urlsafe_b64encode(sign(message.encode())).rstrip(b"=").decode()
    token = f"{message}.{signature}"
    if len(token) > TOKEN_CHARS_MAX:
        raise LocalError(f"the token would have {len(token)} characters, more than {TOKEN_CHARS_MAX}")
    return token


def _encode_part(members: Mapping[str, object]) -> str:
    raw = json.dumps(members, separators=(",", ":"), ensure_ascii=False).encode()
    return urlsafe_b64encode(raw).rstrip(b"=").decode()
