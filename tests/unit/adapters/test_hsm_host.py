"""HSM directories, sealed keys and the in-process transport."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from juicebox_hsm.adapters.hsm_directory import hsm_host
from juicebox_hsm.adapters.hsm_directory.hsm_host import (
    FilePlatform,
    InProcessHsm,
    generate_keys,
    init_hsm_dir,
    open_hsm_dir,
    read_hsm_dir,
)
from juicebox_hsm.adapters.hsm_directory.key_bundle import read_bundle
from juicebox_hsm.errors import InvariantViolation, LocalError
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.messages import (
    CaptureNext,
    JoinRealm,
    JoinRealmOk,
    NewRealm,
    NewRealmOk,
    PersistState,
    PersistStateOk,
    RoleOk,
    Status,
    StatusOk,
)
from juicebox_hsm.hsm.state import InvalidRealmStatement
from juicebox_hsm.ports.errors import HsmGone
from juicebox_hsm.ports.hsm_transport import HsmTransport
from tests.fakes.hsm import MemoryPlatform, expect, realm_keys
from tests.patience import HANGS_S


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    """Return a fresh key bundle."""
    generate_keys(tmp_path / "realm.keys", "test realm")
    return tmp_path / "realm.keys"


@pytest.fixture
def directory(tmp_path: Path, keys_file: Path) -> Path:
    """Return a fresh HSM directory."""
    init_hsm_dir(keys_file, tmp_path / "hsm")
    return tmp_path / "hsm"


def test_restart_from_the_directory(directory: Path) -> None:
    """Id, realm and keys survive; the role clock starts higher."""
    with open_hsm_dir(directory) as platform:
        hsm = Hsm(platform)
        created = expect(hsm.handle(NewRealm()), NewRealmOk)
        first = platform.clock_start
        status = expect(hsm.handle(Status()), StatusOk)
    with open_hsm_dir(directory) as platform:
        again = expect(Hsm(platform).handle(Status()), StatusOk)
        assert platform.clock_start > first
        assert platform.nvram_read() != b""
    assert (again.id, again.public_key) == (status.id, status.public_key)
    assert again.realm is not None
    assert again.realm.id == created.realm
    bundle, state = read_hsm_dir(directory)
    assert bundle.realm_name == "test realm"
    assert state is not None
    assert state.id == status.id


def test_directories_of_one_bundle_join_one_realm(directory: Path, keys_file: Path, tmp_path: Path) -> None:
    """HSMs made from the same bundle hold the same keys; their wrapping keys differ."""
    init_hsm_dir(keys_file, tmp_path / "other")
    assert (directory / "wrapping.key").read_text() != (tmp_path / "other" / "wrapping.key").read_text()
    with open_hsm_dir(directory) as one, open_hsm_dir(tmp_path / "other") as two:
        first, second = Hsm(one), Hsm(two)
        realm = expect(first.handle(NewRealm()), NewRealmOk).realm
        status = expect(first.handle(Status()), StatusOk)
        assert status.realm is not None
        expect(second.handle(JoinRealm(realm, status.id, status.realm.statement)), JoinRealmOk)


def test_one_process_per_directory(directory: Path) -> None:
    """A second opener is refused while the first lives, and served after it closed."""
    platform = open_hsm_dir(directory)
    with pytest.raises(LocalError, match=r"this HSM is run by process \d+ already"):
        open_hsm_dir(directory)
    platform.close()
    platform.close()
    open_hsm_dir(directory).close()


def test_removing_files_does_not_admit_a_second_process(directory: Path) -> None:
    """The lock is on the directory: whatever somebody deletes inside as stale, two processes never share an NVRAM."""
    with open_hsm_dir(directory):
        kept = {entry.name: entry.read_bytes() for entry in directory.iterdir()}
        assert sorted(kept) == ["keys.json", "nvram", "wrapping.key"]
        for name, content in kept.items():
            (directory / name).unlink()
            (directory / name).write_bytes(content)
            (directory / name).chmod(0o600)
        with pytest.raises(LocalError, match=r"this HSM is run by process \d+ already"):
            open_hsm_dir(directory)
    open_hsm_dir(directory).close()


def test_a_file_system_without_locks_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be locked no HSM starts, and the reason is not another process."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(LocalError, match=r"cannot be locked \(No locks available\)"):
        open_hsm_dir(directory)


def test_an_unreadable_directory_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that cannot be opened is named."""

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(LocalError, match="Permission denied"):
        open_hsm_dir(directory)


def test_a_failed_open_releases_the_lock(directory: Path) -> None:
    """After a refused start the directory can be repaired and opened."""
    content = (directory / "nvram").read_bytes()
    (directory / "nvram").unlink()
    with pytest.raises(LocalError):
        open_hsm_dir(directory)
    (directory / "nvram").write_bytes(content)
    open_hsm_dir(directory).close()


def test_secrets_stay_out_of_open_files(directory: Path, keys_file: Path) -> None:
    """Wrapping keys are private files; the bundle holds no key in the clear; the directory is private."""
    keys = read_bundle(keys_file, keys_file.with_name("realm.keys.key")).keys
    text = keys_file.read_text()
    for secret in (keys.communication_secret, keys.record_key, keys.mac_key):
        assert secret.expose().hex() not in text
    assert json.loads(text)["public_key"] == keys.communication_public.hex()
    for path in (directory / "wrapping.key", keys_file.with_name("realm.keys.key"), directory / "nvram"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700


def test_nothing_is_overwritten(directory: Path, keys_file: Path, tmp_path: Path) -> None:
    """Existing keys and directories are refused by name and stay as they are."""
    before = keys_file.read_bytes()
    with pytest.raises(LocalError, match=r"realm\.keys\.key exists"):
        generate_keys(keys_file, "again")
    with pytest.raises(LocalError, match="exists already"):
        init_hsm_dir(keys_file, directory)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LocalError, match="exists already"):
        init_hsm_dir(keys_file, tmp_path / "empty")
    assert keys_file.read_bytes() == before
    lonely = tmp_path / "lonely"
    lonely.write_text("mine")
    with pytest.raises(LocalError, match="lonely exists"):
        generate_keys(lonely, "again")
    assert not (tmp_path / "lonely.key").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("keys.json", "", "not a key bundle"),
        ("keys.json", "{}", "not a key bundle"),
        ("keys.json", "[]", "not a key bundle"),
        ("keys.json", "[" * 60_000, "not a key bundle"),
        ("keys.json", "\u00e4", "not a text file"),
        ("wrapping.key", "", "64 hex digits"),
        ("wrapping.key", "zz", "64 hex digits"),
        ("wrapping.key", "00" * 32, "does not open"),
        ("keys.json", None, "No such file"),
        ("wrapping.key", None, "No such file"),
    ],
)
def test_i15_damaged_key_files(directory: Path, name: str, content: str | None, message: str) -> None:
    """A damaged, foreign or missing key file is one error that names it."""
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_text(content, encoding="utf-8")
    with pytest.raises(LocalError, match=message) as caught:
        open_hsm_dir(directory)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"), [("realm_name", "other"), ("generation", 2), ("format", 2), ("backend", "x")]
)
def test_i15_facts_are_sealed_with_the_keys(directory: Path, field: str, value: object) -> None:
    """Realm name, generation, format and backend cannot be edited without the bundle refusing to open."""
    document = json.loads((directory / "keys.json").read_text())
    (directory / "keys.json").write_text(json.dumps({**document, field: value}))
    with pytest.raises(LocalError, match=r"keys\.json"):
        open_hsm_dir(directory)


def test_i15_public_key_must_belong_to_the_secret(directory: Path) -> None:
    """The public key shown in the clear is what people hand to clients: an edited one is refused."""
    document = json.loads((directory / "keys.json").read_text())
    (directory / "keys.json").write_text(json.dumps({**document, "public_key": "ab" * 32}))
    with pytest.raises(LocalError, match=r"keys\.json: the public key"):
        open_hsm_dir(directory)


def test_public_wrapping_key_is_refused(directory: Path) -> None:
    """A wrapping key that others may read is refused with the command that mends it."""
    (directory / "wrapping.key").chmod(0o644)
    with pytest.raises(LocalError, match="chmod 600"):
        open_hsm_dir(directory)


def test_i15_nvram_of_another_realm(directory: Path, tmp_path: Path) -> None:
    """Keys of one realm never start with the NVRAM of another."""
    with open_hsm_dir(directory) as platform:
        expect(Hsm(platform).handle(NewRealm()), NewRealmOk)
    generate_keys(tmp_path / "foreign.keys", "foreign")
    init_hsm_dir(tmp_path / "foreign.keys", tmp_path / "foreign")
    (tmp_path / "foreign" / "nvram").write_bytes((directory / "nvram").read_bytes())
    with open_hsm_dir(tmp_path / "foreign") as platform, pytest.raises(InvalidRealmStatement):
        Hsm(platform)


def test_missing_directory(tmp_path: Path) -> None:
    """A missing directory names the flag and the command that makes one."""
    with pytest.raises(LocalError, match=r"--hsm-dir .*hsm init"):
        open_hsm_dir(tmp_path / "none")
    with pytest.raises(LocalError, match="--dir"):
        read_hsm_dir(tmp_path / "none")
    with pytest.raises(LocalError, match="no HSM in this directory"):
        open_hsm_dir(tmp_path)


@pytest.mark.parametrize("value", ["zz", "00", 5, None])
def test_i15_sealed_bytes_of_wrong_form(directory: Path, value: object) -> None:
    """Sealed keys that are no hex text of the right size are refused by name."""
    document = json.loads((directory / "keys.json").read_text())
    (directory / "keys.json").write_text(json.dumps({**document, "sealed": value}))
    with pytest.raises(LocalError, match=r"keys\.json"):
        open_hsm_dir(directory)


def test_a_failed_init_leaves_nothing(keys_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk is full the directory is not half made, and the next attempt works."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("juicebox_hsm.adapters.hsm_directory.nvram.write_durably", full)
        with pytest.raises(LocalError, match=r"--dir .*No space left"):
            init_hsm_dir(keys_file, tmp_path / "hsm")
    assert {entry.name for entry in tmp_path.iterdir()} == {"realm.keys", "realm.keys.key"}
    init_hsm_dir(keys_file, tmp_path / "hsm")


async def test_writes_run_beside_the_event_loop() -> None:
    """Requests that may write NVRAM run in a worker thread, one at a time; all others on the loop's thread."""
    platform = MemoryPlatform(realm_keys())
    hsm = Hsm(platform)
    transport: HsmTransport = InProcessHsm(hsm)
    threads: list[int] = []
    platform.on_write = lambda _: threads.append(threading.get_ident())
    created = expect(await transport.send(NewRealm()), NewRealmOk)
    assert threads
    assert threads[0] != threading.get_ident()
    assert expect(await transport.send(Status()), StatusOk).realm is not None
    assert created.entry.index == 1


async def test_strictly_serialised() -> None:
    """While NVRAM is being written no other request runs, and a cancelled caller does not end what was begun."""
    platform = MemoryPlatform(realm_keys())
    transport = InProcessHsm(Hsm(platform))
    begun, proceed = threading.Event(), threading.Event()
    order: list[str] = []

    def slow(_: bytes) -> None:
        begun.set()
        assert proceed.wait(HANGS_S)
        order.append("written")

    platform.on_write = slow
    with trio.fail_after(HANGS_S):
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def create() -> None:
                with scope:
                    await transport.send(NewRealm())
                order.append("created")

            async def ask() -> None:
                status = expect(await transport.send(Status()), StatusOk)
                order.append("asked")
                assert status.realm is not None

            nursery.start_soon(create)
            await trio.to_thread.run_sync(begun.wait)
            scope.cancel()
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            assert order == []
            proceed.set()
    assert order[0] == "written"
    assert set(order) == {"written", "created", "asked"}


async def test_m9_poisoned_is_gone() -> None:
    """A failed write ends the HSM for its agent: this and every later request raise HsmGone."""
    platform = MemoryPlatform(realm_keys())
    transport = InProcessHsm(Hsm(platform))
    platform.fail()
    with pytest.raises(HsmGone):
        await transport.send(NewRealm())
    platform.on_write = None
    for request in (Status(), PersistState()):
        with pytest.raises(HsmGone):
            await transport.send(request)


async def test_broken_invariants_pass_through() -> None:
    """A broken invariant is not turned into an operational error, from the worker thread either."""
    platform = MemoryPlatform(realm_keys())
    transport = InProcessHsm(Hsm(platform))

    def broken(_: bytes) -> None:
        raise InvariantViolation("a test")

    platform.on_write = broken
    with pytest.raises(InvariantViolation):
        await transport.send(NewRealm())


async def test_failed_disk_poisons_a_real_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real file backend a full disk ends the HSM, and the next start continues from the last state."""
    with open_hsm_dir(directory) as platform:
        transport = InProcessHsm(Hsm(platform))
        created = expect(await transport.send(NewRealm()), NewRealmOk)
        expect(await transport.send(CaptureNext(created.realm, created.group, (created.entry,))), RoleOk)
        with monkeypatch.context() as patch:

            def full(*_: object, **__: object) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(os, "pwrite", full)
            with pytest.raises(HsmGone, match="No space left"):
                await transport.send(PersistState())
    with open_hsm_dir(directory) as platform:
        status = expect(Hsm(platform).handle(Status()), StatusOk)
        assert status.realm is not None
        assert status.realm.id == created.realm


def test_platform_is_what_the_core_wants(directory: Path) -> None:
    """Entropy is of the asked size and differs from draw to draw."""
    with open_hsm_dir(directory) as platform:
        assert isinstance(platform, FilePlatform)
        assert len(platform.random(33)) == 33
        assert platform.random(16) != platform.random(16)
        assert hsm_host.NVRAM_FILE in {entry.name for entry in directory.iterdir()}
        assert expect(Hsm(platform).handle(PersistState()), PersistStateOk).captured == ()
