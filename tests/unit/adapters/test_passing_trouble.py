"""What the operating system refuses: whether it passes by itself decides whether a service is started again."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from juicebox_hsm.adapters.process.passing_trouble import local_error, passes
from juicebox_hsm.errors import LocalError, NotYet


@pytest.mark.parametrize(
    "code",
    [
        errno.EADDRINUSE,
        errno.EADDRNOTAVAIL,
        errno.ENOENT,
        errno.EIO,
        errno.ESTALE,
        errno.EMFILE,
        errno.ENOSPC,
        errno.EAGAIN,
    ],
)
def test_what_waiting_may_cure(code: int) -> None:
    """Addresses, mounts and room that others have at the moment are no mistakes."""
    assert isinstance(local_error("x", OSError(code, "x", "/some/file")), NotYet)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EINVAL])
def test_what_a_person_must_change(code: int, tmp_path: Path) -> None:
    """A file that is not ours stays so, however often we look."""
    assert type(local_error("x", OSError(code, "x", str(tmp_path / "file")))) is LocalError


def test_a_mount_point_without_its_mount_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that nobody may enter is how mount points are kept while nothing is mounted."""
    shut = tmp_path / "mount"

    def access(path: os.PathLike[str], mode: int) -> bool:
        assert mode == os.X_OK
        return path != shut

    monkeypatch.setattr(os, "access", access)
    assert passes(PermissionError(errno.EACCES, "x", str(shut / "secrets.json")))
    assert not passes(PermissionError(errno.EACCES, "x", str(tmp_path / "secrets.json")))
    assert not passes(PermissionError(errno.EACCES, "x"))  # a port below 1024


def test_a_name_may_be_resolved_later() -> None:
    """A name server that is not up yet and a name that does not exist give the same answers."""
    with pytest.raises(socket.gaierror) as caught:
        socket.getaddrinfo("no-such-host.invalid", 1, flags=socket.AI_NUMERICHOST)
    assert passes(caught.value)
    assert passes(socket.gaierror(socket.EAI_AGAIN, "x"))
    assert not passes(socket.gaierror(socket.EAI_FAMILY, "x"))
