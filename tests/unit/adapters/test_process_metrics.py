"""What the system knows of this process, as the scrape shows it."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from juicebox_hsm import __version__
from juicebox_hsm.adapters.observation import process_metrics
from juicebox_hsm.adapters.observation.metric_names import PROCESS
from juicebox_hsm.adapters.observation.process_metrics import process_text


def _shown() -> dict[str, float]:
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(process_text())
        for sample in family.samples
    }


def test_names_and_values_are_the_usual_ones() -> None:
    """Prometheus' own client library shows the same names with the same numbers, as far as those hold still."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    theirs = {sample.name: sample.value for family in registry.collect() for sample in family.samples}
    ours = _shown()
    assert set(theirs) == {name for name in ours if name.startswith("process_")}
    assert ours["process_max_fds"] == theirs["process_max_fds"]
    assert ours["process_start_time_seconds"] == pytest.approx(theirs["process_start_time_seconds"], abs=1)
    assert ours["process_resident_memory_bytes"] == pytest.approx(theirs["process_resident_memory_bytes"], rel=0.2)
    assert ours["process_virtual_memory_bytes"] == pytest.approx(theirs["process_virtual_memory_bytes"], rel=0.2)
    assert ours["process_cpu_seconds_total"] == pytest.approx(theirs["process_cpu_seconds_total"], rel=0.2, abs=0.5)


def test_open_files_are_counted() -> None:
    """A descriptor that leaks shows."""
    before = _shown()["process_open_fds"]
    descriptor = os.open("/dev/null", os.O_RDONLY)
    try:
        assert _shown()["process_open_fds"] == before + 1
    finally:
        os.close(descriptor)


def test_a_clock_that_is_set_is_no_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start stays where it was first seen, whatever the wall clock says later."""
    before = _shown()["process_start_time_seconds"]
    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: "btime 1\n" if str(path) == "/proc/stat" else read_text(path))
    assert _shown()["process_start_time_seconds"] == before


def test_build_is_told() -> None:
    """Dashboards can tell which versions run."""
    assert f'version="{__version__}"' in process_text()


def test_without_proc_the_rest_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A system without /proc costs families, never the page; every family is explained."""
    assert process_text().count("# HELP ") == len(PROCESS)
    monkeypatch.setattr(process_metrics, "_PROC", tmp_path)
    assert _shown()["process_max_fds"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
