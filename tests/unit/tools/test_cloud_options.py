"""The flags of Google's other services: what they ask for and what cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from juicebox_hsm.adapters.google.calls import parse_url
from juicebox_hsm.errors import LocalError
from roles.cloud_options import CloudOptions, pubsub_problem, secrets_problem, take_cloud


def options(project: str | None = None, url: str | None = None) -> CloudOptions:
    """Return flags with their defaults."""
    return take_cloud("pubsub", {"pubsub_project": project, "pubsub_url": url})


def test_the_project_is_the_stores_unless_named() -> None:
    """A flag names the project; else the store on Bigtable does; another store cannot."""
    url = "http://127.0.0.1:8085"
    assert options("p", url).access("bigtable:q/i", "h", "pubsub").project == "p"
    found = options(None, url).access("bigtable:q/i?emulator=x:1", "h", "pubsub")
    assert (found.project, found.emulator) == ("q", "127.0.0.1:8085")
    with pytest.raises(LocalError, match="--pubsub-project is required"):
        options(None, url).access("sqlite:x.db", "h", "pubsub")
    with pytest.raises(LocalError, match="not the name of a project"):
        options("a/b").access("sqlite:x.db", "h", "pubsub")


def test_times_and_pings_reach_the_channel() -> None:
    """The connection flags are the channel's settings."""
    values = {"pubsub_project": "p", "pubsub_url": None, "pubsub_timeout": 1.0, "pubsub_connect_timeout": 2.0}
    values |= {"pubsub_http_keepalive_interval": 5.0, "pubsub_http_keepalive_timeout": 6.0}
    found = take_cloud("pubsub", {**values, "pubsub_http_keepalive_while_idle": False}).access("", "h", "pubsub")
    assert found.call_s == 1
    assert found.channel.connect_timeout_s == 2
    assert (found.channel.keepalive_interval_s, found.channel.keepalive_timeout_s) == (5, 6)
    assert not found.channel.keepalive_while_idle


@pytest.mark.parametrize("url", ["ftp://x:1", "http://x", "https://elsewhere", "http://x:y", "x:1", ""])
def test_urls_that_are_no_emulators(url: str) -> None:
    """Only http://HOST:PORT and the service itself are taken; the flag is named."""
    with pytest.raises(LocalError, match="--pubsub-url"):
        parse_url(url, "pubsub.googleapis.com", "--pubsub-url")


def test_the_service_by_its_own_name() -> None:
    """The service's address needs TLS and credentials, an emulator's neither."""
    assert parse_url("https://pubsub.googleapis.com", "pubsub.googleapis.com", "--pubsub-url") == ""
    assert parse_url("http://[::1]:8085", "pubsub.googleapis.com", "--pubsub-url") == "[::1]:8085"


def test_config_check_of_pubsub() -> None:
    """`config check` names what an agent would refuse at its start, and nothing when the bus is not asked for."""
    assert pubsub_problem({}, "sqlite:x.db") == ""
    assert pubsub_problem({"pubsub_project": "p"}, "sqlite:x.db") == ""
    assert "--pubsub-url" in pubsub_problem({"pubsub_project": "p", "pubsub_url": "nonsense"}, "sqlite:x.db")
    assert "--pubsub-project" in pubsub_problem({"pubsub_url": "http://x:1"}, "sqlite:x.db")


def test_where_secrets_are() -> None:
    """A file, or a project that a flag or the store names; not both, and not neither."""
    file = Path("secrets.json")
    assert secrets_problem(file, None, None, "bigtable:p/i", raw=False) == ""
    assert secrets_problem(None, None, None, "bigtable:p/i", raw=True) == ""
    assert secrets_problem(None, "p", None, "sqlite:x.db", raw=False) == ""
    assert "required" in secrets_problem(None, None, None, "sqlite:x.db", raw=False)
    assert "required" in secrets_problem(None, None, "http://x:1", "sqlite:x.db", raw=False)
    assert "exclude" in secrets_problem(file, "p", None, "sqlite:x.db", raw=False)
    assert "--raw-secrets" in secrets_problem(file, None, None, "sqlite:x.db", raw=True)
