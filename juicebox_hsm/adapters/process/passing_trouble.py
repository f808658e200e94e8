"""Which trouble of the operating system passes by itself, in one place (operator-tools.md 10).

A service that cannot start says with its exit code whether starting it again may help. What another program holds, what
a network or a file system does not have *yet*, and what the system has no room for may be right in a moment. A name or
a file that is not there is among them: nobody can tell a mistyped one from one whose server or disk comes up later.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Final

from juicebox_hsm.errors import LocalError, NotYet

_PASSING: Final = frozenset(
    {
        # an address that its former holder, or the network, does not give yet
        errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH,
        errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT,
        # a file system that is not mounted, or whose server is away
        errno.ENOENT, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.EREMOTEIO,
        # room that the system, or somebody else, will have again
        errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC,
        errno.EDQUOT, errno.ETXTBSY,
    }
)  # fmt: skip

_RESOLVING_FAILED: Final = frozenset(
    {socket.EAI_AGAIN, socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_FAIL, socket.EAI_MEMORY, socket.EAI_SYSTEM}
)
"""A name server that is not up yet answers in any of these ways."""


def passes(error: OSError) -> bool:
    """Tell whether `error` may go away while nobody changes anything."""
    if isinstance(error, socket.gaierror):
        return error.errno in _RESOLVING_FAILED
    if error.errno == errno.EACCES and isinstance(error.filename, str | os.PathLike):
        return _is_shut_off(Path(error.filename).parent)
    return error.errno in _PASSING


def _is_shut_off(directory: Path) -> bool:
    """Tell whether the directory itself cannot be entered: so are mount points kept while nothing is mounted there."""
    return not os.access(directory, os.X_OK)


def local_error(message: str, error: OSError) -> LocalError:
    """Return what to raise for `error`: `NotYet` when it may pass, otherwise `LocalError`."""
    return (NotYet if passes(error) else LocalError)(message)
