"""Log lines: their form, what they never contain, and that repetition is held back and said."""

from __future__ import annotations

import enum
import io
import json
import logging as stdlib

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from juicebox_hsm.adapters.observation import logging
from juicebox_hsm.crypto.redacted import Secret
from juicebox_hsm.errors import LocalError
from juicebox_hsm.ids import OwnedRange, RecordId
from juicebox_hsm.wire.rpc import GroupCall

LOG = logging.get_logger("test")  # made before any configure, as modules do


class Terminal(io.StringIO):
    """An output that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Give the limiter a clock of ours and a clean memory."""
    clock = Clock()
    monkeypatch.setattr(logging._limiter, "clock", clock)
    monkeypatch.setattr(logging._limiter, "_places", {})
    return clock


def lines(output: io.StringIO) -> list[dict[str, object]]:
    """Parse JSON lines."""
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_json_unless_on_a_terminal(clock: Clock) -> None:
    """Machines get one JSON object per line, people get text."""
    output = io.StringIO()
    logging.configure("info", stream=output)
    LOG.info("started", version="1.0", groups=["a"], count=3)
    (line,) = lines(output)
    timestamp = line.pop("timestamp")
    assert str(timestamp).endswith("Z")
    assert line == {
        "message": "started",
        "level": "info",
        "logger": "test",
        "version": "1.0",
        "groups": ["a"],
        "count": 3,
    }
    terminal = Terminal()
    logging.configure("info", stream=terminal)
    LOG.info("started", version="1.0")
    assert "started" in terminal.getvalue()
    assert "version" in terminal.getvalue()
    assert not terminal.getvalue().startswith("{")


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("error", ["error"]),
        ("warn", ["warning", "error"]),
        ("WARNING", ["warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("debug", ["debug", "info", "warning", "error"]),
        (" Trace ", ["trace", "debug", "info", "warning", "error"]),
    ],
)
def test_levels(clock: Clock, level: str, shown: list[str]) -> None:
    """A level shows itself and all that is graver."""
    output = io.StringIO()
    logging.configure(level, json=True, stream=output)
    for name in ("trace", "debug", "info", "warning", "error"):
        getattr(LOG, name)(name)
        clock.now += 2
    assert [line["message"] for line in lines(output)] == shown


def test_level_from_the_environment(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """LOGLEVEL counts unless an argument is given; an unknown one is a configuration error, not a default."""
    output = io.StringIO()
    monkeypatch.setenv("LOGLEVEL", "error")
    logging.configure(json=True, stream=output)
    LOG.warning("hidden")
    logging.configure("info", json=True, stream=output)
    LOG.warning("shown")
    assert [line["message"] for line in lines(output)] == ["shown"]
    monkeypatch.setenv("LOGLEVEL", "loud")
    with pytest.raises(LocalError, match="'loud' is unknown; use one of error, warn, info, debug, trace"):
        logging.configure()


def test_louder_and_quieter(clock: Clock) -> None:
    """Verbosity moves one level at a time and stops at both ends."""
    logging.configure("info", stream=io.StringIO())
    seen = []
    for step in [logging.louder] * 3 + [logging.quieter] * 6 + [logging.louder]:
        step()
        seen.append(logging._output.level)
    assert seen == [10, 5, 5, 10, 20, 30, 40, 40, 40, 30]


def test_repetition_is_limited(clock: Clock) -> None:
    """One location speaks once per second; afterwards the number held back is said, once."""
    output = io.StringIO()
    logging.configure("info", json=True, stream=output)

    def speak(number: int) -> None:
        LOG.warning("again", number=number)

    for number in range(5):
        speak(number)
    LOG.error("elsewhere")
    assert [line["message"] for line in lines(output)] == ["again", "elsewhere"]
    clock.now += 0.9
    logging.report_suppressed()
    speak(5)
    assert len(lines(output)) == 2
    clock.now += 0.2
    speak(6)
    *_, suppressed, _ = written = lines(output)
    assert suppressed["message"] == "lines suppressed"
    assert suppressed["suppressed"] == 5
    assert suppressed["location"] == written[0]["location"]
    clock.now += 1.1
    speak(7)
    logging.report_suppressed()
    assert [line.get("number") for line in lines(output)] == [0, None, None, 6, 7]


def test_suppressed_lines_are_said_without_another_line(clock: Clock) -> None:
    """The count comes out by itself, for a storm may end in silence."""
    output = io.StringIO()
    logging.configure("info", json=True, stream=output)
    for _ in range(3):
        LOG.warning("storm")
    logging.report_suppressed(everything=True)
    assert [line.get("suppressed") for line in lines(output)] == [None, 2]
    logging.report_suppressed(everything=True)
    assert len(lines(output)) == 2


async def test_a_task_says_what_it_is_about(clock: Clock) -> None:
    """Bound values are on lines of a task and of those it starts, on no others; what a line says itself comes first."""
    output = io.StringIO()
    logging.configure("info", json=True, stream=output)

    async def speak(name: str) -> None:
        await trio.lowlevel.checkpoint()
        LOG.info(name)

    async def request(nursery: trio.Nursery) -> None:
        logging.bind_context(request="r1", realm="aa", key=SECRET, pin=Secret(b"1234"))
        LOG.info("own", realm="bb")
        nursery.start_soon(speak, "started by it")
        logging.outside_context(nursery.start_soon, speak, "serves others")
        await trio.lowlevel.checkpoint()
        logging.unbind_context("request", "realm", "key", "pin", "never bound")
        LOG.info("after")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(request, nursery)
        await speak("other")
    told = {line["message"]: (line.get("request"), line.get("realm")) for line in lines(output)}
    assert told == {
        "own": ("r1", "bb"),
        "started by it": ("r1", "aa"),
        "serves others": (None, None),
        "after": (None, None),
        "other": (None, None),
    }
    assert SECRET.decode("latin-1") not in output.getvalue()
    assert SECRET.hex() not in output.getvalue()
    assert "1234" not in output.getvalue()


def test_info_is_not_limited(clock: Clock) -> None:
    """Only warnings and errors are held back."""
    output = io.StringIO()
    logging.configure("info", json=True, stream=output)
    for number in range(5):
        LOG.info("fine", number=number)
    assert len(lines(output)) == 5


class Colour(enum.Enum):
    """Some enum."""

    RED = "Red"
    BLUE = 2


SECRET = b"\xaa\xbb correct horse battery"


@pytest.mark.parametrize("as_json", [True, False])
def test_values_are_harmless(clock: Clock, as_json: bool) -> None:
    """Secrets redact, keys show only their length, ids are readable, and nobody writes control characters."""
    output = io.StringIO()
    logging.configure("info", json=as_json, stream=output)
    LOG.info(
        "values",
        secret=Secret(SECRET),
        nested={"inner": [Secret(SECRET)], "key": SECRET},
        key=SECRET,
        key_view=memoryview(SECRET),
        id=bytes(range(16)),
        role=Colour.RED,
        other=Colour.BLUE,
        hostile='a\x1b[31m\r\n{"message": "forged"}',
        long="x" * 10_000,
        deep=[[[[[[SECRET]]]]]],
        body=GroupCall(SECRET, SECRET),
        record=OwnedRange(RecordId(SECRET), RecordId(SECRET)),
        keyed={SECRET: 1},
        wide=list(range(1000)),
    )
    text = output.getvalue()
    assert text.count("\n") == 1
    for form in (SECRET.decode("latin-1"), SECRET.hex(), "horse", repr(SECRET)):
        assert form not in text
    assert "(redacted)" in text
    assert f"({len(SECRET)} bytes)" in text
    assert "000102030405060708090a0b0c0d0e0f" in text
    assert "Red" in text
    assert "BLUE" in text
    assert "\x1b" not in text
    assert "x" * 5000 not in text
    assert ", 999" not in text


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda key: key not in {"event", "exc_info", "suppressed", "exception"}),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    )
)
def test_anything_can_be_logged(values: dict[str, object]) -> None:
    """No value breaks a log call or its line: logging must not be a way to stop a service."""
    output = io.StringIO()
    logging.configure("info", json=True, stream=output)
    LOG.info("values", **values)
    assert len(lines(output)) == 1


def test_every_line_names_its_service(clock: Clock) -> None:
    """With a name every line has it, those of libraries and those about lines too."""
    output = io.StringIO()
    logging.configure("info", json=True, stream=output, service="agent1")
    LOG.info("one")
    LOG.warning("two")
    LOG.warning("two")
    stdlib.getLogger("library").warning("three")
    logging.report_suppressed(everything=True)
    assert {line["service"] for line in lines(output)} == {"agent1"}
    logging.configure("info", json=True, stream=output)


def test_lines_of_a_text_become_one(clock: Clock) -> None:
    """A text of several lines is one readable line; other control characters are escaped, letters stay."""
    output = io.StringIO()
    logging.configure("info", json=True, stream=output)
    LOG.info("loads", text="first line\n  second: Zo\u00eb\n\n\x1b[31m")
    assert lines(output)[0]["text"] == "first line; second: Zo\u00eb; \\x1b[31m"


def test_tracebacks_show_places_only(clock: Clock) -> None:
    """An exception is logged with its places, never with local variables, on a terminal neither."""
    for as_json in (True, False):
        output = io.StringIO()
        logging.configure("info", json=as_json, stream=output)
        local_secret = "hunter2"
        try:
            raise ValueError("no secrets in messages")
        except ValueError:
            LOG.exception("failed")
        assert "ValueError: no secrets in messages" in output.getvalue()
        assert local_secret not in output.getvalue().replace('local_secret = "hunter2"', "")
        clock.now += 2


def test_libraries_speak_our_form(clock: Clock) -> None:
    """The standard library's loggers end in the same output, from warning up, and below that only at trace."""
    output = io.StringIO()
    logging.configure("debug", json=True, stream=output)
    library = stdlib.getLogger("some.library")
    library.info("chatter")
    library.warning("trouble with %s", "x")
    (line,) = lines(output)
    assert (line["message"], line["logger"], line["level"]) == ("trouble with x", "some.library", "warning")
    logging.configure("trace", json=True, stream=output)
    library.debug("chatter")
    assert lines(output)[-1]["message"] == "chatter"


def test_broken_output_is_ignored(clock: Clock) -> None:
    """A closed output does not stop a service."""
    output = io.StringIO()
    logging.configure("info", json=True, stream=output)
    output.close()
    LOG.info("nobody hears this")
