"""Stable names for what a verdict says, so that programs need not read sentences (docs/json.md).

A name is found by the words that only its line has. Names never change; the sentences may, together with this table.
"""

from __future__ import annotations

import re
from typing import Final

OTHER: Final = "other"

REASONS: Final = (
    # name, words of its line; the first that fits counts
    ("no-agent", r"no agent in discovery"),
    ("agent-silent", r"agent \S+ does not answer"),
    ("hsm-silent", r"agent \S+: its HSM does not answer"),
    ("outbox", r"agent \S+: (outbox: |\d+ unpublished events)"),
    ("no-manager", r"no cluster manager in discovery"),
    ("one-manager", r"only one cluster manager"),
    ("manager-silent", r"manager \S+ does not answer"),
    ("no-load-balancer", r"no load balancer in discovery"),
    ("one-load-balancer", r"only one load balancer"),
    ("load-balancer-silent", r"load balancer \S+ does not answer"),
    ("load-balancer-not-ready", r"load balancer \S+ is not ready"),
    ("certificate", r".*certificate.* (ends|ended) on "),
    ("versions", r"services run different versions"),
    ("range-unserved", r"realm \S+: nobody serves "),
    ("range-claimed-twice", r"realm \S+: two groups claim "),
    ("no-majority", r"realm \S+ group \S+: fewer than a majority"),
    ("members-down", r"realm \S+ group \S+: members down"),
    ("too-few-members", r"realm \S+ group \S+: serves with "),
    ("leaderless", r"realm \S+ group \S+: nobody leads"),
    ("transfer-pending", r"realm \S+ group \S+: transfer "),
    ("member-behind", r"realm \S+ group \S+: member \S+ is \d+ entries behind"),
    ("hsm-drained", r"HSM \S+ is drained"),
    ("rebalancing-paused", r"periodic rebalancing is paused"),
)
_PATTERNS: Final = tuple((name, re.compile(words)) for name, words in REASONS)


def reason_of(line: str) -> str:
    """Return the name of a verdict's line, `other` for one that has none."""
    return next((name for name, pattern in _PATTERNS if pattern.match(line)), OTHER)
