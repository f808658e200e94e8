"""What this program was built from, for `--version` and `/livez` (operator-tools.md 9.4).

The commit is written into the package when it is built (`setup.py`); at run time nobody asks git. An editable or bare
checkout has no such file.
"""

from __future__ import annotations

import functools
import json
import platform
import ssl
from importlib import metadata
from pathlib import Path
from typing import Final

from juicebox_hsm import __version__

FILE: Final = Path(__file__).parent.parent / "build.json"
LIBRARIES: Final = ("trio", "cryptography", "pynacl", "rbcl", "apsw")
_COMMIT: Final = ("hash", "tag", "branch")


@functools.cache
def commit() -> dict[str, str]:
    """Return `hash`, `tag` and `branch` of the commit, as far as they were known when the package was built."""
    try:
        found = json.loads(FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: found[name] for name in _COMMIT if isinstance(found, dict) and isinstance(found.get(name), str)}


def tag() -> str:
    """Return what metrics call this version: the commit, else the version."""
    return commit().get("hash", __version__)


@functools.cache
def libraries() -> dict[str, str]:
    """Return the versions of the libraries that matter for security and durability."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def block(*, absent: str | None = None, public: bool = False) -> str:
    """Return one `name: value` line each; what is not known is left out, or shown as `absent`.

    `public` leaves the libraries out: strangers need not know which of them is a version behind.
    """
    known = commit()
    lines = [f"version: {__version__}"]
    for name in _COMMIT:
        value = known.get(name) or absent
        if value is not None:
            lines.append(f"git {name}: {value}")
    lines += [f"python: {platform.python_version()}", f"openssl: {ssl.OPENSSL_VERSION}"]
    if not public:
        lines += [f"{name}: {version}" for name, version in libraries().items()]
    return "\n".join(lines)
