"""Bodies of the internal RPC: whatever bytes come, a body of the method's type or the documented error."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.adapters.rpc import frames
from juicebox_hsm.errors import DecodingError
from juicebox_hsm.wire.methods import AGENT_METHODS, MANAGER_METHODS, AnyMethod
from tests.bodies import bodies_of

METHODS = [*AGENT_METHODS.values(), *MANAGER_METHODS.values()]
plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=40)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


def _decoded(method: AnyMethod, data: bytes) -> Any:
    """Return the body, None for the documented error."""
    try:
        return frames.BodyDecoder(method.request)(msgspec.Raw(data))
    except DecodingError:
        return None


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@given(data=st.data())
def test_a_body_is_of_its_type_or_refused(method: AnyMethod, data: st.DataObject) -> None:
    """Garbage, values of other types and other methods' bodies: each is refused, or is what the handler expects."""
    tag = method.request.__name__
    other = data.draw(st.sampled_from(METHODS))
    sent = data.draw(
        st.binary(max_size=100)
        | plain_values.map(msgspec.msgpack.encode)
        | st.lists(plain_values, max_size=9).map(lambda fields: msgspec.msgpack.encode([tag, *fields]))
        | bodies_of(other, [bytes(16)]).map(msgspec.msgpack.encode)
    )
    body = _decoded(method, sent)
    if body is None:
        return
    assert type(body) is method.request
    assert msgspec.structs.asdict(body).keys() == set(method.request.__struct_fields__)
    again = _decoded(method, msgspec.msgpack.encode(body))
    assert repr(again) == repr(body)  # a number that is none equals nothing
