"""Find and run the Bigtable emulator, which keeps everything in memory: for the demo and for tests."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from juicebox_hsm.adapters.bigtable import EMULATOR_VARIABLE
from juicebox_hsm.errors import LocalError

PROGRAM: Final = "cbtemulator"
START_S: Final = 10.0
STOP_S: Final = 3.0
HOW_TO_GET: Final = (
    "the Bigtable emulator is not installed: apt-get install google-cloud-cli-bigtable-emulator (or gcloud components"
    " install bigtable), or set BIGTABLE_EMULATOR_HOST to one that runs"
)
SDK_ROOTS: Final = ("/usr/lib/google-cloud-sdk", "/usr/share/google-cloud-sdk", "/opt/google-cloud-sdk")
_RUNNING: Final = re.compile(rb"running on ([^\s:]+:[0-9]+)")


def find_emulator() -> Path | None:
    """Return the emulator's program, from PATH or from where Google's packages put it; None if it is not here."""
    found = shutil.which(PROGRAM)
    if found is not None:
        return Path(found)
    roots = [Path(root) for root in SDK_ROOTS]
    gcloud = shutil.which("gcloud")
    if gcloud is not None:
        roots.insert(0, Path(gcloud).resolve().parent.parent)
    for root in roots:
        program = root / "platform" / "bigtable-emulator" / PROGRAM
        if os.access(program, os.X_OK):
            return program
    return None


class Emulator:
    """A running emulator on a port of its own choice. Blocking: it starts in a fraction of a second."""

    def __init__(self) -> None:
        """Start it. Raises `LocalError` if it is not installed or does not start."""
        program = find_emulator()
        if program is None:
            raise LocalError(HOW_TO_GET)
        # A session of its own: Ctrl-C at the terminal must not stop the store before the services.
        self._process = subprocess.Popen(  # noqa: S603 -- a program of Google's package
            [program, "--host", "127.0.0.1", "--port", "0"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self.address = self._wait_address()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    def _wait_address(self) -> str:
        """Read the output until it says where it listens."""
        output = self._process.stdout
        deadline, said = time.monotonic() + START_S, b""
        while output is not None and (left_s := deadline - time.monotonic()) > 0:
            if not select.select([output], [], [], left_s)[0]:
                break
            piece = os.read(output.fileno(), 4096)
            said += piece
            found = _RUNNING.search(said)
            if found is not None:
                return found.group(1).decode()
            if not piece:
                break
        raise LocalError(f"the Bigtable emulator did not start: {said.decode(errors='replace').strip()[-300:]}")

    def stop(self) -> None:
        """End it; what it held is gone."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


@dataclass(frozen=True, slots=True)
class DemoStore:
    """The demo's Bigtable store: its URL ("" for the SQLite file) and the emulator's process (0: not ours)."""

    url: str = ""
    pid: int = 0


@contextmanager
def demo_store(store: str, state: Path) -> Iterator[DemoStore]:
    """Provide the store of a demo in directory `state`: start the emulator unless the environment names one.

    Raises `LocalError` when there is no emulator, and for a directory that belongs to another store: an emulator that
    ended took its data with it, while the directory's HSMs remember theirs.
    """
    if store != "bigtable":
        _check_belongs(state, "")
        yield DemoStore()
        return
    name = f"bigtable:demo/demo-{sha256(bytes(state)).hexdigest()[:12]}"
    given = os.environ.get(EMULATOR_VARIABLE)
    if given:
        url = f"{name}?emulator={given}"
        _check_belongs(state, url)
        yield DemoStore(url)
        return
    _check_belongs(state, name)
    emulator = Emulator()
    try:
        yield DemoStore(f"{name}?emulator={emulator.address}", emulator.pid)
    finally:
        emulator.stop()


def _check_belongs(state: Path, url: str) -> None:
    """Refuse a directory that an earlier demo used with another store."""
    try:
        former = str(tomllib.loads((state / "cluster.toml").read_text(encoding="utf-8")).get("store", ""))
    except (OSError, tomllib.TOMLDecodeError):
        return
    if former.startswith("bigtable:") if not url else former != url:
        raise LocalError(f"{state} belongs to the store {former}, which this demo does not use: give a new --state-dir")
