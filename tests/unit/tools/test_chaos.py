"""The parts of the chaos harness that need no realm: plans, counts of lost attempts, gaps, transfers, forwarders."""

from __future__ import annotations

import os
from collections import Counter
from random import Random

import pytest
import trio
import trio.testing
from click.testing import CliRunner

from juicebox_hsm.history import Call, Op, Outcome
from juicebox_hsm.host.cluster.view import ClusterView, GroupView, Member
from juicebox_hsm.ids import GroupId, HsmId, OwnedRange, RealmId, RecordId
from juicebox_hsm.wire.client import (
    ClientOutcome,
    ClientRequest,
    HandshakeRequest,
    RequestKind,
    TransportRequest,
    TransportResponse,
    encode_client_request,
    encode_client_response,
)
from juicebox_hsm.wire.rpc import GroupInfo, GroupRole, LeaderInfo, Range, RoleInfo
from roles.tools.chaos.command import command
from roles.tools.chaos.faults import choose_transfer
from roles.tools.chaos.load import CountingTransport, History, lost_attempts
from roles.tools.chaos.plan import LONG_PAUSE_S, Kind, Shape, make_plan, possible_kinds
from roles.tools.chaos.proxy import Network, pid_of_port
from roles.tools.chaos.report import Report
from tests.patience import HANGS_S

SHAPE = Shape(agents=3, managers=2, load_balancers=2, groups=2)


def test_a_seed_gives_one_plan() -> None:
    """The same seed plans the same, another seed something else."""
    assert make_plan(5, 60, SHAPE) == make_plan(5, 60, SHAPE)
    assert make_plan(5, 60, SHAPE) != make_plan(6, 60, SHAPE)


def test_plans_hold_every_kind_and_stay_inside_the_run() -> None:
    """Over some seeds everything happens; every plan restarts everything; nothing begins when the run is over."""
    seen: Counter[Kind] = Counter()
    for seed in range(40):
        plan = make_plan(seed, 60, SHAPE)
        seen.update(action.kind for action in plan)
        assert any(action.kind is Kind.RESTART_ALL for action in plan)
        assert all(3 <= action.at_s <= 56 for action in plan)
        assert [action.number for action in plan] == list(range(1, len(plan) + 1))
        assert max(action.for_s for action in plan) <= LONG_PAUSE_S[1]
        assert all(str(action) for action in plan)
    assert set(seen) == set(Kind)


def test_plans_ask_only_for_what_the_realm_has() -> None:
    """One agent cannot duel, one manager cannot race, one group has nobody to give a range to."""
    small = Shape(1, 1, 1)
    assert not {Kind.DUEL, Kind.BOTH_MANAGERS, Kind.TRANSFER, Kind.RIVAL_MANAGERS} & set(possible_kinds(small))
    names = {"leader", "agent1", "manager1", "lb1", "", "one witness", "every witness"}
    for seed in range(20):
        assert {name for action in make_plan(seed, 60, small) for name in (action.target, action.other)} <= names
    assert {action.kind for action in make_plan(1, 60, SHAPE, [Kind.KILL])} == {Kind.KILL}
    assert make_plan(1, 60, small, [Kind.DUEL]) == []


def test_the_command_prints_its_plan_and_refuses_unknown_kinds() -> None:
    """--plan-only shows what a seed does without doing it."""
    result = CliRunner().invoke(command, ["--seed", "3", "--duration", "30", "--plan-only"])
    assert result.exit_code == 0
    assert "seed 3, 30 s" in result.output
    assert "restart-all" in result.output
    result = CliRunner().invoke(command, ["--only", "kill,earthquake", "--plan-only"])
    assert result.exit_code == 2
    assert "earthquake" in result.output


@pytest.mark.parametrize(
    ("counted", "outcome", "given_up", "lost"),
    [
        ([0, 0, 0, 0], Outcome.OK, False, (0, 0, 0)),
        ([2, 1, 0], Outcome.INVALID_PIN, False, (2, 1)),
        ([1, 5], Outcome.LOST, False, (1, 5)),
        ([0], Outcome.LOST, False, (0,)),
        ([0, 0], Outcome.LOST, False, (0, 0)),
        ([3, 0], Outcome.LOST, True, (4,)),
        ([0, 1], Outcome.LOST, True, (0, 1)),
        ([1], Outcome.LOST, True, (1,)),
    ],
)
def test_lost_attempts_of_a_call(counted: list[int], outcome: Outcome, given_up: bool, lost: tuple[int, ...]) -> None:
    """An answered call ends with the phase that was answered last; a call given up may have just been answered."""
    assert lost_attempts(counted, outcome, given_up=given_up) == lost


async def test_the_transport_counts_attempts_by_phase() -> None:
    """Answers begin a phase, refusals are no attempts, silence and `Unavailable` are lost; handshakes carry nothing."""
    answers: list[bytes | None] = []

    class Inner:
        async def post(self, url: str, headers: object, body: bytes, timeout_s: float) -> tuple[int, bytes]:
            answer = answers.pop(0)
            if answer is None:
                raise OSError("lost")
            return 200, answer

    transport = CountingTransport(Inner())
    realm = RealmId(bytes(16))

    async def send(answer: bytes | None, kind: RequestKind = RequestKind.SECRETS_REQUEST) -> None:
        noise = TransportRequest(b"x") if kind is RequestKind.SECRETS_REQUEST else HandshakeRequest(bytes(32), b"x")
        answers.append(answer)
        try:
            await transport.post("", (), encode_client_request(ClientRequest(realm, "t", 1, kind, noise)), 1.0)
        except OSError:
            pass

    answered = encode_client_response(TransportResponse(b"y"))
    await send(None)
    await send(encode_client_response(ClientOutcome.UNAVAILABLE))
    await send(encode_client_response(ClientOutcome.MISSING_SESSION))
    await send(None, RequestKind.HANDSHAKE_ONLY)
    assert transport.lost == [2]
    await send(answered)
    await send(b"not an answer")
    await send(answered)
    assert transport.lost == [2, 1, 0]
    transport.begin()
    assert transport.lost == [0]


def test_history_counts_and_gaps() -> None:
    """Lost calls are no answers; the longest times without one come first, the edges of the run included."""
    history = History()
    for end, outcome in ((2.0, Outcome.OK), (3.0, Outcome.LOST), (9.0, Outcome.OK)):
        history.add(Call("ann", Op.DELETE, 0, end, outcome))
    history.add(Call("ann", Op.DELETE, 0, 9.5, Outcome.LOST), "InvalidAuth: no")
    assert history.counts == {"delete: ok": 2, "delete: lost": 2}
    assert history.gaps(1.0, 12.0) == [(1.0, 7.0), (8.0, 3.0), (0.0, 1.0)]
    assert len(history.violations) == 1
    assert "InvalidAuth" in history.violations[0]


def test_the_report_says_what_matters() -> None:
    """Counts, gaps and the verdict are in the summary; violations are counted there and stand in the file in full."""
    report = Report(1, 60, {}, 2, [], [], {"recover: ok": 5, "recover: lost": 2}, 7, [(3.0, 1.5)], 0.5, 2, 1, ["a\nb"])
    text = "\n".join(report.lines())
    assert "7 calls of 2 users, 2 of them lost" in text
    assert "1.50 s at 3.0 s" in text
    assert "no violation" in text
    assert "exit: a" in text
    assert report.to_json()["seed"] == 1
    bad = Report(1, 60, {}, 2, [], [], {}, 0, [], 0.5, 2, 1, [], ["a lie"])
    assert "1 VIOLATIONS" in "\n".join(bad.lines())


def _group(number: int, owned: tuple[int, int] | None) -> GroupView:
    hsm = HsmId(bytes([number]) * 16)
    wire = None if owned is None else Range(bytes([owned[0]]) + bytes(31), bytes([owned[1]]) + b"\xff" * 31)
    leader = LeaderInfo(1, 1, wire, None)
    info = GroupInfo(bytes([number]) * 16, [hsm], (1, b""), leader, RoleInfo(GroupRole.LEADER, 1, 1))
    return GroupView(
        RealmId(bytes(16)), GroupId(bytes([number]) * 16), (hsm,), (Member(hsm, "tls://x", "a", info, None),)
    )


def test_transfers_move_ranges_to_neighbours() -> None:
    """What is moved lies inside the source's range and touches what the destination owns."""
    groups = [_group(1, (0, 99)), _group(2, (100, 255)), _group(3, None)]
    view = ClusterView((), {}, {group.key: group for group in groups})
    moves = 0
    for seed in range(200):
        chosen = choose_transfer(view, Random(seed))
        assert chosen is not None
        source, destination, moved = chosen
        owned, theirs = source.owned_range, destination.owned_range
        assert owned is not None
        assert owned.start <= moved.start <= moved.end <= owned.end
        if theirs is not None:
            assert moved.end == owned.end if theirs.start > owned.end else moved.start == owned.start
        moves += moved != owned
    assert moves > 50
    assert choose_transfer(ClusterView((), {}, {groups[0].key: groups[0]}), Random(1)) is None
    assert OwnedRange(RecordId(bytes(32)), RecordId(b"\xff" * 32)).start == bytes(32)


async def _echo(listener: trio.SocketListener) -> None:
    async def handle(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    await trio.serve_listeners(handle, [listener])


@pytest.fixture
async def forwarded(nursery: trio.Nursery) -> tuple[Network, int]:
    """An echo service called `b` behind a forwarder; this process is called `a`."""
    network = Network(lambda: {os.getpid(): "a"})
    [echo] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    [front] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(_echo, echo)
    await nursery.start(network.forward, "b", front, echo.socket.getsockname()[1])
    return network, front.socket.getsockname()[1]


async def test_forwarders_pass_hold_and_reset(forwarded: tuple[Network, int]) -> None:
    """Bytes pass; a cut link holds them back until it heals; a reset link ends old and new connections."""
    network, port = forwarded
    with trio.fail_after(HANGS_S):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        assert pid_of_port(stream.socket.getsockname()[1], {os.getpid(): "a"}) == "a"
        assert pid_of_port(stream.socket.getsockname()[1], {}) is None
        await stream.send_all(b"one")
        assert await stream.receive_some() == b"one"
        network.cut("a", "other", resets=True)  # not this link
        network.cut("b", "a", resets=False)
        await stream.send_all(b"two")
        with trio.move_on_after(0.05) as waited:
            await stream.receive_some()
        assert waited.cancelled_caught
        network.heal("a", "b")
        assert await stream.receive_some() == b"two"
        network.delay("a", "b", 0.02)
        begun = trio.current_time()
        await stream.send_all(b"three")
        assert await stream.receive_some() == b"three"
        assert trio.current_time() - begun >= 0.04
        network.cut("a", "b", resets=True)
        assert await stream.receive_some() == b""
        late = await trio.open_tcp_stream("127.0.0.1", port)
        assert await late.receive_some() == b""
        network.heal_all()
        again = await trio.open_tcp_stream("127.0.0.1", port)
        await again.send_all(b"four")
        assert await again.receive_some() == b"four"
        for each in (stream, late, again):
            await each.aclose()
