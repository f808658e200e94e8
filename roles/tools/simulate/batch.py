"""Many seeds over several processes, and what came of them."""

from __future__ import annotations

import gc
import hashlib
import io
import multiprocessing
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Final

from juicebox_hsm.adapters.observation.logging import configure
from roles.tools.simulate.profiles import MIXED, PROFILES
from roles.tools.simulate.run import simulate
from roles.tools.simulate.world import World

CPU_S_MAX: Final = 120.0
"""A run that needs more CPU hangs: virtual time stands still while something turns in circles."""
SEEDS_PER_PROCESS: Final = 50
"""After so many a worker is replaced, so that nothing that a run leaves behind adds up."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one seed came to. `rule` is "" when nothing was found; times in seconds."""

    seed: int
    profile: str
    digest: str
    rule: str
    detail: str
    virtual_s: float
    cpu_s: float
    calls: int
    counts: Counter[str] = field(repr=False)
    lines: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Job:
    """One seed to run."""

    seed: int
    profile: str
    without: frozenset[str] = frozenset()
    keeps_trace: bool = False


class HangsError(BaseException):
    """The run used up its CPU time."""


def profile_of(name: str, seed: int) -> str:
    """Return the profile of a seed: the named one, or with `mixed` one after the other."""
    return MIXED[seed % len(MIXED)] if name == "mixed" else name


def run_one(job: Job) -> Result:
    """Run one seed in this process."""
    configure("error", json=True, stream=io.StringIO())
    began = time.process_time()
    world = World(job.seed, PROFILES[job.profile], without=job.without, keeps_trace=job.keeps_trace)
    rule = detail = ""
    before = signal.signal(signal.SIGVTALRM, _hang)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S_MAX)
    gc.disable()  # what it would find in so short a life is not worth the search
    try:
        simulate(world)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        rule, detail = "simulator", "".join(traceback.format_exception(error))
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        gc.enable()
    if world.failure is not None:
        rule, detail = world.failure.rule, world.failure.detail
    at_s = world.ended_at_s if world.failure is None else world.failure.at_s
    return Result(
        seed=job.seed,
        profile=job.profile,
        digest=world.notes.digest,
        rule=rule,
        detail=detail,
        virtual_s=at_s,
        cpu_s=time.process_time() - began,
        calls=world.calls_made,
        counts=world.counts,
        lines=tuple(world.notes.lines) if rule or job.keeps_trace else (),
    )


def _hang(_signal: int, _frame: FrameType | None) -> None:
    raise HangsError(f"more than {CPU_S_MAX:.0f} s of CPU")


def run_all(jobs: Sequence[Job], processes: int) -> Iterator[Result]:
    """Run all seeds, `processes` at a time; results come in the order of `jobs`."""
    if processes == 1 or len(jobs) == 1:
        for job in jobs:
            yield run_one(job)
            gc.collect()
        return
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, maxtasksperchild=SEEDS_PER_PROCESS) as pool:
        yield from pool.imap(run_one, jobs)


@dataclass(slots=True)
class Summary:
    """What a batch came to."""

    seeds: int = 0
    failed: int = 0
    calls: int = 0
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    _digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, result: Result) -> None:
        """Take in one seed, in order."""
        self.seeds += 1
        self.failed += bool(result.rule)
        self.calls += result.calls
        self.virtual_s += result.virtual_s
        self.cpu_s += result.cpu_s
        self.counts += result.counts
        self._digest.update(f"{result.seed} {result.digest}\n".encode())

    @property
    def digest(self) -> str:
        """Return the digest of all runs' digests."""
        return self._digest.hexdigest()[:16]
