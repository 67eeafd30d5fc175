"""How time and memory of a training step grow with documents and with models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.training import Result, console, run_peer, run_puna, share_of_limit, spec_of
from benchmarks.training_work import SIZES, Prepared, Work, computed_in, of_length, of_size, prepare

LENGTHS = (512, 1024, 2048, 4096, 8192)
STEPS = 3
LARGEST = {"length": 4096.0, "size": 400.0}
"""The peer is left out above these unless --peer-up-to says otherwise: minutes, and many GB, per step."""
MILLIONS = {"40M": 40.0, "135M": 135.0, "362M": 362.0, "1.1B": 1100.0}


def points(given: argparse.Namespace, dtype: str) -> list[tuple[str, float, Work]]:
    """Name, size and work of each line of the table."""
    if given.growth == "length":
        lengths = [int(length) for length in given.only or LENGTHS]
        return [(str(length), float(length), computed_in(dtype, of_length(length))) for length in lengths]
    names = given.only or list(SIZES)
    unknown = sorted(set(names) - set(SIZES))
    if unknown:
        raise SystemExit(f"no such size: {', '.join(unknown)}; there are {', '.join(SIZES)}")
    return [(name, MILLIONS[name], computed_in(dtype, of_size(name))) for name in names]


def growth(given: argparse.Namespace, folder: Path, dtype: str, peak: float) -> None:
    """Measure each point on both sides, where the peer is feasible, and print the table."""
    largest = LARGEST[given.growth] if given.peer_up_to is None else given.peer_up_to
    count = given.steps or STEPS
    found: list[tuple[str, Prepared, Result, Result | None]] = []
    for name, size, work in points(given, dtype):
        prepared = prepare(work, folder, count)
        ours = run_puna(prepared, count, given.threads)
        theirs = None
        if size <= largest:
            theirs = run_peer(prepared, work.peers[0], count, given.threads)
        else:
            console.print(f"  {name}: the peer is left out above {largest:g}; --peer-up-to raises that")
        found.append((name, prepared, ours, theirs))
        console.print(f"  {prepared.notes[0]}: {seconds(ours):.1f} s a step")
    console.print(table(given.growth, found, peak))
    if given.json:
        from puna.core.files import write_json

        write_json(given.json, [as_json(*one) for one in found])


def seconds(result: Result) -> float:
    """Seconds of a step, without the first."""
    return result.measured_seconds / (len(result.seconds) - 1)


def table(what: str, found: Sequence[tuple[str, Prepared, Result, Result | None]], peak: float) -> Table:
    """Seconds, tokens per second, peak and share of the limit of each point."""
    shown = Table(title=f"LoRA r=16, one document per step: growth with {what}")
    columns = ("s/step puna", "tokens/s", "peak GB", "of the limit", "s/step peer", "tokens/s", "peak GB")
    for column in (what, *columns, "speed ratio", "memory ratio"):
        shown.add_column(column)
    for name, prepared, ours, theirs in found:
        share = share_of_limit(prepared, ours, spec_of(prepared.model), peak)
        cells = [f"{seconds(ours):.2f}", f"{ours.speed:.0f}", f"{ours.peak / 1e9:.2f}", f"{share:.0%}"]
        if theirs is None:
            shown.add_row(name, *cells, *["-"] * 5)
            continue
        cells += [f"{seconds(theirs):.2f}", f"{theirs.speed:.0f}", f"{theirs.peak / 1e9:.2f}"]
        ratios = (f"{ours.speed / theirs.speed:.2f}", f"{ours.peak / theirs.peak:.2f}")
        shown.add_row(name, *cells, *ratios)
    return shown


def as_json(name: str, prepared: Prepared, ours: Result, theirs: Result | None) -> dict[str, Any]:
    """One point, to be kept."""
    from dataclasses import asdict

    return {
        "point": name,
        "work": prepared.work.says,
        "puna": asdict(ours),
        "theirs": None if theirs is None else asdict(theirs),
    }
