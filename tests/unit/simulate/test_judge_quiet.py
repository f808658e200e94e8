"""What must hold in quiet, what no log may show, and histories: each rule is seen broken."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable

import pytest

from juicebox_hsm.errors import InvariantViolation
from juicebox_hsm.history import Call, Op, Outcome
from juicebox_hsm.hsm import messages as m
from juicebox_hsm.ids import GroupId, RealmId
from juicebox_hsm.wire import rpc
from roles.tools.simulate.judge import Quiet
from roles.tools.simulate.judge_liveness import check_duels, check_quiet
from roles.tools.simulate.judge_logs import LogJudge
from roles.tools.simulate.judge_rules import BrokenRule
from roles.tools.simulate.store import SimulatedStore
from roles.tools.simulate.store_data import RealmData, StoreData, TenantRows
from tests.unit.simulate.judged import JudgedWorld

REALM = RealmId(b"\x11" * 16)
SECRET = "correct horse battery"


def broken(rule: str, run: Callable[[], object]) -> None:
    """Expect a broken rule."""
    with pytest.raises(BrokenRule) as found:
        run()
    assert found.value.rule == rule, found.value


def status(*ranges: tuple[int, int], role: rpc.GroupRole = rpc.GroupRole.LEADER) -> rpc.AgentStatus:
    """Return the status of an agent that leads one group for each range of first bytes."""
    groups = [
        rpc.GroupInfo(
            bytes([number]) * 16,
            [b"\x01" * 16],
            None,
            rpc.LeaderInfo(1, 1, rpc.Range(bytes([first]) + bytes(31), bytes([last]) + b"\xff" * 31), None),
            rpc.RoleInfo(role, 1, 2),
        )
        for number, (first, last) in enumerate(ranges)
    ]
    return rpc.AgentStatus(1.0, rpc.HsmInfo(b"h" * 16, rpc.RealmInfo(REALM, b"", groups), b""), "a", "", [])


def quiet_data() -> StoreData:
    """Return the content of a store with one realm and nothing that waits."""
    data = SimulatedStore(random.Random(0), now=lambda: 0.0).data
    data.realms[REALM] = RealmData(tenants={"acme": TenantRows(tail=3, published=3)})
    return data


SOUND = {"a": status((0, 0x7F)), "b": status((0x80, 0xFF)), "c": status((0, 0xFF), role=rpc.GroupRole.WITNESS)}


def test_a_sound_quiet() -> None:
    """A realm that is led everywhere, with empty outboxes, is at rest; so is a rival that has not written yet."""
    check_quiet(Quiet(SOUND, sizes={"queue": (3, 3)}), quiet_data())
    check_quiet(Quiet({**SOUND, "d": status((0x70, 0xFF))}), quiet_data())


@pytest.mark.parametrize(
    ("rule", "quiet"),
    [
        ("liveness.leader", Quiet({"a": status((0, 0x7F))})),
        ("liveness.leader", Quiet({})),
        ("liveness.recover", Quiet(SOUND, failed=["u1: Unavailable"])),
        ("liveness.status", Quiet(SOUND, complaints=["outbox backlog"])),
        ("liveness.died", Quiet(SOUND, died=["agent a: KeyError"])),
        ("liveness.growth", Quiet(SOUND, sizes={"queue": (4, 3)})),
    ],
)
def test_what_quiet_must_not_have(rule: str, quiet: Quiet) -> None:
    """Ranges without a leader, failed recoveries, complaints, dead tasks and growing queues are seen."""
    broken(rule, lambda: check_quiet(quiet, quiet_data()))


def test_a_duel_without_end() -> None:
    """liveness.duels: a group whose leadership does not come to rest; what came before the quiet does not count."""
    group, other = GroupId(b"g" * 16), GroupId(b"o" * 16)
    storm = [(number / 10, group) for number in range(100)]
    moved = [(90.0 + number, each) for number in range(6) for each in (group, other)]
    check_duels([*storm, *moved], 100.0)
    broken("liveness.duels", lambda: check_duels([(85.0 + number, group) for number in range(12)], 100.0))


def test_leaderships_are_counted() -> None:
    """Each leadership that begins in some HSM is one for `liveness.duels`, and keeping it is none."""
    world = JudgedWorld(3, stops=False)
    group = world.grouped()
    for leader in (1, 2, 1, 2, 1, 2, 1, 2, 1, 2):
        world.lead(group, leader)
        world.lead(group, leader)
        world.send(leader, m.StepDown(world.realm, group, force=True))
    world.judge.finish(Quiet({"a": status((0, 0xFF))}))
    assert "liveness.duels" in [each.rule for each in world.judge.violations]


def test_an_outbox_that_is_not_emptied() -> None:
    """liveness.outbox: an event that is never published."""
    data = quiet_data()
    data.realms[REALM].tenants["acme"].tail += 1
    broken("liveness.outbox", lambda: check_quiet(Quiet(SOUND), data))


@pytest.mark.parametrize(
    "line",
    [
        f"pin={SECRET}",
        f"pin={SECRET!r}",
        SECRET.encode().hex(),
        SECRET.encode().hex().upper(),
        base64.b64encode(SECRET.encode()).decode(),
        base64.urlsafe_b64encode(SECRET.encode()).decode().rstrip("="),
    ],
)
def test_a_secret_in_a_line(line: str) -> None:
    """log.secret: a PIN as text, hex or base64; the report does not repeat more of the line than it must."""
    judge = LogJudge()
    judge.secret("a PIN", SECRET)
    judge.line("all is well")
    judge.line(line)
    broken("log.secret", judge.search)


def test_secret_bytes_in_a_line() -> None:
    """log.secret: key bytes as Python shows them."""
    judge = LogJudge()
    key = bytes(range(200, 232))
    judge.secret("a key", key)
    judge.line(f"key={key!r}")
    broken("log.secret", judge.search)


def test_impossible_lines() -> None:
    """log.invariant and log.exception: what stands in a log only when something is broken."""
    judge = LogJudge()
    broken("log.invariant", lambda: judge.line(f"ended: {InvariantViolation.__name__}: a log is chained"))
    broken("log.exception", lambda: judge.line("Traceback (most recent call last):"))
    judge.line("leadership lost: another leader appended first")
    judge.search()


def test_a_history_that_nothing_explains() -> None:
    """history: a recovery that returns a secret nobody registered under that PIN."""
    world = JudgedWorld(1, stops=False)
    world.judge.call(Call("u", Op.REGISTER, 0.0, 1.0, Outcome.OK, pin="1", secret="s", num_guesses=2, lost=(0, 0)))
    world.judge.call(Call("u", Op.RECOVER, 2.0, 3.0, Outcome.OK, pin="2", secret="s", lost=(0, 0, 0)))
    world.judge.finish(Quiet({"a": status((0, 0xFF))}))
    assert "history" in [each.rule for each in world.judge.violations]
