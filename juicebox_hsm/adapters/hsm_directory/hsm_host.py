"""An HSM inside this process, and its directory (decision record 0004, hardware.md 2).

`InProcessHsm` is the `HsmTransport` of the default deployment: strictly serialised, and never on the event loop while
NVRAM is written. An HSM directory holds `keys.json` (sealed realm keys), `wrapping.key` and `nvram`. It belongs to one
HSM for ever: never start a copy while the original may run. The directory itself is what is locked: a lock file could
be deleted as stale, and two processes with one NVRAM would vote twice.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, Self, get_args

import trio

from juicebox_hsm.adapters.hsm_directory.key_bundle import BACKEND as KEY_BACKEND
from juicebox_hsm.adapters.hsm_directory.key_bundle import KeyBundle, read_bundle, write_bundle
from juicebox_hsm.adapters.hsm_directory.nvram import FileNvram, NvramFailed, read_nvram, sync_directory
from juicebox_hsm.adapters.hsm_directory.unpacked import remove_unpacked_library
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.process.directory_lock import DIRECTORY, by_whom, lock_now
from juicebox_hsm.adapters.process.threads import in_thread_or_here
from juicebox_hsm.consensus.nvram import PersistentState, decode_state
from juicebox_hsm.errors import LocalError, NotYet
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.keys import RealmKeys
from juicebox_hsm.hsm.messages import (
    BecomeLeader,
    JoinGroup,
    JoinRealm,
    NewGroup,
    NewRealm,
    PersistState,
    Request,
    Response,
)
from juicebox_hsm.hsm.state import Poisoned
from juicebox_hsm.ports.errors import HsmGone

remove_unpacked_library()

KEYS_FILE: Final = "keys.json"
WRAPPING_KEY_FILE: Final = "wrapping.key"
NVRAM_FILE: Final = "nvram"
BACKENDS: Final = f"keys: {KEY_BACKEND} (in memory while running), NVRAM: file (no protection against rollback)"

_MAY_WRITE: Final = (PersistState, BecomeLeader, NewRealm, JoinRealm, NewGroup, JoinGroup)
"""Requests that may write NVRAM; they run whole in a worker thread, so that the event loop never waits for a disk."""


INLINE_S_MAX: Final = 0.002
"""Work done without letting other tasks run; then a checkpoint, so that pings and heartbeats get their turn (own)."""


class InProcessHsm:
    """`HsmTransport` to an `Hsm` object.

    `send` may be a checkpoint before the request begins and never is one after. It is none while the HSM is free and
    has worked for less than `INLINE_S_MAX` since the last: a trip through the scheduler costs as much as a capture.
    """

    def __init__(self, hsm: Hsm, metrics: Metrics | None = None) -> None:
        """`metrics` get `hsm.handle{req_name}`, as the host sees it: coarse, and nothing it does not know anyway."""
        self._hsm = hsm
        metrics = Metrics() if metrics is None else metrics
        self._timers = {kind: metrics.timer("hsm.handle", req_name=kind.__name__) for kind in get_args(Request)}
        self._waits = metrics.timer("hsm.wait")
        self._lock = trio.Lock()
        self._writer = trio.CapacityLimiter(1)
        self._inline_s = 0.0

    async def send(self, request: Request) -> Response:
        """Run one request. Raises `HsmGone` when the HSM is poisoned, also by this very request; bugs pass."""
        try:
            if isinstance(request, _MAY_WRITE):
                return await self._send_thread(request)
            if self._lock.locked() or self._inline_s > INLINE_S_MAX:
                waiting = time.perf_counter_ns()
                async with self._lock:
                    self._inline_s = 0.0
                    began = time.perf_counter_ns()
                    self._waits.observe_ns(began - waiting)
                    reply = self._hsm.handle(request)
                    self._timers[type(request)].observe_ns(time.perf_counter_ns() - began)
                    return reply
            # no checkpoint between the look at the lock and here, so nobody else can be inside
            began = time.perf_counter_ns()
            try:
                return self._hsm.handle(request)
            finally:
                elapsed = time.perf_counter_ns() - began
                self._inline_s += elapsed * 1e-9
                self._timers[type(request)].observe_ns(elapsed)
        except (Poisoned, NvramFailed) as error:
            raise HsmGone(str(error)) from error

    async def _send_thread(self, request: Request) -> Response:
        """Run a request that may write NVRAM in the worker thread."""
        waiting = time.perf_counter_ns()
        async with self._lock:
            began = time.perf_counter_ns()
            self._waits.observe_ns(began - waiting)
            reply = await in_thread_or_here(self._hsm.handle, request, limiter=self._writer)
            self._timers[type(request)].observe_ns(time.perf_counter_ns() - began)
            return reply


class FilePlatform:
    """The platform of an HSM directory, locked against every other opener until `close`."""

    def __init__(self, directory: Path, lock: int) -> None:
        self._lock: int | None = lock
        self._nvram = FileNvram(directory / NVRAM_FILE)
        self._keys = _read_keys(directory).keys
        self._clock_start = self._nvram.start(time.time_ns() // 1_000_000)

    @property
    def keys(self) -> RealmKeys:
        """Return the realm keys."""
        return self._keys

    @property
    def clock_start(self) -> int:
        """Return the first role clock value of this life (H5)."""
        return self._clock_start

    def random(self, size: int) -> bytes:
        """Return bytes of the operating system's generator."""
        return os.urandom(size)

    def nvram_read(self) -> bytes:
        """Return the last completely written content."""
        return self._nvram.read()

    def nvram_write(self, content: bytes) -> None:
        """Make the content durable; raises `NvramFailed`."""
        self._nvram.write(content)

    def close(self) -> None:
        """Release the directory's lock; idempotent. The HSM MUST NOT be used afterwards."""
        if self._lock is not None:
            self._nvram.close()
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_keys(directory: Path) -> KeyBundle:
    return read_bundle(directory / KEYS_FILE, directory / WRAPPING_KEY_FILE)


def open_hsm_dir(path: Path) -> FilePlatform:
    """Lock an HSM directory and begin a life of its HSM; raises `LocalError` naming what is wrong.

    Blocks for two fsyncs.
    """
    _check_directory(path, "--hsm-dir")
    lock = _lock(path)
    try:
        return FilePlatform(path, lock)
    except BaseException:
        os.close(lock)
        raise


def _lock(directory: Path) -> int:
    def taken() -> LocalError:
        return NotYet(f"{directory}: this HSM is run{by_whom(directory)} already; one directory serves one process")

    return lock_now(directory, DIRECTORY, taken)


def init_hsm_dir(keys_file: Path, path: Path) -> None:
    """Make the directory of a new HSM with the realm keys of `keys_file` under a wrapping key of its own.

    The wrapping key of `keys_file` is expected in `keys_file` + ".key". Raises `LocalError`, also if `path` exists.
    """
    bundle = read_bundle(keys_file, wrapping_key_path(keys_file))
    if path.exists() or path.is_symlink():
        raise LocalError(f"--dir {path}: exists already; an HSM directory is never overwritten, give another name")
    staging = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        write_bundle(bundle, staging / KEYS_FILE, staging / WRAPPING_KEY_FILE, os.urandom)
        FileNvram.create(staging / NVRAM_FILE)
        staging.rename(path)
        staging = None
        sync_directory(path.parent)
    except OSError as error:
        raise LocalError(f"--dir {path}: {error.strerror}") from None
    finally:
        if staging is not None:
            with suppress(OSError):
                shutil.rmtree(staging)


def generate_keys(keys_file: Path, realm_name: str) -> RealmKeys:
    """Draw the keys of a new realm and write the bundle and its wrapping key; raises `LocalError`."""
    keys = RealmKeys.generate(os.urandom)
    write_bundle(KeyBundle(realm_name, 1, keys), keys_file, wrapping_key_path(keys_file), os.urandom)
    return keys


def wrapping_key_path(keys_file: Path) -> Path:
    """Return where the wrapping key of a bundle made by `generate_keys` lies."""
    return keys_file.with_name(keys_file.name + ".key")


def _check_directory(path: Path, flag: str) -> None:
    if problem := directory_problem(path):
        raise NotYet(f"{flag} {path}: {problem}")


def directory_problem(path: Path) -> str | None:
    """Return why a directory is not an HSM's at all, None if something of an HSM is there.

    A mistyped name or a file system that is not mounted must not read as the loss of an HSM.
    """
    make = f"make an HSM with `juicebox-hsm hsm init --keys FILE --dir {path}`"
    if not path.is_dir():
        return f"no such directory; correct the name, mount its file system, or {make}"
    if not any(os.path.lexists(path / name) for name in (NVRAM_FILE, KEYS_FILE, WRAPPING_KEY_FILE)):
        return f"no HSM in this directory; correct the name, mount its file system, or {make}"
    return None


def read_hsm_dir(path: Path) -> tuple[KeyBundle, PersistentState | None]:
    """Return keys and durable state of an HSM directory without starting or locking it; raises `RealmError`.

    The state is None before the first start.
    """
    _check_directory(path, "--dir")
    _, payload = read_nvram(path / NVRAM_FILE)
    return _read_keys(path), decode_state(payload)
