"""A wrapper that keeps secret bytes out of logs, tracebacks and pickles (style: secrets redact)."""

from __future__ import annotations

import hmac
from typing import NoReturn


class Secret:
    """Secret bytes. Prints as `(redacted)`, compares in constant time, refuses pickling and hashing.

    Only `expose` gives the bytes; its call sites are the places to review.
    """

    __hash__ = None  # type: ignore[assignment]  # a hash table would compare by timing-dependent buckets
    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = bytes(value)

    def expose(self) -> bytes:
        """Return the secret bytes."""
        return self._value

    def __len__(self) -> int:
        return len(self._value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value, other._value)

    def __repr__(self) -> str:
        return "(redacted)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("secrets are not pickled or copied")
