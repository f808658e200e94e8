"""Ids, record ids and durations as operators write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.host.cluster.ranges import show_range, show_record_id
from juicebox_hsm.ids import OwnedRange
from roles.durations import format_duration, parse_duration
from roles.tools.ids import parse_record_id, resolve_id
from roles.tools.session import ToolFailure

KNOWN = [bytes.fromhex("ab" * 16), bytes.fromhex("ac" + "00" * 15), bytes.fromhex("1f" * 16)]


@pytest.mark.parametrize(("text", "expected"), [("ab", 0), ("AB", 0), ("ac", 1), ("1", 2), ("1f1", 2), ("ac0", 1)])
def test_prefixes(text: str, expected: int) -> None:
    """Any unambiguous number of digits, odd ones too, in either case."""
    assert resolve_id(text, KNOWN, "group") == KNOWN[expected]


def test_full_ids_need_not_be_known() -> None:
    """A full id is taken at its word."""
    assert resolve_id("0f" * 16, [], "group") == b"\x0f" * 16


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("a", ExitCode.ID, "ambiguous"),
        ("ff", ExitCode.ID, "no item with that ID"),
        ("xy", ExitCode.USAGE, "hex"),
        ("", ExitCode.USAGE, "hex"),
        ("ab" * 17, ExitCode.USAGE, "hex"),
    ],
)
def test_wrong_ids(text: str, code: ExitCode, says: str) -> None:
    """Each mistake has its message and exit code."""
    with pytest.raises(ToolFailure, match=says) as caught:
        resolve_id(text, KNOWN, "group")
    assert caught.value.exit_code == code


def test_record_id_shorthand() -> None:
    """A short id ending in 00 or ff repeats that byte."""
    assert parse_record_id("7fff") == bytes.fromhex("7f" + "ff" * 31)
    assert parse_record_id("2000") == bytes.fromhex("20" + "00" * 31)
    assert parse_record_id("0x00") == bytes(32)
    assert parse_record_id("12" * 32) == b"\x12" * 32


@pytest.mark.parametrize("text", ["20", "", "0x", "123", "zz", "00" * 33, "ff01"])
def test_bad_record_ids(text: str) -> None:
    """Anything else short, too long, or not hex is an error."""
    with pytest.raises(ValueError, match=r"."):
        parse_record_id(text)


@given(st.binary(min_size=1, max_size=31), st.sampled_from([b"\x00", b"\xff"]))
def test_shown_record_ids_read_back(head: bytes, fill: bytes) -> None:
    """What is shown shortened is shorthand for the same id."""
    record = head + fill * (32 - len(head))
    shown = show_record_id(record)
    assert parse_record_id(shown.removesuffix("...")) == record
    assert shown.endswith("...") == (len(record) - len(record.rstrip(record[-1:])) > 3)


def test_shown_ranges() -> None:
    """Ranges print both ends; no range prints none."""
    full = OwnedRange(parse_record_id("00"), parse_record_id("7fff"))
    assert show_range(full) == "[0x00...-0x7fff...]"
    assert show_range(None) == "none"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5s", 5), ("500ms", 0.5), ("1.5 m", 90), ("2h", 7200), ("2hr", 7200), ("1d", 86400), ("3days", 259200),
     ("7us", 7e-6), ("7µs", 7e-6), ("9ns", 9e-9), ("2min", 120), ("0s", 0)],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    """Every unit, and at most one blank."""
    assert parse_duration(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize("text", ["5", "-1s", "+1s", "1e3s", "1  s", " 1s", "1s ", "s", "", "1.s", "1S", "٣s", "1s2m"])
def test_bad_durations(text: str) -> None:
    """No unit, a sign, an exponent, inner blanks, foreign digits: refused."""
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


def test_shown_durations() -> None:
    """Uptimes print without leading zero parts."""
    assert format_duration(93784.9) == "1d 2h 3m 4s"
    assert format_duration(60) == "1m 0s"
    assert format_duration(0) == "0s"
