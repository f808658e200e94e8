"""Google's libraries are loaded only by who opens a Bigtable store."""

from __future__ import annotations

import subprocess
import sys

from tests.patience import PROGRAM_S


def test_the_embedded_store_does_not_load_google_libraries() -> None:
    """Opening stores by URL, and the demo that starts an emulator, import neither gRPC nor protobuf."""
    script = (
        "import sys, juicebox_hsm.adapters.stores.opening, roles.tools.demo.emulator, roles.tools.demo.command;"
        "print([name for name in sys.modules if name.split('.')[0] in ('grpc', 'google')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PROGRAM_S, check=True
    )
    assert result.stdout.strip() == "[]"
