"""What a chaos run found: counts, the longest times without an answer, exits and violations. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Report:
    """The result of one run. `gaps` are (start after the load's begin, length) in seconds, longest first."""

    seed: int
    duration_s: float
    shape: dict[str, int]
    users: int
    plan: list[str]
    events: list[str]
    counts: dict[str, int]
    calls: int
    gaps: list[tuple[float, float]]
    recovered_s: float
    barriers: int
    skipped: int
    exits: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the file of --json."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the summary a person reads."""
        lost = sum(number for name, number in self.counts.items() if name.endswith(": lost"))
        lines = [f"seed {self.seed}: {self.calls} calls of {self.users} users, {lost} of them lost"]
        lines += [f"  {name:<26}{number:>7}" for name, number in sorted(self.counts.items())]
        if self.gaps:
            gaps = ", ".join(f"{length:.2f} s at {start:.1f} s" for start, length in self.gaps)
            lines.append(f"  longest without an answer: {gaps}")
        lines.append(f"  after the last restart of everything: serving in {self.recovered_s:.2f} s")
        lines.append(f"  {self.barriers} full restarts, {self.skipped} actions skipped, {len(self.exits)} exits")
        lines += [f"  exit: {text.splitlines()[0]}" for text in self.exits]
        if self.violations:
            lines.append(f"  {len(self.violations)} VIOLATIONS")
        else:
            lines.append("  no violation: every answer is explained with each guess counted once")
        return lines
