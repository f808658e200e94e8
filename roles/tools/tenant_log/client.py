"""`juicebox-hsm tenant-log tail` and `ack`: a tenant's auditor on the command line (operator-tools.md 6.4)."""

from __future__ import annotations

import http.client
import json
import ssl
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import click

from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.adapters.tls.wording import reason_of
from juicebox_hsm.host.addresses import parse_url
from juicebox_hsm.tenant_keys import event_user_id
from roles.tools.session import ToolFailure

DEFAULT_URL: Final = "http://localhost:8080"
CALL_S: Final = 40.0  # the service waits up to 20 s for an event
EMPTY_PAUSE_S: Final = 1.0
ACK_CHARS_SHOWN: Final = 10
PAGE_MAX: Final = 200  # the service gives no more
ANSWER_BYTES_MAX: Final = 4 << 20
COLUMNS: Final = ("id", "when", "event", "num_guesses", "guess_count", "user_id")

Event = dict[str, Any]
SINCE_PAGE: Final = 100
"""Own: a tenant log on Pub/Sub returns no larger pages, so that a page which is not full is the last."""


class LogClient:
    """One kept-alive connection to the service. Every call raises `ToolFailure` with the exit code that fits."""

    def __init__(self, url: str, token: str, ca_file: Path | None = None) -> None:
        try:
            parts = parse_url(url, ("http", "https"))
        except ValueError as error:
            raise ToolFailure(f"--url {error}", ExitCode.USAGE) from None
        self._url = url
        self._path = parts.path.rstrip("/")
        self._token = token
        self._connection: http.client.HTTPConnection
        if parts.scheme == "https":
            try:
                context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
            except (OSError, ssl.SSLError) as error:
                raise ToolFailure(f"--ca {ca_file}: {reason_of(error)}", ExitCode.USAGE) from None
            self._connection = http.client.HTTPSConnection(parts.host, parts.port, timeout=CALL_S, context=context)
        else:
            self._connection = http.client.HTTPConnection(parts.host, parts.port, timeout=CALL_S)

    def pull(self, acks: Sequence[str], page_size: int) -> list[Event]:
        """Acknowledge, then return the next events; may take 20 s."""
        answer = self._post("/tenant_log", {"acks": list(acks), "page_size": page_size})
        events = answer.get("events")
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            raise ToolFailure(f"{self._url} does not answer like a tenant log", ExitCode.UNREACHABLE)
        return events

    def acknowledge(self, acks: Sequence[str]) -> None:
        """Acknowledge events."""
        self._post("/tenant_log/ack", {"acks": list(acks)})

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        for attempt in (1, 2):
            try:
                self._connection.request("POST", self._path + path, json.dumps(body), headers)
                answer = self._connection.getresponse()
                raw = answer.read(ANSWER_BYTES_MAX)
                break
            except (http.client.RemoteDisconnected, BrokenPipeError) as error:
                self._connection.close()  # the service closed a kept-alive connection meanwhile
                if attempt == 2:
                    raise ToolFailure(f"{self._url}: {error}", ExitCode.UNREACHABLE) from None
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                raise ToolFailure(f"{self._url}: {error}", ExitCode.UNREACHABLE) from None
        try:
            document = json.loads(raw)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise ToolFailure(f"{self._url} does not answer like a tenant log ({answer.status})", ExitCode.UNREACHABLE)
        if answer.status >= 500:
            raise ToolFailure(f"{self._url}: {document.get('message', answer.status)}", ExitCode.UNREACHABLE)
        if answer.status != 200:
            raise ToolFailure(f"{self._url}: {document.get('message', answer.status)} ({answer.status})")
        return document


def _client_options(function: Any) -> Any:
    for option in (
        click.option("--ca", type=click.Path(path_type=Path, dir_okay=False), help="PEM certificates to trust."),
        click.option("--token-file", type=click.Path(path_type=Path, dir_okay=False), help="File with the token."),
        click.option("--token", help="Token of scope audit. Others on this machine can see it; prefer --token-file."),
        click.option("--url", default=DEFAULT_URL, show_default=True, help="The service's address."),
    ):  # fmt: skip
        function = option(function)
    return function


def _read_token(token: str | None, token_file: Path | None) -> str:
    if (token is None) == (token_file is None):
        raise ToolFailure("give --token or --token-file", ExitCode.USAGE)
    if token_file is None:
        return token or ""
    try:
        return token_file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ToolFailure(f"--token-file {token_file}: {error}", ExitCode.USAGE) from None


def _tenant_of(token: str) -> str:
    """Return the tenant a token names, unverified: the service verifies it."""
    import base64

    try:
        part = token.split(".")[1]
        issuer = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))["iss"]
    except (IndexError, KeyError, TypeError, ValueError):
        issuer = None
    if not isinstance(issuer, str):
        raise ToolFailure("--since-user: the token does not name its tenant", ExitCode.USAGE)
    return issuer


@click.command()
@_client_options
@click.option(
    "--page",
    type=click.IntRange(1, PAGE_MAX),
    help=f"Events per request.  [default: 1; {SINCE_PAGE} with --since-user]",
)
@click.option("--ack", "with_ack", is_flag=True, help="Acknowledge what was printed; it does not come again.")
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C. Without --ack the same events come again every 10 s.")
@click.option(
    "--since-user", metavar="USER", help="Only this user's events, oldest first; others are neither shown nor acked."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line, as the service sends it.")
def tail(
    url: str,
    token: str | None,
    token_file: Path | None,
    ca: Path | None,
    page: int | None,
    since_user: str | None,
    *,
    with_ack: bool,
    watch: bool,
    as_json: bool,
) -> None:
    """Print a tenant's events: id, time, event, guesses allowed, guess number, hashed user, start of the ack id.

    One page, or with --since-user all pages there are at the moment; with --watch for ever.
    """
    token = _read_token(token, token_file)
    page = page or (1 if since_user is None else SINCE_PAGE)
    wanted = None if since_user is None else event_user_id(_tenant_of(token), since_user)
    acks: list[str] = []
    with closing(LogClient(url, token, ca)) as client:
        try:
            for events in _pages(client, acks, page, watch=watch, all_pages=wanted is not None):
                shown = [event for event in events if wanted in (None, event.get("user_id"))]
                for event in shown:
                    _print_event(event, as_json=as_json)
                sys.stdout.flush()
                if with_ack:
                    acks += [str(event.get("ack")) for event in shown]
        except KeyboardInterrupt:
            pass  # how --watch ends
        finally:
            if acks:
                client.close()  # an interrupted call left the connection in the middle of an answer
                client.acknowledge(acks)


def _pages(client: LogClient, acks: list[str], size: int, *, watch: bool, all_pages: bool) -> Iterator[list[Event]]:
    """Yield pages. `acks` is what the consumer wants acknowledged: taken with the next request.

    All pages end with a short one, or with one that only repeats: what is not acknowledged comes again every 10 s.
    """
    known: set[object] = set()
    while True:
        events = client.pull(acks, size)
        acks.clear()
        if watch:
            yield events
            if not events:
                time.sleep(EMPTY_PAUSE_S)
            continue
        fresh = [event for event in events if event.get("id") not in known]
        known.update(event.get("id") for event in fresh)
        yield fresh
        if not all_pages or not fresh or len(events) < size:
            return


def _print_event(event: Event, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(event))
        return
    cells = ["" if event.get(column) is None else str(event[column]) for column in COLUMNS]
    click.echo(", ".join([*cells, str(event.get("ack", ""))[:ACK_CHARS_SHOWN] + "..."]))


@click.command()
@_client_options
@click.argument("acks", nargs=-1, required=True, metavar="ACK...")
def ack(url: str, token: str | None, token_file: Path | None, ca: Path | None, acks: tuple[str, ...]) -> None:
    """Acknowledge events: they do not come again. ACK is the `ack` of an event (`tail --json` shows it whole)."""
    with closing(LogClient(url, _read_token(token, token_file), ca)) as client:
        client.acknowledge(acks)
    click.echo(f"acknowledged {len(acks)} events")
