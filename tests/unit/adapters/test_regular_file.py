"""Files that an operator names are opened without hanging, and only if they can be read again."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from juicebox_hsm.adapters.edge.tls import load_edge_context
from juicebox_hsm.adapters.hsm_directory.key_bundle import read_bundle
from juicebox_hsm.adapters.process.directory_lock import own_directory, writing_into
from juicebox_hsm.adapters.process.regular_file import NOT_REGULAR, open_regular
from juicebox_hsm.adapters.tls.certificates import init_ca, issue
from juicebox_hsm.adapters.tls.cluster_tls import ClusterTls
from juicebox_hsm.errors import LocalError
from juicebox_hsm.wire.rpc import PeerRole
from roles.options import read_settings
from roles.tools.store.restore import read_hsm_dirs


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A named pipe that nobody writes to: opening it as a file would wait for ever."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def test_what_is_no_file_is_refused_at_once(pipe: Path, tmp_path: Path) -> None:
    """A pipe, named or of a shell, a directory and a missing file are errors with a reason; a file opens."""
    with pytest.raises(OSError, match="pipes cannot be read again"):
        open_regular(pipe)
    read, write = os.pipe()
    try:
        with pytest.raises(OSError, match="pipes cannot be read again"):
            open_regular(Path(f"/dev/fd/{read}"))
    finally:
        os.close(read)
        os.close(write)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "missing")
    (tmp_path / "file").write_bytes(b"content")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"content"


def test_every_reader_of_named_files_refuses_a_pipe(pipe: Path, tmp_path: Path) -> None:
    """Keys, certificates, HSM directories and settings: each names the file and says why."""
    with pytest.raises(LocalError, match=NOT_REGULAR):
        load_edge_context(pipe, pipe)
    with pytest.raises(LocalError, match=NOT_REGULAR):
        read_bundle(pipe, pipe)
    (tmp_path / "ca.pem").symlink_to(pipe)
    with pytest.raises(LocalError, match=NOT_REGULAR):
        ClusterTls.load(tmp_path)
    assert NOT_REGULAR in read_settings(pipe, [])[1][0]


def test_a_directory_has_one_owner(tmp_path: Path) -> None:
    """A second owner is refused with the first one's process id, and may have it once the first is done."""
    with own_directory(tmp_path):
        with pytest.raises(LocalError, match=f"in use by process {os.getpid()}"), own_directory(tmp_path):
            pass
        refused: list[bool] = []

        def try_again() -> None:
            try:
                with own_directory(tmp_path):
                    refused.append(False)
            except LocalError:
                refused.append(True)

        thread = threading.Thread(target=try_again)
        thread.start()
        thread.join()
        assert refused == [True]
    with own_directory(tmp_path):
        pass


def test_a_directory_has_one_writer(tmp_path: Path) -> None:
    """Who writes beside another is told whom to wait for, and nothing is left behind."""
    told = f"being written by process {os.getpid()}"
    with writing_into(tmp_path), pytest.raises(LocalError, match=told), writing_into(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LocalError, match="No such file"), writing_into(tmp_path / "missing"):
        pass


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be locked nobody goes on, and nobody else is blamed for it."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for held in (own_directory(tmp_path), writing_into(tmp_path), read_hsm_dirs([tmp_path])):
        with pytest.raises(LocalError, match=r"cannot be locked \(No locks available\)"), held:
            pass


def test_certificates_are_not_written_side_by_side(tmp_path: Path) -> None:
    """Neither a CA nor a service's pair is mixed from two runs: the second one changes nothing."""
    init_ca(tmp_path / "ca")
    (tmp_path / "out").mkdir()
    with writing_into(tmp_path / "out"), pytest.raises(LocalError, match="being written"):
        issue(tmp_path / "ca", PeerRole.AGENT, "a", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "other").mkdir()
    with writing_into(tmp_path / "other"), pytest.raises(LocalError, match="being written"):
        init_ca(tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []
