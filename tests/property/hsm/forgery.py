"""Altered requests: one field, byte or element of something real is changed, as a malicious host would.

Everything stays expressible on the wire (types, lengths of ids, macs and nonces), for what is not never reaches the
core: the codec's own tests are about that.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from juicebox_hsm.consensus.types import LogEntry
from juicebox_hsm.hsm import messages as m

OPTIONAL = {
    (LogEntry, "partition"),
    (LogEntry, "transferring"),
    (m.TransferOut, "proof"),
    (m.TransferIn, "proofs"),
}
"""Fields that may be absent, so that leaving them out is an alteration too."""

UNSIZED = {"proof", "proofs", "ciphertext", "payload_ciphertext"}
"""Byte strings whose length is the host's choice."""

PAIRS = {"proofs", "consumed", "members"}
"""Fields of pairs: an element may be dropped or repeated, half a pair may not."""


REFUSED_FIRST = {"realm", "group"}
"""Fields that are checked before anything else, so that altering them too often would test nothing but that."""


def alter(request: m.Request, chooser: random.Random, donors: Sequence[m.Request]) -> m.Request:
    """Return the request with one thing changed, or with a field of one of `donors` in place of its own.

    A request without anything to change comes back as it is.
    """
    if chooser.random() < 0.4:
        crossed = _cross(request, chooser, donors)
        if crossed is not None:
            return crossed
    altered: m.Request = _alter(request, "", chooser)
    return altered


def _cross(request: m.Request, chooser: random.Random, donors: Sequence[m.Request]) -> m.Request | None:
    """Put a field of another request in: a statement, a nonce, a proof that is real but not for this."""
    names = [field.name for field in fields(request)]
    for donor in chooser.choices(donors, k=min(len(donors), 8)):
        usable = [
            name
            for name in names
            if (name not in REFUSED_FIRST or chooser.random() < 0.2)
            and getattr(donor, name, None) is not None
            and type(getattr(donor, name)) is type(getattr(request, name))
            and getattr(donor, name) != getattr(request, name)
        ]
        if usable:
            name = chooser.choice(usable)
            changes: dict[str, Any] = {name: getattr(donor, name)}
            return replace(request, **changes)
    return None


def _alter(value: Any, name: str, chooser: random.Random) -> Any:
    match value:
        case bool():
            return not value
        case int():
            return chooser.choice([value + 1, max(value - 1, 0), 0, 2**32 - 1])
        case bytes():
            return _alter_bytes(value, chooser, sized=name not in UNSIZED)
        case tuple():
            return _alter_tuple(value, name, chooser)
    if not is_dataclass(value):
        return value
    present = [field.name for field in fields(value) if getattr(value, field.name) not in {None, ()}]
    if not present:
        return value
    chosen = chooser.choice(present)
    if chosen in REFUSED_FIRST and chooser.random() < 0.8:
        chosen = chooser.choice(present)
    if (type(value), chosen) in OPTIONAL and chooser.random() < 0.2:
        changes: dict[str, Any] = {chosen: None}
    else:
        changes = {chosen: _alter(getattr(value, chosen), chosen, chooser)}
    return replace(value, **changes)  # type: ignore[type-var]  # an instance of a dataclass


def _alter_bytes(value: bytes, chooser: random.Random, *, sized: bool) -> bytes:
    """Flip a bit; where the length is free also cut off, lengthen or empty."""
    if not sized:
        match chooser.randrange(6):
            case 0:
                return value[: chooser.randrange(len(value) + 1)]
            case 1:
                return value + chooser.randbytes(chooser.choice([1, 32, 2048]))
    if not value:
        return value
    at = chooser.randrange(len(value))
    return value[:at] + bytes([value[at] ^ 1 << chooser.randrange(8)]) + value[at + 1 :]


def _alter_tuple(value: tuple[Any, ...], name: str, chooser: random.Random) -> tuple[Any, ...]:
    """Alter, drop or repeat an element, give it a field of another one, or turn the order round."""
    if not value:
        return value
    at = chooser.randrange(len(value))
    altered = _alter(value[at], name, chooser)
    if name == "proofs" or (name in PAIRS and not isinstance(value[at], tuple)):
        return (*value[:at], altered, *value[at + 1 :])
    match chooser.randrange(8):
        case 0:
            return value[:at] + value[at + 1 :]
        case 1:
            return (*value, value[at])
        case 2:
            return value[::-1]
        case 3 | 4 if is_dataclass(value[at]):
            borrowed = chooser.choice(fields(value[at])).name
            altered = replace(value[at], **{borrowed: getattr(chooser.choice(value), borrowed)})
    return (*value[:at], altered, *value[at + 1 :])
