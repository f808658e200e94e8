"""Copies of HSMs: two processes with one HSM are noticed, one process with two addresses is not (custody.md 4)."""

from __future__ import annotations

from juicebox_hsm.host.copies import Elsewhere, Place, copied
from juicebox_hsm.ids import HsmId

ONE, TWO = HsmId(b"1" * 16), HsmId(b"2" * 16)
HERE, THERE = Place("tls://here", ONE, b"i"), Place("tls://there", ONE, b"j")


def test_two_processes_are_a_copy() -> None:
    """An HSM that answers from two processes is named with both addresses, and nothing else is."""
    assert copied([HERE, THERE, Place("tls://other", TWO, b"k")]) == {ONE: ("tls://here", "tls://there")}


def test_one_process_is_no_copy() -> None:
    """Two addresses of one process, and an agent that tells no instance, are no copies."""
    assert copied([HERE, Place("tls://alias", ONE, b"i")]) == {}
    assert copied([HERE, Place("tls://older", ONE, b"")]) == {}


def test_a_copy_is_forgiven_one_answer_and_forgotten_after_two() -> None:
    """A copy that hangs once does not make its original ready; one that is gone for good, or left discovery, does."""
    elsewhere = Elsewhere()
    seen = []
    for answered in ([THERE], [], []):
        elsewhere.asked(HERE, answered, [THERE.url])
        seen.append(elsewhere.urls)
    assert seen == [(THERE.url,), (THERE.url,), ()]
    elsewhere.asked(HERE, [THERE], [THERE.url])
    elsewhere.asked(HERE, [], [])
    assert elsewhere.urls == ()


def test_an_address_with_another_hsm_is_no_copy_any_more() -> None:
    """An address that answers for another HSM is no copy, at once."""
    elsewhere = Elsewhere()
    elsewhere.asked(HERE, [THERE], [THERE.url])
    elsewhere.asked(HERE, [Place(THERE.url, TWO, b"j")], [THERE.url])
    assert elsewhere.urls == ()
