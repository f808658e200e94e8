"""Asks the store which realms this balancer may serve; the rule is `host.served_realms`."""

from __future__ import annotations

from typing import Final

import trio

from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.served_realms import Ruling, ServedRealms, setting_name
from juicebox_hsm.ports.observation import Log
from juicebox_hsm.ports.settings import Settings
from roles.lb.poller import Poller

RETRY_S: Final = 1.0
"""Pause before asking a store that failed again."""


class RealmGuard:
    """Claims the fingerprint for each realm that appears in the table. `run` must be running."""

    def __init__(self, fingerprint: bytes, settings: Settings, poller: Poller, log: Log) -> None:
        self.realms = ServedRealms(fingerprint)
        self._settings = settings
        self._poller = poller
        self._log = log

    async def run(self) -> None:
        """Look at every new table, until cancelled."""
        while True:
            complete = await self.look()
            with trio.move_on_after(float("inf") if complete else RETRY_S):
                if complete and self.realms.unknown(self._poller.table.realms):
                    continue
                await self._poller.wait_changed()

    async def look(self) -> bool:
        """Claim for the realms not yet known; False when the store failed and some remain."""
        ours = self.realms.fingerprint
        for realm in self.realms.unknown(self._poller.table.realms):
            try:
                standing = await self._settings.claim(setting_name(realm), ours)
            except RealmError as error:
                self._log.warning("cannot check the record-id key of a realm", realm=realm.hex(), error=str(error))
                return False
            match self.realms.rule(realm, standing):
                case Ruling.SERVED:
                    self._log.info("serving realm", realm=realm.hex())
                case Ruling.REFUSED:
                    self._log.error(
                        "realm NOT served: it was used with another record-id key than this balancer's. Give this "
                        "balancer the secret record-id-randomization that the realm's other balancers have",
                        realm=realm.hex(),
                        expected=standing.hex(),
                        ours=ours.hex(),
                    )
                case Ruling.KNOWN:
                    pass  # somebody else looked at the same time, and has said so
        return True
