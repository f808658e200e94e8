"""Whether a log can be the one of which an HSM captured an entry."""

from __future__ import annotations

from juicebox_hsm.host.log import lacks
from tests.emulator.realm_data import entry


def test_a_log_without_what_was_captured() -> None:
    """A log that is empty, ends earlier or has another entry there is another log; one that goes on is not judged."""
    last = entry(6)
    assert lacks(None, 1, b"m" * 32)
    assert lacks(last, 7, b"m" * 32)
    assert lacks(last, 6, b"m" * 32)
    assert not lacks(last, 6, last.entry_mac)
    assert not lacks(last, 5, b"m" * 32)
