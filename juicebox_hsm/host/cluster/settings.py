"""The settings in which operators and managers tell the managers something (storage.md 2.8)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from juicebox_hsm.errors import DecodingError
from juicebox_hsm.host.cluster.view import GroupKey, name_of
from juicebox_hsm.ids import HsmId, parse_id

DRAIN_PREFIX: Final = "drain/"
PAUSED: Final = "rebalance/paused"
MOVED_PREFIX: Final = "rebalance/moved/"


def drain_setting(hsm: HsmId) -> str:
    """Name the setting that takes an HSM out of leadership."""
    return f"{DRAIN_PREFIX}{hsm.hex()}"


def moved_setting(key: GroupKey) -> str:
    """Name the setting that says when a group's leadership was moved, in Unix ms."""
    return f"{MOVED_PREFIX}{name_of(key)}"


def drained_hsms(names: Iterable[str]) -> frozenset[HsmId]:
    """Return the HSMs that settings take out of leadership; a name that holds no HSM id counts for nothing."""
    found = set()
    for name in names:
        try:
            found.add(HsmId(parse_id(name.removeprefix(DRAIN_PREFIX))))
        except DecodingError:
            continue
    return frozenset(found)
