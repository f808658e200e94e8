"""Reasons as gauges: one for each code, 1 while the reason holds and 0 after, with its severity as a label."""

from __future__ import annotations

from collections.abc import Iterable

from juicebox_hsm.host.codes import Code
from juicebox_hsm.ports.observation import Meter


class ReasonGauges:
    """The family `name`. A code that never held has no series: there are many, and most never hold."""

    def __init__(self, meter: Meter, name: str) -> None:
        self._meter = meter
        self._name = name
        self._shown: set[Code] = set()

    def show(self, codes: Iterable[Code]) -> None:
        """Adopt the codes that hold now, however many reasons have the same one."""
        holding = set(codes)
        self._shown |= holding
        for code in self._shown:
            self._meter.gauge(self._name, code in holding, code=code.word, severity=code.severity.value)
