"""Bodies of the internal RPC keep their bytes, so that services of two versions understand each other."""

from __future__ import annotations

import msgspec
import pytest

from juicebox_hsm.wire.rpc import Direction, GroupRole, Range, RoleInfo, TransferringInfo


@pytest.mark.parametrize(
    ("body", "plain"),
    [
        (RoleInfo(GroupRole.LEADER, 7, 5), ["RoleInfo", "Leader", 7, 5]),
        (RoleInfo(GroupRole.STEPPING_DOWN, 8, 5), ["RoleInfo", "SteppingDown", 8, 5]),
        (RoleInfo(GroupRole.WITNESS, 1), ["RoleInfo", "Witness", 1, None]),
        (
            TransferringInfo(Direction.IN, b"g", Range(b"a", b"b"), 9),
            ["TransferringInfo", "In", b"g", ["Range", b"a", b"b"], 9, b""],
        ),
        (
            TransferringInfo(Direction.OUT, b"g", Range(b"a", b"b"), 9, b"h"),
            ["TransferringInfo", "Out", b"g", ["Range", b"a", b"b"], 9, b"h"],
        ),
    ],
)
def test_roles_and_directions_travel_by_name(body: msgspec.Struct, plain: list[object]) -> None:
    """An enum is written as the word that was written before there was one, and read back as the enum."""
    encoded = msgspec.msgpack.encode(body)
    assert encoded == msgspec.msgpack.encode(plain)
    assert msgspec.msgpack.decode(encoded, type=type(body)) == body


def test_an_unknown_role_is_no_status() -> None:
    """A role that this build does not know is refused where it arrives, not compared with names later."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(["RoleInfo", "Emperor", 1, None]), type=RoleInfo)
