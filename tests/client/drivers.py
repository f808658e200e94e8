"""Two clients behind one face: the official SDK under Node and our own, so that one list of scenarios serves both."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import jwt
import trio

SDK_DIRECTORY = Path(__file__).with_name("sdk")

REGISTER_CODES = ("InvalidAuth", "UpgradeRequired", "RateLimitExceeded", "Assertion", "Transient")
RECOVER_CODES = ("InvalidPin", "NotRegistered", *REGISTER_CODES)


@dataclass(frozen=True)
class Result:
    """How one operation ended: `error` is the SDK's name of the error, None for success."""

    error: str | None = None
    guesses_remaining: int | None = None
    secret: bytes | None = None
    detail: str = ""
    ms: float = 0.0

    def __str__(self) -> str:
        """Return a short form for failure messages."""
        if self.error is None:
            return "success"
        return f"{self.error}(guesses_remaining={self.guesses_remaining}) {self.detail}"


@dataclass(frozen=True)
class Environment:
    """What `juicebox-hsm demo` writes to client.json, and how to mint more tokens from it."""

    path: Path
    configuration: dict[str, Any]
    signer: dict[str, Any]
    ca: Path

    @classmethod
    def load(cls, path: Path) -> Environment:
        """Read client.json."""
        content = json.loads(path.read_text())
        return cls(path, content["configuration"], content["signer"], Path(content["ca"]))

    @property
    def realms(self) -> list[str]:
        """Return the realm ids in hex, in configuration order."""
        return [realm["id"] for realm in self.configuration["realms"]]

    def with_thresholds(self, register: int, recover: int) -> dict[str, Any]:
        """Return the configuration with other thresholds."""
        return {**self.configuration, "register_threshold": register, "recover_threshold": recover}

    def token(self, realm: str, user: str, **changes: Any) -> str:
        """Mint a token for a user; `changes` override claims, `tenant`, `version` or `key`."""
        tenant = changes.pop("tenant", self.signer["tenant"])
        version = changes.pop("version", self.signer["version"])
        key = changes.pop("key", bytes.fromhex(self.signer["key_hex"]))
        now = int(time.time())
        claims = {"iss": tenant, "sub": user, "aud": realm, "iat": now, "nbf": now, "exp": now + 600, "scope": "user"}
        return jwt.encode({**claims, **changes}, key, algorithm="HS256", headers={"kid": f"{tenant}:{version}"})

    def tokens(self, user: str, **changes: Any) -> dict[str, str]:
        """Mint one token per realm."""
        return {realm: self.token(realm, user, **changes) for realm in self.realms}


@dataclass(frozen=True)
class User:
    """One user of one client implementation. `with_*` return changed copies that share the SDK instance."""

    driver: Driver
    name: str
    configuration: dict[str, Any]
    tokens: dict[str, str] = field(repr=False)
    info: bytes = b"user info"

    def with_tokens(self, tokens: dict[str, str]) -> User:
        """Use other tokens."""
        return replace(self, tokens=tokens)

    async def register(self, pin: bytes, secret: bytes, guesses: int = 2) -> Result:
        """Register a secret."""
        return await self.driver.run(self, "register", pin=pin, secret=secret, num_guesses=guesses)

    async def recover(self, pin: bytes, info: bytes | None = None) -> Result:
        """Recover the secret."""
        user = self if info is None else replace(self, info=info)
        return await self.driver.run(user, "recover", pin=pin)

    async def delete(self) -> Result:
        """Delete the secret."""
        return await self.driver.run(self, "delete")


class Driver(Protocol):
    """A client implementation that can run one operation for one user."""

    name: str

    async def run(self, user: User, op: str, **arguments: Any) -> Result:
        """Run one operation; never raises for an outcome of the protocol."""
        ...


class OfficialDriver:
    """The official SDK in one Node process, one instance per user."""

    name = "official"

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._waiting: dict[int, tuple[trio.Event, list[Any]]] = {}
        self._next = 0
        self._lock = trio.Lock()

    async def run(self, user: User, op: str, **arguments: Any) -> Result:
        """Send one operation to Node and wait for its end."""
        self._next += 1
        number = self._next
        message = {
            "id": number,
            "op": op,
            "instance": user.name,
            "configuration": user.configuration,
            "tokens": user.tokens,
            "info": user.info.hex(),
            **{key: value.hex() if isinstance(value, bytes) else value for key, value in arguments.items()},
        }
        event = trio.Event()
        box: list[Any] = []
        self._waiting[number] = (event, box)
        async with self._lock:
            assert self._process.stdin is not None
            await self._process.stdin.send_all(json.dumps(message).encode() + b"\n")
        await event.wait()
        answer = box[0]
        if answer["ok"]:
            secret = answer.get("secret")
            return Result(secret=bytes.fromhex(secret) if secret is not None else None, ms=answer["ms"])
        names = RECOVER_CODES if op == "recover" else REGISTER_CODES
        code = answer.get("code")
        error = names[code] if isinstance(code, int) else "Crash"
        return Result(error, answer.get("guesses_remaining"), detail=answer.get("message", ""), ms=answer["ms"])

    async def read_answers(self) -> None:
        """Hand answers to their waiters until Node ends."""
        assert self._process.stdout is not None
        buffer = b""
        async for chunk in self._process.stdout:
            buffer += chunk
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                answer = json.loads(line)
                event, box = self._waiting.pop(answer["id"])
                box.append(answer)
                event.set()


class OwnDriver:
    """Our Python client, one `Client` per user so that sessions are reused as the SDK does."""

    name = "own"

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._clients: dict[str, tuple[Any, dict[str, str]]] = {}

    async def run(self, user: User, op: str, **arguments: Any) -> Result:
        """Run one operation with our client."""
        from juicebox_hsm.client import AssertionFailed, Client, ClientError, Configuration

        key = json.dumps([user.name, user.configuration])
        if key not in self._clients:
            tokens: dict[str, str] = {}
            configuration = Configuration.from_json(json.dumps(user.configuration))
            client = Client(configuration, lambda realm: tokens[realm.hex()], transport=self._transport)
            self._clients[key] = (client, tokens)
        client, tokens = self._clients[key]
        tokens.clear()
        tokens.update(user.tokens)
        started = time.perf_counter()
        secret = None
        try:
            if op == "register":
                await client.register(arguments["pin"], arguments["secret"], user.info, arguments["num_guesses"])
            elif op == "recover":
                secret = await client.recover(arguments["pin"], user.info)
            else:
                await client.delete()
        except ClientError as error:
            name = "Assertion" if isinstance(error, AssertionFailed) else type(error).__name__
            ms = (time.perf_counter() - started) * 1000
            return Result(name, getattr(error, "guesses_remaining", None), detail=str(error), ms=ms)
        return Result(secret=secret, ms=(time.perf_counter() - started) * 1000)


@asynccontextmanager
async def official_driver(ca: Path) -> AsyncIterator[OfficialDriver]:
    """Start Node with the demo's CA trusted; the official package must be installed in tests/client/sdk."""
    if not (SDK_DIRECTORY / "node_modules" / "juicebox-sdk").is_dir():
        raise RuntimeError(f"the official client is not installed: run `npm install --prefix {SDK_DIRECTORY}`")
    import os

    process = await trio.lowlevel.open_process(
        ["node", str(SDK_DIRECTORY / "driver.mjs")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "NODE_EXTRA_CA_CERTS": str(ca)},
    )
    driver = OfficialDriver(process)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.read_answers)
        try:
            yield driver
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def own_driver(ca: Path) -> AsyncIterator[OwnDriver]:
    """Return our client with a shared connection pool that trusts the demo's CA."""
    from juicebox_hsm.client.transport import HttpTransport

    async with HttpTransport(ca_file=ca) as transport:
        yield OwnDriver(transport)
