"""Progress where nobody looks at it: a line now and then."""

import pytest

from latentds.core import display as module
from latentds.core.display import progress


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """tqdm's time, moved by the test."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.tqdm._time", lambda self: now[0], raising=False)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_in_a_file_there_is_a_line_every_half_minute(clock, capsys):
    with progress(total=100, desc="patches", unit="patch") as bar:
        for step in range(100):
            clock[0] = float(step + 1)
            bar.update()
            if step == 40:
                bar.set_description("slides")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4  # at 30, 60 and 90 s, and the end
    assert lines[0].startswith("patches: 30 of 100 patch, 00:30 gone, 01:10 left")
    assert [line.split(":")[0] for line in lines] == ["patches", "slides", "slides", "slides"]
    assert lines[3].startswith("slides: 100 of 100 patch")


def test_the_last_line_is_written_once(clock, capsys):
    with progress(total=60, desc="patches", unit="patch") as bar:
        for step in (30.0, 60.0):
            clock[0] = step
            bar.update(30)
        clock[0] = 61.0  # what was read is written
    counts = [line.split(" patch,")[0] for line in capsys.readouterr().err.splitlines()]
    assert counts == ["patches: 30 of 60", "patches: 60 of 60"]


def test_a_bar_that_is_not_wanted_writes_nothing(clock, capsys):
    with progress(total=1, desc="patches", disable=True) as bar:
        clock[0] = 31.0
        bar.update()
    assert capsys.readouterr().err == ""


def test_short_work_writes_nothing(clock, capsys):
    assert list(progress(range(5), desc="keys")) == list(range(5))
    assert capsys.readouterr().err == ""


def test_on_a_terminal_it_is_a_bar(monkeypatch, capsys):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress(total=2, desc="patches", delay=0) as bar:
        bar.update(2)
    assert "\r" in capsys.readouterr().err and bar.delay == 0 and module.LINE_S == 30
