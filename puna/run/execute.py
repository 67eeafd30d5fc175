"""Executes one stage: in ``<stage>.work`` beside its place, which it takes when it is whole."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.core.files import fingerprint, read_json, sha256_of, write_json
from puna.core.progress import say
from puna.core.stage import Context, Kind, Outcome, Stage
from puna.run import fingerprints
from puna.run.machine import PeakMemory
from puna.run.processes import Processes
from puna.run.recipe import Header, StageEntry
from puna.run.record import StageRecord


def execute(
    entry: StageEntry,
    final: Path,
    inputs: Mapping[str, Any],
    parts: Mapping[str, Any],
    *,
    described: Mapping[str, Any],
    afresh: bool = False,
    ready: Callable[[], None] | None = None,
) -> StageRecord:
    """Run ``entry`` on ``inputs`` and leave its folder at ``final``.

    ``parts`` make up its fingerprint (:func:`puna.run.fingerprints.parts_of`); ``described`` is how
    stage.json names the inputs. A work folder that a kill left behind is continued if its fingerprint
    is this one's. Otherwise it is wiped, unless the stage could have gone on from what is in it: that is
    an error. ``afresh`` wipes it, and the finished one, in any case.
    ``ready`` is called when the work folder stands, before the stage begins.
    """
    work = _work_folder(final)
    stamp = fingerprint(parts)
    sessions = _prepare(entry, work, final, parts, afresh)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    context = _context(entry, work, inputs, parts["seed"], parts["device"], parts["dtype"])
    if ready is not None:
        ready()
    clock = time.monotonic()
    try:
        with PeakMemory(parts["device"]) as peak:
            outcome = entry.stage.function(context, entry.parameters)
    except BaseException:
        say(f"{entry.id}: stopped; {work} is kept, and the same run continues there")
        raise
    seconds = time.monotonic() - clock
    record = {
        "stage": entry.id,
        "use": entry.stage.name,
        "version": entry.stage.version,
        "fingerprint": stamp,
        "parts": dict(parts),
        "parameters": entry.settings(),
        "seed": parts["seed"],
        "device": parts["device"],
        "dtype": parts["dtype"],
        "inputs": dict(described),
        "outputs": {
            name: _describe_output(entry, name, path, work) for name, path in outcome.outputs.items()
        },
        "metrics": _metrics(entry, outcome),
        "report": context.report,
        "started": started,
        "seconds": round(seconds, 3),
        "sessions": sessions,
        "peak_memory": peak.bytes,
    }
    write_json(work / "stage.json", record)
    _take_place(entry.stage, work, final)
    finished = StageRecord.open(final)
    assert finished is not None
    return finished


def follow(
    entry: StageEntry,
    final: Path,
    inputs: Callable[[], Mapping[str, Any]],
    header: Header,
    device: str,
    dtype: str,
    others: Processes,
) -> StageRecord:
    """Wait, as another process than the first, until that has a stage done; take part if it is distributed.

    ``inputs`` is called for what the stage is given. Nothing is written.
    """
    if others.hear(entry.id) == "join":
        work = _work_folder(final)
        context = _context(entry, work, inputs(), header.seed, device, dtype)
        entry.stage.function(context, entry.parameters)
    others.wait(entry.id)
    record = StageRecord.open(final)
    assert record is not None
    return record


def _context(
    entry: StageEntry, work: Path, inputs: Mapping[str, Any], seed: int, device: str, dtype: str
) -> Context:
    return Context(entry.id, work.absolute(), inputs, seed=seed, device=device, dtype=dtype)


def check_place(final: Path) -> None:
    """Refuse to put a stage where something lies that no stage made: it would be replaced."""
    for folder, mark in ((final, "stage.json"), (_work_folder(final), "work.json")):
        if not folder.exists() or any((folder / name).is_file() for name in (mark, "stage.json")):
            continue
        # A stage that was killed as it began leaves its folder empty, or half a work.json in it.
        found = (
            [] if folder.is_file() else [f for f in folder.iterdir() if not f.name.startswith(".work.json")]
        )
        if folder.is_file() or found:
            raise PunaError(
                "holds something that no stage made, and would be replaced",
                where=folder,
                found="a file" if folder.is_file() else ", ".join(sorted(file.name for file in found)[:5]),
                fix="choose another --out, or move it away",
            )


def interrupted(final: Path) -> str | None:
    """Fingerprint of the work that was interrupted on its way to ``final``, or None."""
    file = _work_folder(final) / "work.json"
    return str(read_json(file)["fingerprint"]) if file.is_file() else None


def refusal(entry: StageEntry, final: Path, parts: Mapping[str, Any]) -> PunaError | None:
    """The error if unfinished work of other settings or inputs lies here that the stage could go on from."""
    work = _work_folder(final)
    if entry.stage.resumes is None or interrupted(final) in (None, fingerprint(parts)):
        return None
    kept = sorted(path.name for path in (work / entry.stage.resumes).glob("[!.]*"))
    if not kept:
        return None
    begun = read_json(work / "work.json")
    words = fingerprints.difference(begun.get("parts", {}), parts)
    words = "; ".join([words, *fingerprints.changed_files(begun.get("files", {}), _files(entry))])
    return PunaError(
        "unfinished work with other settings or inputs lies here, and would be lost",
        where=work,
        found=words,
        expected=f"what it was begun with, to go on from {kept[-1]}",
        fix="set that back and run again; or begin anew, without what is there: --from "
        f"{entry.id} (puna run), --force (puna stage); or choose another --out",
    )


def finish_interrupted(stage: Stage, final: Path) -> None:
    """Give whole work its place, if the process died between writing it and doing so."""
    work = _work_folder(final)
    if (work / "stage.json").is_file():
        _take_place(stage, work, final)


def _work_folder(final: Path) -> Path:
    return final.with_name(f"{final.name}.work")


def _prepare(entry: StageEntry, work: Path, final: Path, parts: Mapping[str, Any], afresh: bool) -> int:
    """Make the work folder, or keep it if it is this work's; return the number of this session."""
    stamp = fingerprint(parts)
    if afresh:
        for folder in (work, final):
            _remove(folder)
    elif work.exists() and interrupted(final) != stamp:
        refused = refusal(entry, final, parts)
        if refused is not None:
            raise refused
        say(f"{work.name}: was begun with other settings or inputs; wiped")
        _remove(work)
    work.mkdir(parents=True, exist_ok=True)
    file = work / "work.json"
    sessions = read_json(file)["sessions"] + 1 if file.is_file() else 1
    begun = {"fingerprint": stamp, "sessions": sessions, "parts": dict(parts), "files": _files(entry)}
    write_json(file, begun)
    return int(sessions)


def _files(entry: StageEntry) -> dict[str, Any]:
    """The files of each input that is a path, to name the one that is another later."""
    return {
        name: fingerprints.listing(Path(reference.text).expanduser())
        for name, reference in entry.references()
        if reference.origin == "path"
    }


def _take_place(stage: Stage, work: Path, final: Path) -> None:
    """Rename ``work`` to ``final``, without what only going on needed; an older ``final`` goes."""
    if stage.resumes is not None:
        shutil.rmtree(work / stage.resumes, ignore_errors=True)
    (work / "work.json").unlink(missing_ok=True)
    old = _put_aside(final)
    os.rename(work, final)
    shutil.rmtree(old, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a stage's folder; a kill meanwhile leaves no half of it in its place."""
    shutil.rmtree(_put_aside(folder), ignore_errors=True)


def _put_aside(folder: Path) -> Path:
    """Rename ``folder``, if it is there, to the name returned."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    return old


def _describe_output(entry: StageEntry, name: str, path: Path, work: Path) -> dict[str, Any]:
    declared: dict[str, Kind] = entry.stage.outputs
    root = path.absolute()
    if name not in declared:
        raise ValueError(f"stage {entry.stage.name!r} wrote an output {name!r} that it does not declare")
    if not root.is_relative_to(work.absolute()) or not root.exists():
        raise ValueError(f"stage {entry.stage.name!r}: output {name!r} is not below its folder: {path}")
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    listed = {
        "" if file == root else file.relative_to(root).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": sha256_of(file),
        }
        for file in files
        if file.name != "work.json"
    }
    hashes = {relative: str(about["sha256"]) for relative, about in listed.items()}
    return {
        "path": root.relative_to(work.absolute()).as_posix(),
        "kind": declared[name],
        "fingerprint": fingerprints.of_files(hashes),
        "files": listed,
    }


def _metrics(entry: StageEntry, outcome: Outcome) -> dict[str, float | None]:
    """Metrics as JSON has them: null for what is not finite, and a line that says so."""
    values: dict[str, float | None] = {}
    for name, value in outcome.metrics.items():
        number = float(value)
        values[name] = number if math.isfinite(number) else None
        if values[name] is None:
            say(f"{entry.id}: metric {name} is {number}", style="red")
    return values
