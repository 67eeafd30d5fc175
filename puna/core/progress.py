"""Progress for anything over two seconds: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True, highlight=False)
_SECONDS_BETWEEN_LINES = 10.0


def say(text: str, *, style: str | None = None) -> None:
    """Print a line as it is, to the error output: never wrapped, and nothing in it is markup."""
    console.print(text, style=style, markup=False, emoji=False, soft_wrap=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} {task.fields['unit']}/s")


class Track:
    """A progress bar as a context manager: ``advance`` moves it, ``note`` sets the words behind it.

    On a terminal it draws a bar with rate and time left after the first update; elsewhere it
    prints one line every ten seconds, so that a log shows the same facts.
    """

    def __init__(self, description: str, total: float, unit: str = "steps") -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = 0.0
        self._note = ""
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Track:
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                TextColumn("{task.percentage:>3.0f}%"),
                _Rate(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=console, transient=False)
            self._task = self._bar.add_task(self.description, total=self.total, unit=self.unit, note="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and time.monotonic() - self._start > 2:
            self._line()

    def advance(self, amount: float = 1) -> None:
        """Move the bar by ``amount`` units."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, note=self._note)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._line()

    def note(self, text: str) -> None:
        """Show ``text`` behind the bar from the next update on."""
        self._note = text

    def _line(self) -> None:
        now = self._last_line = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        rate = self.done / seconds
        left = (self.total - self.done) / rate if rate else 0.0
        share = 100 * self.done / self.total if self.total else 100.0
        print(
            f"{self.description}: {share:3.0f}% {self.done:,.0f}/{self.total:,.0f} {self.unit}, "
            f"{rate:,.0f} {self.unit}/s, {left:,.0f} s left {self._note}".rstrip(),
            file=sys.stderr,
            flush=True,
        )
