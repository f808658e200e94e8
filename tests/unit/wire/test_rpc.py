"""The internal RPC's methods and bodies on the wire: services of two builds must understand each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from juicebox_hsm.wire.methods import AGENT_METHODS, MANAGER_METHODS, AnyMethod

GOLDEN = Path(__file__).parents[2] / "data" / "rpc-methods.txt"


def structs_of(found: inspect.Type) -> list[inspect.StructType]:
    """Return the body types of a request or reply."""
    members = found.types if isinstance(found, inspect.UnionType) else (found,)
    return [member for member in members if isinstance(member, inspect.StructType)]


def sample(found: inspect.Type, inner: set[type]) -> Any:
    """Return a value of a field's type; `inner` collects the bodies inside it. Optional fields are filled."""
    match found:
        case inspect.StructType(cls=body, fields=fields):
            inner.add(body)
            return body(*(sample(field.type, inner) for field in fields))
        case inspect.ListType(item_type=item):
            return [sample(item, inner)]
        case inspect.VarTupleType(item_type=item):
            return (sample(item, inner),)
        case inspect.TupleType(item_types=items):
            return tuple(sample(item, inner) for item in items)
        case inspect.UnionType(types=types):
            return sample(next(kind for kind in types if not isinstance(kind, inspect.NoneType)), inner)
        case inspect.EnumType(cls=codes):
            return next(iter(codes))
        case inspect.IntType():
            return 7
        case inspect.FloatType():
            return 0.5
        case inspect.BoolType():
            return True
        case inspect.StrType():
            return "text"
        case inspect.BytesType():
            return b"\x01\x02"
    raise AssertionError(f"no sample of {found}")


def described(service: str, methods: dict[str, AnyMethod], bodies: set[type]) -> list[str]:
    """Return a line per method; adds every body type to `bodies`."""
    lines = []
    for method in methods.values():
        request, replies = (structs_of(inspect.type_info(kind)) for kind in (method.request, method.reply))
        for found in (*request, *replies):
            sample(found, bodies)
        names = " | ".join(found.cls.__name__ for found in replies)
        callers = " ".join(sorted(role.value for role in method.callers))
        lines.append(f"{service} {method.name}: {request[0].cls.__name__} -> {names} for {callers}")
    return lines


def test_methods_and_bodies_are_those_recorded() -> None:
    """Names, bodies, callers and the exact bytes of each body stay; set UPDATE_TRANSCRIPTS=1 to record anew."""
    bodies: set[type] = set()
    lines = described("agent", AGENT_METHODS, bodies) + described("manager", MANAGER_METHODS, bodies)
    for body in sorted(bodies, key=lambda found: found.__name__):
        encoded = msgspec.msgpack.encode(sample(inspect.type_info(body), set()))
        lines.append(f"{body.__name__} {encoded.hex()}")
    text = "\n".join(lines) + "\n"
    if os.environ.get("UPDATE_TRANSCRIPTS"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()
