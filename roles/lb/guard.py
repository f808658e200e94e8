"""Which realms this balancer may serve with its record-id key (load-balancer.md 6.4).

A realm's store remembers the fingerprint of the key that was first used with it. Another key would move every user to
a new record id and make all secrets look unregistered, so a realm with another fingerprint is refused; other realms go
on. A realm is served only once the store has answered.
"""

from __future__ import annotations

from typing import Final

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.ids import RealmId
from juicebox_hsm.ports.settings import Settings
from roles.lb.context import Log
from roles.lb.poller import Poller

SETTING_PREFIX: Final = "record-id-key/"
RETRY_S: Final = 1.0
"""Pause before asking a store that failed again."""


class RealmGuard:
    """Claims the fingerprint for each realm that appears in the table. `run` must be running."""

    def __init__(self, fingerprint: bytes, settings: Settings, poller: Poller, log: Log) -> None:
        self._fingerprint = fingerprint
        self._settings = settings
        self._poller = poller
        self._log = log
        self.allowed: set[RealmId] = set()
        self.refused: set[RealmId] = set()

    async def run(self) -> None:
        """Look at every new table, until cancelled."""
        while True:
            complete = await self.look()
            with trio.move_on_after(float("inf") if complete else RETRY_S):
                if self._unknown() and complete:
                    continue
                await self._poller.wait_changed()

    async def look(self) -> bool:
        """Claim for the realms not yet known; False when the store failed and some remain."""
        for realm in self._unknown():
            try:
                standing = await self._settings.claim(SETTING_PREFIX + realm.hex(), self._fingerprint)
            except RealmError as error:
                self._log.warning("cannot check the record-id key of a realm", realm=realm.hex(), error=str(error))
                return False
            if realm in self.allowed or realm in self.refused:
                continue  # somebody else looked at the same time, and has said so
            if standing == self._fingerprint:
                self.allowed.add(realm)
                self._log.info("serving realm", realm=realm.hex())
            else:
                self.refused.add(realm)
                self._log.error(
                    "realm NOT served: it was used with another record-id key than this balancer's. Give this balancer "
                    "the secret record-id-randomization that the realm's other balancers have",
                    realm=realm.hex(),
                    expected=standing.hex(),
                    ours=self._fingerprint.hex(),
                )
        return True

    def _unknown(self) -> list[RealmId]:
        return [realm for realm in self._poller.table.realms if realm not in self.allowed | self.refused]
