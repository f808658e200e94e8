"""Decision records can be found: each has a number of its own, and ARCHITECTURE.md leads to it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORDS = sorted((ROOT / "docs" / "adr").glob("*.md"))


def test_a_number_is_given_once() -> None:
    """Two branches that took the same number would make every mention of it ambiguous."""
    counted = Counter(path.name[:4] for path in RECORDS)
    assert [number for number, count in counted.items() if count > 1] == []


def test_the_title_carries_the_number() -> None:
    """A record says its own number, which is that of its file."""
    for path in RECORDS:
        assert path.read_text().startswith(f"# {path.name[:4]}: "), path


def test_the_architecture_leads_to_every_record() -> None:
    """A record that nothing mentions is not read; a mention of none leads nowhere."""
    told = re.search(r"The records in `docs/adr/` .*?\n\n", (ROOT / "ARCHITECTURE.md").read_text(), re.DOTALL)
    assert told is not None
    assert set(re.findall(r"\b(\d{4})\b", told[0])) == {path.name[:4] for path in RECORDS}
