"""PIN stretching with Argon2id (client-protocol.md 12)."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

from argon2.low_level import Type, hash_secret_raw

_ARGON2_VERSION: Final = 0x13
_OUTPUT_BYTES: Final = 64
_LANES: Final = 1


class PinHashingMode(enum.Enum):
    """How much work a guess costs; values are the configuration's texts."""

    STANDARD_2019 = "Standard2019"
    FAST_INSECURE = "FastInsecure"


@dataclass(frozen=True, slots=True)
class _Cost:
    memory_kib: int
    passes: int


_COSTS: Final = {
    PinHashingMode.STANDARD_2019: _Cost(memory_kib=16384, passes=32),
    PinHashingMode.FAST_INSECURE: _Cost(memory_kib=8, passes=1),
}


@dataclass(frozen=True, slots=True)
class StretchedPin:
    """The two halves of the stretched PIN: what the OPRF is asked for, and what the secret's key grows from."""

    access_key: bytes = field(repr=False)
    encryption_key_seed: bytes = field(repr=False)


def salt(version: bytes, info: bytes) -> bytes:
    """Return the salt of a registration: both parts with their 4-byte lengths."""
    return len(version).to_bytes(4, "big") + version + len(info).to_bytes(4, "big") + info


def stretch(mode: PinHashingMode, pin: bytes, version: bytes, info: bytes) -> StretchedPin:
    """Stretch a PIN. Standard2019 takes 16 MiB and about 100 ms without the GIL, FastInsecure no time."""
    cost = _COSTS[mode]
    output = hash_secret_raw(
        secret=pin,
        salt=salt(version, info),
        time_cost=cost.passes,
        memory_cost=cost.memory_kib,
        parallelism=_LANES,
        hash_len=_OUTPUT_BYTES,
        type=Type.ID,
        version=_ARGON2_VERSION,
    )
    return StretchedPin(output[:32], output[32:])
