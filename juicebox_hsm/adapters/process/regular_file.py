"""Open a file that an operator named: one that can be read again, and that no open can hang on (own).

Keys, certificates, secrets and settings are read more than once (a check before use, the use, SIGHUP). A named pipe
would make the first open wait for a writer for ever, and what a shell's `<(command)` gives is empty the second time.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

NOT_REGULAR: Final = "is not a regular file; pipes cannot be read again, so write the content into a file"

_OTHERS_READ: Final = 0o004


def others_read(path: Path) -> bool:
    """Tell whether every user of the machine may read the file. Raises `OSError`."""
    return bool(path.stat().st_mode & _OTHERS_READ)


def open_regular(path: Path) -> BinaryIO:
    """Open `path` for reading, at once. Raises `OSError`, also for whatever is no regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, os.strerror(code) if stat.S_ISDIR(mode) else NOT_REGULAR, str(path))
    return os.fdopen(descriptor, "rb")
