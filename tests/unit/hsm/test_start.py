"""Start, persistence and fail-stop (hsm.md 5 to 7)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from juicebox_hsm.consensus.nvram import Deserialization, InvalidChecksum, decode_state
from juicebox_hsm.consensus.types import Leader, RoleStatus, Witness
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.errors import InvariantViolation, LocalError
from juicebox_hsm.hsm.core import Hsm
from juicebox_hsm.hsm.keys import RealmKeys
from juicebox_hsm.hsm.messages import (
    BecomeLeader,
    CaptureNext,
    NewRealm,
    NewRealmOk,
    NotCaptured,
    PersistState,
    PersistStateOk,
    RoleOk,
    Status,
    StatusOk,
    StepDown,
    StepDownOk,
)
from juicebox_hsm.hsm.state import InvalidRealmStatement, Poisoned
from juicebox_hsm.ids import FULL_RANGE, LOG_INDEX_MAX
from juicebox_hsm.wire import requests as secrets
from tests.fakes.hsm import MemoryPlatform, World, expect, realm_keys, snapshot


def test_first_start_draws_and_stores_an_id() -> None:
    """The id is durable before anything else happens, and survives a restart."""
    platform = MemoryPlatform(realm_keys())
    hsm = Hsm(platform)
    stored = decode_state(platform.nvram)
    assert stored is not None
    assert stored.realm is None
    status = expect(hsm.handle(Status()), StatusOk)
    assert (status.id, status.realm, status.public_key) == (stored.id, None, platform.keys.communication_public)
    assert expect(platform.restart().handle(Status()), StatusOk).id == stored.id


def test_restart_keeps_memberships_and_persisted_heads_as_witness() -> None:
    """After a restart every group is there, as witness, at its persisted head."""
    world = World(2)
    group = world.new_group([0, 1])
    head = world.captured(1, group)
    world.new_group([1], commit=False)
    world.crash(1)
    realm = world.status(1).realm
    assert realm is not None
    (kept,) = [found for found in realm.groups if found.id == group]
    (other,) = [found for found in realm.groups if found.id != group]
    assert (other.captured, other.role.role) == (None, Witness())
    assert kept.id == group
    assert isinstance(kept.role.role, Witness)
    assert kept.captured == (head, world.logs[group][-1].entry_mac)


@pytest.mark.parametrize("nvram", [b"\0" * 31, b"\0" * 32, b"\0" * 100])
def test_m8_corrupt_image_refuses_to_start(nvram: bytes) -> None:
    """An image whose checksum is wrong stops the start; the id is not drawn anew."""
    platform = MemoryPlatform(realm_keys())
    platform.nvram = nvram
    with pytest.raises((InvalidChecksum, Deserialization)):
        Hsm(platform)
    assert platform.nvram == nvram


def test_m8_i15_image_with_other_keys_refuses_to_start() -> None:
    """Keys and NVRAM of different realms never serve together."""
    world = World(1)
    platform = MemoryPlatform(realm_keys(1))
    platform.nvram = world.platforms[0].nvram
    with pytest.raises(InvalidRealmStatement):
        Hsm(platform)


def test_m8_image_of_another_hsm_keeps_that_hsms_id() -> None:
    """An image moved between machines brings its id along, so it never votes under a second name."""
    world = World(2)
    world.platforms[1].nvram = world.platforms[0].nvram
    world.crash(1)
    assert world.id(1) == world.id(0)


def test_i15_keys_must_match_their_public_key() -> None:
    """A public key that does not belong to the secret, or a key of a wrong size, is refused at once."""
    keys = realm_keys()
    with pytest.raises(LocalError):
        RealmKeys(keys.communication_secret, bytes(32), keys.record_key, keys.mac_key)
    with pytest.raises(LocalError):
        RealmKeys(keys.communication_secret, keys.communication_public, Secret(bytes(31)), keys.mac_key)
    for size in (95, 97):
        with pytest.raises(LocalError):
            RealmKeys.from_bundle(b"\1" * size)
    assert RealmKeys.from_bundle(keys.bundle().expose()) == keys
    assert keys.bundle().expose().hex() not in repr(keys)


def test_i6_persisted_heads_never_go_back() -> None:
    """Over a life with crashes the persisted index of a group never falls and nothing else of it changes."""
    world = World(2)
    group = world.new_group([0, 1])
    world.move(world.first, 0, group, 0, FULL_RANGE)
    client = world.client(b"\1" * 32)
    for number in range(4):
        world.ask(group, 0, client, secrets.Register1())
        if number == 1:
            world.crash(1)
    heads = []
    for image in world.platforms[1].history:
        state = decode_state(image)
        assert state is not None
        if state.realm is not None and group in state.realm.groups:
            kept = state.realm.groups[group]
            heads.append(0 if kept.captured is None else kept.captured[0])
            assert sorted(kept.configuration) == sorted((world.id(0), world.id(1)))
    assert heads == sorted(heads)
    assert heads[-1] == world.logs[group][-1].index


def test_i7_m9_only_durable_heads_are_signed() -> None:
    """A head that was captured but not persisted is neither signed before a crash nor usable after it."""
    world = World(1)
    world.lead(world.first, 0)
    client = world.client(b"\1" * 32)
    entry = world.app(world.first, 0, client, secrets.Register1()).entry
    world.capture(0, world.first)
    world.crash(0)
    answer = world.send(0, BecomeLeader(world.realm, world.first, entry))
    assert answer == NotCaptured(entry.index - 1)
    (captured,) = world.persist(0, world.first)
    assert captured.index == entry.index - 1


def test_i7_statements_equal_the_written_image() -> None:
    """What PersistState signs is exactly what the image holds."""
    world = World(1)
    world.app(world.first, 0, world.client(b"\1" * 32), secrets.Register1())
    world.capture(0, world.first)
    (captured,) = world.persist(0, world.first)
    stored = decode_state(world.platforms[0].nvram)
    assert stored is not None
    assert stored.realm is not None
    assert stored.realm.groups[world.first].captured == (captured.index, captured.mac)


def test_m9_failed_write_poisons() -> None:
    """After a failed write nothing was published, nothing is signed and nothing is answered until a restart."""
    world = World(1)
    world.app(world.first, 0, world.client(b"\1" * 32), secrets.Register1())
    world.capture(0, world.first)
    before = world.platforms[0].nvram
    persistent = world.hsms[0]._state.persistent
    world.platforms[0].fail()
    with pytest.raises(Poisoned):
        world.send(0, PersistState())
    world.platforms[0].on_write = None
    with pytest.raises(Poisoned):
        world.send(0, Status())
    assert world.hsms[0]._state.persistent is persistent
    assert world.platforms[0].nvram == before
    world.crash(0)
    assert world.captured(0, world.first) == world.logs[world.first][-1].index - 1


@pytest.mark.parametrize("after", [False, True])
def test_m9_failure_before_or_after_the_bytes_landed(after: bool) -> None:
    """Whether a failed write took effect or not, no statement for it exists, and both images start."""
    world = World(1)
    world.app(world.first, 0, world.client(b"\1" * 32), secrets.Register1())
    world.capture(0, world.first)
    platform = world.platforms[0]

    def fail(content: bytes) -> None:
        if after:
            platform.nvram = content
        raise OSError("broken")

    platform.on_write = fail
    with pytest.raises(Poisoned):
        world.send(0, PersistState())
    platform.on_write = None
    world.crash(0)
    assert world.captured(0, world.first) == world.logs[world.first][-1].index - (0 if after else 1)


def test_abnormal_end_poisons() -> None:
    """Whatever leaves a request through an exception leaves the instance unusable."""
    world = World(1)

    def broken(_: bytes) -> None:
        raise InvariantViolation("a test")

    world.platforms[0].on_write = broken
    world.app(world.first, 0, world.client(b"\1" * 32), secrets.Register1())
    world.capture(0, world.first)
    with pytest.raises(InvariantViolation):
        world.send(0, PersistState())
    with pytest.raises(Poisoned):
        world.send(0, Status())


def test_write_is_skipped_only_for_what_this_instance_wrote() -> None:
    """Persisting twice writes once; the first persist of a new life always writes."""
    world = World(1)
    writes = world.platforms[0].history
    count = len(writes)
    expect(world.send(0, PersistState()), PersistStateOk)
    assert len(writes) == count
    world.crash(0)
    expect(world.send(0, PersistState()), PersistStateOk)
    expect(world.send(0, PersistState()), PersistStateOk)
    assert len(writes) == count + 1


def test_i19_clock_values_are_never_reused() -> None:
    """No two leaderships of one HSM share a clock value, across step-downs and restarts."""
    world = World(1)
    seen = set()
    for number in range(6):
        entry = world.logs[world.first][-1]
        role = expect(world.send(0, BecomeLeader(world.realm, world.first, entry)), RoleOk).role
        assert isinstance(role.role, Leader)
        if number:
            assert role.at not in seen
        seen.add(role.at)
        again = expect(world.send(0, BecomeLeader(world.realm, world.first, entry)), RoleOk).role
        assert again == role, "becoming what one is changes neither state nor clock"
        if number % 2:
            world.crash(0)
        else:
            down = expect(world.send(0, StepDown(world.realm, world.first, force=True)), StepDownOk).role
            assert down == RoleStatus(Witness(), role.at + 1)
    assert len(seen) == 6


def test_same_platform_same_bytes() -> None:
    """The core is deterministic given its platform: two runs end in equal states."""
    worlds = [World(2, seed=7) for _ in range(2)]
    for world in worlds:
        group = world.new_group([0, 1])
        world.move(world.first, 0, group, 0, FULL_RANGE)
        world.ask(group, 0, world.client(b"\1" * 32), secrets.Register1())
    assert snapshot(worlds[0].hsms[0]) == snapshot(worlds[1].hsms[0])
    assert worlds[0].platforms[1].history == worlds[1].platforms[1].history


def test_no_realm_persists_nothing() -> None:
    """Without a realm there is nothing to sign, and a capture is refused."""
    hsm = Hsm(MemoryPlatform(realm_keys()))
    assert expect(hsm.handle(PersistState()), PersistStateOk).captured == ()
    created = expect(Hsm(MemoryPlatform(realm_keys(), 1)).handle(NewRealm()), NewRealmOk)
    answer = hsm.handle(CaptureNext(created.realm, created.group, (created.entry,)))
    assert getattr(answer, "value", None) == "InvalidRealm"


def test_role_of_restarted_leader_has_a_larger_clock() -> None:
    """A host that knew the leadership of the earlier life cannot mistake the witness of this one for it (H5)."""
    world = World(1)
    realm = world.status(0).realm
    assert realm is not None
    before = realm.groups[0].role.at
    world.crash(0)
    realm = world.status(0).realm
    assert realm is not None
    assert realm.groups[0].role.at > before


@pytest.mark.parametrize("limits", [(0, 8), (65536, 8), (8, 0), (8, 65536)])
def test_cache_sizes_are_bounded(limits: tuple[int, int]) -> None:
    """No HSM starts with a cache that holds nothing or more than it may; the bounds themselves are fine."""
    sessions, deltas = limits
    with pytest.raises(InvariantViolation, match="is 1 to 65535"):
        Hsm(MemoryPlatform(realm_keys()), max_sessions=sessions, tree_overlay_size=deltas)
    sessions, deltas = min(max(sessions, 1), 65535), min(max(deltas, 1), 65535)
    hsm = Hsm(MemoryPlatform(realm_keys()), max_sessions=sessions, tree_overlay_size=deltas)
    expect(hsm.handle(NewRealm()), NewRealmOk)


def test_the_last_index_begins_nothing() -> None:
    """At the highest log index an HSM stops rather than lead on, or sign an entry that no other could read."""
    world = World(1)
    state = world.hsms[0]._state
    last = replace(world.logs[world.first][-1], index=LOG_INDEX_MAX)
    with pytest.raises(InvariantViolation, match="exhausted"):
        state.new_leader(last)
    with pytest.raises(InvariantViolation, match="exhausted"):
        state.new_entry(world.first, last, None)
    assert state.new_entry(world.first, replace(last, index=LOG_INDEX_MAX - 1), None).index == LOG_INDEX_MAX


def test_a_member_that_captured_nothing_yet_follows_after_a_restart() -> None:
    """A group without a durable pair begins at entry 1 in the next life too."""
    world = World(2)
    group = world.new_group([0, 1], commit=False)
    world.crash(1)
    world.capture(1, group)
    assert world.captured(1, group) == 1
