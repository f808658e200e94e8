"""The recorded conversation with the official client (client-protocol.md 19.10), driven at the HSM byte for byte."""

from __future__ import annotations

from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.keys import RealmKeys
from juicebox_hsm.hsm.messages import (
    AppRequest,
    AppRequestOk,
    CaptureNext,
    Commit,
    CommitOk,
    NewRealm,
    NewRealmOk,
    PersistState,
    PersistStateOk,
)
from juicebox_hsm.ids import RecordId
from juicebox_hsm.wire.client import RequestKind, decode_client_request, encode_client_response
from tests.fakes.hsm import MemoryPlatform, Nodes, expect
from tests.fakes.random import SeededRandom
from tests.vectors import VECTORS, raw


class GoldenPlatform(MemoryPlatform):
    """Serves the recorded server's draws (32 bytes per handshake, 64 per evaluation); all else from its own stream.

    The recorded server drew its realm id, static secret and record-id key first and had no ids or leaf nonces to draw.
    """

    def __init__(self) -> None:
        stream = SeededRandom(raw("golden", "server_seed"))
        assert stream(16) == raw("golden", "realm_id")
        secret = stream(32)
        assert secret == raw("golden", "server_static_secret")
        assert stream(32) == raw("golden", "record_id_key")
        super().__init__(RealmKeys.from_bundle(secret + b"\1" * 32 + b"\2" * 32))
        self.draws: list[int] = []
        self._stream = stream

    def random(self, size: int) -> bytes:
        """Return recorded entropy for the sizes the recorded server drew."""
        if size not in (32, 64):
            return super().random(size)
        self.draws.append(size)
        return self._stream(size)


def test_golden_conversation() -> None:
    """Every answer of the recording comes out byte for byte, with entropy drawn in the recorded order."""
    golden = VECTORS["golden"]
    platform = GoldenPlatform()
    assert platform.keys.communication_public == raw("golden", "server_static_public")
    hsm, nodes = Hsm(platform), Nodes()
    created = expect(hsm.handle(NewRealm()), NewRealmOk)
    nodes.put(created.delta)
    entry = created.entry
    expect_capture = CaptureNext(created.realm, created.group, (entry,))
    hsm.handle(expect_capture)
    for exchange in golden["exchanges"]:
        request = decode_client_request(bytes.fromhex(exchange["request"]))
        assert request.kind is RequestKind.SECRETS_REQUEST
        record = RecordId(b"\x42" * 32)
        assert entry.partition is not None
        proof = nodes.proof(entry.partition, record)
        answer = expect(
            hsm.handle(
                AppRequest(
                    created.realm, created.group, record, request.session_id, request.encrypted, proof, entry.index
                )
            ),
            AppRequestOk,
        )
        entry = answer.entry
        nodes.put(answer.delta)
        hsm.handle(CaptureNext(created.realm, created.group, (entry,)))
        captures = expect(hsm.handle(PersistState()), PersistStateOk).captured
        done = expect(hsm.handle(Commit(created.realm, created.group, captures)), CommitOk)
        ((mac, noise, result),) = done.responses
        assert mac == entry.entry_mac
        assert result.kind.value == exchange["request_name"]
        assert encode_client_response(noise).hex() == exchange["response"]
    assert len(golden["exchanges"]) == 9
    assert platform.draws[0] == 32
    assert set(platform.draws[1:]) == {64}
