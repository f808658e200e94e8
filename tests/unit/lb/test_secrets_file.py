"""The secrets file: fatal at start, patient afterwards (load-balancer.md 6.4, 7.3, 7.4)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from juicebox_hsm.adapters.tenants.secrets_file import SecretsFile
from juicebox_hsm.errors import LocalError
from juicebox_hsm.tenant_keys import RECORD_ID_KEY_NAME, SecretError, record_id_key
from tests.unit.lb.harness import LbRecorder

GOOD: dict[str, Any] = {
    "record-id-randomization": {
        "1": {"data": "32-bytes-to-randomize-record-IDs", "encoding": "UTF8", "algorithm": "Blake2sMac256"}
    },
    "tenant-test-acme": {"1": {"data": "aa" * 32, "encoding": "Hex", "algorithm": "HmacSha256"}},
}


def _file(tmp_path: Path, content: object = GOOD) -> tuple[SecretsFile, LbRecorder]:
    path = tmp_path / "secrets.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(0o600)
    recorder = LbRecorder()
    return SecretsFile(path, metrics=recorder, log=recorder), recorder


async def test_loads(tmp_path: Path) -> None:
    """Keys are found by tenant and version; unknown ones are not."""
    secrets, recorder = _file(tmp_path)
    await secrets.load()
    assert secrets.token_key("test-acme", 1) is not None
    assert secrets.token_key("test-acme", 2) is None
    assert secrets.token_key("acme", 1) is None
    assert record_id_key(secrets.versions(RECORD_ID_KEY_NAME)).expose() == b"32-bytes-to-randomize-record-IDs"
    assert recorder.lines == []


@pytest.mark.parametrize("content", ["", "[]", '{"tenant-a": {"1": "raw"}}', '{"tenant-a": {"x": {}}}'])
async def test_bad_file_at_start_is_an_error(tmp_path: Path, content: str) -> None:
    """A file that does not parse, or is missing, fails the start with its name."""
    secrets, _ = _file(tmp_path, content)
    with pytest.raises(LocalError, match=r"secrets\.json"):
        await secrets.load()
    secrets.path.unlink()
    with pytest.raises(LocalError, match="cannot read secrets file"):
        await secrets.load()


async def test_refresh_keeps_the_last_good_content(tmp_path: Path) -> None:
    """A changed file that fails to load changes nothing, is warned about once, counted each time, and ages."""
    secrets, recorder = _file(tmp_path)
    await secrets.load()
    key = secrets.token_key("test-acme", 1)
    secrets.path.write_text("{broken")
    await secrets.refresh()
    await secrets.refresh()
    assert secrets.token_key("test-acme", 1) is key
    assert recorder.counts["secrets.refresh.failures"] == 2
    assert len(recorder.lines) == 1
    assert "aa" not in str(recorder.lines)


async def test_rotation(tmp_path: Path) -> None:
    """A new version works beside the old one; a removed one is gone; an unchanged key stays the same object."""
    secrets, _ = _file(tmp_path)
    await secrets.load()
    first = secrets.token_key("test-acme", 1)
    both = json.loads(json.dumps(GOOD))
    both["tenant-test-acme"]["2"] = {"data": "bb" * 32, "encoding": "Hex", "algorithm": "HmacSha256"}
    secrets.path.write_text(json.dumps(both))
    await secrets.refresh()
    assert secrets.token_key("test-acme", 1) is first
    assert secrets.token_key("test-acme", 2) is not None
    del both["tenant-test-acme"]["1"]
    secrets.path.write_text(json.dumps(both))
    await secrets.refresh()
    assert secrets.token_key("test-acme", 1) is None


async def test_refresh_period(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read again every five seconds."""
    secrets, _ = _file(tmp_path)
    times: list[float] = []

    async def refresh() -> None:
        times.append(trio.current_time())

    monkeypatch.setattr(secrets, "refresh", refresh)
    nursery.start_soon(secrets.refresh_forever)
    began = trio.current_time()
    await trio.sleep(16)
    assert [round(time - began) for time in times] == [5, 10, 15]


async def test_warnings(tmp_path: Path) -> None:
    """Open permissions, short HMAC keys and unusable keys are warned about once each; nothing else is affected."""
    content = {
        **GOOD,
        "tenant-short": {"1": {"data": "short", "encoding": "UTF8", "algorithm": "HmacSha256"}},
        "tenant-bad": {"1": {"data": "00", "encoding": "Hex", "algorithm": "Edwards25519"}},
    }
    secrets, recorder = _file(tmp_path, content)
    secrets.path.chmod(0o644)
    await secrets.load()
    await secrets.load()
    assert sorted(text.split(";")[0] for _, text in recorder.lines) == [
        "secrets file is readable by others",
        "unusable tenant key",
        "weak tenant key",
    ]
    assert secrets.token_key("test-acme", 1) is not None


async def test_record_id_key_versions(tmp_path: Path) -> None:
    """Two enabled versions refuse to start unless one is named; another algorithm or length is refused."""
    two = json.loads(json.dumps(GOOD))
    two[RECORD_ID_KEY_NAME]["2"] = {"data": "bb" * 32, "encoding": "Hex", "algorithm": "Blake2sMac256"}
    secrets, _ = _file(tmp_path, two)
    await secrets.load()
    versions = secrets.versions(RECORD_ID_KEY_NAME)
    with pytest.raises(SecretError, match="several"):
        record_id_key(versions)
    assert record_id_key(versions, 2).expose() == b"\xbb" * 32
    with pytest.raises(SecretError):
        record_id_key(versions, 3)
