"""Bodies of the internal RPC as a peer might send them: of the right types, with any values in them.

Each is encoded and decoded as it would be on its way, so that only what the wire lets through reaches a handler.
"""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from hypothesis import strategies as st

from juicebox_hsm.adapters.rpc import frames
from juicebox_hsm.wire.methods import AnyMethod

_NUMBERS: Final = (0, 1, 2, -1, 2**32, 2**48, 2**63 - 1, 2**63, 2**64 - 1, -(2**63))
_SIZES: Final = (0, 1, 15, 16, 17, 31, 32, 33, 500)


def bodies_of(method: AnyMethod, known: Sequence[bytes]) -> st.SearchStrategy[Any]:
    """Return bodies of the method's request; `known` are ids and other bytes that exist."""
    decode = frames.BodyDecoder(method.request)
    encode = msgspec.msgpack.encode
    return _of(method.request, known).map(lambda body: decode(msgspec.Raw(encode(body))))


def _of(kind: Any, known: Sequence[bytes]) -> st.SearchStrategy[Any]:
    """Return values of a field's type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([_of(argument, known) for argument in arguments])
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return st.lists(_of(arguments[0], known), max_size=12)
    if origin is tuple:
        return st.tuples(*(_of(argument, known) for argument in arguments))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{name: _of(hints[name], known) for name in kind.__struct_fields__})
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return st.sampled_from(list(kind))
    sizes = st.sampled_from(_SIZES).flatmap(lambda size: st.binary(min_size=size, max_size=size))
    plain: dict[Any, st.SearchStrategy[Any]] = {
        bytes: st.sampled_from([*known, *known, b"\xff" * 32]) | sizes,
        int: st.sampled_from(_NUMBERS) | st.integers(-(2**63), 2**64 - 1),
        float: st.floats(),
        bool: st.booleans(),
        str: st.text(max_size=300),
        types.NoneType: st.none(),
    }
    return plain[kind]
