"""The simulator's judge of HSM calls agrees with the ledger on schedules of a malicious host."""

from __future__ import annotations

import pytest

from juicebox_hsm.hsm import messages as m
from juicebox_hsm.hsm.core import Hsm
from roles.tools.simulate.judge_commits import Commits
from roles.tools.simulate.judge_ledger import Ledger as JudgesLedger
from roles.tools.simulate.judge_ledger import state_of
from tests.fakes.hsm import Nodes
from tests.property.hsm import adversary, ledger, schedules


class BothLedgers(ledger.Ledger):
    """The ledger, and the judge's beside it."""

    def __init__(self, nodes: Nodes, record_key: bytes) -> None:
        super().__init__(nodes, record_key)
        self.judge = JudgesLedger(record_key)
        self.commits = Commits(self.judge)

    def wrote(self, number: int, content: bytes) -> None:
        """Tell both."""
        self.judge.wrote(str(number), content)
        super().wrote(number, content)

    def crashed(self, number: int) -> None:
        """Tell both."""
        self.judge.ended(str(number))
        super().crashed(number)

    def observe(self, number: int, hsm: Hsm, request: m.Request, response: m.Response) -> None:
        """Tell both."""
        name = str(number)
        self.judge.observe(name, hsm, request, response)
        if isinstance(request, m.Commit) and isinstance(response, m.CommitOk):
            self.commits.observe(name, hsm, request, response)
        self.judge.follow(name, hsm, request, list(state_of(hsm).groups.values()))
        super().observe(number, hsm, request, response)


@pytest.mark.parametrize("seed", range(24))
def test_no_false_alarm_on_a_malicious_host(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a malicious host does to sound HSMs, the judge sees no rule broken and the ledger's history."""
    monkeypatch.setattr(adversary, "Ledger", BothLedgers)
    world = schedules.run(seed, 250)
    both = world.ledger
    assert isinstance(both, BothLedgers)
    assert both.commits.chains == both.committed
