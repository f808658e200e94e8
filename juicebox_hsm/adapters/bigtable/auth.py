"""Authorise calls with a bearer token in their metadata, refreshed by one background task (storage.md 9.4).

Credentials are not attached to the channel: that costs a thread per call. The emulator gets no token.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol

import trio

from juicebox_hsm.adapters.bigtable.driver import Metadata
from juicebox_hsm.adapters.observation.logging import get_logger
from juicebox_hsm.adapters.observation.metrics import Metrics
from juicebox_hsm.adapters.observation.retry_metrics import Family
from juicebox_hsm.adapters.process.threads import in_thread
from juicebox_hsm.errors import LocalError, NotYet
from juicebox_hsm.ports.errors import StoreUnavailable

SCOPES: Final = (
    "https://www.googleapis.com/auth/bigtable.data",
    "https://www.googleapis.com/auth/bigtable.admin.table",
)
EARLY_S: Final = 300.0
"""How long before its expiry a token is replaced."""
RETRY_S: Final = 10.0
MIN_AGE_S: Final = 10.0
"""A token younger than this is not replaced because a call was refused: it is not the token's fault."""
REFRESH_TIMEOUT_S: Final = 60.0

FAMILY: Final = "gcp.get_token"
"""Name of its metrics. An error is one after which it is tried again; at the start it ends the process instead."""

_log = get_logger("bigtable.auth")


class Authorization(Protocol):
    """What calls are authorised with."""

    def metadata(self) -> Metadata:
        """Return the headers for the next call."""
        ...

    async def renew(self) -> bool:
        """Get a new token after a refusal; False if that cannot help."""
        ...

    async def keep_fresh(self) -> None:
        """Replace tokens before they expire, for ever."""
        ...


class NoAuthorization:
    """The emulator asks for nothing."""

    def metadata(self) -> Metadata:
        """Return no headers."""
        return ()

    async def renew(self) -> bool:
        """Tell that no token would help."""
        return False

    async def keep_fresh(self) -> None:
        """Do nothing."""


Run = Callable[[Callable[[], None]], Awaitable[None]]


async def _in_thread(work: Callable[[], None]) -> None:
    await in_thread(work, abandon_on_cancel=True)


class ApplicationDefault:
    """Google's application-default credentials. `run` carries out a blocking refresh elsewhere."""

    def __init__(self, credentials: Any, transport: Any, run: Run = _in_thread, metrics: Metrics | None = None) -> None:
        self._credentials = credentials
        self._transport = transport
        self._run = run
        self._metadata: Metadata = ()
        self._obtained = -MIN_AGE_S
        self._lock = trio.Lock()
        self._family = Family(Metrics() if metrics is None else metrics, FAMILY)

    @classmethod
    async def find(
        cls,
        scopes: Sequence[str] = SCOPES,
        service: str = "Bigtable",
        otherwise: str = ", or BIGTABLE_EMULATOR_HOST for the emulator",
        metrics: Metrics | None = None,
    ) -> ApplicationDefault:
        """Find credentials and get the first token.

        Raises `LocalError` when there are none or they are refused, `StoreUnavailable` when no token comes in time.
        """
        import google.auth
        import google.auth.exceptions
        import google.auth.transport.requests

        try:
            credentials, _ = await in_thread(lambda: google.auth.default(scopes=list(scopes)))
            found = cls(credentials, google.auth.transport.requests.Request(), metrics=metrics)
            await found.refresh()
        except google.auth.exceptions.GoogleAuthError as error:
            # a machine's metadata server, or a file that is mounted, may come up later than we do
            passing = google.auth.exceptions.TransportError, google.auth.exceptions.DefaultCredentialsError
            kind = NotYet if isinstance(error, passing) else LocalError
            raise kind(
                f"no credentials for {service}: {error}; set GOOGLE_APPLICATION_CREDENTIALS{otherwise}"
            ) from None
        except trio.TooSlowError:
            raise StoreUnavailable(
                f"no access token for {service} within {REFRESH_TIMEOUT_S:g} s: the token endpoint does not answer"
            ) from None
        return found

    def metadata(self) -> Metadata:
        """Return the current token's header."""
        return self._metadata

    async def refresh(self) -> None:
        """Get a new token. Raises the library's errors."""
        began_ns = time.perf_counter_ns()
        with trio.fail_after(REFRESH_TIMEOUT_S):
            await self._run(lambda: self._credentials.refresh(self._transport))
        self._metadata = (("authorization", f"Bearer {self._credentials.token}"),)
        self._obtained = trio.current_time()
        self._family.succeeded(time.perf_counter_ns() - began_ns)

    async def renew(self) -> bool:
        """Get a new token after a refusal, at most one per 10 s however many calls were refused."""
        async with self._lock:
            if trio.current_time() - self._obtained < MIN_AGE_S:
                return False
            return await self._try_refresh()

    async def _try_refresh(self) -> bool:
        try:
            await self.refresh()
        except Exception as error:  # noqa: BLE001 - the library's families are many; the old token serves meanwhile
            _log.warning("access token not renewed", error=str(error))
            self._family.retried()
            return False
        return True

    def _due_s(self) -> float:
        """Return in how many seconds the next refresh is due."""
        expiry: dt.datetime | None = self._credentials.expiry
        if expiry is None:
            return 3600.0 - EARLY_S
        aware = expiry if expiry.tzinfo is not None else expiry.replace(tzinfo=dt.UTC)
        left_s: float = (aware - dt.datetime.now(dt.UTC)).total_seconds()
        return max(RETRY_S, left_s - EARLY_S)

    async def keep_fresh(self) -> None:
        """Replace the token 5 minutes before it expires; the old one serves while that fails."""
        while True:
            await trio.sleep(self._due_s())
            async with self._lock:
                await self._try_refresh()
