"""Which realms a balancer may serve with its record-id key (load-balancer.md 6.4).

A realm's store remembers the fingerprint of the key that was first used with it. Another key would move every user to
a new record id and make all secrets look unregistered, so a realm with another fingerprint is refused; other realms go
on. A realm is served only once the store has answered.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Final

from juicebox_hsm.ids import RealmId

SETTING_PREFIX: Final = "record-id-key/"


def setting_name(realm: RealmId) -> str:
    """Return the setting that holds the fingerprint of `realm`'s key."""
    return SETTING_PREFIX + realm.hex()


class Ruling(enum.Enum):
    """What a realm's fingerprint says about serving it. `KNOWN`: it has said so before."""

    SERVED = enum.auto()
    REFUSED = enum.auto()
    KNOWN = enum.auto()


class ServedRealms:
    """The realms whose standing fingerprint is ours, and those with another one; neither list ever changes its mind."""

    def __init__(self, fingerprint: bytes) -> None:
        self.fingerprint: Final = fingerprint
        self.allowed: set[RealmId] = set()
        self.refused: set[RealmId] = set()

    def unknown(self, realms: Iterable[RealmId]) -> list[RealmId]:
        """Return those of `realms` whose fingerprint has yet to be asked for."""
        return [realm for realm in realms if realm not in self.allowed and realm not in self.refused]

    def rule(self, realm: RealmId, standing: bytes) -> Ruling:
        """Take in the fingerprint that stands in the store once ours was offered."""
        if realm in self.allowed or realm in self.refused:
            return Ruling.KNOWN
        if standing == self.fingerprint:
            self.allowed.add(realm)
            return Ruling.SERVED
        self.refused.add(realm)
        return Ruling.REFUSED
