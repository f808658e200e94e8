"""An HSM whose NVRAM stops taking writes when told to: the platform of a real HSM directory behind a switch.

A refused write is what a broken or full device gives: nothing was stored, the HSM is poisoned, the process ends with
status 75, and its next life starts from what was written before.
"""

from __future__ import annotations

from juicebox_hsm.adapters.faults.switch import FaultSwitch
from juicebox_hsm.adapters.hsm_directory.nvram import NvramFailed
from juicebox_hsm.hsm.keys import RealmKeys
from juicebox_hsm.hsm.platform import Platform


def with_nvram_faults(platform: Platform, switch: FaultSwitch) -> Platform:
    """Return a platform whose writes suffer the faults of `switch`; `platform` itself when none can be asked for."""
    return _FaultyPlatform(platform, switch) if switch.is_configured else platform


class _FaultyPlatform:
    """Passes everything on but the writes that are to fail."""

    def __init__(self, platform: Platform, switch: FaultSwitch) -> None:
        self._platform = platform
        self._switch = switch

    @property
    def keys(self) -> RealmKeys:
        return self._platform.keys

    @property
    def clock_start(self) -> int:
        return self._platform.clock_start

    def random(self, size: int) -> bytes:
        return self._platform.random(size)

    def nvram_read(self) -> bytes:
        return self._platform.nvram_read()

    def nvram_write(self, content: bytes) -> None:
        if self._switch.now.nvram_fails:
            raise NvramFailed("the NVRAM takes no writes (asked for by a chaos run)")
        self._platform.nvram_write(content)
