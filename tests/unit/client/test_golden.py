"""The recorded conversation with the official client, replayed from the client's side (client-protocol.md 19.10)."""

from __future__ import annotations

from typing import Any

import pytest

from juicebox_hsm.client import (
    Client,
    Configuration,
    InvalidPin,
    NotRegistered,
    PinHashingMode,
    Realm,
)
from juicebox_hsm.client.transport import Headers
from juicebox_hsm.ids import RealmId
from tests.fakes.random import SeededRandom
from tests.vectors import VECTORS

GOLDEN: dict[str, Any] = VECTORS["golden"]


class Recording:
    """A transport that demands the recorded requests and plays the recorded answers."""

    def __init__(self) -> None:
        self.remaining = list(GOLDEN["exchanges"])

    async def post(self, url: str, headers: Headers, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Compare with the next recorded request, byte for byte."""
        exchange = self.remaining.pop(0)
        assert body.hex() == exchange["request"], exchange["request_name"]
        return exchange["http_status"], bytes.fromhex(exchange["response"])


async def test_golden_conversation() -> None:
    """Drawing the same randomness, this client sends what the official one sent, and reads its answers."""
    recording = Recording()
    realm_id = RealmId(bytes.fromhex(GOLDEN["realm_id"]))
    realm = Realm(realm_id, "https://realm.test/", bytes.fromhex(GOLDEN["server_static_public"]))
    client = Client(
        Configuration((realm,), 1, 1, PinHashingMode(GOLDEN["pin_hashing_mode"])),
        {realm_id.hex(): GOLDEN["auth_token"]},
        transport=recording,
        random=SeededRandom(bytes.fromhex(GOLDEN["client_seed"])),
    )
    info = GOLDEN["info"].encode()
    await client.register(GOLDEN["pin"].encode(), GOLDEN["secret"].encode(), info, GOLDEN["num_guesses"])
    with pytest.raises(InvalidPin) as wrong:
        await client.recover(GOLDEN["wrong_pin"].encode(), info)
    assert wrong.value.guesses_remaining == 2
    assert await client.recover(GOLDEN["pin"].encode(), info) == GOLDEN["secret"].encode()
    await client.delete()
    with pytest.raises(NotRegistered):
        await client.recover(GOLDEN["pin"].encode(), info)
    assert recording.remaining == []
