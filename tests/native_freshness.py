"""Tell whether the built C library is older than its sources.

An editable install does not rebuild on a C edit, and a stale library passes silently.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REBUILD = "pip install -e . --no-build-isolation"


def stale_message(root: Path = ROOT) -> str | None:
    """Return what to do about a missing or stale library under `root`, or None if it is fresh."""
    native = root / "native"
    if not native.is_dir():  # an installed package has no sources to be older than
        return None
    sources = [*native.glob("*.c"), *native.glob("*.h"), *native.glob("*.py")]
    built = list((root / "juicebox_hsm" / "merkle").glob("_native*.so"))
    if not built:
        return f"the C extension is not built; run: {REBUILD}"
    newest = max(sources, key=lambda path: path.stat().st_mtime)
    if newest.stat().st_mtime > max(path.stat().st_mtime for path in built):
        return f"native/{newest.name} is newer than the built C extension; run: {REBUILD}"
    return None
