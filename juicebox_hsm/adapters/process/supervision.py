"""How a process of ours starts, reloads, stops and fails, as seen from its supervisor (operator-tools.md 10)."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final, TextIO, TypeVar

import trio

from juicebox_hsm.adapters.observation.line_writer import write_in_time
from juicebox_hsm.adapters.observation.logging import flush, get_logger, louder, quieter
from juicebox_hsm.adapters.process.exit_codes import ExitCode
from juicebox_hsm.errors import InvariantViolation, LocalError, NotYet, RealmError
from juicebox_hsm.ports.errors import HsmGone, StoreUnavailable

STOP_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})
FRAMES_MAX: Final = 50  # own: enough of a traceback to find the place

STDERR: Final = 2
LAST_WORDS_S: Final = 2.0
"""Longest wait for somebody to read why the process ends (own); its exit code tells the essence."""

T = TypeVar("T")

_log = get_logger("supervision")


NOT_RESTARTED: Final = frozenset({ExitCode.USAGE, ExitCode.CONFIG})
"""After these a person has to change something first; after all others but OK, starting again may help."""


def notify(*states: str) -> bool:
    """Tell systemd `states` such as `READY=1`; False, and nothing done, when no NOTIFY_SOCKET is set or it is gone."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address or address[0] not in "/@":
        return False
    if address[0] == "@":
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as endpoint:
            endpoint.setblocking(False)
            endpoint.sendto("\n".join(states).encode(), address)
    except OSError as error:
        _log.debug("cannot notify the supervisor", error=error.strerror)
        return False
    return True


def notify_reloading() -> None:
    """Tell systemd that a reload begins; `READY=1` ends it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_interval_s() -> float | None:
    """Return how often to send `WATCHDOG=1` (half of what systemd allows), None when it does not ask this process."""
    pid = os.environ.get("WATCHDOG_PID", "")
    interval = os.environ.get("WATCHDOG_USEC", "")
    if not interval.isdigit() or int(interval) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(interval) / 2e6


Reloads = Mapping[str, Callable[[], Awaitable[object]]]
"""What a service reloads on SIGHUP, by its name in the log. Each part keeps what it has when it raises `RealmError`."""


async def reload_all(parts: Reloads) -> None:
    """Reload each part, whatever becomes of the others, and say in one line which was reloaded and which was kept."""
    reloaded: list[str] = []
    kept: dict[str, str] = {}
    for name, reload in parts.items():
        try:
            await reload()
            reloaded.append(name)
        except RealmError as error:
            kept[name] = str(error)
    if not kept:
        _log.info("reloaded" if reloaded else "nothing to reload", reloaded=reloaded)
    elif reloaded:
        _log.error("reloaded in part", reloaded=reloaded, kept=kept)
    else:
        _log.error("reload refused, nothing changed", kept=kept)


async def handle_signals(
    on_stop: Callable[[str], None],
    reloads: Reloads,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Turn signals into calls until cancelled.

    SIGTERM, SIGINT, SIGQUIT: `on_stop(name)`, each time. SIGHUP: `reload_all(reloads)` between RELOADING and READY.
    SIGUSR1 and SIGUSR2: more and less verbose. Reports started once signals are caught.
    """
    more = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    with trio.open_signal_receiver(*STOP_SIGNALS, *more) as signals:
        task_status.started()
        async for number in signals:
            name = signal.Signals(number).name
            if number in STOP_SIGNALS:
                _log.info("stopping", signal=name)
                on_stop(name)
            elif number == signal.SIGUSR1:
                louder()
            elif number == signal.SIGUSR2:
                quieter()
            else:
                notify_reloading()
                await reload_all(reloads)
                notify("READY=1")


class StartPhase:
    """Whether a service's start is over: trouble with others before means "unavailable", after it a crash."""

    started = False


def run_service(main: Callable[..., Awaitable[T]], *arguments: object, phase: StartPhase | None = None) -> T:
    """Run `main(*arguments)` in Trio and return its result; whatever ends it otherwise ends the process.

    Every error is reported in one form, raised in a nursery or not, and has its exit code. A `StoreUnavailable` that
    is in no group left the opening of the store; `phase` is for services that also wait for others in a nursery.
    """
    try:
        return trio.run(main, *arguments)
    except StoreUnavailable as error:
        _log.error("store unavailable at start", error=str(error))
        sys.exit(ExitCode.UNAVAILABLE)
    except (Exception, InvariantViolation, BaseExceptionGroup) as error:  # noqa: BLE001 -- the process ends with it
        sys.exit(report_crash(error, starting=phase is not None and not phase.started))


def exit_code_of(error: BaseException, *, starting: bool = False) -> ExitCode:
    """Return the exit code for what ended a role. In a group the gravest counts: broken invariant, HSM, setting.

    Whoever is still `starting` waits for others: any operational trouble is then "unavailable".
    """
    found = [type(leaf) for leaf in _leaves(error)]
    if any(issubclass(kind, InvariantViolation) for kind in found):
        return ExitCode.INTERNAL
    if any(issubclass(kind, HsmGone) for kind in found):
        return ExitCode.HSM
    if found and all(issubclass(kind, LocalError) for kind in found):
        return ExitCode.UNAVAILABLE if all(issubclass(kind, NotYet) for kind in found) else ExitCode.CONFIG
    if starting and all(issubclass(kind, RealmError) for kind in found):
        return ExitCode.UNAVAILABLE
    return ExitCode.INTERNAL


def report_crash(error: BaseException, *, stream: TextIO | None = None, starting: bool = False) -> ExitCode:
    """Say on stderr what ended the process and return its exit code.

    A `LocalError` is one line `error: ...`. Otherwise: a traceback on a terminal, else one line of JSON `{message,
    reason, panic, level, location, backtrace}`. Places only, no local values, so no secrets.
    """
    to_stderr = stream is None
    stream = stream if stream is not None else sys.stderr
    code = exit_code_of(error, starting=starting)
    gravest = _gravest(error, code)
    reason = f"{type(gravest).__name__}: {gravest}"
    if all(isinstance(leaf, LocalError) for leaf in _leaves(error)):
        text = f"error: {gravest}"
    elif stream.isatty():
        text = "".join(traceback.format_exception(error)).rstrip() + f"\nexit {int(code)}: {reason}"
    else:
        places = traceback.extract_tb(gravest.__traceback__)
        last = places[-1] if places else None
        text = json.dumps(
            {
                "message": f"process ends with code {int(code)}: {reason}",
                "reason": reason,
                "panic": True,
                "level": "ERROR",
                "location": f"{Path(last.filename).name}:{last.lineno}" if last is not None else "unknown",
                "backtrace": [f"{place.filename}:{place.lineno} {place.name}" for place in places[-FRAMES_MAX:]],
            }
        )
    flush()
    _say_last(text, None if to_stderr and stream is sys.__stderr__ else stream)
    return code


def _say_last(text: str, stream: TextIO | None) -> None:
    """Say why the process ends; a stderr that nobody reads or that is closed must not keep it from ending."""
    if stream is None:
        write_in_time(STDERR, text, LAST_WORDS_S)
        return
    try:
        stream.write(text + "\n")
        stream.flush()
    except (OSError, ValueError):
        pass  # nobody is listening; the code still tells


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


def _gravest(error: BaseException, code: ExitCode) -> BaseException:
    leaves = _leaves(error)
    return next((leaf for leaf in leaves if exit_code_of(leaf) is code), leaves[0])
