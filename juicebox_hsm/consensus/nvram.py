"""What an HSM keeps across restarts, and its bytes in NVRAM (hsm.md 5).

Stored bytes = `CBOR(state) || BLAKE2s-256(CBOR(state))`. The digest detects corruption, not attack: authenticity
and freshness are the back end's business. The worst legal state takes 3976 of 4000 bytes; do not lengthen field
names or add fields without redoing that sum.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import cbor2

from juicebox_hsm.consensus.types import GROUP_MEMBERS_MAX, GROUPS_PER_HSM_MAX, MAC_BYTES
from juicebox_hsm.errors import DecodingError, RealmError, check
from juicebox_hsm.ids import ID_BYTES, GroupId, HsmId, RealmId
from juicebox_hsm.wire import cbor

NVRAM_BYTES_MAX: Final = 4000
DIGEST_BYTES: Final = 32


class InvalidChecksum(RealmError):
    """The NVRAM content is corrupt; the HSM must not start from it."""


class Deserialization(RealmError):
    """The NVRAM content has an intact checksum but is not a state of ours; the HSM must not start from it."""


@dataclass(frozen=True, slots=True)
class PersistentGroup:
    """A membership; `captured` is the persisted (index, mac). Forgotten only for a retired group."""

    configuration: tuple[HsmId, ...]
    captured: tuple[int, bytes] | None


@dataclass(frozen=True, slots=True)
class PersistentRealm:
    """The realm, this HSM's own hsmrealm statement and its groups.

    `generation` counts the groups it has forgotten (u64): a statement admits an HSM to a group in one generation only.
    """

    id: RealmId
    statement: bytes
    groups: Mapping[GroupId, PersistentGroup]
    generation: int = 0


@dataclass(frozen=True, slots=True)
class PersistentState:
    """Everything that survives a restart."""

    id: HsmId
    realm: PersistentRealm | None


def encode_state(state: PersistentState) -> bytes:
    """Encode with the digest appended; deterministic. At most 4000 bytes for any legal state."""
    realm: dict[str, object] | None = None
    if state.realm is not None:
        groups = {
            group: {
                "configuration": list(state.realm.groups[group].configuration),
                "captured": _pair_item(state.realm.groups[group].captured),
            }
            for group in sorted(state.realm.groups)
        }
        realm = {"id": state.realm.id, "statement": state.realm.statement, "groups": groups}
        if state.realm.generation:
            realm["generation"] = state.realm.generation
    body: bytes = cbor2.dumps({"id": state.id, "realm": realm})
    check(len(body) + DIGEST_BYTES <= NVRAM_BYTES_MAX, "a legal persistent state fits the NVRAM")
    return body + digest(body)


def digest(body: bytes) -> bytes:
    """Return the unkeyed BLAKE2s-256 of the encoded state."""
    return hashlib.blake2s(body).digest()


def decode_state(stored: bytes) -> PersistentState | None:
    """Return the stored state, None when nothing was ever written.

    Raises `InvalidChecksum` for corrupt bytes and `Deserialization` for intact bytes that are no state.
    """
    if not stored:
        return None
    body, trailer = stored[:-DIGEST_BYTES], stored[-DIGEST_BYTES:]
    if len(stored) < DIGEST_BYTES or not hmac.compare_digest(digest(body), trailer):
        raise InvalidChecksum("the NVRAM content does not match its checksum")
    try:
        state = _state(cbor.decode_strict(body))
    except DecodingError as error:
        raise Deserialization(f"the NVRAM content is not an HSM state: {error}") from None
    if len(stored) > NVRAM_BYTES_MAX or encode_state(state) != stored:
        raise Deserialization("the NVRAM content is not an HSM state in canonical form")
    return state


def _pair_item(pair: tuple[int, bytes] | None) -> list[object] | None:
    return None if pair is None else list(pair)


def _fixed(item: object, size: int) -> bytes:
    if type(item) is not bytes or len(item) != size:
        raise DecodingError(f"a byte string of {size} bytes was expected")
    return item


def _state(item: object) -> PersistentState:
    fields = cbor.as_map(item)
    try:
        realm = fields["realm"]
        return PersistentState(HsmId(_fixed(fields["id"], ID_BYTES)), None if realm is None else _realm(realm))
    except KeyError as missing:
        raise DecodingError(f"a state lacks {missing}") from None


def _realm(item: object) -> PersistentRealm:
    fields = cbor.as_map(item)
    groups = cbor.as_map(fields["groups"])
    if len(groups) > GROUPS_PER_HSM_MAX:
        raise DecodingError(f"an HSM is in at most {GROUPS_PER_HSM_MAX} groups")
    return PersistentRealm(
        RealmId(_fixed(fields["id"], ID_BYTES)),
        _fixed(fields["statement"], MAC_BYTES),
        {GroupId(_fixed(group, ID_BYTES)): _group(value) for group, value in groups.items()},
        cbor.as_uint(fields["generation"], cbor.U64_MAX) if "generation" in fields else 0,
    )


def _group(item: object) -> PersistentGroup:
    fields = cbor.as_map(item)
    members = fields["configuration"]
    if type(members) is not list or not 1 <= len(members) <= GROUP_MEMBERS_MAX:
        raise DecodingError(f"a group has 1 to {GROUP_MEMBERS_MAX} members")
    return PersistentGroup(tuple(HsmId(_fixed(member, ID_BYTES)) for member in members), _pair(fields["captured"]))


def _pair(item: object) -> tuple[int, bytes] | None:
    if item is None:
        return None
    if type(item) is not list or len(item) != 2:
        raise DecodingError("a captured pair was expected")
    return cbor.as_uint(item[0], cbor.U64_MAX), _fixed(item[1], MAC_BYTES)
