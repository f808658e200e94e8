"""The status page in a real browser, at the width of a desk and of a telephone, without scripts.

With JUICEBOX_PICTURES=DIR the pictures are kept there for people to look at.
"""

from __future__ import annotations

import html
import http.server
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from juicebox_hsm.host.clocks import DAY_MS
from juicebox_hsm.host.cluster.verdict import BalancerReport, Evidence, ManagerReport, judge
from juicebox_hsm.host.cluster.view import AgentView, build_view
from juicebox_hsm.host.codes import Code
from juicebox_hsm.ids import OwnedRange
from juicebox_hsm.wire import rpc
from roles.manager.page import REFRESH_S, Own, render, render_trouble
from roles.manager.page_style import STYLE
from roles.manager.status_page import HEADERS
from tests.ci import in_ci
from tests.host.cluster.agents import FakeAgent, FakeGroup, group, hsm, record
from tests.patience import HANGS_S, PROGRAM_S

pytestmark = [pytest.mark.processes, pytest.mark.chromium]
NOW_MS = 1_795_512_600_000  # 24 November 2026, 9:30 UTC
WIDTHS = (1280, 640, 400)
HOW_TO_GET = "Chromium is missing (the status page is tested in it): apt-get install chromium, or set CHROMIUM=PROGRAM"
LONG = "tls://realm-agent-number-five.europe-west4-b.c.some-project-with-a-long-name.internal.example.org:18095"


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser; without it these tests are skipped, and fail where CI=true."""
    names = (
        [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else ["chromium", "chromium-browser", "google-chrome"]
    )
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        if in_ci():
            pytest.fail(HOW_TO_GET, pytrace=False)
        pytest.skip(HOW_TO_GET)
    return found


def _agents(groups: int) -> list[FakeAgent]:
    names = [*(f"tls://10.1.2.{number}:18091" for number in range(1, 5)), LONG]
    members: list[bytes] = [hsm(number) for number in range(1, 6)]
    agents = []
    for number, name in enumerate(names, start=1):
        inside = {
            group(one): FakeGroup(members, captured=1_234_567, requests_per_s=41.5) for one in range(1, groups + 1)
        }
        agents.append(FakeAgent(name, hsm(number), groups=inside))
    return agents


def _evidence(agents: list[FakeAgent], **changes: Any) -> Evidence:
    views = [
        AgentView(agent.url, None, "connection refused by the peer, no route to host, gave up after 5 s")
        if agent.down
        else AgentView(agent.url, agent.status())
        for agent in agents
    ]
    values: dict[str, Any] = {
        "managers": tuple(ManagerReport(f"tls://10.1.3.{n}:18071", version="build") for n in (1, 2)),
        "balancers": tuple(
            BalancerReport(f"https://10.1.4.{n}:443", version="build", certificate_end_ms=NOW_MS + 61 * DAY_MS)
            for n in (1, 2)
        ),
    }
    return Evidence(view=build_view(views), now_ms=NOW_MS, **{**values, **changes})


def _thirds() -> list[OwnedRange]:
    ends = ["55", "aa", "ff"]
    starts = ["00", "56", "ab"]
    return [OwnedRange(record(start), record(end, 0xFF)) for start, end in zip(starts, ends, strict=True)]


def healthy_page() -> str:
    """The recommended realm with nothing to complain about."""
    agents = _agents(3)
    for number, owned in enumerate(_thirds()):
        agents[number].lead(group(number + 1), owned)
    evidence = _evidence(agents)
    loops = [rpc.LoopRun(name, NOW_MS - 1000, 12) for name in ("leaders", "rebalance")]
    return render(evidence, judge(evidence), Own("manager1", "tls://10.1.3.1:18071", "build", loops=loops))


def troubled_page() -> str:
    """The same realm with everything wrong that can be: a gap, lag, a transfer, a lost agent, balancers in trouble."""
    agents = _agents(4)
    thirds = _thirds()
    agents[0].lead(group(1), thirds[0])
    agents[1].lead(group(2), replace(thirds[1], end=record("9f", 0xFF)))
    bounds = rpc.Range(record("40"), record("55", 0xFF))
    agents[0].groups[group(1)].transferring = rpc.TransferringInfo(
        rpc.Direction.OUT, group(2), bounds, 1_234_560, b"h" * 32
    )
    agents[1].groups[group(1)].captured = 1_200_000
    agents[1].groups[group(2)].stalled_s = 12.0
    agents[3].down = True
    evidence = _evidence(
        agents,
        drained=frozenset({hsm(3)}),
        managers=(ManagerReport("tls://10.1.3.1:18071", version="build"), ManagerReport(LONG, error="gone " * 30)),
        balancers=(
            BalancerReport(
                "https://10.1.4.1:443",
                version="older",
                reasons=((Code.SECRETS_STALE, "secrets are 3000 s old"), (Code.OTHER, "no route " * 20)),
            ),
            BalancerReport(LONG.replace("tls", "https"), error="certificate verify failed: unable to get local issuer"),
            BalancerReport("https://10.1.4.3:443", version="build", certificate_end_ms=NOW_MS + 3 * DAY_MS),
        ),
    )
    loops = [rpc.LoopRun("transfers", NOW_MS, 5012, "timed out")]
    own = Own("manager1", "tls://10.1.3.1:18071", "build", ["ownership-" + "52" * 16], ["transfer " + "47" * 40], loops)
    return render(evidence, judge(evidence), own)


def storeless_page() -> str:
    """What is shown while the store cannot be read."""
    return render_trouble("sqlite:" + "/a-long-directory" * 12 + ": disk I/O error", Own("m", "u", "1"))


PAGES: dict[str, Callable[[], str]] = {"healthy": healthy_page, "troubled": troubled_page, "storeless": storeless_page}


def _browse(chromium: str, profile: Path, *arguments: str, width: int = 1280, height: int = 3000) -> str:
    """Run the browser once and return what it prints."""
    run = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}",
            f"--window-size={width},{height}", *arguments,
        ],
        capture_output=True, text=True, timeout=PROGRAM_S, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_wider_than_the_screen(chromium: str, tmp_path: Path, name: str, width: int) -> None:
    """At both widths the page and every piece of text fit; measured where no script of the page could run."""
    # A page of ours holds the status page in a frame without scripts and measures it from outside.
    measure = (
        "<!DOCTYPE html><body style='margin:0'><pre id=out></pre>"
        f"<iframe id=page sandbox=allow-same-origin style='border:0;width:{width}px;height:2000px' "
        f'srcdoc="{html.escape(PAGES[name]())}"></iframe><script>page.onload = () => {{'
        "const inside = page.contentDocument, wide = [];"
        "for (const piece of inside.querySelectorAll('body *')) {"
        "  const box = piece.getBoundingClientRect();"
        f"  if (box.right > {width} + 0.5 || box.left < -0.5) wide.push(piece.outerHTML.slice(0, 80));"
        "}"
        "const place = inside.querySelector('.bar')?.getBoundingClientRect();"
        "const parts = [...inside.querySelectorAll('.bar rect')].map((part) => {"
        "  const box = part.getBoundingClientRect();"
        "  return [box.left - place.left, box.width, box.height, place.width, getComputedStyle(part).fill];"
        "});"
        "out.textContent = JSON.stringify({scroll: inside.documentElement.scrollWidth, wide, parts});"
        "};</script>"
    )
    (tmp_path / "measure.html").write_text(measure)
    dom = _browse(chromium, tmp_path / "profile", "--dump-dom", f"file://{tmp_path}/measure.html")
    found = re.search(r"<pre id=\"out\">(.*?)</pre>", dom, re.DOTALL)
    assert found is not None
    seen = json.loads(html.unescape(found[1]))
    assert seen["scroll"] <= width
    assert seen["wide"] == []
    if name == "healthy":
        thirds = [0.0, 0x56 / 256, 0xAB / 256, 1.0]
        assert len(seen["parts"]) == 3
        for number, (left, wide, high, whole, _) in enumerate(seen["parts"]):
            assert left / whole == pytest.approx(thirds[number], abs=0.01)
            assert wide / whole == pytest.approx(thirds[number + 1] - thirds[number], abs=0.01)
            assert high > 20
        assert len({part[4] for part in seen["parts"]}) == 3, "each group has a colour of its own"
    elif name == "troubled":
        assert len(seen["parts"]) == 2, "what nobody owns is left out"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_pictures(chromium: str, tmp_path: Path, name: str, width: int) -> None:
    """The page can be drawn at both widths, and what is drawn is not empty."""
    (tmp_path / "page.html").write_text(PAGES[name]())
    kept = os.environ.get("JUICEBOX_PICTURES")
    picture = Path(kept or tmp_path) / f"status-{name}-{width}.png"
    _browse(chromium, tmp_path / "profile", f"--screenshot={picture}", f"file://{tmp_path}/page.html", width=width)
    data = picture.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (width, 3000)
    assert len(data) > 10_000


@contextmanager
def _served(page: str) -> Iterator[tuple[str, list[str]]]:
    """Serve the page with the headers of the manager; yield its address and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            for header, value in HEADERS.items():
                self.send_header(header, value)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_style_applies_under_the_policy(chromium: str, tmp_path: Path) -> None:
    """As served, with its headers, exactly the page's own style sheet applies."""
    pictures: list[bytes] = []
    for page in (healthy_page(), healthy_page().replace(STYLE, STYLE + " ")):
        picture = tmp_path / f"{len(pictures)}.png"
        with _served(page) as (address, asked):
            _browse(chromium, tmp_path / "profile", f"--screenshot={picture}", address)
        assert set(asked) <= {"/", "/favicon.ico"}
        pictures.append(picture.read_bytes())
    assert pictures[0] != pictures[1]


def test_refreshes_itself(chromium: str, tmp_path: Path) -> None:
    """A page that is left open is loaded again and again, without a script."""
    page = healthy_page()
    told = f'http-equiv="refresh" content="{REFRESH_S}"'
    assert told in page
    with _served(page.replace(told, told.replace(str(REFRESH_S), "1"))) as (address, asked):
        browser = subprocess.Popen(
            [
                chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                "--remote-debugging-port=0", f"--user-data-dir={tmp_path}/profile", address,
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + HANGS_S
            while asked.count("/") < 3 and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
    assert asked.count("/") >= 3
