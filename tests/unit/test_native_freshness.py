"""The check that the built C library belongs to the sources at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.native_freshness import REBUILD, stale_message


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "native").mkdir()
    (tmp_path / "juicebox_hsm" / "merkle").mkdir(parents=True)
    (tmp_path / "native" / "merkle.c").write_text("")
    os.utime(tmp_path / "native" / "merkle.c", (100, 100))
    return tmp_path


@pytest.mark.parametrize(("built_at", "fresh"), [(99, False), (100, True), (101, True)])
def test_a_library_older_than_a_source_is_refused(checkout: Path, built_at: int, fresh: bool) -> None:
    """A C edit without a rebuild cannot pass silently, and the message names the command."""
    library = checkout / "juicebox_hsm" / "merkle" / "_native.abi3.so"
    library.write_text("")
    os.utime(library, (built_at, built_at))
    message = stale_message(checkout)
    assert (message is None) == fresh
    assert fresh or (message is not None and REBUILD in message and "merkle.c" in message)


def test_a_missing_library_is_refused(checkout: Path) -> None:
    """A checkout that was never built says how to build it."""
    assert REBUILD in (stale_message(checkout) or "")


def test_an_installed_package_has_nothing_to_compare(tmp_path: Path) -> None:
    """Without sources there is no stale library."""
    assert stale_message(tmp_path) is None
