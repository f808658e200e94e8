"""Cryptography of realms and clients (client-protocol.md 6 and 10 to 13), on libsodium, hashlib and Argon2.

Everything is a pure function or a small state machine: entropy arrives as `Random` or as bytes drawn by the caller.
Library errors are translated to the error named by each module; none escapes. Scalar arithmetic on secrets runs in
libsodium, in constant time; only public values meet Python's integers.
"""

from collections.abc import Callable

Random = Callable[[int], bytes]
"""A source of entropy: called with a size in bytes, returns that many uniformly random bytes."""

__all__ = ["Random"]
