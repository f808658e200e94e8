"""Which agent an operator means: by URL, by address, or by the name that `cluster agents` and the status page show."""

from __future__ import annotations

from collections.abc import Sequence

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.host.cluster.view import ClusterView
from roles.survey.overview import read_overview
from roles.tools.session import Session, ToolFailure


def is_url(text: str) -> bool:
    """Tell whether a text names an agent by its URL, so that nobody has to be asked."""
    return "://" in text


def named_agent(view: ClusterView, text: str) -> str | None:
    """Return the URL of the agent with this name or address, None if there is none. Raises `ToolFailure`."""
    found = sorted(
        agent.url
        for agent in view.agents
        if (agent.status is not None and agent.status.name == text) or agent.url.partition("://")[2] == text
    )
    if len(found) > 1:
        raise ToolFailure(f"several agents are called {text!r}: {', '.join(found)}; give the URL", ExitCode.ID)
    return found[0] if found else None


async def agent_urls(session: Session, texts: Sequence[str]) -> list[str]:
    """Return the URLs of the agents that are meant. Raises `ToolFailure`, exit 3, for a name that nobody has."""
    if all(map(is_url, texts)):
        return list(texts)
    view = await read_overview(session.store, session.rpc)
    return [_url_of(view, text) for text in texts]


def _url_of(view: ClusterView, text: str) -> str:
    url = text if is_url(text) else named_agent(view, text)
    if url is None:
        names = ", ".join(sorted(agent.status.name for agent in view.agents if agent.status is not None))
        known = f"those that answer are {names}" if names else "none answers"
        raise ToolFailure(f"no agent is called {text!r}; {known}", ExitCode.ID)
    return url
