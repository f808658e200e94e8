"""Token validation on random and mutated tokens: a documented answer, never an exception, never a forgery."""

from __future__ import annotations

import base64
import hmac
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm import tokens
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.ids import RealmId
from juicebox_hsm.tenant_keys import SecretAlgorithm, TenantSecret
from juicebox_hsm.tokens import TokenCache, TokenKey, TokenRejection, ValidToken

REALM = RealmId(bytes(range(16)))
NOW = 1_700_000_000
SECRET = TenantSecret(Secret(b"k" * 32), SecretAlgorithm.HMAC_SHA256)
KEY = TokenKey(SECRET)
GOOD = tokens.create(SECRET, tenant="acme", version=1, user="mario", realm=REALM, now_s=NOW)

members = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def keys(tenant: str, version: int) -> TokenKey | None:
    """Know one key."""
    return KEY if (tenant, version) == ("acme", 1) else None


def judge(token: str, now_s: float = NOW) -> ValidToken | TokenRejection:
    """Validate, and check that the cache says the same, twice."""
    result = tokens.validate(token, realm=REALM, now_s=now_s, keys=keys)
    cache = TokenCache()
    for _ in range(2):
        assert cache.validate(token, realm=REALM, now_s=now_s, keys=keys) == result
    return result


def signed(header: object, claims: object) -> str:
    """Sign whatever members."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (header, claims)]
    message = ".".join(parts)
    signature = hmac.digest(b"k" * 32, message.encode(), "sha256")
    return f"{message}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


@given(st.text(max_size=1100) | st.from_regex(r"[A-Za-z0-9_-]{0,40}\.[A-Za-z0-9_-]{0,40}\.[A-Za-z0-9_-]{0,40}"))
def test_random_text(token: str) -> None:
    """Random text is refused with a reason."""
    assert isinstance(judge(token), TokenRejection)


@given(place=st.integers(0, len(GOOD)), removed=st.integers(0, 3), inserted=st.text(max_size=3))
def test_mutated_tokens(place: int, removed: int, inserted: str) -> None:
    """Any change to a good token invalidates it."""
    token = GOOD[:place] + inserted + GOOD[place + removed :]
    assert isinstance(judge(token), ValidToken) is (token == GOOD)


@given(
    changes=st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "jku", "zip"]), members, max_size=3),
    claim_changes=st.dictionaries(
        st.sampled_from(["iss", "sub", "aud", "exp", "nbf", "iat", "scope", "x"]), members, max_size=4
    ),
)
def test_signed_nonsense(changes: dict[str, Any], claim_changes: dict[str, Any]) -> None:
    """A tenant that signs nonsense gets a reason; what passes obeys the rules."""
    claims = {"iss": "acme", "sub": "mario", "aud": REALM.hex(), "exp": NOW + 60, "nbf": NOW, **claim_changes}
    header = {"alg": "HS256", "kid": "acme:1", **changes}
    result = judge(signed(header, claims))
    if isinstance(result, ValidToken):
        assert (header["alg"], header["kid"]) == ("HS256", "acme:1")
        assert "crit" not in header
        assert result.tenant == "acme"
        assert result.user == claims["sub"] != ""
        assert 0 <= result.expires - result.not_before <= tokens.LIFETIME_S_MAX
        assert result.not_before - 5 <= NOW <= result.expires + 5


@given(offset=st.integers(-90_000, 90_000), lifetime=st.integers(0, 86_400))
def test_validity_window(offset: int, lifetime: int) -> None:
    """A minted token is valid exactly from 5 s before its start to 5 s after its end."""
    token = tokens.create(SECRET, tenant="acme", version=1, user="m", realm=REALM, now_s=NOW, lifetime_s=lifetime)
    assert isinstance(judge(token, NOW + offset), ValidToken) is (-5 <= offset <= lifetime + 5)
