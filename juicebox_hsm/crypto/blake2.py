"""Keyed BLAKE2s over length-prefixed parts (client-protocol.md 13)."""

from __future__ import annotations

import hashlib


def mac(size: int, key: bytes, label: str | bytes, *parts: bytes) -> bytes:
    """Return the keyed BLAKE2s of digest size `size` (1 to 32) over label and parts, each with its length.

    `key` is 1 to 32 bytes. The digest size is part of BLAKE2s' parameters: a 16-byte result is not the start of a
    32-byte one. Length prefixes (4 bytes, big-endian) keep different splits of the same bytes apart.
    """
    name = label.encode() if isinstance(label, str) else label
    pieces = [len(name).to_bytes(4, "big"), name]
    for part in parts:
        pieces += (len(part).to_bytes(4, "big"), part)
    return hashlib.blake2s(b"".join(pieces), digest_size=size, key=key).digest()
