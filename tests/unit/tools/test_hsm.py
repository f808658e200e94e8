"""`juicebox-hsm hsm`: what it makes, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from juicebox_hsm.adapters.hsm_directory.hsm_host import open_hsm_dir
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.messages import NewRealm, NewRealmOk
from roles.tools.hsm.command import command
from tests.fakes.hsm import expect


def invoke(*arguments: str | Path) -> Result:
    """Run the tool in this process."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def failed(result: Result, code: int, *words: str) -> None:
    """Check for one line on stderr with these words, no traceback, and the exit code."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    for word in words:
        assert word in last
    if code == 1:
        assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Return keys made by the tool."""
    assert invoke("keygen", "--out", tmp_path / "keys").exit_code == 0
    return tmp_path / "keys"


def test_from_keys_to_a_realm(keys: Path, tmp_path: Path) -> None:
    """keygen, init, info and public-key belong together, before and after the HSM ran."""
    directory = tmp_path / "hsm"
    made = invoke("init", "--keys", keys, "--dir", directory)
    assert made.exit_code == 0
    assert "--hsm-dir" in made.output
    public = invoke("public-key", "--keys", keys).output.strip()
    assert len(bytes.fromhex(public)) == 32
    assert invoke("public-key", "--dir", directory).output.strip() == public
    before = json.loads(invoke("info", "--dir", directory, "--json").output)
    assert (before["hsm"], before["realm"], before["groups"]) == (None, None, [])
    assert "never started" in invoke("info", "--dir", directory).output
    with open_hsm_dir(directory) as platform:
        created = expect(Hsm(platform).handle(NewRealm()), NewRealmOk)
        running = json.loads(invoke("info", "--dir", directory, "--json").output)
    assert running["realm"] == created.realm.hex()
    assert running["public_key"] == public
    assert running["groups"] == [{"id": created.group.hex(), "members": [running["hsm"]], "captured": None}]
    text = invoke("info", "--dir", directory).output
    assert created.realm.hex() in text
    assert "no protection against rollback" in text


def test_secrets_are_never_printed(keys: Path, tmp_path: Path) -> None:
    """No output of the tool contains a key or the wrapping key."""
    wrapping = (tmp_path / "keys.key").read_text().strip()
    shown = invoke("public-key", "--keys", keys).output + invoke("init", "--keys", keys, "--dir", tmp_path / "d").output
    assert wrapping not in shown


def test_mistakes_are_one_line(keys: Path, tmp_path: Path) -> None:
    """Existing, missing or damaged files and wrong flags are named with the way out; exit code 1 or 2."""
    directory = tmp_path / "hsm"
    failed(invoke("keygen", "--out", keys), 1, "keys.key", "never overwritten")
    failed(invoke("init", "--keys", tmp_path / "none", "--dir", directory), 1, "none")
    assert invoke("init", "--keys", keys, "--dir", directory).exit_code == 0
    failed(invoke("init", "--keys", keys, "--dir", directory), 1, "--dir", "never overwritten")
    failed(invoke("info", "--dir", tmp_path / "none"), 1, "--dir", "hsm init")
    failed(invoke("public-key"), 2, "--keys FILE", "--dir DIR")
    failed(invoke("public-key", "--keys", keys, "--dir", directory), 2, "one of")
    failed(invoke("keygen"), 2, "--out")
    failed(invoke("keygen", "--out", tmp_path / "no" / "such"), 1, "no/such")
    (directory / "nvram").write_bytes(b"")
    failed(invoke("info", "--dir", directory), 1, "nvram", "hsm init")
    (directory / "wrapping.key").write_text("x")
    keys.write_text("{")
    failed(invoke("public-key", "--keys", keys), 1, "keygen")
    (tmp_path / "keys.key").chmod(0o640)
    failed(invoke("init", "--keys", keys, "--dir", tmp_path / "other"), 1, "keys")
