"""Progress says the same on a terminal and in a log."""

import io

import pytest
from rich.console import Console

from puna.core import progress
from puna.core.progress import Track, say


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    monkeypatch.setattr(progress, "console", Console(file=io.StringIO(), force_terminal=False))
    return clock


def test_a_log_gets_a_line_every_ten_seconds_with_share_rate_and_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Track("reading", total=100, unit="rows") as track:
        track.note("loss 2.5")
        for _ in range(4):
            clock.now += 6
            track.advance(10)
        lines = capsys.readouterr().err.splitlines()
        assert lines == [
            "reading:  20% 20/100 rows, 2 rows/s, 48 s left loss 2.5",
            "reading:  40% 40/100 rows, 2 rows/s, 36 s left loss 2.5",
        ]
        track.advance(60)
    assert capsys.readouterr().err.splitlines()[-1].startswith("reading: 100% 100/100 rows")


def test_what_is_quick_or_fails_says_nothing_at_its_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Track("quick", total=1) as track:
        track.advance()
    with pytest.raises(RuntimeError), Track("failing", total=2) as track:
        clock.now += 5
        raise RuntimeError
    assert capsys.readouterr().err == ""


def test_an_empty_task_does_not_divide_by_zero(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Track("nothing", total=0):
        clock.now += 3
    assert "nothing: 100% 0/0" in capsys.readouterr().err


def test_a_terminal_gets_a_bar_and_the_note(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        progress, "console", Console(file=screen, force_terminal=True, width=100, legacy_windows=False)
    )
    with Track("reading", total=4, unit="rows") as track:
        track.note("loss 2.5")
        track.advance(4)
    shown = screen.getvalue()
    assert "reading" in shown and "100%" in shown and "rows/s" in shown and "loss 2.5" in shown
    assert track.done == 4


def test_a_line_of_a_log_is_printed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=written, force_terminal=False, width=20))
    line = "left out: [red]a row[/] that is much longer than the terminal is wide :cat:"
    say(line)
    assert written.getvalue() == f"{line}\n"
