"""What is damaged in a store is told once in a while, shown for half a minute, and never fills memory or the log."""

from __future__ import annotations

from juicebox_hsm.host.damage import KEPT_MAX, SHOWN_S, Damages
from juicebox_hsm.wire.rpc import DamageKind, StoreDamage


def _row(at: int) -> StoreDamage:
    return StoreDamage(DamageKind.LOG, f"of entry {at}", bytes(16))


def test_told_once_in_a_while() -> None:
    """The same place, however often it is met, is told every half minute; another one at once."""
    damages = Damages()
    assert damages.met(_row(1), 0.0)
    assert not damages.met(_row(1), SHOWN_S - 1)
    assert damages.met(_row(2), SHOWN_S - 1)
    assert damages.met(_row(1), SHOWN_S)


def test_shown_until_it_is_long_not_met() -> None:
    """What goes on being met goes on being shown; what was mended disappears."""
    damages = Damages()
    damages.met(_row(1), 0.0)
    damages.met(_row(2), 0.0)
    damages.met(_row(1), SHOWN_S - 1)
    assert damages.lately(SHOWN_S - 1) == (_row(1), _row(2))
    assert damages.lately(SHOWN_S) == (_row(1),)
    assert damages.lately(2 * SHOWN_S) == ()


def test_bounded() -> None:
    """A destroyed store is a few places, not millions."""
    damages = Damages()
    told = [damages.met(_row(at), 0.0) for at in range(1000)]
    assert sum(told) == len(damages.lately(0.0)) == KEPT_MAX
