"""Agents by the name that is shown."""

from __future__ import annotations

import msgspec
import pytest

from juicebox_hsm.host.cluster.view import AgentView, ClusterView, build_view
from roles.tools.agents import named_agent
from roles.tools.session import ToolFailure
from tests.host.cluster.agents import FakeAgent, hsm


def _view(*names: str) -> ClusterView:
    agents = [FakeAgent(f"tls://10.0.0.{number}:1", hsm(number)) for number in range(1, len(names) + 1)]
    views = []
    for agent, name in zip(agents, names, strict=True):
        views.append(AgentView(agent.url, msgspec.structs.replace(agent.status(), name=name)))
    return build_view([*views, AgentView("tls://10.0.0.9:1", None, "down")])


def test_names_and_addresses() -> None:
    """A name or an address means its agent, also one that does not answer; a name of nobody means none."""
    view = _view("agent1", "agent2")
    assert named_agent(view, "agent2") == "tls://10.0.0.2:1"
    assert named_agent(view, "10.0.0.1:1") == "tls://10.0.0.1:1"
    assert named_agent(view, "10.0.0.9:1") == "tls://10.0.0.9:1"
    assert named_agent(view, "agent") is None


def test_a_name_of_two_means_neither() -> None:
    """Two agents with one name are told apart by their URLs."""
    with pytest.raises(ToolFailure, match=r"several agents .* tls://10.0.0.1:1, tls://10.0.0.2:1"):
        named_agent(_view("same", "same"), "same")
