"""Faults on request, for chaos runs: a slow or refusing store, failing NVRAM, a wrong clock, a manager out of step.

Off unless the environment variable JUICEBOX_HSM_FAULTS_DIR names a directory; a role then follows the file
`<directory>/<its name>.json` while it runs. A missing file, or one that is being replaced, means no faults. The file
holds one JSON object with the fields of `Faults`; whoever controls a role's environment controls the role anyway.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

ENVIRONMENT: Final = "JUICEBOX_HSM_FAULTS_DIR"
LOOK_S: Final = 0.05
"""How long a look at the file is good for; shorter than anything a chaos run asks for."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What is wrong at the moment.

    `clock_offset_ms` is added to the wall clock. `store_delay_ms` goes before every store operation; with
    `store_refuses` all of them fail and nothing is applied; with `store_loses_replies` log appends are applied and
    reported as ambiguous. With `ignores_leases` every lease is granted, without the store's knowledge; with
    `reversed_candidates` a manager prefers the members that others would ask last. With `nvram_fails` an HSM's writes
    fail before they take effect.
    """

    clock_offset_ms: int = 0
    store_delay_ms: int = 0
    store_refuses: bool = False
    store_loses_replies: bool = False
    ignores_leases: bool = False
    reversed_candidates: bool = False
    nvram_fails: bool = False

    def to_json(self) -> str:
        """Return the file's content."""
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def from_json(cls, text: str) -> Faults:
        """Read the file's content; unknown fields are left out. Raises `ValueError`."""
        document = json.loads(text)
        if not isinstance(document, dict):
            raise ValueError("not a JSON object")  # noqa: TRY004 -- one error for any wrong content
        known = {field.name: type(field.default) for field in fields(cls)}
        for name, value in document.items():
            if name in known and type(value) is not known[name]:
                raise ValueError(f"{name}: {value!r} is not {known[name].__name__}")
        return cls(**{name: value for name, value in document.items() if name in known})


NO_FAULTS: Final = Faults()


class FaultSwitch:
    """Follows one file, or nothing (`path` None), which costs nothing."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._faults = NO_FAULTS
        self._good_until = 0.0

    @classmethod
    def from_environment(cls, name: str) -> FaultSwitch:
        """Return the switch of the role called `name`."""
        directory = os.environ.get(ENVIRONMENT)
        return cls(Path(directory) / f"{name}.json" if directory else None)

    @property
    def is_configured(self) -> bool:
        """Tell whether faults can be asked for at all."""
        return self._path is not None

    @property
    def now(self) -> Faults:
        """Return the faults in force, at most 50 ms old."""
        if self._path is None:
            return NO_FAULTS
        moment = time.monotonic()
        if moment >= self._good_until:
            self._good_until = moment + LOOK_S
            try:
                self._faults = Faults.from_json(self._path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                self._faults = NO_FAULTS
        return self._faults

    def now_ms(self) -> int:
        """Return Unix milliseconds by this role's clock."""
        return time.time_ns() // 1_000_000 + self.now.clock_offset_ms

    def now_s(self) -> float:
        """Return Unix seconds by this role's clock."""
        return time.time() + self.now.clock_offset_ms / 1000
