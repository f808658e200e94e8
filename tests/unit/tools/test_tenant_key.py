"""Commands that mint tokens read the tenant's key where the balancers do: from a file, or from Secret Manager."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from roles.cli import cli
from tests.fakes.secret_manager import SecretManager

REALM = "0f" * 16
CONFIGURATION = {
    "realms": [{"id": REALM, "address": "https://127.0.0.1:1/", "public_key": "09" + "00" * 31}],
    "register_threshold": 1, "recover_threshold": 1, "pin_hashing_mode": "FastInsecure",
}  # fmt: skip


def _key(byte: str) -> str:
    return json.dumps({"data": byte * 32, "encoding": "Hex", "algorithm": "HmacSha256"})


@pytest.fixture
def cloud() -> Iterator[SecretManager]:
    """A Secret Manager with two versions of one tenant's key."""
    server = SecretManager("prod")
    server.put("tenant-test-acme", "1", _key("aa"))
    server.put("tenant-test-acme", "2", _key("bb"))
    yield server
    server.stop()


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def _flags(server: SecretManager) -> tuple[str, ...]:
    return ("--secrets-manager-project", "prod", "--secrets-manager-url", f"http://{server.address}")


def test_auth_token_from_secret_manager(cloud: SecretManager, tmp_path: Path) -> None:
    """The newest enabled version signs; a tenant without a key is exit 3, a service that refuses us exit 4."""
    store = ("--store", f"sqlite:{tmp_path / 's.db'}")
    words = ("cluster", "auth-token", "-u", "mario", "-r", REALM, *store, *_flags(cloud))
    check = ("tokens", "validate", "-r", REALM, "-t", "test-acme", "-u", "mario", "-a", "HS256")
    minted = _run(*words, "-t", "test-acme")
    assert minted.exit_code == 0, minted.output
    assert _run(*check, "-j", minted.output.strip(), "-k", "bb" * 32, "-v", "2").exit_code == 0
    cloud.disable("tenant-test-acme", "2")
    minted = _run(*words, "-t", "test-acme")
    assert _run(*check, "-j", minted.output.strip(), "-k", "aa" * 32, "-v", "1").exit_code == 0
    missing = _run(*words, "-t", "test-other")
    assert missing.exit_code == 3
    assert "no key tenant-test-other" in missing.output
    cloud.fail.add("ListSecrets")
    assert _run(*words, "-t", "test-acme").exit_code == 4


def test_check_from_secret_manager(cloud: SecretManager) -> None:
    """The check mints with the cloud's key: what fails is the realm it cannot reach, not the key."""
    words = ("check", "--configuration", json.dumps(CONFIGURATION), "--count", "1", "--json")
    result = _run(*words, "--tenant", "test-acme", *_flags(cloud))
    assert result.exit_code == 1
    assert json.loads(result.stdout.splitlines()[-1])["ok"] is False
    assert cloud.count("AccessSecretVersion") == 2
    assert _run(*words, "--tenant", "test-other", *_flags(cloud)).exit_code == 3


def test_one_source_and_no_more(cloud: SecretManager, tmp_path: Path) -> None:
    """A file and the cloud together, or neither, are usage errors that name the flags."""
    store = ("--store", f"sqlite:{tmp_path / 's.db'}")
    words = ("cluster", "auth-token", "-t", "test-acme", "-u", "mario", "-r", REALM, *store)
    both = _run(*words, "--secrets-file", tmp_path / "s.json", *_flags(cloud))
    neither = _run(*words)
    assert both.exit_code == neither.exit_code == 2
    assert "exclude each other" in both.output
    assert "--secrets-manager-project" in neither.output
    unsaid = _run("check", "--configuration", json.dumps(CONFIGURATION), "--tenant", "test-acme")
    assert unsaid.exit_code == 2
    assert "--secrets-manager-project" in unsaid.output
