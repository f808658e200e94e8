"""The flags of existing Bigtable realms say the same as --store, everywhere, and reach the channel."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from juicebox_hsm.adapters.bigtable.backend import parse_address
from roles.cli import cli
from roles.store_options import store_url_of
from roles.tools.config.parse import parse_role
from roles.tools.session import Connection


def test_project_and_instance_are_a_store() -> None:
    """Each has its default once the other, or an address, is given; nothing given is no store."""
    assert store_url_of(None, {}) is None
    assert store_url_of(None, {"bigtable_timeout": 5.0}) is None
    assert store_url_of(None, {"bigtable_project": "p"}) == "bigtable:p/instance"
    assert store_url_of(None, {"bigtable_instance": "i"}) == "bigtable:prj/i"
    assert store_url_of(None, {"bigtable_url": "https://bigtable.googleapis.com"}) == "bigtable:prj/instance"
    assert store_url_of("sqlite:x", {"bigtable_project": "p", "bigtable_timeout": 5.0}) == "sqlite:x"


def test_every_flag_reaches_the_channel() -> None:
    """What the flags say is what the store is opened with."""
    url = store_url_of(
        "bigtable:p/i?app-profile=one",
        {
            "bigtable_url": "http://localhost:9000", "bigtable_timeout": 7.0, "bigtable_connect_timeout": 0.5,
            "bigtable_http_keepalive_interval": 11.0, "bigtable_http_keepalive_timeout": 2.5,
            "bigtable_http_keepalive_while_idle": False,
        },
    )  # fmt: skip
    assert url is not None
    address = parse_address(url.removeprefix("bigtable:"), None)
    assert (address.emulator, address.profile, address.call_s) == ("localhost:9000", "one", 7.0)
    options = dict(address.channel.options(insecure=False))
    assert options["grpc.min_reconnect_backoff_ms"] == 500
    assert options["grpc.keepalive_time_ms"] == 11_000
    assert options["grpc.keepalive_timeout_ms"] == 2_500
    assert options["grpc.keepalive_permit_without_calls"] == 0


def test_defaults_are_those_of_the_document() -> None:
    """20 s to connect, a ping every 4 s for 3 s, idle or not; the emulator gets none."""
    address = parse_address("p/i", None)
    options = dict(address.channel.options(insecure=False))
    assert [options[f"grpc.{name}"] for name in ("keepalive_time_ms", "keepalive_timeout_ms")] == [4000, 3000]
    assert options["grpc.keepalive_permit_without_calls"] == 1
    assert not [name for name in dict(address.channel.options(insecure=True)) if "keepalive" in name]
    assert address.call_s is None


@pytest.mark.parametrize("address", ["localhost:9000", "https://elsewhere", "http://host", "http://[", "http://h:x"])
def test_addresses_that_are_none(address: str) -> None:
    """Only an emulator's address or Google's own is one."""
    with pytest.raises(ValueError, match="--bigtable-url"):
        store_url_of(None, {"bigtable_url": address})


def test_a_role_takes_the_variables_of_existing_realms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JB_GCP_PROJECT and JB_BIGTABLE name the store; our variable and a flag count before them."""
    monkeypatch.setenv("JB_GCP_PROJECT", "theirs")
    monkeypatch.setenv("JB_BIGTABLE", "table")
    assert parse_role("manager", []).common.store_url == "bigtable:theirs/table"
    monkeypatch.setenv("JUICEBOX_HSM_BIGTABLE_PROJECT", "ours")
    assert parse_role("manager", []).common.store_url == "bigtable:ours/table"
    assert parse_role("manager", ["--bigtable-project", "flag"]).common.store_url == "bigtable:flag/table"
    assert parse_role("manager", ["--store", "sqlite:x"]).common.store_url == "sqlite:x"
    (tmp_path / "m.toml").write_text('bigtable-timeout = "9s"\nbigtable-http-keepalive-while-idle = false\n')
    url = parse_role("manager", ["--config", str(tmp_path / "m.toml")]).common.store_url
    assert url == "bigtable:ours/table?timeout=9s&keepalive-while-idle=off"


def test_without_a_store_the_flag_is_named() -> None:
    """A role without any store says which flag is missing."""
    assert [line for line in parse_role("manager", []).problems if line.startswith("--store is required")]
    assert Connection().store_url is None


def test_operator_commands_take_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags of the group count before variables, whichever of the two names spells them."""
    monkeypatch.setenv("JB_GCP_PROJECT", "theirs")

    def said(*arguments: str) -> str:
        return CliRunner().invoke(cli, ["store", *arguments, "backup", f"{tmp_path}/copy"]).output

    assert "bigtable:theirs/instance" in said()
    assert (
        "bigtable:theirs/table"
        in CliRunner().invoke(cli, ["store", "backup", "x"], env={"JB_BIGTABLE": "table"}).output
    )
    assert "bigtable:flag/instance" in said("--bigtable-project", "flag")
    assert f"sqlite:{tmp_path}/x.db" in said("--store", f"sqlite:{tmp_path}/x.db")
