"""What may never stand in a log: broken invariants, exceptions that nobody took, secrets."""

from __future__ import annotations

import base64
from typing import Final

from juicebox_hsm.errors import InvariantViolation
from roles.tools.simulate.judge_rules import BrokenRule, require

SECRET_CHARACTERS_MIN: Final = 6
"""Shorter secrets would be found by accident."""
LINES_TOGETHER: Final = 1_000
"""Lines that are searched at a time: one search in a long text is cheaper than many in short ones."""
_IMPOSSIBLE: Final = {
    InvariantViolation.__name__: "log.invariant",
    "Traceback (most recent call last)": "log.exception",
    "was never retrieved": "log.exception",
    "was never awaited": "log.exception",
}
"""What Python and Trio say of an error that nobody took, with the rule that it breaks."""


class LogJudge:
    """Reads every line that any process writes."""

    def __init__(self) -> None:
        self._secrets: dict[str, str] = {}
        self._lines: list[str] = []

    def secret(self, what: str, value: bytes | str) -> None:
        """Take in something that no line may show: as text, hex, or base64."""
        raw = value.encode() if isinstance(value, str) else value
        require("log.secret", len(raw) >= SECRET_CHARACTERS_MIN, f"{what} is too short to be looked for")
        forms = [raw.hex(), base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()]
        forms += [repr(raw)[2:-1], *([value] if isinstance(value, str) else [])]
        for form in forms:
            self._secrets.setdefault(form.rstrip("="), what)

    def line(self, text: str) -> None:
        """Read one line."""
        for words, rule in _IMPOSSIBLE.items():
            if words in text:
                raise BrokenRule(rule, text[-500:])
        self._lines.append(text)
        if len(self._lines) >= LINES_TOGETHER:
            self.search()

    def search(self) -> None:
        """Look for secrets in the lines that were not looked at yet."""
        lines, self._lines = self._lines, []
        together = "\n".join(lines)
        for form, what in self._secrets.items():
            if form in together or form.upper() in together:
                line = next(line for line in lines if form in line or form.upper() in line)
                raise BrokenRule("log.secret", f"{what} stands in: {line[:40]}...")
