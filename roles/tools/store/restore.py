"""Decide whether HSMs can go on with a backup: a restore must never rewind a guess (operator-tools.md 5).

An HSM that captured an entry beyond the end of a backup's log may have helped to commit it, and a client may have been
answered. With the backup's log that entry would be gone, and its guess with it. So every member of every group is
asked what it captured last, and one that cannot be asked is a reason to refuse unless the operator says it is dead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from juicebox_hsm.adapters.hsm_directory.hsm_host import read_hsm_dir
from juicebox_hsm.adapters.process.directory_lock import DIRECTORY, by_whom, locked
from juicebox_hsm.adapters.stores.check import LogTail
from juicebox_hsm.consensus.nvram import PersistentState
from juicebox_hsm.errors import LocalError
from juicebox_hsm.host.cluster.view import AgentView
from juicebox_hsm.ids import GroupId, HsmId, RealmId


@dataclass(frozen=True, slots=True)
class Membership:
    """An HSM's place in a group: all members, and the (index, MAC) it captured last."""

    members: tuple[HsmId, ...]
    captured: tuple[int, bytes] | None


@dataclass(frozen=True, slots=True)
class HsmWitness:
    """What one HSM says, and where it was asked."""

    hsm: HsmId
    source: str
    groups: Mapping[tuple[RealmId, GroupId], Membership]


def restore_problems(
    tails: Sequence[LogTail], witnesses: Sequence[HsmWitness], unknown: Collection[HsmId]
) -> list[str]:
    """Return why the backup must not be restored, one line each; none if it may.

    `unknown` are HSMs that the operator declares dead for good.
    """
    problems = captured_problems(tails, witnesses, "the backup")
    by_group = {(tail.realm, tail.group): tail for tail in tails}
    asked = {witness.hsm for witness in witnesses}
    told: dict[tuple[RealmId, GroupId], set[HsmId]] = {key: set() for key in by_group}
    for witness in witnesses:
        for key, membership in witness.groups.items():
            if key in told:
                told[key].update(membership.members)
    for (realm, group), members in sorted(told.items()):
        tail = by_group[realm, group]
        if not members:
            known = ", ".join(hsm.hex() for hsm in sorted(tail.writers)) or "none that the log names"
            problems.append(f"group {group.hex()}: none of its HSMs was asked; it has {known}")
        problems += [
            f"group {group.hex()}: HSM {hsm.hex()} was not asked; it may have captured more than index {tail.last}"
            for hsm in sorted(members)
            if hsm not in asked and hsm not in unknown
        ]
    return problems


def captured_problems(tails: Sequence[LogTail], witnesses: Sequence[HsmWitness], holder: str) -> list[str]:
    """Return where HSMs captured what a store or a backup (`holder`, in words) does not have, one line each."""
    problems = []
    by_group = {(tail.realm, tail.group): tail for tail in tails}
    for witness in witnesses:
        for key, membership in sorted(witness.groups.items()):
            if membership.captured is None:
                continue
            where = f"group {key[1].hex()}: HSM {witness.hsm.hex()} ({witness.source})"
            index, mac = membership.captured
            tail = by_group.get(key)
            if tail is None:
                problems.append(f"{where} captured index {index}, {holder} has no such group")
            elif index > tail.last:
                problems.append(f"{where} captured index {index}, {holder}'s log ends at {tail.last}")
            elif tail.macs.get(index, mac) != mac:
                problems.append(f"{where} captured another entry at index {index} than {holder} has")
    return problems


@contextmanager
def read_hsm_dirs(paths: Iterable[Path]) -> Iterator[list[HsmWitness]]:
    """Read HSM directories and keep them from starting until the block ends. Raises `LocalError` and `RealmError`."""
    with ExitStack() as stack:
        witnesses = []
        for path in paths:
            stack.enter_context(_kept_from_starting(path))
            _, state = read_hsm_dir(path)
            if state is None:
                raise LocalError(f"--hsm-dir {path}: this HSM never started; it belongs to no realm")
            witnesses.append(witness_in(path, state))
        yield witnesses


def witness_in(path: Path, state: PersistentState) -> HsmWitness:
    """Return what the state in an HSM directory says."""
    groups: dict[tuple[RealmId, GroupId], Membership] = {}
    if state.realm is not None:
        for group, kept in state.realm.groups.items():
            groups[state.realm.id, group] = Membership(kept.configuration, kept.captured)
    return HsmWitness(state.id, f"--hsm-dir {path}", groups)


def _kept_from_starting(path: Path) -> AbstractContextManager[int]:
    """Hold the lock that an agent takes on its HSM directory."""
    name = f"--hsm-dir {path}"

    def taken() -> LocalError:
        return LocalError(f"{name}: this HSM is run{by_whom(path)} and may capture more; stop it first")

    return locked(path, DIRECTORY, taken, name=name)


def witness_of(view: AgentView) -> HsmWitness:
    """Return what a running agent's HSM says. Raises `LocalError` when it says nothing."""
    if view.status is None or view.status.hsm is None:
        raise LocalError(f"--agent {view.url}: {view.error or 'its HSM does not answer'}")
    hsm = view.status.hsm
    groups: dict[tuple[RealmId, GroupId], Membership] = {}
    if hsm.realm is not None:
        for info in hsm.realm.groups:
            members = tuple(HsmId(member) for member in info.configuration)
            groups[RealmId(hsm.realm.id), GroupId(info.id)] = Membership(members, info.captured)
    return HsmWitness(HsmId(hsm.id), f"--agent {view.url}", groups)
