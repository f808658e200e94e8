"""Auth tokens: the matrix of load-balancer.md 11, the rules of client-protocol.md 14, caching and minting."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from juicebox_hsm import tokens
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.errors import LocalError
from juicebox_hsm.ids import RealmId
from juicebox_hsm.tenant_keys import SecretAlgorithm, TenantSecret, parse_payload
from juicebox_hsm.tokens import (
    BadKeyError,
    RejectionReason,
    Scope,
    TokenCache,
    TokenKey,
    TokenRejection,
    ValidToken,
)
from tests.vectors import VECTORS

REALM = RealmId(bytes.fromhex(VECTORS["jwt"]["realm_id"]))
NOW = 1_700_000_300
HMAC_KEY = b"k" * 32


@pytest.fixture(scope="module")
def rsa() -> RSAPrivateKey:
    """One RSA key for the module; making them is slow."""
    return generate_private_key(65537, 2048)


def hmac_secret(key: bytes = HMAC_KEY) -> TenantSecret:
    """Return a shared tenant key."""
    return TenantSecret(Secret(key), SecretAlgorithm.HMAC_SHA256)


def lookup(secret: TenantSecret, tenant: str = "acme", version: int = 1) -> tokens.KeyLookup:
    """Return a lookup that knows one key."""
    key = TokenKey(secret)
    return lambda name, number: key if (name, number) == (tenant, version) else None


def b64(data: bytes) -> str:
    """Encode as base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forge(
    header: object | None = None,
    claims: object | None = None,
    sign: Callable[[bytes], bytes] = lambda m: hmac.digest(HMAC_KEY, m, "sha256"),
    **changes: Any,
) -> str:
    """Sign arbitrary members. Keyword arguments change claims (None removes one); str and bytes pass through raw."""
    members: dict[str, Any] = {
        "iss": "acme",
        "sub": "mario",
        "aud": REALM.hex(),
        "exp": NOW + 600,
        "nbf": NOW,
        "iat": NOW,
        "scope": "user",
    }
    for name, value in changes.items():
        members[name] = value
        if value is None:
            del members[name]
    if header is None:
        header = {"alg": "HS256", "kid": "acme:1", "typ": "JWT"}
    parts = []
    for part in (header, members if claims is None else claims):
        encoded = part if isinstance(part, str | bytes) else json.dumps(part)
        parts.append(b64(encoded.encode() if isinstance(encoded, str) else encoded))
    message = ".".join(parts)
    return f"{message}.{b64(sign(message.encode()))}"


def judge(token: str, secret: TenantSecret | None = None, **options: Any) -> RejectionReason | None:
    """Validate and return only the reason, or None for a valid token."""
    keys = options.pop("keys", None) or lookup(secret or hmac_secret())
    result = tokens.validate(token, realm=REALM, now_s=options.pop("now_s", NOW), keys=keys, **options)
    return result.reason if isinstance(result, TokenRejection) else None


@pytest.mark.parametrize(("name", "version"), [("hs256", 1), ("eddsa", 2)])
def test_vectors(name: str, version: int) -> None:
    """The published tokens validate, and minting gives them byte for byte."""
    vector = VECTORS["jwt"][name]
    secret = parse_payload(json.dumps(vector["secret"]), name)
    keys = lookup(secret, "test-acme", version)
    result = tokens.validate(vector["token"], realm=REALM, now_s=VECTORS["jwt"]["now_ok"], keys=keys)
    assert isinstance(result, ValidToken)
    assert (result.tenant, result.user, result.scope) == ("test-acme", "mario", "user")
    signing = secret
    if name == "eddsa":
        signing = TenantSecret(Secret(bytes.fromhex(vector["private_pkcs8"])), SecretAlgorithm.EDWARDS25519)
    minted = tokens.create(signing, tenant="test-acme", version=version, user="mario", realm=REALM, now_s=1_700_000_000)
    assert minted == vector["token"]


def asymmetric(rsa_key: RSAPrivateKey, algorithm: str) -> tuple[TenantSecret, TenantSecret]:
    """Return (private, public) secrets of an algorithm; for HS256 both are the shared key."""
    if algorithm == "HS256":
        return hmac_secret(), hmac_secret()
    key = rsa_key if algorithm == "RS256" else Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    kind = SecretAlgorithm.RSA_PKCS1_SHA256 if algorithm == "RS256" else SecretAlgorithm.EDWARDS25519
    private = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return TenantSecret(Secret(private), kind), TenantSecret(Secret(public), kind)


ALGORITHMS = ["HS256", "RS256", "EdDSA"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", ["ok", "wrong key", "wrong alg", "none", "cut signature", "changed claims"])
def test_algorithm_matrix(rsa: RSAPrivateKey, algorithm: str, case: str) -> None:
    """Only a signature by the named key under that key's own algorithm counts."""
    private, public = asymmetric(rsa, algorithm)
    token = tokens.create(private, tenant="acme", version=1, user="mario", realm=REALM, now_s=NOW)
    header, claims, signature = token.split(".")
    stored = public
    if case == "wrong key":
        others = {
            "HS256": hmac_secret(b"o" * 32),
            "RS256": None,
            "EdDSA": asymmetric(rsa, "EdDSA")[1],
        }
        other = others[algorithm]
        if algorithm == "RS256":
            second = generate_private_key(65537, 2048)
            other = asymmetric(second, "RS256")[1]
        if algorithm == "EdDSA":
            raw = Ed25519PrivateKey.from_private_bytes(b"x" * 32).public_key()
            der = raw.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            other = TenantSecret(Secret(der), SecretAlgorithm.EDWARDS25519)
        assert other is not None
        stored = other
    elif case == "wrong alg":
        wrong = ALGORITHMS[(ALGORITHMS.index(algorithm) + 1) % 3]
        header = b64(json.dumps({"alg": wrong, "kid": "acme:1"}).encode())
    elif case == "none":
        header = b64(json.dumps({"alg": "none", "kid": "acme:1"}).encode())
        signature = ""
    elif case == "cut signature":
        signature = b64(base64.urlsafe_b64decode(signature + "==")[:-1])
    elif case == "changed claims":
        claims = b64(base64.urlsafe_b64decode(claims + "==").replace(b"mario", b"luigi"))
    expected = None if case == "ok" else RejectionReason.SIGNATURE
    assert judge(f"{header}.{claims}.{signature}", stored) is expected


def _sign(rsa_key: RSAPrivateKey, algorithm: str, message: bytes) -> bytes:
    """Sign as the holder of the key in `asymmetric` can."""
    match algorithm:
        case "HS256":
            return hmac.digest(HMAC_KEY, message, "sha256")
        case "RS256":
            return rsa_key.sign(message, PKCS1v15(), SHA256())
        case _:
            return Ed25519PrivateKey.from_private_bytes(bytes(range(32))).sign(message)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("claimed", [*ALGORITHMS, "HS384", "hs256", "none", "", None, 7, ["HS256"]])
def test_a_header_that_claims_another_algorithm(rsa: RSAPrivateKey, algorithm: str, claimed: object) -> None:
    """The word of the header must be the key's own, even where the signature over that very header verifies."""
    _, public = asymmetric(rsa, algorithm)
    header = {"alg": claimed, "kid": "acme:1"}
    if claimed is None:
        del header["alg"]
    token = forge(header, sign=lambda message: _sign(rsa, algorithm, message))
    assert judge(token, public) is (None if claimed == algorithm else RejectionReason.SIGNATURE)


@pytest.mark.parametrize("algorithm", ["RS256", "EdDSA"])
def test_algorithm_confusion(rsa: RSAPrivateKey, algorithm: str) -> None:
    """A public key is never an HMAC secret: neither by the token's word nor by a mislabelled entry."""
    _, public = asymmetric(rsa, algorithm)
    der = public.data.expose()
    confused = forge(sign=lambda message: hmac.digest(der, message, "sha256"))
    assert judge(confused, public) is RejectionReason.SIGNATURE
    assert judge(confused, TenantSecret(Secret(der), SecretAlgorithm.HMAC_SHA256)) is RejectionReason.BAD_KEY


def test_pkcs1_public_key(rsa: RSAPrivateKey) -> None:
    """A PKCS#1 public key is accepted beside SubjectPublicKeyInfo."""
    private, _ = asymmetric(rsa, "RS256")
    pkcs1 = rsa.public_key().public_bytes(Encoding.DER, PublicFormat.PKCS1)
    token = tokens.create(private, tenant="acme", version=1, user="mario", realm=REALM, now_s=NOW)
    assert judge(token, TenantSecret(Secret(pkcs1), SecretAlgorithm.RSA_PKCS1_SHA256)) is None


@pytest.mark.parametrize(
    "kid",
    [
        "a:b:1", "a:", "a:latest", "a-b:1", "acme", ":1", "acme:-1", "acme:+1", "acme: 1", "acme:1 ",
        "acme:18446744073709551616", "acme:1\n", "test-:1", "test-a-b:1", "TEST-a:1", "acmé:1", "acme:\u0661",
        1, None, ["acme:1"],
    ],
)  # fmt: skip
def test_bad_kid(kid: object) -> None:
    """Key ids are TENANT:VERSION with a plain tenant name and an unsigned 64-bit version, nothing else."""
    assert judge(forge({"alg": "HS256", "kid": kid})) is RejectionReason.KID


@pytest.mark.parametrize(("kid", "version"), [("test-acme:1", 1), ("test-acme:18446744073709551615", 2**64 - 1)])
def test_good_kid(kid: str, version: int) -> None:
    """The test- prefix is part of the tenant's name, and versions use all 64 bits."""
    token = forge({"alg": "HS256", "kid": kid}, iss="test-acme")
    assert judge(token, keys=lookup(hmac_secret(), "test-acme", version)) is None


def test_kid_of_another_tenant() -> None:
    """A key only vouches for its own tenant."""
    assert judge(forge(iss="other")) is RejectionReason.ISSUER
    assert judge(forge({"alg": "HS256", "kid": "other:1"})) is RejectionReason.UNKNOWN_KEY
    assert judge(forge({"alg": "HS256", "kid": "acme:2"})) is RejectionReason.UNKNOWN_KEY


@pytest.mark.parametrize(
    ("aud", "reason"),
    [
        (REALM.hex(), None),
        ([REALM.hex()], None),
        ([REALM.hex(), REALM.hex()], RejectionReason.AUDIENCE),
        ([REALM.hex(), "11" * 16], RejectionReason.AUDIENCE),
        ([], RejectionReason.AUDIENCE),
        ([[REALM.hex()]], RejectionReason.AUDIENCE),
        ("11" * 16, RejectionReason.AUDIENCE),
        (REALM.hex().upper(), RejectionReason.AUDIENCE),
        ("00010203-0405-0607-0809-0a0b0c0d0e0f", RejectionReason.AUDIENCE),
        (5, RejectionReason.AUDIENCE),
        (None, RejectionReason.AUDIENCE),
    ],
)
def test_audience(aud: object, reason: RejectionReason | None) -> None:
    """The audience is exactly this realm, as a text or a list of one."""
    assert judge(forge(aud=aud)) is reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"exp": NOW - 5, "nbf": NOW - 600}, None),
        ({"exp": NOW - 6, "nbf": NOW - 600}, RejectionReason.EXPIRED),
        ({"nbf": NOW + 5}, None),
        ({"nbf": NOW + 6}, RejectionReason.NOT_YET),
        ({"iat": NOW + 5}, None),
        ({"iat": NOW + 6}, RejectionReason.NOT_YET),
        ({"iat": None}, None),
        ({"exp": NOW + 86_400}, None),
        ({"exp": NOW + 86_401}, RejectionReason.LIFETIME),
        ({"exp": NOW, "nbf": NOW + 1}, RejectionReason.LIFETIME),
        ({"exp": NOW, "nbf": NOW}, None),
        ({"exp": None}, RejectionReason.MALFORMED),
        ({"nbf": None}, RejectionReason.MALFORMED),
        ({"exp": NOW + 86_400.9}, None),
        ({"exp": NOW - 5 + 0.9, "nbf": NOW - 600.5}, None),
        ({"nbf": NOW + 5.9}, None),
        ({"exp": True}, RejectionReason.MALFORMED),
        ({"iat": False}, RejectionReason.MALFORMED),
        ({"exp": str(NOW)}, RejectionReason.MALFORMED),
        ({"exp": 10**300}, RejectionReason.LIFETIME),
        ({"nbf": -(10**300)}, RejectionReason.LIFETIME),
        ({"exp": 1e300}, RejectionReason.LIFETIME),
        ({"iat": [NOW]}, RejectionReason.MALFORMED),
    ],
)
def test_times(changes: dict[str, Any], reason: RejectionReason | None) -> None:
    """Leeway is 5 s to the second, the lifetime cap 24 h to the second, fractions are truncated, types are numbers."""
    assert judge(forge(**changes)) is reason


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1E+400"])
def test_times_that_are_not_finite(value: str) -> None:
    """Python's JSON reader accepts these; the validator must not, nor crash on them."""
    claims = f'{{"iss":"acme","sub":"m","aud":"{REALM.hex()}","nbf":{NOW},"exp":{value}}}'
    assert judge(forge(claims=claims)) is RejectionReason.MALFORMED


@pytest.mark.parametrize("sub", ["", None, 5, ["mario"], True])
def test_bad_subject(sub: object) -> None:
    """The user id is a non-empty text."""
    assert judge(forge(sub=sub)) is RejectionReason.SUBJECT


def test_subject_with_lone_surrogate() -> None:
    """A user id that cannot be encoded would crash the record id later; it is refused here."""
    assert judge(forge(sub="\ud800")) is RejectionReason.SUBJECT


@pytest.mark.parametrize(
    ("scope", "user", "audit"),
    [
        (None, True, False),
        ("user", True, False),
        (" user ", True, False),
        ("audit", False, True),
        ("auditor", False, False),
        ("user audit", False, False),
        ("USER", False, False),
        ("", False, False),
        (5, False, False),
    ],
)
def test_scopes(scope: object, user: bool, audit: bool) -> None:
    """`user` may be missing, `audit` may not, anything else is refused."""
    token = forge(scope=scope)
    assert (judge(token) is None) is user
    assert (judge(token, scope=Scope.AUDIT) is None) is audit


def test_exactly_1000_characters() -> None:
    """A valid token of exactly 1000 characters passes and one of 1001 or more does not."""
    lengths = {}
    for pad in range(450, 560):
        for kid_pad in ("", "x", "xx"):
            token = forge({"alg": "HS256", "kid": "acme:1", "y": kid_pad}, pad="p" * pad)
            lengths[len(token)] = token
    assert judge(lengths[1000]) is None
    assert judge("a" * 1000) is RejectionReason.MALFORMED
    longer = min(length for length in lengths if length > 1000)
    assert judge(lengths[longer]) is RejectionReason.TOO_LONG


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "HS256", "kid": "acme:1", "crit": ["exp"]},
        {"alg": "HS256", "kid": "acme:1", "crit": []},
        {"alg": "HS256", "kid": "acme:1", "typ": "JOSE"},
        {"alg": "HS256", "kid": "acme:1", "typ": 5},
        '{"alg":"HS256","alg":"HS256","kid":"acme:1"}',
        '["HS256"]',
        '"x"',
        "",
        "{",
        b"\xff\xfe{\x00}\x00",
        b"\xef\xbb\xbf{}",
        "[" * 450,
    ],
)
def test_malformed_headers(header: object) -> None:
    """Critical extensions, foreign types, duplicates and everything that is not a JSON object are refused."""
    assert judge(forge(header)) is RejectionReason.MALFORMED


@pytest.mark.parametrize("typ", ["JWT", "jwt", "at+JWT", "at+jwt"])
def test_types(typ: str) -> None:
    """The type is JWT or ends in +JWT, in any case."""
    assert judge(forge({"alg": "HS256", "kid": "acme:1", "typ": typ})) is None


@pytest.mark.parametrize(
    "change", ["padding", "newline", "standard alphabet", "trailing bits", "four parts", "two parts"]
)
def test_encodings(change: str) -> None:
    """Base64url has one spelling: no padding, no blanks, no other alphabet, no stray bits."""
    token = forge()
    header, claims, signature = token.split(".")
    tokens_by_change = {
        "padding": f"{header}.{claims}.{signature}=",
        "newline": f"{header}.{claims}.{signature}\n",
        "standard alphabet": f"{header}.{claims}.+/{signature[2:]}",
        "trailing bits": f"{header}.{claims}.{signature[:-1]}{chr(ord(signature[-1]) + 1)}",
        "four parts": f"{token}.x",
        "two parts": f"{header}.{claims}",
    }
    assert judge(tokens_by_change[change]) is RejectionReason.MALFORMED


@pytest.mark.parametrize("claims", ["[]", "5", "{", '{"sub":"a","sub":"b"}', "[" * 500, "\u00fc"])
def test_malformed_claims(claims: str) -> None:
    """Signed claims that are not one JSON object with distinct members are refused."""
    assert judge(forge(claims=claims)) is RejectionReason.MALFORMED


@pytest.mark.parametrize("token", ["", ".", "..", "...", "é.é.é", "\ud800.a.b", "a" * 50])
def test_garbage(token: str) -> None:
    """Text that is no token at all is refused, also text that cannot be encoded."""
    assert judge(token) is RejectionReason.MALFORMED


@pytest.mark.parametrize(
    ("algorithm", "data"),
    [
        (SecretAlgorithm.EDWARDS25519, b""),
        (SecretAlgorithm.EDWARDS25519, b"\x30\x2a"),
        (SecretAlgorithm.RSA_PKCS1_SHA256, b"\x00" * 300),
        (SecretAlgorithm.RSA_PKCS1_SHA256, bytes.fromhex(VECTORS["jwt"]["eddsa"]["secret"]["data"])),
        (SecretAlgorithm.HMAC_SHA256, b""),
        (SecretAlgorithm.BLAKE2S_MAC256, b"k" * 32),
    ],
)
def test_bad_stored_keys(algorithm: SecretAlgorithm, data: bytes) -> None:
    """A malformed stored key refuses its own tenant's tokens, every time, and nothing else."""
    bad = TokenKey(TenantSecret(Secret(data), algorithm))
    good = TokenKey(hmac_secret())

    def keys(tenant: str, version: int) -> TokenKey:
        return bad if tenant == "bad" else good

    for _ in range(2):
        token = forge({"alg": bad.algorithm, "kid": "bad:1"}, iss="bad")
        assert judge(token, keys=keys) is RejectionReason.BAD_KEY
    assert judge(forge(), keys=keys) is None


def test_problems_lists_everything() -> None:
    """The debugging view reports all problems of a signed token, in the order of the checks."""
    token = forge(exp=NOW - 100, nbf=NOW - 100_000, aud="x", iss="y", sub="", scope="z")
    found = tokens.problems(token, realm=REALM, now_s=NOW, keys=lookup(hmac_secret()))
    assert found == [
        RejectionReason.EXPIRED,
        RejectionReason.LIFETIME,
        RejectionReason.AUDIENCE,
        RejectionReason.ISSUER,
        RejectionReason.SUBJECT,
        RejectionReason.SCOPE,
    ]
    assert tokens.problems("x", realm=REALM, now_s=NOW, keys=lookup(hmac_secret())) == [RejectionReason.MALFORMED]


class CountingKeys:
    """A lookup over changeable keys that counts verifier calls through fresh TokenKeys."""

    def __init__(self) -> None:
        self.key: TokenKey | None = TokenKey(hmac_secret())

    def __call__(self, tenant: str, version: int) -> TokenKey | None:
        return self.key


def cached(cache: TokenCache, token: str, keys: tokens.KeyLookup, now_s: float = NOW, realm: RealmId = REALM) -> object:
    """Validate through a cache; the reason, or the valid token."""
    result = cache.validate(token, realm=realm, now_s=now_s, keys=keys)
    return result.reason if isinstance(result, TokenRejection) else result


def test_cache_skips_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hit returns the same verified claims without a second signature check."""
    cache, keys, token = TokenCache(), CountingKeys(), forge()
    first = cached(cache, token, keys)
    monkeypatch.setattr(TokenKey, "verifier", lambda self: pytest.fail("verified again"))
    assert cached(cache, token, keys) is first


def test_cache_rechecks_time_realm_and_scope() -> None:
    """A cached token expires, belongs to its realm only, and keeps its scope."""
    cache, keys, token = TokenCache(), CountingKeys(), forge()
    assert isinstance(cached(cache, token, keys), ValidToken)
    assert cached(cache, token, keys, realm=RealmId(b"r" * 16)) is RejectionReason.AUDIENCE
    assert isinstance(cached(cache, token, keys), ValidToken)
    assert cached(cache, token, keys, now_s=NOW - 6) is RejectionReason.NOT_YET
    assert cached(cache, token, keys, now_s=NOW + 606) is RejectionReason.EXPIRED
    assert isinstance(cached(cache, token, keys), ValidToken)
    audit = cache.validate(token, realm=REALM, now_s=NOW, keys=keys, scope=Scope.AUDIT)
    assert audit == TokenRejection(RejectionReason.SCOPE, "acme", 1)


def test_cache_follows_keys() -> None:
    """A changed or disabled key takes effect at once; an equal key read again keeps the entry."""
    cache, keys, token = TokenCache(), CountingKeys(), forge()
    first = cached(cache, token, keys)
    keys.key = TokenKey(hmac_secret())
    assert cached(cache, token, keys) is first
    keys.key = TokenKey(hmac_secret(b"n" * 32))
    assert cached(cache, token, keys) is RejectionReason.SIGNATURE
    keys.key = None
    assert cached(cache, token, keys) is RejectionReason.UNKNOWN_KEY
    assert len(cache) == 0


def test_cache_is_bounded_and_keeps_successes_only() -> None:
    """The least recently used token goes first; refused tokens take no room."""
    cache, keys = TokenCache(2), CountingKeys()
    one, two, three = (forge(sub=user) for user in ("1", "2", "3"))
    cached(cache, one, keys)
    cached(cache, two, keys)
    kept = cached(cache, one, keys)
    cached(cache, three, keys)
    cached(cache, "garbage", keys)
    assert len(cache) == 2
    assert cached(cache, one, keys) is kept


def test_minting_needs_a_private_key(rsa: RSAPrivateKey) -> None:
    """Minting from a realm's stored public key is a clear error; a bare Ed25519 seed works."""
    for algorithm in ("RS256", "EdDSA"):
        _, public = asymmetric(rsa, algorithm)
        with pytest.raises(BadKeyError, match="signing key"):
            tokens.create(public, tenant="acme", version=1, user="m", realm=REALM, now_s=NOW)
    seed = TenantSecret(Secret(bytes(range(32))), SecretAlgorithm.EDWARDS25519)
    token = tokens.create(seed, tenant="acme", version=1, user="mario", realm=REALM, now_s=NOW)
    assert judge(token, asymmetric(rsa, "EdDSA")[1]) is None


@pytest.mark.parametrize(
    "options",
    [
        {"tenant": "a-b"},
        {"tenant": "a:b"},
        {"user": ""},
        {"lifetime_s": 86_401},
        {"lifetime_s": -1},
        {"user": "u" * 900},
    ],
)
def test_minting_refuses_what_realms_would(options: dict[str, Any]) -> None:
    """A token no realm would accept is not made."""
    arguments: dict[str, Any] = {"tenant": "acme", "user": "mario", "lifetime_s": 600, **options}
    with pytest.raises(LocalError):
        tokens.create(hmac_secret(), version=1, realm=REALM, now_s=NOW, **arguments)


def test_minting_without_scope() -> None:
    """A token without scope can be made, for realms that still accept it, and works for users only."""
    token = tokens.create(hmac_secret(), tenant="acme", version=1, user="m", realm=REALM, now_s=NOW, scope=None)
    assert judge(token) is None
    assert judge(token, scope=Scope.AUDIT) is RejectionReason.SCOPE


def test_minting_with_a_key_of_another_type(rsa: RSAPrivateKey) -> None:
    """A private key of another type than its label says does not sign."""
    private, _ = asymmetric(rsa, "RS256")
    mislabelled = TenantSecret(private.data, SecretAlgorithm.EDWARDS25519)
    with pytest.raises(BadKeyError):
        tokens.create(mislabelled, tenant="acme", version=1, user="m", realm=REALM, now_s=NOW)


def test_cache_with_a_key_that_vanishes_meanwhile() -> None:
    """A token whose key is gone right after its verification is answered but not kept."""
    answers = [TokenKey(hmac_secret()), None]
    cache = TokenCache()
    result = cache.validate(forge(), realm=REALM, now_s=NOW, keys=lambda tenant, version: answers.pop(0))
    assert isinstance(result, ValidToken)
    assert len(cache) == 0


def test_nothing_prints_keys_or_users() -> None:
    """Keys and user ids stay out of every printed form."""
    secret = hmac_secret()
    valid = tokens.validate(forge(), realm=REALM, now_s=NOW, keys=lookup(secret))
    printed = f"{secret!r} {TokenKey(secret)!r} {valid!r} {secret.data}"
    assert "mario" not in printed
    assert "kkk" not in printed
    assert hashlib.sha256(HMAC_KEY).hexdigest() not in printed


@pytest.mark.parametrize(
    ("claims", "expect"),
    [
        ({"aud": "abc"}, "abc"),
        ({"aud": ["abc"]}, "abc"),
        ({"aud": ["a", "b"]}, None),
        ({"aud": 5}, None),
        ({}, None),
    ],
)
def test_claimed_audience(claims: dict[str, object], expect: str | None) -> None:
    """The claimed audience is read without a key, from good tokens only; it proves nothing."""
    part = b64(json.dumps(claims).encode())
    assert tokens.claimed_audience(f"e30.{part}.AA") == expect
    for broken in ("", "a.b", "e30.!.AA", f"{part}{part}", "x" * 1001, f"e30.{b64(b'[]')}.AA", "e30.e30.\u00e9."):
        assert tokens.claimed_audience(broken) is None


@pytest.mark.parametrize("bits", [1024, 2040])
def test_rsa_keys_under_2048_bits_are_refused(bits: int) -> None:
    """Neither a token is verified nor one minted with an RSA key that is too short; the reason says so."""
    private = generate_private_key(65537, bits)
    public = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(BadKeyError, match=f"{bits} bits is too weak"):
        TokenKey(TenantSecret(Secret(public), SecretAlgorithm.RSA_PKCS1_SHA256)).verifier()
    der = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    signing = TenantSecret(Secret(der), SecretAlgorithm.RSA_PKCS1_SHA256)
    with pytest.raises(BadKeyError, match=f"{bits} bits is too weak"):
        tokens.create(signing, tenant="test-a", version=1, user="u", realm=RealmId(bytes(16)), now_s=0)
