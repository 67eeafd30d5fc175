"""Proving many systems: one after the other, each in its run folder, and one table of how all of them stand.

Resumable: what a run folder holds already is reused, and a proof that was killed goes on where it stood.
Parallel-safe: a system is proved by one process at a time (a lock in its run folder), so that several calls
side by side share the work. A system that fails to run is a row of the table, not the end.

Below the folder of runs lies ``proofs/``: ``<system>.json`` for what became of a system's last proof,
``table.md`` and ``table.html`` with one row for each system, written anew after each. Figures come out of the
run folders, so that the table shows earlier proofs as well.
"""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.files import read_json, write_json, write_text
from puna.core.progress import say
from puna.run import claims
from puna.run.lock import BusyError, locked
from puna.run.prove import prove
from puna.run.recipe import load_header, system_names
from puna.run.record import Run

if TYPE_CHECKING:
    from rich.table import Table

FOLDER, COULD_NOT = "proofs", "could not run"
COLUMNS = ("", "system", "state", "passed", "failed", "reported", "minutes", "seeds", "what failed")


@dataclass(frozen=True)
class Row:
    """How a system stands: claims by verdict, ``minutes`` of all its stages and seeds, what failed."""

    name: str
    number: str
    state: str
    passed: int = 0
    failed: int = 0
    reported: int = 0
    minutes: float = 0.0
    seeds: str = ""
    failures: tuple[str, ...] = ()
    report: str | None = None

    @property
    def went_wrong(self) -> bool:
        """Whether a claim fails, or the system could not be run."""
        return self.failed > 0 or self.state == COULD_NOT

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as texts, under :data:`COLUMNS`."""
        known = self.passed + self.failed + self.reported > 0
        counts = [str(count) if known else "" for count in (self.passed, self.failed, self.reported)]
        minutes = f"{self.minutes:.1f}" if self.minutes else ""
        return self.number, self.name, self.state, *counts, minutes, self.seeds, ", ".join(self.failures)


@dataclass
class Overview:
    """All rows, and their sums."""

    rows: list[Row]

    @property
    def failed(self) -> bool:
        """Whether a claim of some system fails, or a system could not be run."""
        return any(row.went_wrong for row in self.rows)

    @property
    def total(self) -> Row:
        """The sums over all rows."""
        proved = sum(row.state == "proved" for row in self.rows)
        return Row(
            name="all",
            number="",
            state=f"{proved} of {len(self.rows)} proved",
            passed=sum(row.passed for row in self.rows),
            failed=sum(row.failed for row in self.rows),
            reported=sum(row.reported for row in self.rows),
            minutes=sum(row.minutes for row in self.rows),
        )

    def table(self) -> Table:
        """The rows as a table to print, those without any proof left out."""
        from rich.table import Table
        from rich.text import Text

        shown = Table(title="systems proved so far", title_justify="left")
        for heading in COLUMNS:
            right = heading in ("passed", "failed", "reported", "minutes")
            shown.add_column(heading, justify="right" if right else "left")
        told = [row for row in self.rows if row.state != "not yet"]
        for row in told:
            style = "red" if row.went_wrong else None
            shown.add_row(*map(Text, row.cells), style=style, end_section=row is told[-1])
        shown.add_row(*map(Text, self.total.cells))
        return shown

    def markdown(self) -> str:
        """The same as a table of a Markdown file, of all systems."""
        lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
        rows = [[_plain(cell) for cell in row.cells] for row in (*self.rows, self.total)]
        return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)]) + "\n"


def _plain(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")


@dataclass
class Proofs:
    """Proofs of systems, each in a folder below ``runs``; settings as in :func:`puna.run.prove.prove`."""

    runs: Path
    seeds: int | None = None
    set: Mapping[str, Any] | None = None
    device: str | None = None
    dtype: str | None = None
    names: Sequence[str] = field(default_factory=system_names)

    @property
    def page(self) -> Path:
        """The table as a page; ``table.md`` beside it holds the same."""
        return self.runs / FOLDER / "table.html"

    def run(self) -> Overview:
        """Prove every system that no other process has in work, and tell how all of them stand.

        What another call with the same settings proves meanwhile is taken from it. A system that it works on
        is looked at again once the others are done; if it is not free by then, it is left to that call.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise PunaError(
                "all systems cannot be proved under torchrun",
                where="--all",
                fix="call it several times side by side: the calls share the work",
            )
        # What a call was stopped at comes last: if it takes its process down again, the others are done.
        begun, waiting = _now(), sorted(self.names, key=lambda name: _state(self._said(name)) == "stopped")
        while waiting:
            taken = [name for name in waiting if not self._done_since(name, begun)]
            busy = [name for name in taken if not self._one(name)]
            if busy and len(busy) == len(taken):
                say(f"in work elsewhere: {', '.join(busy)}")
                break
            waiting = busy
        return self.overview()

    def _one(self, name: str) -> bool:
        """Prove a system and note what became of it; False if another process works on it."""
        folder = self.runs / name
        try:
            with locked(folder, self.runs / FOLDER / f".{name}.lock"):
                self._note(name, "in work")
                try:
                    prove(name, folder, seeds=self.seeds, set=self.set, device=self.device, dtype=self.dtype)
                except BusyError:
                    self._note(name, "in work elsewhere")
                    raise
                except PunaError as error:
                    self._note(name, COULD_NOT, str(error))
                except Exception as error:
                    traceback.print_exc()
                    self._note(name, COULD_NOT, f"{type(error).__name__}: {error}")
                except BaseException:
                    self._note(name, "stopped")
                    raise
                else:
                    self._note(name, "proved")
        except BusyError:
            return False
        self._tell(name)
        return True

    def _note(self, name: str, state: str, error: str | None = None) -> None:
        about = {"system": name, "state": state, "error": error, "process": os.getpid()}
        write_json(self.runs / FOLDER / f"{name}.json", {**about, "asked": self._asked(), "time": _now()})

    def _asked(self) -> dict[str, Any]:
        return {
            "seeds": self.seeds,
            "set": dict(self.set or {}),
            "device": self.device,
            "dtype": self.dtype,
        }

    def _done_since(self, name: str, begun: str) -> bool:
        """Whether a call with the same settings has proved the system, or failed to, since ``begun``."""
        said = self._said(name)
        finished = said.get("state") in ("proved", COULD_NOT)
        return finished and said["time"] > begun and said["asked"] == self._asked()

    def _said(self, name: str) -> dict[str, Any]:
        """What is noted of a system's last proof; nothing if there was none."""
        file = self.runs / FOLDER / f"{name}.json"
        if not file.is_file():
            return {}
        said = read_json(file)
        if not isinstance(said, dict) or not {"state", "error", "process", "asked", "time"} <= said.keys():
            raise PunaError("not the note of a proof", where=file, fix="remove it")
        return said

    def _tell(self, name: str) -> None:
        """Write the table anew, and say how the system stands."""
        from puna.run.report.proofs import write_proofs_page

        with locked(self.runs / FOLDER, self.runs / FOLDER / ".table.lock", wait=True):
            found = self.overview()
            write_text(self.runs / FOLDER / "table.md", found.markdown())
            write_proofs_page(found, self.page)
        row = next(row for row in found.rows if row.name == name)
        counts = f"{row.passed} passed, {row.failed} failed, {row.reported} reported, {row.minutes:.1f} min"
        why = f": {', '.join(row.failures)}" if row.failures else ""
        say(f"{name}: {row.state}; {counts}{why} ({found.total.state})")

    def overview(self) -> Overview:
        """How all systems stand, by what lies on disk."""
        found = [self._row(name) for name in self.names]
        return Overview(sorted(found, key=lambda row: (row.number or "~", row.name)))

    def _row(self, name: str) -> Row:
        try:
            header, said = load_header(name), self._said(name)
            return self._row_of(name, header, said)
        except PunaError as error:  # a recipe or a folder that cannot be read is a row as well
            return Row(name, "", COULD_NOT, failures=(_first_line(str(error)),))

    def _row_of(self, name: str, header: Any, said: Mapping[str, Any]) -> Row:
        folder, number = self.runs / name, header.system or ""
        state = _state(said)
        why = () if said.get("error") is None else (_first_line(said["error"]),)
        if not (folder / "run.json").is_file():
            return Row(name, number, "not yet" if state in (None, "proved") else state, failures=why)
        run = Run.open(folder)
        seeds = [Run.open(file.parent) for file in sorted(self.runs.glob(f"{name}-seed*/run.json"))]
        minutes = sum(one.stage_seconds for one in (run, *seeds)) / 60
        report = f"../{name}/report.html" if run.report.is_file() else None
        if run.claims is None or state in (COULD_NOT, "in work", "stopped"):
            return Row(name, number, state or "not judged", minutes=minutes, failures=why, report=report)
        if not claims.are_judged(header.claims, folder):
            return Row(name, number, "claims have changed since", minutes=minutes, report=report)
        verdicts = {claim["name"]: claims.verdict(claim) for claim in run.claims["claims"]}
        counts = Counter(verdicts.values())
        failures = tuple(claim for claim, verdict in verdicts.items() if verdict == "FAIL")
        seeds_said = ", ".join(map(str, run.claims["seeds"]))
        return Row(
            name,
            number,
            "proved",
            passed=counts["pass"],
            failed=counts["FAIL"],
            reported=counts["reported"],
            minutes=minutes,
            seeds=seeds_said,
            failures=failures,
            report=report,
        )


def _state(said: Mapping[str, Any]) -> str | None:
    """What the note of a proof says, where the process that wrote it may have died since."""
    state: str | None = said.get("state")
    if state == "in work" and not _lives(int(said["process"])):
        return "stopped"
    return state


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no message"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
