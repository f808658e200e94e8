"""Register, recover and delete over all realms of a configuration (client-protocol.md 17)."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Self, TypeVar

import trio

from juicebox_hsm.adapters.process.threads import in_thread_or_here
from juicebox_hsm.client import recovery
from juicebox_hsm.client.configuration import Configuration, Realm
from juicebox_hsm.client.errors import AssertionFailed, ClientError, InvalidPin, NotRegistered, Replaced
from juicebox_hsm.client.exchange import AuthSource, Exchange
from juicebox_hsm.client.registration import create_registration
from juicebox_hsm.client.transport import HttpTransport, Transport
from juicebox_hsm.crypto import Random, derive, oprf
from juicebox_hsm.crypto.pin import PinHashingMode, StretchedPin, stretch
from juicebox_hsm.errors import LocalError
from juicebox_hsm.wire import requests as secrets
from juicebox_hsm.wire.cbor import U16_MAX

_T = TypeVar("_T")

SECRET_BYTES_MAX: Final = derive.SECRET_BYTES_MAX


class Client:
    """Registers, recovers and deletes one user's secret.

    `auth` gives the user's token for a realm: a mapping by realm id (bytes or hex), or a function (plain or async) that
    is asked before every HTTP request. Previous configurations are tried when nothing is registered under the current
    one. The transport is closed with the client only if it was not handed in. Safe to use from several tasks.

    All operations raise `ClientError`; PIN and info are arbitrary bytes.
    """

    def __init__(
        self,
        configuration: Configuration,
        auth: AuthSource,
        *,
        transport: Transport | None = None,
        previous_configurations: Sequence[Configuration] = (),
        random: Random = os.urandom,
    ) -> None:
        self._configuration = configuration
        self._previous = tuple(previous_configurations)
        self._own_transport: HttpTransport | None = None
        if transport is None:
            transport = self._own_transport = HttpTransport()
        self._exchange = Exchange(auth, transport, random)
        self._random = random

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the transport if this client made it."""
        if self._own_transport is not None:
            await self._own_transport.aclose()

    async def register(self, pin: bytes, secret: bytes, info: bytes, num_guesses: int) -> None:
        """Store `secret` (at most 128 bytes), protected by `pin` and at most `num_guesses` (0 to 65535) wrong tries.

        Replaces an earlier registration. Raises `LocalError` for arguments out of range.
        """
        if len(secret) > SECRET_BYTES_MAX:
            raise LocalError(f"a secret has at most {SECRET_BYTES_MAX} bytes, not {len(secret)}")
        if not 0 <= num_guesses <= U16_MAX:
            raise LocalError(f"num_guesses is from 0 to {U16_MAX}, not {num_guesses}")
        configuration = self._configuration
        threshold = configuration.register_threshold

        async def register1(realm: Realm) -> None:
            await self._exchange.request(realm, secrets.Register1())

        await _gather(configuration.realms, threshold, register1)

        version = self._random(secrets.VERSION_BYTES)
        stretched = await _stretch(configuration.pin_hashing_mode, pin, version, info)
        realm_ids = [realm.id for realm in configuration.realms]
        requests = dict(
            zip(
                configuration.realms,
                create_registration(
                    realm_ids, configuration.recover_threshold, version, stretched, secret, num_guesses, self._random
                ),
                strict=True,
            )
        )

        async def register2(realm: Realm) -> None:
            await self._exchange.request(realm, requests[realm])

        await _gather(configuration.realms, threshold, register2)

    async def recover(self, pin: bytes, info: bytes) -> bytes:
        """Return the secret. Raises `InvalidPin` (with `guesses_remaining`), `NotRegistered` and the others."""
        not_registered: NotRegistered | None = None
        for configuration in (self._configuration, *self._previous):
            try:
                version, realms = await self._recover1(configuration)
            except NotRegistered as error:
                not_registered = not_registered or error
                continue
            return await self._recover_version(configuration, version, realms, pin, info)
        raise not_registered or NotRegistered("nothing is registered")

    async def delete(self) -> None:
        """Delete the registration from every realm; succeeds only if all of them did."""
        failures: dict[Realm, ClientError] = {}

        async def delete_one(realm: Realm) -> None:
            try:
                await self._exchange.request(realm, secrets.Delete())
            except ClientError as error:
                failures[realm] = error

        await _gather(self._configuration.realms, len(self._configuration.realms), delete_one)
        for realm in self._configuration.realms:
            if realm in failures:
                raise failures[realm]

    async def _recover1(self, configuration: Configuration) -> tuple[bytes, list[Realm]]:
        async def ask(realm: Realm) -> secrets.Recover1Ok:
            match await self._exchange.request(realm, secrets.Recover1()):
                case secrets.Recover1Ok() as answer:
                    return answer
                case other:
                    raise _failure(other)

        answers = await _gather(configuration.realms, configuration.recover_threshold, ask)
        return recovery.agree_on_version(configuration, answers)

    async def _recover_version(
        self, configuration: Configuration, version: bytes, realms: Sequence[Realm], pin: bytes, info: bytes
    ) -> bytes:
        """Run the steps after the realms agreed on a version."""
        stretched = await _stretch(configuration.pin_hashing_mode, pin, version, info)
        blinded = oprf.blind(stretched.access_key, self._random(oprf.WIDE_SCALAR_BYTES))
        recover2 = secrets.Recover2(version, blinded.element)

        async def evaluate(realm: Realm) -> secrets.Recover2Ok:
            match await self._exchange.request(realm, recover2):
                case secrets.Recover2Ok() as answer:
                    recovery.check_evaluation(realm, blinded, answer)
                    return answer
                case other:
                    raise _failure(other)

        evaluations = await _gather(realms, configuration.recover_threshold, evaluate)
        unlock_key = recovery.derive_unlock_key(configuration, stretched, blinded, evaluations)

        async def unlock(realm: Realm) -> secrets.Recover3Ok:
            tag = derive.unlock_key_tag(unlock_key, realm.id)
            match await self._exchange.request(realm, secrets.Recover3(version, tag)):
                case secrets.Recover3Ok() as answer:
                    return answer
                case other:
                    raise _failure(other)

        shares = await _gather(realms, configuration.recover_threshold, unlock)
        return recovery.open_secret(configuration, stretched, unlock_key, shares)


async def _stretch(mode: PinHashingMode, pin: bytes, version: bytes, info: bytes) -> StretchedPin:
    """Stretch the PIN; the slow mode in a worker thread, so that other tasks go on."""
    if mode is PinHashingMode.FAST_INSECURE:
        return stretch(mode, pin, version, info)
    return await in_thread_or_here(stretch, mode, pin, version, info)


async def _gather(realms: Sequence[Realm], threshold: int, ask: Callable[[Realm], Awaitable[_T]]) -> dict[Realm, _T]:
    """Ask all realms at once; return all successes, in the order of realms, when at least `threshold` succeed.

    Fails with the most telling error as soon as too many realms have failed, cancelling the rest. Anything but a
    `ClientError` (a token function's own exception) fails the whole at once and is raised as it is.
    """
    if len(realms) == 1:  # no task to spawn: a realm alone is the common case of benchmarks
        return {realms[0]: await ask(realms[0])}
    failures_max = len(realms) - threshold
    answers: dict[Realm, _T] = {}
    failures: list[ClientError] = []
    crashes: list[Exception] = []

    async def ask_one(realm: Realm, scope: trio.CancelScope) -> None:
        try:
            answers[realm] = await ask(realm)
        except ClientError as error:
            failures.append(error)
            if len(failures) > failures_max:
                scope.cancel()
        except Exception as crash:  # noqa: BLE001 - raised below, outside the nursery, so that it is not wrapped
            crashes.append(crash)
            scope.cancel()

    async with trio.open_nursery() as nursery:
        for realm in realms:
            nursery.start_soon(ask_one, realm, nursery.cancel_scope)
    if crashes:
        raise crashes[0]
    if len(failures) > failures_max:
        raise min(failures, key=lambda error: error.rank())
    return {realm: answers[realm] for realm in realms if realm in answers}


def _failure(answer: secrets.SecretsResponse) -> ClientError:
    """Translate an answer other than Ok to the error of a recovery."""
    match answer:
        case secrets.NotRegistered():
            return NotRegistered("nothing is registered")
        case secrets.NoGuesses():
            return InvalidPin(0)
        case secrets.BadUnlockKeyTag():
            return InvalidPin(answer.guesses_remaining)
        case secrets.VersionMismatch():
            return Replaced("the registration was replaced in the middle of the recovery")
        case _:
            return AssertionFailed("the answer belongs to another request")
