"""What an operation of the client can fail with (client-protocol.md 17).

`recover_number` and `operation_number` are the numbers that the official bindings report: the former for recover, the
latter for register and delete. Their order decides which of several realms' errors an operation reports.
"""

from __future__ import annotations

from typing import ClassVar

from juicebox_hsm.errors import RealmError


class ClientError(RealmError):
    """An operation failed. Subclasses say why; `retryable` whether trying later may help."""

    recover_number: ClassVar[int]
    operation_number: ClassVar[int | None] = None

    def rank(self) -> tuple[int, int]:
        """Return the sort key by which the most telling of several errors is chosen: smallest first."""
        return self.recover_number, 0


class InvalidPin(ClientError):
    """The PIN is wrong. `guesses_remaining` is how many guesses are left before the secret is destroyed."""

    recover_number = 0

    def __init__(self, guesses_remaining: int) -> None:
        super().__init__(f"wrong PIN, {guesses_remaining} guesses remaining")
        self.guesses_remaining = guesses_remaining

    def rank(self) -> tuple[int, int]:
        """Return the sort key; fewer guesses come first."""
        return self.recover_number, self.guesses_remaining


class NotRegistered(ClientError):
    """Nothing is registered, or not on enough realms."""

    recover_number = 1


class InvalidAuth(ClientError):
    """A realm refused the auth token, or there was none."""

    recover_number = 2
    operation_number = 0


class UpgradeRequired(ClientError):
    """A realm asks for a newer client."""

    recover_number = 3
    operation_number = 1


class RateLimitExceeded(ClientError):
    """The tenant sends too many requests."""

    recover_number = 4
    operation_number = 2
    retryable = True


class AssertionFailed(ClientError):
    """A realm misbehaved, or this client has a bug; trying again will not help."""

    recover_number = 5
    operation_number = 3


class Replaced(AssertionFailed):
    """The registration was replaced in the middle of a recovery; its secret can no longer be recovered."""


class Transient(ClientError):
    """Realms could not be reached or were unavailable; trying again later may help."""

    recover_number = 6
    operation_number = 4
    retryable = True
