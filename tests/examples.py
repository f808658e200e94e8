"""How many examples property tests try, and where those that failed are kept.

Three profiles, chosen by HYPOTHESIS_PROFILE: `default`; `long` for `scripts/fuzz`, which tells by FUZZ_EXAMPLES how
long; both replay what was ever found. A test that needs more or fewer examples than others says so with `examples`, in
numbers of the default profile: a fixed `max_examples` would hold under every profile.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase, MultiplexedDatabase, ReadOnlyDatabase

ROOT: Final = Path(__file__).parent.parent
FOUND_VARIABLE: Final = "FUZZ_FOUND"
EXAMPLES_VARIABLE: Final = "FUZZ_EXAMPLES"
DEFAULT_EXAMPLES: Final = 60
LONG_EXAMPLES: Final = 5000

FOUND: Final = DirectoryBasedExampleDatabase(
    Path(os.environ.get(FOUND_VARIABLE) or ROOT / "tests" / "data" / "found") / "examples"
)
LOCAL: Final = DirectoryBasedExampleDatabase(ROOT / ".hypothesis" / "examples")

settings.register_profile(
    "default",
    max_examples=DEFAULT_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    database=MultiplexedDatabase(LOCAL, ReadOnlyDatabase(FOUND)),
)
settings.register_profile(
    "long",
    max_examples=int(os.environ.get(EXAMPLES_VARIABLE) or LONG_EXAMPLES),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=FOUND,
)
PROFILE: Final = os.environ.get("HYPOTHESIS_PROFILE", "default")
settings.load_profile(PROFILE)


def examples(count: int, *, stateful_step_count: int = 50) -> settings:
    """Return settings for `count` examples where others have 60, and in proportion under another profile."""
    usual = settings.get_profile(PROFILE).max_examples
    return settings(max_examples=max(1, count * usual // DEFAULT_EXAMPLES), stateful_step_count=stateful_step_count)
