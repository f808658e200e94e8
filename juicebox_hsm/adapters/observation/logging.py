"""Log lines on stdout: readable on a terminal, one JSON object per line otherwise (operator-tools.md 9.1).

Loggers may be made before `configure` and follow it, for level and output are looked up when a line is written.
Warnings and errors of one code location appear once per second; how many were held back is said in a line of its own.
A line carries what its task said it is about (`bind_context`), such as realm and group, request and tenant.
Values are made harmless on the way out: secrets redact themselves, byte strings longer than an id show only their
length, control characters are escaped, long texts are cut.
"""

from __future__ import annotations

import atexit
import contextvars
import dataclasses
import enum
import json as jsonlib
import logging as stdlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from types import FrameType
from typing import Any, Final, TextIO

import msgspec
import structlog
from structlog.types import Processor

from juicebox_hsm.adapters.observation.line_writer import LineWriter
from juicebox_hsm.errors import LocalError

TRACE: Final = 5
LEVELS: Final[Mapping[str, int]] = {
    "error": stdlib.ERROR,
    "warn": stdlib.WARNING,
    "info": stdlib.INFO,
    "debug": stdlib.DEBUG,
    "trace": TRACE,
}
LEVEL_VARIABLE: Final = "LOGLEVEL"
REPEAT_S: Final = 1.0  # operator-tools.md 9.1
LOCATIONS_MAX: Final = 1000  # own: more than there are log calls
TEXT_CHARS_MAX: Final = 4096  # own
ITEMS_MAX: Final = 100  # own
FLUSH_S: Final = 1.0
"""Longest wait at the end of a process for somebody to read its last lines (own); a supervisor reads at once."""
BYTES_SHOWN_MAX: Final = 16  # own: ids are shown in hex, keys and messages are not

_LADDER: Final = tuple(LEVELS.values())
_HERE: Final = __file__
_OWN: Final = frozenset({"suppressed", "dropped"})
"""Values of lines about lines, which are not limited themselves."""
_STRUCTLOG: Final = str(Path(structlog.__file__).parent)


class _Output:
    """Where lines go and which; the one mutable thing of this module."""

    __slots__ = ("level", "stream", "writer")

    def __init__(self) -> None:
        self.level: int = stdlib.INFO
        self.stream: TextIO | None = None
        self.writer: LineWriter | None = None

    def write(self, message: str) -> None:
        """Write a line. A closed or broken output must not stop a service."""
        if self.writer is not None:
            self.writer.put(message)
            return
        stream = self.stream if self.stream is not None else sys.stdout
        if stream is None:  # Python was started without one
            return
        try:
            stream.write(message + "\n")
            stream.flush()
        except (OSError, ValueError):
            pass

    debug = info = warning = error = write


_output: Final = _Output()
_processors: Final[list[Processor]] = []


class Logger(structlog.BoundLoggerBase):
    """A logger with a name and bound values; a line below the level costs one comparison."""

    def trace(self, event: str, **values: Any) -> None:
        """Log what only somebody who reads the code understands."""
        if _output.level <= TRACE:
            self._proxy_to_logger("debug", event, **values)

    def debug(self, event: str, **values: Any) -> None:
        """Log what helps to find a fault."""
        if _output.level <= stdlib.DEBUG:
            self._proxy_to_logger("debug", event, **values)

    def info(self, event: str, **values: Any) -> None:
        """Log what an operator wants to have seen."""
        if _output.level <= stdlib.INFO:
            self._proxy_to_logger("info", event, **values)

    def warning(self, event: str, **values: Any) -> None:
        """Log trouble that is being handled."""
        if _output.level <= stdlib.WARNING:
            self._proxy_to_logger("warning", event, **values)

    def error(self, event: str, **values: Any) -> None:
        """Log trouble that is not."""
        self._proxy_to_logger("error", event, **values)

    def exception(self, event: str, **values: Any) -> None:
        """Log an error with the traceback of the exception being handled (places only, no values)."""
        self._proxy_to_logger("error", event, exc_info=True, **values)


def get_logger(name: str) -> Logger:
    """Return a logger; `name` says which part speaks."""
    return Logger(_output, _processors, {"logger": name})


def bind_context(**values: object) -> None:
    """Add `values` to every line of this task, and of the tasks that it starts from now on; looked at per line only.

    A value given with a line counts before one of the context.
    """
    structlog.contextvars.bind_contextvars(**values)


def unbind_context(*names: str) -> None:
    """Take values out of this task's context again; names that are not bound are fine."""
    structlog.contextvars.unbind_contextvars(*names)


def outside_context(start: Callable[..., object], *arguments: object) -> None:
    """Call `start`, such as a nursery's `start_soon`, without the context of the caller.

    For tasks that serve others too: lines about them must not name the request that happened to start them.
    """
    contextvars.Context().run(start, *arguments)


def parse_level(text: str) -> int:
    """Return the number of a level's name. Raises `LocalError` for any other text."""
    name = text.strip().lower()
    level = LEVELS.get("warn" if name == "warning" else name)
    if level is None:
        raise LocalError(f"log level {text[:40]!r} is unknown; use one of {', '.join(LEVELS)}")
    return level


def configure(
    level: str | None = None,
    json: bool | None = None,  # noqa: FBT001
    *,
    stream: TextIO | None = None,
    in_background: bool = False,
    service: str = "",
) -> None:
    """Set level and form of all loggers, those of libraries included; `service` is named in every line.

    `level`: a name, else LOGLEVEL, else info. `json`: None means JSON unless the output is a terminal. `stream`: None
    means stdout, whatever that is at the time of a line. `in_background`, for services: lines go to this process's
    stdout through a thread, and an output that nobody reads holds up nobody. Raises `LocalError` for an unknown level.
    """
    set_level(parse_level(level if level is not None else os.environ.get(LEVEL_VARIABLE) or "info"))
    _output.stream = stream
    _output.writer = LineWriter(sys.__stdout__.fileno()) if in_background and sys.__stdout__ is not None else None
    is_terminal = bool(getattr(stream if stream is not None else sys.stdout, "isatty", lambda: False)())
    _processors[:] = _chain(as_json=not is_terminal if json is None else json, colors=is_terminal, service=service)
    root = stdlib.getLogger()
    root.handlers[:] = [_Bridge()]
    atexit.unregister(flush)
    atexit.register(flush)
    atexit.unregister(report_suppressed)
    atexit.register(report_suppressed, everything=True)  # before the other: the last one registered is called first


def flush() -> None:
    """Wait until lines written in the background are out, for at most 1 s."""
    if _output.writer is not None:
        _output.writer.flush(FLUSH_S)


def lines_dropped() -> int:
    """Return how many lines of this process nobody will see, since the output was full or closed."""
    return 0 if _output.writer is None else _output.writer.dropped


def set_level(level: int) -> None:
    """Set the level of all loggers; libraries speak from warning up, and below that only at trace."""
    _output.level = level
    stdlib.getLogger().setLevel(stdlib.DEBUG if level <= TRACE else stdlib.WARNING)


def louder() -> None:
    """Raise the verbosity by one level (SIGUSR1)."""
    set_level(max((level for level in _LADDER if level < _output.level), default=_LADDER[-1]))


def quieter() -> None:
    """Lower the verbosity by one level (SIGUSR2)."""
    set_level(min((level for level in _LADDER if level > _output.level), default=_LADDER[0]))


def report_suppressed(*, everything: bool = False) -> None:
    """Say how many lines were held back where the second is over (or everywhere), or dropped since nobody read them.

    Roles call it every second.
    """
    dropped = 0 if _output.writer is None else _output.writer.take_untold()
    if dropped:
        _suppressed_log.warning(f"{dropped} lines dropped, the output was not read in time", dropped=dropped)
    for location, count in _limiter.due(everything=everything):
        _suppressed_log.warning("lines suppressed", suppressed=count, location=location)


class _Limiter:
    """Counts warnings and errors per location. Worker threads log too, hence the lock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._places: dict[str, tuple[float, int]] = {}  # location -> (when the line appeared, held back since)

    def admit(self, location: str) -> bool:
        """Tell whether a line of `location` may appear now, and count it if not."""
        now = self.clock()
        with self._lock:
            since, count = self._places.get(location, (-REPEAT_S, 0))
            if now - since < REPEAT_S:
                self._places[location] = (since, count + 1)
                return False
            if len(self._places) >= LOCATIONS_MAX:
                self._places.clear()
            self._places[location] = (now, 0)
            return True

    def due(self, *, everything: bool) -> list[tuple[str, int]]:
        """Take the counts that may be reported."""
        now = self.clock()
        with self._lock:
            due = [
                (place, since, count)
                for place, (since, count) in self._places.items()
                if count and (everything or now - since >= REPEAT_S)
            ]
            for place, since, _ in due:
                self._places[place] = (since, 0)
            return [(place, count) for place, _, count in due]


_limiter: Final = _Limiter()
_suppressed_log: Final = get_logger("logging")


def _limit(_logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if method in {"warning", "error"} and not _OWN.intersection(event):
        location = event.get("location") or _location()
        event["location"] = location
        report_suppressed()
        if not _limiter.admit(location):
            raise structlog.DropEvent
    return event


def _location() -> str:
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  # the documented way to the caller; inspect reads sources
    while frame is not None:
        code = frame.f_code
        if code.co_filename != _HERE and not code.co_filename.startswith(_STRUCTLOG):
            return f"{'/'.join(Path(code.co_filename).parts[-3:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


def _harmless(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if key != "exception":
            event[key] = _plain(value, depth=3)
    return event


def _plain(value: object, *, depth: int) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, enum.Enum):
        value = value.value if isinstance(value.value, str) else value.name
    if isinstance(value, bytes | bytearray | memoryview):
        raw = bytes(value)
        return raw.hex() if len(raw) <= BYTES_SHOWN_MAX else f"({len(raw)} bytes)"
    if depth > 0 and isinstance(value, Mapping):
        items = list(value.items())[:ITEMS_MAX]
        return {str(_plain(key, depth=0)): _plain(item, depth=depth - 1) for key, item in items}
    if depth > 0 and isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth=depth - 1) for item in list(value)[:ITEMS_MAX]]
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping | list | tuple | set | frozenset | msgspec.Struct) or dataclasses.is_dataclass(value):
        return f"({type(value).__name__})"  # its repr would show the bytes inside
    return _text(repr(value))


def _text(value: str) -> str:
    if len(value) > TEXT_CHARS_MAX:
        value = value[:TEXT_CHARS_MAX] + "..."
    if value.isprintable():
        return value
    if "\n" in value:  # in one line all the same: an escaped end of line reads like a mistake
        value = "; ".join(part for line in value.splitlines() if (part := line.strip()))
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in value)


def _named(service: str) -> Processor:
    """Return what adds a service's name: a collector puts the lines of many into one place."""

    def add(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["service"] = service
        return event

    return add


def _chain(*, as_json: bool, colors: bool, service: str = "") -> list[Processor]:
    first: list[Processor] = [
        _limit,
        *((_named(service),) if service else ()),
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=as_json),
        structlog.processors.format_exc_info,
        _harmless,
    ]
    if as_json:
        return [
            *first,
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(serializer=jsonlib.dumps),
        ]
    plain = structlog.dev.plain_traceback  # the default one shows local variables
    return [*first, structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]


class _Bridge(stdlib.Handler):
    """Carries the lines of libraries that use the standard library's loggers."""

    def emit(self, record: stdlib.LogRecord) -> None:
        """Write one record in our form."""
        log = get_logger(record.name)
        location = f"{'/'.join(Path(record.pathname).parts[-3:])}:{record.lineno}"
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            message = str(record.msg)
        values = {"location": location, "exc_info": record.exc_info or None}
        if record.levelno >= stdlib.ERROR:
            log.error(message, **values)
        elif record.levelno >= stdlib.WARNING:
            log.warning(message, **values)
        else:
            log.trace(message, **values)


_processors[:] = _chain(as_json=True, colors=False)
