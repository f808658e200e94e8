"""Remove what a library leaves behind: `rbcl` writes its libsodium to a temporary file at import and never deletes it.

That is 2.8 MB for every start of an agent, a tool or a program with our client. Once loaded, the library does not need
the file. The core cannot see to it, for it does no I/O; whoever imports the core for real work calls this.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Final

_MODULE: Final = "rbcl._sodium"


def remove_unpacked_library() -> None:
    """Delete the file, if the library was loaded by this process and still lies in a temporary directory."""
    path = getattr(sys.modules.get(_MODULE), "lib_path", None)
    if isinstance(path, str) and Path(path).parent == Path(tempfile.gettempdir()):
        try:
            Path(path).unlink(missing_ok=True)
        except OSError:
            pass  # a file too many harms nobody
