"""Serve the status page on the manager's HTTP port: `/` for people, `/status.json` for programs (manager.md 2)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

import trio
from quart import Response
from quart_trio import QuartTrio

from juicebox_hsm import __version__
from juicebox_hsm.errors import RealmError
from juicebox_hsm.host.cluster.verdict import Evidence, Verdict, judge
from roles.manager.context import ManagerContext
from roles.manager.page import Own, render, render_trouble
from roles.manager.page_style import STYLE_HASH
from roles.survey.document import verdict_json
from roles.survey.evidence import gather

LOOK_S: Final = 3.0  # own: longest wait for a service; a page should not take longer
KEEP_S: Final = 1.0  # own: many watchers cost the cluster one look a second
HEADERS: Final = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class StatusPage:
    """Looks at the cluster when somebody asks, at most once a second."""

    def __init__(self, context: ManagerContext, url: str) -> None:
        self._context = context
        self._url = url
        self._turn = trio.Lock()
        self._seen: tuple[float, Evidence] | None = None

    def hook(self, app: QuartTrio) -> None:
        """Add the pages; `/` replaces the list of paths that other roles show."""
        app.view_functions["index"] = self._page
        app.add_url_rule("/status.json", view_func=self._json)

    async def evidence(self) -> Evidence:
        """Return what all services say, at most a second old. Raises `StoreUnavailable`."""
        async with self._turn:
            if self._seen is None or trio.current_time() - self._seen[0] >= KEEP_S:
                context = self._context
                found = await gather(context.store, context.rpc, context.now_ms(), timeout_s=LOOK_S)
                self._seen = (trio.current_time(), found)
            return self._seen[1]

    def own(self) -> Own:
        """Return what this manager knows of itself."""
        state = self._context.state
        return Own(
            name=self._context.name,
            url=self._url,
            version=__version__,
            leases=sorted(state.held_leases),
            actions=sorted(state.actions.values()),
            transfers=[progress.to_wire(self._context.now_ms()) for progress in state.transfers],
            loops=[run for _, run in sorted(state.loops.items())],
        )

    async def _page(self) -> Response:
        return await self._answer("text/html; charset=utf-8", self._html, lambda text: render_trouble(text, self.own()))

    async def _json(self) -> Response:
        return await self._answer(
            "application/json",
            lambda evidence, verdict: json.dumps(verdict_json(evidence, verdict)) + "\n",
            lambda text: json.dumps({"ok": False, "problems": [f"the store cannot be read: {text}"]}) + "\n",
        )

    def _html(self, evidence: Evidence, verdict: Verdict) -> str:
        return render(evidence, verdict, self.own())

    async def _answer(
        self, content_type: str, show: Callable[[Evidence, Verdict], str], trouble: Callable[[str], str]
    ) -> Response:
        """Answer 200 whatever the verdict: the page was made. 503 only when the store could not be read."""
        try:
            evidence = await self.evidence()
        except RealmError as error:
            return Response(trouble(str(error)), status=503, headers=HEADERS, content_type=content_type)
        return Response(show(evidence, judge(evidence)), headers=HEADERS, content_type=content_type)
