"""What the managers' rules decide, in words for people: logs, the command line and the status page."""

from __future__ import annotations

from collections.abc import Sequence

from juicebox_hsm.host.cluster.balance import HsmLoad, Move
from juicebox_hsm.host.cluster.view import name_of


def describe_loads(hsms: Sequence[HsmLoad], move: Move | None) -> str:
    """Return the workloads as text, one HSM a line, marking what moves and where."""
    lines = []
    for hsm in sorted(hsms, key=lambda load: (load.work, load.hsm)):
        mark = " [destination]" if move is not None and move.destination == hsm.hsm else ""
        lines.append(f"{hsm.hsm.hex()} work {hsm.work}{' drained' if hsm.drained else ''}{mark}")
        for group in hsm.groups:
            moving = " [moving]" if move is not None and (move.key, move.source) == (group.key, hsm.hsm) else ""
            lines.append(f"  {name_of(group.key)} work {group.work}{' leader' if group.leads else ''}{moving}")
    return "\n".join(lines)
