"""Whole realms from seeds: the same seed is the same run, and all runs keep the rules (docs/reliability.md)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from juicebox_hsm.adapters.observation.logging import outside_context
from roles.tools.simulate.batch import Job, run_one
from roles.tools.simulate.scheduling import LIFE, Life, LifeOfParents, VirtualClock, prepare_runner, seeded_scheduler

ROOT = Path(__file__).parents[2]
SIMULATE = [sys.executable, "-m", "roles", "simulate"]
TIMEOUT_S = 300


def _simulate(*arguments: str, hash_seed: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    return subprocess.run(
        [*SIMULATE, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_a_calm_realm_serves_everybody() -> None:
    """Without trouble every call of every client is answered, for a minute of the realm's time."""
    result = run_one(Job(1, "calm"))
    assert not result.rule, result.detail
    assert result.virtual_s >= 60
    assert result.calls >= 100
    assert not [name for name in result.counts if name.startswith("client.") and name.endswith(".Transient")]


def test_the_same_seed_is_the_same_run() -> None:
    """Two processes whose hashes differ print the same trace, byte for byte, for a run full of trouble."""
    first, second = (_simulate("--seed", "3", "--profile", "storm", "--replay", hash_seed=seed) for seed in (1, 2))
    assert first.returncode in {0, 5}, first.stderr
    assert first.stdout.count("\n") > 100
    assert _without_cpu(first.stdout) == _without_cpu(second.stdout)


def _without_cpu(text: str) -> str:
    """Return the output without the CPU time in its last line, the only thing that comes from this machine."""
    body, _, last = text.rstrip().rpartition("\n")
    return body + ",".join(part for part in last.split(",") if "CPU" not in part)


def test_different_seeds_are_different_runs() -> None:
    """The seed decides the schedule: other seeds give other traces."""
    assert run_one(Job(1, "calm")).digest != run_one(Job(2, "calm")).digest


@pytest.mark.parametrize("thaws", [True, False])
def test_a_frozen_process_takes_no_step(thaws: bool) -> None:
    """A killed process runs nothing more, not even cleanup; a paused one goes on and finds time gone by."""
    steps: list[str] = []

    async def work() -> None:
        try:
            await trio.sleep(1.0)
            steps.append(f"woke at {trio.current_time():.0f}")
        finally:
            steps.append("cleanup")

    async def main() -> None:
        prepare_runner()
        async with trio.open_nursery() as nursery:
            life = Life("process")
            life.context.run(nursery.start_soon, work)
            await trio.sleep(0.5)
            life.freeze()
            await trio.sleep(4.5)
            assert not steps
            if thaws:
                life.thaw()
                await trio.sleep(0.1)
                assert steps == ["woke at 5", "cleanup"]
            life.thaw()
            nursery.cancel_scope.cancel()

    with seeded_scheduler(1):
        trio.run(main, clock=VirtualClock(), instruments=[LifeOfParents()])


def test_tasks_belong_to_the_process_of_their_nursery() -> None:
    """Whoever starts a task, it dies with the process whose nursery it runs in."""
    seen: list[str] = []

    async def body() -> None:
        life = LIFE.get()
        seen.append("none" if life is None else life.name)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            life = Life("server")

            async def serve() -> None:
                async with trio.open_nursery() as bodies:
                    Life("caller").context.run(bodies.start_soon, body)
                    outside_context(bodies.start_soon, body)
                    await trio.sleep(1.0)

            life.context.run(nursery.start_soon, serve)
            nursery.start_soon(body)

    trio.run(main, clock=VirtualClock(), instruments=[LifeOfParents()])
    assert sorted(seen) == ["none", "server", "server"]
