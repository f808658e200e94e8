"""`secrets`: keys that tenants drew themselves, keys that end, and private halves that nobody sees unasked."""

from __future__ import annotations

import json
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.adapters.tls.certificates import init_ca
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.ids import RealmId
from juicebox_hsm.tenant_keys import SecretAlgorithm, TenantSecret, parse_file, tenant_secret_name
from juicebox_hsm.tokens import Scope, TokenKey, create, problems
from roles.cli import cli
from roles.tools.secrets.public_keys import KEYS_MAX, UnusableKey, read_public_keys
from tests.terminal import run_on_terminal

REALM = RealmId(bytes(16))
PKCS8 = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
SPKI = (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
Pair = rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


@pytest.fixture(scope="module")
def rsa_pair() -> rsa.RSAPrivateKey:
    """A key that is strong enough."""
    return rsa.generate_private_key(65537, 2048)


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def _import(tmp_path: Path, data: bytes, tenant: str = "acme") -> Result:
    (tmp_path / "key").write_bytes(data)
    return _run("secrets", "import", tenant, "--public-key", tmp_path / "key", "--file", tmp_path / "s.json")


def _versions(tmp_path: Path, tenant: str = "acme") -> dict[int, TenantSecret]:
    return parse_file((tmp_path / "s.json").read_bytes()).get(tenant_secret_name(tenant), {})


def _accepts(secret: TenantSecret, pair: Pair, version: int) -> bool:
    """Tell whether a balancer that holds `secret` takes a token that the tenant signed with its own half."""
    private = pair.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    algorithm = (
        SecretAlgorithm.RSA_PKCS1_SHA256 if isinstance(pair, rsa.RSAPrivateKey) else SecretAlgorithm.EDWARDS25519
    )
    now_s = int(time.time())
    token = create(
        TenantSecret(Secret(private), algorithm), tenant="acme", version=version, user="u", realm=REALM, now_s=now_s,
        lifetime_s=60, scope=Scope.USER,
    )  # fmt: skip
    key = TokenKey(secret)
    return not problems(token, realm=REALM, now_s=now_s, keys=lambda _tenant, _version: key, scope=Scope.USER)


def _base64url(number: int | bytes) -> str:
    raw = number if isinstance(number, bytes) else number.to_bytes((number.bit_length() + 7) // 8, "big")
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


def _jwk(pair: Pair, **more: Any) -> dict[str, Any]:
    if isinstance(pair, rsa.RSAPrivateKey):
        numbers = pair.public_key().public_numbers()
        return {"kty": "RSA", "n": _base64url(numbers.n), "e": _base64url(numbers.e), **more}
    raw = pair.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return {"kty": "OKP", "crv": "Ed25519", "x": _base64url(raw), **more}


@pytest.mark.parametrize("kind", ["rsa", "rsa-pkcs1", "ed25519"])
def test_a_pem_key_becomes_a_version(tmp_path: Path, kind: str, rsa_pair: rsa.RSAPrivateKey) -> None:
    """Tokens that the tenant signs with its half are taken; the next import is the next version."""
    pair: Pair = ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else rsa_pair
    form = (Encoding.PEM, PublicFormat.PKCS1) if kind == "rsa-pkcs1" else SPKI
    result = _import(tmp_path, pair.public_key().public_bytes(*form))
    assert result.exit_code == 0, result.output
    assert "acme:1" in result.output
    assert _accepts(_versions(tmp_path)[1], pair, 1)
    assert (tmp_path / "s.json").stat().st_mode & 0o777 == 0o600
    other = ed25519.Ed25519PrivateKey.generate()
    assert "acme:2" in _import(tmp_path, other.public_key().public_bytes(*SPKI)).output
    assert _accepts(_versions(tmp_path)[2], other, 2)
    assert not _accepts(_versions(tmp_path)[1], other, 1)


def test_a_jwk_set_is_taken_whole(tmp_path: Path, rsa_pair: rsa.RSAPrivateKey) -> None:
    """Every key of a set becomes a version, under the number that its key id names; one bad key, and none is."""
    young = ed25519.Ed25519PrivateKey.generate()
    keys = [_jwk(rsa_pair, kid="acme:7", use="sig", alg="RS256"), _jwk(young, kid="2026-11")]
    result = _import(tmp_path, json.dumps({"keys": keys}).encode())
    assert result.exit_code == 0, result.output
    assert sorted(_versions(tmp_path)) == [7, 8]
    assert _accepts(_versions(tmp_path)[7], rsa_pair, 7)
    assert _accepts(_versions(tmp_path)[8], young, 8)
    more = [_jwk(ed25519.Ed25519PrivateKey.generate()), {"kty": "EC", "crv": "P-256"}]
    assert _import(tmp_path, json.dumps({"keys": more}).encode()).exit_code == 1
    assert sorted(_versions(tmp_path)) == [7, 8]
    taken = _jwk(ed25519.Ed25519PrivateKey.generate(), kid="acme:7")
    assert "version 7 of tenant-acme exists already" in _import(tmp_path, json.dumps(taken).encode()).output


def test_a_key_is_imported_once(tmp_path: Path) -> None:
    """The same key again is refused, and so is one of another tenant: each could sign for the other."""
    data = ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(*SPKI)
    assert _import(tmp_path, data).exit_code == 0
    again = _import(tmp_path, data)
    assert (again.exit_code, list(_versions(tmp_path))) == (1, [1])
    assert "is version 1 of tenant-acme already" in again.output
    other = _import(tmp_path, data, "globex")
    assert other.exit_code == 1
    assert "sign for the other" in other.output
    assert _versions(tmp_path, "globex") == {}


def _weak() -> bytes:
    # the library makes no smaller keys any more; one of 1024 bits from its numbers
    modulus = (1 << 1023) + 1155
    return json.dumps({"kty": "RSA", "n": _base64url(modulus | 1), "e": "AQAB"}).encode()


def _private(pair: Pair) -> bytes:
    return pair.private_bytes(*PKCS8)


def _both() -> bytes:
    pair = ed25519.Ed25519PrivateKey.generate()
    return pair.public_key().public_bytes(*SPKI) + _private(pair)


WRONG: dict[str, tuple[Callable[[], bytes], str]] = {
    "private PEM": (lambda: _private(ed25519.Ed25519PrivateKey.generate()), "holds a private key"),
    "public and private PEM": (_both, "holds a private key"),
    "private JWK": (
        lambda: json.dumps(_jwk(ed25519.Ed25519PrivateKey.generate(), d="AAAA")).encode(), "holds a private key",
    ),
    "shared JWK": (lambda: b'{"keys":[{"kty":"oct","k":"AAAA"}]}', "holds a private key"),
    "EC": (lambda: ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(*SPKI), "neither RSA"),
    "weak RSA": (_weak, "1024 bits is too weak"),
    "huge RSA": (lambda: json.dumps({"kty": "RSA", "n": "_" * 3000, "e": "AQAB"}).encode(), "is the most"),
    "nothing": (lambda: b"", "neither one public key"),
    "text": (lambda: b"hello", "neither one public key"),
    "damaged PEM": (lambda: b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "is damaged"),
    "two PEM": (
        lambda: 2 * ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(*SPKI), "neither one public key",
    ),
    "DER": (
        lambda: ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.DER, SPKI[1]),
        "neither one public key",
    ),
    "no JSON": (lambda: b"{", "is not JSON"),
    "no set": (lambda: b'{"keys":5}', "is no JWK set"),
    "other JSON": (lambda: b'{"tenant-acme":{}}', "is no JWK set"),
    "empty set": (lambda: b'{"keys":[]}', "is no JWK set"),
    "many": (lambda: json.dumps({"keys": [{}] * (KEYS_MAX + 1)}).encode(), "are the most"),
    "for encryption": (lambda: b'{"kty":"RSA","use":"enc","n":"AQAB","e":"AQAB"}', "not for signatures"),
    "other algorithm": (lambda: b'{"kty":"RSA","alg":"PS256","n":"AQAB","e":"AQAB"}', "neither of RSA for RS256"),
    "no modulus": (lambda: b'{"kty":"RSA","kid":"k","e":"AQAB"}', "the key 'k' has no 'n'"),
    "bad point": (lambda: b'{"kty":"OKP","crv":"Ed25519","x":"AAAA"}', "is damaged"),
    "large": (lambda: b" " * 70_000, "is larger than"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files_are_named(tmp_path: Path, kind: str) -> None:
    """What is no usable public key is refused in one sentence that names the file, and nothing is written."""
    make, said = WRONG[kind]
    result = _import(tmp_path, make())
    assert result.exit_code == 1, result.output
    assert said in result.output
    assert str(tmp_path / "key") in result.output
    assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "s.json").exists()


def test_a_certificate_says_how(tmp_path: Path) -> None:
    """A certificate is not taken for a key; the way from one to the other is said."""
    init_ca(tmp_path / "ca")
    data = (tmp_path / "ca" / "ca.pem").read_bytes()
    assert x509.load_pem_x509_certificate(data)
    assert "openssl x509" in _import(tmp_path, data).output


@given(st.binary(max_size=300) | st.binary(max_size=200).map(lambda data: b"{" + data))
def test_garbage_is_refused_and_nothing_else(data: bytes) -> None:
    """Whatever a tenant sends, it is a key or an `UnusableKey`."""
    try:
        read_public_keys(data, "acme")
    except UnusableKey:
        pass


_values = st.recursive(
    st.none() | st.integers() | st.text(max_size=8) | st.sampled_from(["RSA", "OKP", "Ed25519", "sig", "AQAB"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(["kty", "crv", "alg", "use", "kid", "n", "e", "x", "keys"]), _values))
def test_strange_keys_are_refused_and_nothing_else(key: dict[str, Any]) -> None:
    """Whatever shape a JWK has, it is a key or an `UnusableKey`."""
    for document in (key, {"keys": [key]}):
        try:
            read_public_keys(json.dumps(document).encode(), "acme")
        except UnusableKey:
            pass


def test_removal_leaves_nobody_out_by_accident(tmp_path: Path) -> None:
    """One version goes; the last one only with --all; what is not there is exit 3, and a dry run changes nothing."""
    path = tmp_path / "s.json"
    for command in ("add-tenant", "rotate", "rotate"):
        assert _run("secrets", command, "acme", "--file", path).exit_code == 0
    _run("secrets", "init-record-id", "--file", path)
    before = path.read_bytes()
    assert _run("secrets", "remove", "acme", "--version", "1", "--file", path, "--dry-run").exit_code == 0
    assert path.read_bytes() == before
    assert _run("secrets", "remove", "acme", "--file", path).exit_code == 2
    for wrong in (("acme", "--version", "9"), ("globex", "--all"), ("globex", "--version", "1")):
        assert _run("secrets", "remove", *wrong, "--file", path).exit_code == 3
    assert _run("secrets", "remove", "acme", "--all", "--file", tmp_path / "none").exit_code == 1
    for version in ("1", "2"):
        assert _run("secrets", "remove", "acme", "--version", version, "--file", path).exit_code == 0
    last = _run("secrets", "remove", "acme", "--version", "3", "--file", path)
    assert last.exit_code == 1
    assert "the only one" in last.output
    assert _run("secrets", "remove", "acme", "--all", "--file", path).exit_code == 0
    assert list(json.loads(path.read_text())) == ["record-id-randomization"]


@pytest.mark.parametrize("algorithm", ["EdDSA", "RS256"])
def test_a_private_half_goes_where_it_was_sent(tmp_path: Path, algorithm: str) -> None:
    """Without a place for it nothing is drawn; a file is new and private, and `tokens create` takes it."""
    path, private = tmp_path / "s.json", tmp_path / "private"
    words = ("secrets", "add-tenant", "acme", "--algorithm", algorithm)
    refused = _run(*words, "--file", path)
    assert (refused.exit_code, path.exists()) == (2, False)
    assert "--private-key FILE" in refused.output
    assert _run(*words).exit_code == 2, "the two halves must not share one standard output"
    kept = _run(*words, "--file", path, "--private-key", private)
    assert kept.exit_code == 0, kept.output
    text = private.read_text().strip()
    assert text not in kept.output
    assert private.stat().st_mode & 0o777 == 0o600
    again = _run("secrets", "rotate", "acme", "--algorithm", algorithm, "--file", path, "--private-key", private)
    assert (again.exit_code, list(_versions(tmp_path))) == (1, [1]), "a key is never overwritten"
    token = _run(
        "tokens", "create", "-u", "u", "-t", "acme", "-r", REALM.hex(), "-a", algorithm, "--key-file", private
    ).stdout.strip()
    key = TokenKey(_versions(tmp_path)[1])
    assert not problems(token, realm=REALM, now_s=time.time(), keys=lambda _tenant, _version: key, scope=Scope.USER)
    asked = _run("secrets", "rotate", "acme", "--algorithm", algorithm, "--file", path, "--print-private-key")
    assert "private key for the tenant" in asked.output


def test_no_secret_on_a_terminal_unasked() -> None:
    """What prints a secret refuses a terminal, unless told; a pipe gets it as before."""
    for words in ("init-record-id", "add-tenant acme"):
        code, said = run_on_terminal(["secrets", *words.split()])
        assert code == 2
        assert "is not shown on a terminal" in said
        assert '"data"' not in said
        code, said = run_on_terminal(["secrets", *words.split(), "--print-private-key"])
        assert code == 0
        assert '"data"' in said
        assert '"data"' in _run("secrets", *words.split()).stdout


def test_readers_of_a_shared_file_keep_it(tmp_path: Path) -> None:
    """A file that a service reads through its group can still be read by it after a change, and by nobody else."""
    path = tmp_path / "s.json"
    assert _run("secrets", "add-tenant", "acme", "--file", path).exit_code == 0
    path.chmod(0o646)
    assert _run("secrets", "rotate", "acme", "--file", path).exit_code == 0
    assert path.stat().st_mode & 0o777 == 0o640
