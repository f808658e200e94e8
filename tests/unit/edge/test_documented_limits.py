"""The limits that the protocol page promises are those that are enforced."""

from __future__ import annotations

from pathlib import Path

from juicebox_hsm.adapters.edge.limits import EdgeLimits

PAGE = Path(__file__).parents[3] / "docs" / "protocol" / "load-balancer.md"


def test_the_page_has_the_numbers_of_the_edge() -> None:
    """What is said about HTTP/2 are the defaults of `EdgeLimits`."""
    limits = EdgeLimits()
    text = " ".join(PAGE.read_text().split())
    counts = f"at most {limits.h2_resets_max} resets and {limits.h2_control_frames_max} control frames"
    assert f"h2: {limits.h2_streams_max} streams, {limits.h2_header_list_bytes_max} bytes of headers; " in text
    assert f"per {limits.h2_flood_window_s:g} s {counts}" in text
    assert f"{limits.h2_silent_bytes_max // 1024} KiB that complete no frame" in text
