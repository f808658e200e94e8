"""Find and run the Pub/Sub emulator, which keeps everything in memory: for the demo and for tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from juicebox_hsm.adapters.pubsub.bus import EMULATOR_VARIABLE
from juicebox_hsm.errors import LocalError
from roles.tools.demo.emulator import SDK_ROOTS

PROJECT: Final = "demo"
START_S: Final = 30.0
STOP_S: Final = 3.0
POLL_S: Final = 0.05
HOW_TO_GET: Final = (
    "the Pub/Sub emulator is not installed: apt-get install google-cloud-cli-pubsub-emulator default-jre-headless (or"
    " gcloud components install pubsub-emulator), or set PUBSUB_EMULATOR_HOST to one that runs"
)
_STARTED: Final = b"Server started, listening on"
_JAVA_FLAGS: Final = ("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
"""It starts in a second and stays small; it is no measure of the service's speed anyway."""


def find_emulator() -> Path | None:
    """Return the emulator's archive where Google's packages put it; None if it or Java is not here."""
    if shutil.which("java") is None:
        return None
    roots = [Path(root) for root in SDK_ROOTS]
    gcloud = shutil.which("gcloud")
    if gcloud is not None:
        roots.insert(0, Path(gcloud).resolve().parent.parent)
    for root in roots:
        found = sorted((root / "platform" / "pubsub-emulator" / "lib").glob("cloud-pubsub-emulator-*-all.jar"))
        if found:
            return found[-1]
    return None


class PubSubEmulator:
    """A running emulator. Blocking: it starts in one to three seconds."""

    def __init__(self, port: int = 0) -> None:
        """Begin to start it on `port`, 0 for a free one. Raises `LocalError` if it is not installed."""
        archive = find_emulator()
        if archive is None:
            raise LocalError(HOW_TO_GET)
        self.port = port or _free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process; a pipe would fill up
        # A session of its own: Ctrl-C at the terminal must not stop the bus before the services.
        self._process = subprocess.Popen(  # noqa: S603 -- a program of Google's package
            ["java", *_JAVA_FLAGS, "-jar", archive, "--host=127.0.0.1", f"--port={self.port}"],  # noqa: S607 - Java from PATH
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    def wait_started(self) -> None:
        """Wait until it takes calls. Raises `LocalError` with the end of what it said."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if _STARTED in self._output():
                return
            time.sleep(POLL_S)
        said = self._output().decode(errors="replace").strip()[-300:]
        self.stop()
        raise LocalError(f"the Pub/Sub emulator did not start: {said}")

    def _output(self) -> bytes:
        return os.pread(self._said.fileno(), 1 << 16, 0)

    def signal(self, number: int) -> None:
        """Send it a signal, SIGSTOP for one."""
        self._process.send_signal(number)

    def stop(self) -> None:
        """End it; what it held is gone."""
        self._process.kill()
        self._process.wait(STOP_S)
        self._said.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class DemoBus:
    """The demo's bus: the flags of agents and tenant log, none for the embedded one, and the emulator's process."""

    flags: tuple[str, ...] = ()
    pid: int = 0


def flags_of(address: str) -> tuple[str, ...]:
    """Return the flags that name the demo's project on an emulator."""
    return ("--pubsub-project", PROJECT, "--pubsub-url", f"http://{address}")


@contextmanager
def demo_bus(bus: str, store: str) -> Iterator[DemoBus]:
    """Provide the bus of a demo: Pub/Sub's emulator for `pubsub`, and beside a Bigtable store where it is installed.

    It is started unless the environment names one. Raises `LocalError` when it was asked for and is not installed.
    """
    given = os.environ.get(EMULATOR_VARIABLE)
    wanted = bus or ("pubsub" if store == "bigtable" else "embedded")
    if wanted == "pubsub" and not bus and not given and find_emulator() is None:
        print(f"demo: {HOW_TO_GET}; events are served from the store meanwhile", file=sys.stderr)
        wanted = "embedded"
    if wanted == "embedded":
        yield DemoBus()
        return
    if given:
        yield DemoBus(flags_of(given))
        return
    emulator = PubSubEmulator()
    try:
        emulator.wait_started()
        yield DemoBus(flags_of(emulator.address), emulator.pid)
    finally:
        emulator.stop()
