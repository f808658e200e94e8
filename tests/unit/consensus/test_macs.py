"""MACs against the golden table of hsm.md 4.1, and verification of hostile values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from juicebox_hsm.consensus import macs
from juicebox_hsm.consensus.macs import Macs
from juicebox_hsm.consensus.types import Captured, LogEntry, Partition, TransferringIn, TransferringOut
from juicebox_hsm.ids import FULL_RANGE, LOG_INDEX_MAX, GroupId, HsmId, OwnedRange, RealmId, RecordId
from juicebox_hsm.wire import cbor

KEY = b"\x2a" * 32
M = LOG_INDEX_MAX


def realm(octet: int) -> RealmId:
    return RealmId(bytes([octet]) * 16)


def group(octet: int) -> GroupId:
    return GroupId(bytes([octet]) * 16)


def hsm(octet: int) -> HsmId:
    return HsmId(bytes([octet]) * 16)


def word(octet: int) -> bytes:
    return bytes([octet]) * 32


E0 = LogEntry(M, None, None, word(6), bytes(32), hsm(7))
E1 = replace(
    E0,
    partition=Partition(FULL_RANGE, word(3)),
    transferring=TransferringOut(group(4), Partition(FULL_RANGE, word(5)), M - 1),
)
E2 = replace(
    E0,
    partition=Partition(FULL_RANGE, word(3)),
    transferring=TransferringIn(group(0x0E), FULL_RANGE, M - 2),
)
E3 = replace(E0, consumed=((group(8), 3), (group(9), 300)))
E4 = replace(E3, retired=True)

GOLDEN = [
    (
        "groupcfg2",
        macs.group_configuration_message(realm(1), group(2), (hsm(3), hsm(4), hsm(5)), (0, 1, M)),
        "5668053798ab222b3379db800990dcd23d06ccdabb05d0fb946a497f580ec5ee",
        "70c84bceb82f6bfcf24798e1294de33b467e2a69f89d7052d1e51ae97030b3a6",
    ),
    (
        "logentry",
        macs.log_entry_message(realm(1), group(2), E4),
        "58bddb3a0662674cb5b31f010768d7d46717f5e48ad4df712ad8136d90364e6c",
        "78101d853adfa8039ecd1b71f0cebca9010736d7cd9d64e79654823a00f51854",
    ),
    (
        "groupcfg",
        macs.group_configuration_message(realm(1), group(2), (hsm(3), hsm(4), hsm(5))),
        "69310c98be6cfc349fbb1c34bf141932a8954f356a1e73b769eda18d1b18bdca",
        "25ac3c9b19c72a614ea47da613824f6b555dcc2f62e729440f15c8659cbda998",
    ),
    (
        "hsmrealm",
        macs.hsm_realm_message(realm(2), hsm(0x11), (word(0x40), word(0x80), word(0x10), word(0xE0))),
        "c510ebb72919d56a182f0a86449463a33aeeb28c5b546ace6aaca985a6dffc28",
        "492c7b95206352878f69058afb97c4a16293e01b71d4666b76f978a1d6c9f000",
    ),
    (
        "capture",
        macs.captured_message(hsm(1), realm(2), group(3), M, word(5)),
        "64be4f2c6fba5c50102e87d2d4d51ee3a026c8d1eedfa1a04852b21b8b1dc353",
        "ccbdb4b6fcd06e4bcba5ed6f7f02eec0f29dda10ad010480056bd5511d2b61e1",
    ),
    (
        "logentry",
        macs.log_entry_message(realm(1), group(2), E0),
        "0c34181ee7555fe98d3628c25cb96d61f36982b022643d2187f1f5b4e85b9221",
        "25c5170b4064eb01c0d4ba96a31b4be075d4fea7aac39e2349adc523172b567d",
    ),
    (
        "logentry",
        macs.log_entry_message(realm(1), group(2), E1),
        "466cd3c8ff65f986fd33854fc3b650a585e1eff225c4e2b66f2080abe37f0e63",
        "fd27948ddf1de00690a3b178d3dd74be03bb0fe25118780440ac96016f7949f2",
    ),
    (
        "logentry",
        macs.log_entry_message(realm(1), group(2), E2),
        "affb3619c7557de2e45bd9c5e0cf6810536203f966615765f0fdeab5e9b751e8",
        "ae9a2dbfc7e1a35e703ba3018bce9b083481a14e600a4fa68870f262ea09244e",
    ),
    (
        "logentry",
        macs.log_entry_message(realm(1), group(2), E3),
        None,
        "b4dc3f6f96875d75aeef0552686ca7e305f8044f96bcd8d68f2eb38682d273f8",
    ),
    (
        "prepared_transfer",
        macs.prepared_transfer_message(realm(0x0A), group(0x0B), group(0x0C), FULL_RANGE, b"\x0d" * 16),
        "0f1f2079aa4204fd393fd67e515ba4539392f398aef5e964e9f3d9d294e85218",
        "0ddb3862b687265b45749957d5f7c81a0593ee56601028276a0ebcc2340ebdad",
    ),
    (
        "transfer",
        # The layout before H2 exists only here, to check the building blocks: realm, partition, destination, nonce.
        b"".join(
            (
                cbor.map_head(4),
                cbor.text("realm"),
                cbor.byte_string(realm(1)),
                cbor.text("partition"),
                macs.encode_partition(Partition(FULL_RANGE, word(2))),
                cbor.text("destination"),
                cbor.byte_string(group(3)),
                cbor.text("nonce"),
                cbor.byte_string(b"\x04" * 16),
            )
        ),
        "c1319e7498d95636823b2f952d2e83d8bf2cd00daf2a8de5c6f7d2fbf5df78e3",
        "89f713bf4e8f316597b9b9401fd6f8687eaddc1c620c415e419c2b3e6810cdb0",
    ),
    (
        "transfer2",
        macs.transfer_message(realm(1), group(0x0E), group(3), Partition(FULL_RANGE, word(2)), 5, b"\x04" * 16),
        None,
        "cbf1e2c1d1c85ad4aab8f87c889f020613d4d4fbcc9daea9a939779529664549",
    ),
]


@pytest.mark.parametrize(("domain", "message", "test_domain", "production"), GOLDEN)
def test_golden_macs(domain: str, message: bytes, test_domain: str | None, production: str) -> None:
    """Every statement's message and domain are byte for byte those of the specification."""
    assert macs.mac(KEY, domain.encode(), message).hex() == production
    if test_domain is not None:
        assert macs.mac(KEY, b"test", message).hex() == test_domain


def test_methods_use_the_golden_domains() -> None:
    """The signing methods are the same function over the same messages, each in its own domain."""
    signer = Macs(KEY)
    keys = (word(0x40), word(0x80), word(0x10), word(0xE0))
    partition = Partition(FULL_RANGE, word(2))
    produced = [
        signer.group_configuration(realm(1), group(2), (hsm(3), hsm(4), hsm(5)), (0, 1, M)),
        signer.log_entry(realm(1), group(2), E4),
        signer.group_configuration(realm(1), group(2), (hsm(3), hsm(4), hsm(5))),
        signer.hsm_realm(realm(2), hsm(0x11), keys),
        signer.captured(hsm(1), realm(2), group(3), M, word(5)),
        *[signer.log_entry(realm(1), group(2), entry) for entry in (E0, E1, E2, E3)],
        signer.prepared_transfer(realm(0x0A), group(0x0B), group(0x0C), FULL_RANGE, b"\x0d" * 16),
        signer.transfer(realm(1), group(0x0E), group(3), partition, 5, b"\x04" * 16),
    ]
    configuration = (hsm(3), hsm(4), hsm(5))
    unbound = signer.group_configuration(realm(1), group(2), configuration, (0, 0, 0))
    assert unbound == signer.group_configuration(realm(1), group(2), configuration), "one statement per meaning"
    assert [mac.hex() for mac in produced] == [row[3] for row in GOLDEN if row[0] != "transfer"]


def test_entry_message_bytes() -> None:
    """The CBOR of entry E0 is exactly the published one."""
    expected = (
        "a76368736d5007070707070707070707070707070707657265616c6d50010101010101010101010101010101016567726f75705002"
        "02020202020202020202020202020265696e6465781bffffffffffffffff69706172746974696f6ef6707472616e7366657272696e"
        "675f6f7574f668707265765f6d616358200606060606060606060606060606060606060606060606060606060606060606"
    )
    assert macs.log_entry_message(realm(1), group(2), E0).hex() == expected


ALTERATIONS = {
    "index": replace(E2, index=M - 1),
    "hsm": replace(E2, hsm=hsm(8)),
    "prev_mac": replace(E2, prev_mac=word(7)),
    "no partition": replace(E2, partition=None),
    "root": replace(E2, partition=Partition(FULL_RANGE, word(4))),
    "range": replace(E2, partition=Partition(OwnedRange(RecordId(word(1)), FULL_RANGE.end), word(3))),
    "no marker": replace(E2, transferring=None),
    "other marker": replace(E2, transferring=E1.transferring),
    "marker at": replace(E2, transferring=TransferringIn(group(0x0E), FULL_RANGE, M - 3)),
    "consumed": replace(E2, consumed=((group(8), 3),)),
    "retired": replace(E2, retired=True),
    "mac": replace(E2, entry_mac=bytes(32)),
    "short mac": replace(E2, entry_mac=b""),
    "index too large": replace(E2, index=2**64),
    "index negative": replace(E2, index=-1),
    "at too large": replace(E2, transferring=TransferringIn(group(0x0E), FULL_RANGE, 2**64)),
    "consumed too large": replace(E2, consumed=((group(8), 2**64),)),
    "short range": replace(E2, partition=Partition(OwnedRange(RecordId(b""), RecordId(b"")), word(3))),
}


@pytest.mark.parametrize("name", sorted(ALTERATIONS))
def test_altered_entries_do_not_verify(name: str) -> None:
    """No single altered field of an entry, however malformed, keeps its MAC valid or raises."""
    signer = Macs(KEY)
    mac = signer.log_entry(realm(1), group(2), E2)
    assert signer.verify_log_entry(realm(1), group(2), replace(E2, entry_mac=mac))
    altered = ALTERATIONS[name]
    if len(altered.entry_mac) == 32 and name != "mac":
        altered = replace(altered, entry_mac=mac)
    assert not signer.verify_log_entry(realm(1), group(2), altered)


def test_entries_do_not_verify_elsewhere() -> None:
    """An entry of one group or realm is nothing in another, nor under another key."""
    entry = replace(E1, entry_mac=Macs(KEY).log_entry(realm(1), group(2), E1))
    assert not Macs(KEY).verify_log_entry(realm(2), group(2), entry)
    assert not Macs(KEY).verify_log_entry(realm(1), group(1), entry)
    assert not Macs(b"\x2b" * 32).verify_log_entry(realm(1), group(2), entry)


@pytest.mark.parametrize(
    "change",
    [
        {"hsm": hsm(9)},
        {"realm": realm(9)},
        {"group": group(9)},
        {"index": 6},
        {"index": -1},
        {"index": 2**64},
        {"mac": word(9)},
        {"mac": b""},
        {"statement": word(9)},
        {"statement": b""},
    ],
)
def test_altered_captures_do_not_verify(change: dict[str, object]) -> None:
    """Every field of a capture is covered by its statement; malformed ones are refused, not raised."""
    signer = Macs(KEY)
    statement = signer.captured(hsm(1), realm(1), group(1), 5, word(1))
    captured = Captured(hsm(1), realm(1), group(1), 5, word(1), statement)
    assert signer.verify_captured(captured)
    assert not signer.verify_captured(replace(captured, **change))  # type: ignore[arg-type]  # one field each
