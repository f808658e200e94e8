"""The client scenarios every realm must pass, for the official client and for ours.

As a program, inside a demo realm:  juicebox-hsm demo --realms 3 --agents 1 -- python -m tests.client.scenarios
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.client.drivers import Driver, Environment, Result, User, official_driver, own_driver

_counter = 0


@dataclass(frozen=True)
class Stage:
    """What a scenario gets: the realms, the client under test and the other client."""

    environment: Environment
    driver: Driver
    other: Driver

    def user(self, *, driver: Driver | None = None, name: str | None = None) -> User:
        """Return a user nobody used before (or `name`), over all realms with the thresholds of client.json."""
        global _counter  # noqa: PLW0603 - names must differ within one process
        _counter += 1
        name = name or f"{(driver or self.driver).name}-{os.getpid()}-{time.time_ns()}-{_counter}"
        return User(driver or self.driver, name, self.environment.configuration, self.environment.tokens(name))


def expect(
    result: Result, error: str | None = None, *, guesses: int | None = None, secret: bytes | None = None
) -> None:
    """Fail unless the result is as expected."""
    assert result.error == error, f"expected {error or 'success'}, got {result}"
    if guesses is not None:
        assert result.guesses_remaining == guesses, f"expected {guesses} guesses remaining, got {result}"
    if secret is not None:
        assert result.secret == secret, "the recovered secret differs"


async def register_and_recover(stage: Stage) -> None:
    """A registered secret comes back with the right PIN, twice."""
    user = stage.user()
    expect(await user.register(b"1234", b"my secret"))
    expect(await user.recover(b"1234"), secret=b"my secret")
    expect(await user.recover(b"1234"), secret=b"my secret")


async def longest_and_empty_secret(stage: Stage) -> None:
    """Secrets of 0 and 128 bytes are stored exactly."""
    for secret in (b"", bytes(range(128))):
        user = stage.user()
        expect(await user.register(b"", secret))
        expect(await user.recover(b""), secret=secret)


async def wrong_pin(stage: Stage) -> None:
    """A wrong PIN tells the guesses remaining; the right one resets the count."""
    user = stage.user()
    expect(await user.register(b"1234", b"s", 3))
    expect(await user.recover(b"0000"), "InvalidPin", guesses=2)
    expect(await user.recover(b"0001"), "InvalidPin", guesses=1)
    expect(await user.recover(b"1234"), secret=b"s")
    expect(await user.recover(b"0002"), "InvalidPin", guesses=2)


async def last_guess_can_succeed(stage: Stage) -> None:
    """The last guess still recovers and gives all guesses back."""
    user = stage.user()
    expect(await user.register(b"1234", b"s", 2))
    expect(await user.recover(b"0000"), "InvalidPin", guesses=1)
    expect(await user.recover(b"1234"), secret=b"s")
    expect(await user.recover(b"0000"), "InvalidPin", guesses=1)


async def exhaustion(stage: Stage) -> None:
    """Using up the guesses destroys the secret: the right PIN no longer helps."""
    user = stage.user()
    expect(await user.register(b"1234", b"s", 2))
    expect(await user.recover(b"0000"), "InvalidPin", guesses=1)
    expect(await user.recover(b"0000"), "InvalidPin", guesses=0)
    expect(await user.recover(b"1234"), "InvalidPin", guesses=0)
    expect(await user.recover(b"1234"), "InvalidPin", guesses=0)


async def no_guesses_allowed(stage: Stage) -> None:
    """A secret registered with no guesses is locked from the start."""
    user = stage.user()
    expect(await user.register(b"1234", b"s", 0))
    expect(await user.recover(b"1234"), "InvalidPin", guesses=0)


async def register_again(stage: Stage) -> None:
    """Registering again replaces secret, PIN and count, also after exhaustion."""
    user = stage.user()
    expect(await user.register(b"1234", b"first", 1))
    expect(await user.recover(b"0000"), "InvalidPin", guesses=0)
    expect(await user.recover(b"1234"), "InvalidPin", guesses=0)
    expect(await user.register(b"5678", b"second", 2))
    expect(await user.recover(b"1234"), "InvalidPin", guesses=1)
    expect(await user.recover(b"5678"), secret=b"second")


async def delete(stage: Stage) -> None:
    """A deleted secret is not registered; deleting nothing succeeds."""
    user = stage.user()
    expect(await user.recover(b"1234"), "NotRegistered")
    expect(await user.delete())
    expect(await user.register(b"1234", b"s"))
    expect(await user.delete())
    expect(await user.recover(b"1234"), "NotRegistered")
    expect(await user.delete())
    expect(await user.register(b"1234", b"t"))
    expect(await user.recover(b"1234"), secret=b"t")


async def wrong_user_info(stage: Stage) -> None:
    """Other user info stretches the PIN differently, so it costs a guess like a wrong PIN."""
    user = stage.user()
    expect(await user.register(b"1234", b"s", 3))
    expect(await user.recover(b"1234", info=b"other info"), "InvalidPin", guesses=2)
    expect(await user.recover(b"1234"), secret=b"s")


async def two_users_apart(stage: Stage) -> None:
    """Two users with the same PIN do not see or influence each other."""
    ann, bob = stage.user(), stage.user()
    expect(await ann.register(b"1234", b"ann's", 2))
    expect(await bob.recover(b"1234"), "NotRegistered")
    expect(await bob.register(b"1234", b"bob's", 2))
    expect(await bob.recover(b"0000"), "InvalidPin", guesses=1)
    expect(await ann.recover(b"1234"), secret=b"ann's")
    expect(await bob.delete())
    expect(await ann.recover(b"1234"), secret=b"ann's")


async def sixteen_users_at_once(stage: Stage) -> None:
    """Sixteen users register, fail, recover and delete concurrently without disturbing each other."""

    async def life(number: int) -> None:
        user = stage.user()
        secret = f"secret {number}".encode()
        expect(await user.register(b"%04d" % number, secret, 3))
        expect(await user.recover(b"none"), "InvalidPin", guesses=2)
        expect(await user.recover(b"%04d" % number), secret=secret)
        if number % 2:
            expect(await user.delete())
            expect(await user.recover(b"%04d" % number), "NotRegistered")

    async with trio.open_nursery() as nursery:
        for number in range(16):
            nursery.start_soon(life, number)


async def refused_tokens(stage: Stage) -> None:
    """Bad, expired, wrong-realm and wrong-tenant tokens are refused and change nothing."""
    user = stage.user()
    expect(await user.register(b"1234", b"s", 2))
    environment, name = stage.environment, user.name
    now = int(time.time())
    good = environment.tokens(name)
    bad = {
        "not a token": dict.fromkeys(good, "abc"),
        "wrong key": environment.tokens(name, key=b"x" * 32),
        "expired": environment.tokens(name, nbf=now - 700, iat=now - 700, exp=now - 100),
        "not yet valid": environment.tokens(name, nbf=now + 100, iat=now, exp=now + 700),
        "too long-lived": environment.tokens(name, exp=now + 90_000),
        "wrong realm": {realm: environment.token("00" * 16, name) for realm in good},
        "unknown tenant": environment.tokens(name, tenant="test-other"),
        "tenant in kid only": environment.tokens(name, iss="test-other"),
        "unknown version": environment.tokens(name, version=99),
        "audit scope": environment.tokens(name, scope="audit"),
    }
    for tokens in bad.values():
        refused = user.with_tokens(tokens)
        expect(await refused.recover(b"1234"), "InvalidAuth")
        expect(await refused.register(b"9999", b"t", 2), "InvalidAuth")
        expect(await refused.delete(), "InvalidAuth")
    expect(await user.recover(b"1234"), secret=b"s")


async def written_by_the_other_client(stage: Stage) -> None:
    """A secret registered by one client implementation is recovered by the other, guesses included."""
    name = stage.user().name
    ours, theirs = stage.user(name=name), stage.user(driver=stage.other, name=name)
    expect(await theirs.register(b"1234", b"shared", 3))
    expect(await ours.recover(b"0000"), "InvalidPin", guesses=2)
    expect(await theirs.recover(b"0000"), "InvalidPin", guesses=1)
    expect(await ours.recover(b"1234"), secret=b"shared")
    expect(await ours.delete())
    expect(await theirs.recover(b"1234"), "NotRegistered")


SCENARIOS: tuple[Callable[[Stage], Awaitable[None]], ...] = (
    register_and_recover,
    longest_and_empty_secret,
    wrong_pin,
    last_guess_can_succeed,
    exhaustion,
    no_guesses_allowed,
    register_again,
    delete,
    wrong_user_info,
    two_users_apart,
    sixteen_users_at_once,
    refused_tokens,
    written_by_the_other_client,
)


def kill_realm(state_dir: Path, realm: str) -> None:
    """Kill every agent of one realm for good."""
    for process in json.loads((state_dir / "processes.json").read_text()):
        if process["role"] == "agent" and process["realm"] == realm:
            os.kill(process["pid"], signal.SIGKILL)


async def one_realm_down(stage: Stage, down: Callable[[], None]) -> None:
    """With three realms and threshold two, everything but delete works while one realm is down."""
    configuration = stage.environment.with_thresholds(2, 2)
    before = stage.user()
    before = User(before.driver, before.name, configuration, before.tokens)
    expect(await before.register(b"1234", b"before", 2))
    down()
    expect(await before.recover(b"0000"), "InvalidPin", guesses=1)
    expect(await before.recover(b"1234"), secret=b"before")
    after = stage.user()
    after = User(after.driver, after.name, configuration, after.tokens)
    expect(await after.register(b"1234", b"after", 2))
    expect(await after.recover(b"1234"), secret=b"after")
    expect(await after.delete(), "Transient")


async def run_all(environment: Environment, clients: list[str], *, stop_one: bool) -> None:
    """Run every scenario with the named clients; the last one kills a realm."""
    async with official_driver(environment.ca) as official, own_driver(environment.ca) as own:
        drivers: dict[str, Driver] = {"official": official, "own": own}
        stages = [
            Stage(environment, drivers[name], drivers["own" if name == "official" else "official"]) for name in clients
        ]
        for stage in stages:
            for scenario in SCENARIOS:
                started = time.perf_counter()
                await scenario(stage)
                print(
                    f"{stage.driver.name:9} {scenario.__name__:30} {time.perf_counter() - started:6.2f} s", flush=True
                )
        if stop_one and len(environment.realms) == 3:
            killed: list[str] = []

            def down() -> None:
                if not killed:
                    killed.append(environment.realms[2])
                    kill_realm(environment.path.parent, environment.realms[2])

            for stage in stages:
                started = time.perf_counter()
                await one_realm_down(stage, down)
                print(f"{stage.driver.name:9} {'one_realm_down':30} {time.perf_counter() - started:6.2f} s", flush=True)


def main() -> None:
    """Run the scenarios against the realm of JUICEBOX_CLIENT_JSON."""
    parser = argparse.ArgumentParser(description="Run the client scenarios against a demo realm.")
    parser.add_argument("--client", choices=["official", "own", "both"], default="both")
    parser.add_argument("--no-kill", action="store_true", help="leave out the scenario that kills a realm")
    options = parser.parse_args()
    path = os.environ.get("JUICEBOX_CLIENT_JSON")
    if not path:
        sys.exit("scenarios: run me inside a demo: juicebox-hsm demo -- python -m tests.client.scenarios")
    clients = ["official", "own"] if options.client == "both" else [options.client]
    trio.run(lambda: run_all(Environment.load(Path(path)), clients, stop_one=not options.no_kill))
    print("all scenarios passed")


if __name__ == "__main__":
    main()
