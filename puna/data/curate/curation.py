"""Curation from sources to survivors: the phases of a pipeline over all shards of a pool.

Parts of the sources are read, shards go through a phase, then what needs all of them is worked out here,
in this process, and so on. Every step finds what is done already, so a run that was killed goes on where it
stood. Memory is that of a batch per worker and of what a global operator says it needs.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy
import pyarrow

from puna.core.errors import PunaError
from puna.core.files import clear_leftovers, folder_aside, read_json, write_json
from puna.core.progress import Track
from puna.data.curate.executors import Executor, make_executor
from puna.data.curate.gates import quantile_bounds, reduced
from puna.data.curate.guard import Range
from puna.data.curate.layout import at_rows, column_of, read_table, strings, write_table
from puna.data.curate.named_files import files_of
from puna.data.curate.operator import Spans, checked
from puna.data.curate.pipeline import Phase, Pipeline
from puna.data.curate.planner import plan
from puna.data.curate.pool import Pool
from puna.data.curate.settings import CurateParameters
from puna.data.curate.shard import Unit, idle_file, told_of
from puna.data.curate.sketches import StoredSketch
from puna.data.curate.sources import reader_of

_GRACE = 15.0  # seconds over its limit after which a process counts as hung
_DEATHS_UNTOLD = 3  # deaths of a unit that told nothing of what it was doing


@dataclass
class Curation:
    """One run over the pool at ``path``; ``earlier`` is another pool whose results may be taken over."""

    parameters: CurateParameters
    path: Path
    earlier: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """What each part of the work took, by the clock."""

    def run(self) -> Pool:
        """Do whatever is not done, and return the pool."""
        parameters = self.parameters
        # Its processes start while this one prepares.
        executor = make_executor(parameters.executor, parameters.workers or _cores(), parameters.address)
        try:
            pool = self._prepared(parameters.loaded())
            parts = range(len(pool.meta["parts"]))
            todo = [Unit("begin", 0, str(number)) for number in parts if not pool.part_file(number).exists()]
            if todo:
                self._plan(pool, executor, pool.phases[0], "")
            self._drive(pool, executor, todo, f"reading, phase 1 of {len(pool.phases)}")
            shards = pool.shards()
            if not shards:
                raise PunaError("the sources hold no document", where="sources")
            for phase in pool.phases:
                self._entry(pool, phase, shards)
                self._phase(pool, executor, phase, shards)
            last = [
                Unit("survivors", 0, shard) for shard in shards if not pool.survivors_file(shard).exists()
            ]
            self._drive(pool, executor, last, "writing")
        finally:
            executor.close()
        self._clear(pool)
        return pool

    def _prepared(self, pipeline: Pipeline) -> Pool:
        """The pool's folder with ``pool.json``, and with what an earlier pool has that still holds."""
        parameters, path = self.parameters, self.path
        read = files_of(pipeline)
        sources = [
            source.model_dump(mode="json", exclude_defaults=True) | {"format": source.format}
            for source in parameters.sources
        ]
        titles = [source.title for source in parameters.sources]
        for title in titles:
            if titles.count(title) > 1:
                fix = "give each a name: {name: ..., ...}"
                raise PunaError("two sources have the same name", found=title, fix=fix)
        old = read_json(path / "pool.json") if (path / "pool.json").exists() else {}
        if self.earlier is not None:
            _take_over(Pool.open(self.earlier), path)
            old = old or read_json(path / "pool.json")
        if parameters.sources:
            parts = [
                {"source": index, "index": place, "name": part.name, "bytes": part.size}
                for index, source in enumerate(parameters.sources)
                for place, part in enumerate(reader_of(source).parts(source))
            ]
        else:
            parts = old.get("parts", [])
            sources = old.get("sources", [])
        if not parts:
            raise PunaError("nothing to read", where="sources", fix="give sources, a corpus or a pool")
        meta = {
            "sources": sources,
            "limits": parameters.limits.model_dump(),
            "parts": parts,
            "shard_bytes": parameters.shard_bytes,
            "batch_characters": parameters.batch_characters,
            "batch_seconds": parameters.batch_seconds,
            "short_circuit": parameters.short_circuit,
            "modules": parameters.modules,
            "read": read,
        }
        same = [old.get(key) == meta[key] for key in ("sources", "limits", "parts", "shard_bytes")]
        if old and not all(same):
            if self.earlier is not None:
                raise PunaError(
                    "the pool was read from other sources or with other limits",
                    where=self.earlier,
                    fix="give no sources to go on with a pool, or no pool",
                )
            shutil.rmtree(path)
            old = {}
        pool = Pool.create(path, pipeline, meta)
        if old.get("keys") == pool.keys_json() and parameters.plan == old.get("plan"):
            pool.meta["order"] = old.get("order", {})
        pool.meta |= {"keys": pool.keys_json(), "plan": parameters.plan}
        pool.save()
        for folder in path.iterdir():
            if folder.is_dir():
                clear_leftovers(folder)
        return pool

    def _phase(self, pool: Pool, executor: Executor, phase: Phase, shards: Sequence[str]) -> None:
        """All shards through a phase, gates in the order that costs over the first documents suggest."""
        ends = ["signals", "decisions"]
        if phase.closing is not None and phase.closing.kind == "global":
            ends.append("sketch")
        todo = [
            Unit("phase", phase.index, shard)
            for shard in shards
            if not all(pool.file(kind, phase.index, shard).exists() for kind in ends)
        ]
        if todo and len(shards) > 1:
            self._plan(pool, executor, phase, shards[0])
        self._drive(pool, executor, todo, f"phase {phase.index + 1} of {len(pool.phases)}")

    def _plan(self, pool: Pool, executor: Executor, phase: Phase, shard: str) -> None:
        """Decide on the order of a phase's steps by a shard, or by what is read first ("").

        The decision stands for all shards, so that their ledgers add up.
        """
        order, key = pool.meta.setdefault("order", {}), str(phase.index)
        if not self.parameters.short_circuit or self.parameters.plan != "measured" or key in order:
            return
        if _nothing_to_order(phase) or not (shard or self._large(pool)):
            order[key] = [step.label for step in phase.steps]
        else:
            if not pool.plan_file(phase.index).exists():
                self._drive(pool, executor, [Unit("plan", phase.index, shard)], "planning")
            order[key] = plan(phase, read_json(pool.plan_file(phase.index)))
        pool.save()

    def _large(self, pool: Pool) -> bool:
        """Whether what is read is more than a shard, so that it pays to find an order of the steps first."""
        parts = pool.meta["parts"]
        return len(parts) > 1 or parts[0].get("bytes", 0) > self.parameters.shard_bytes

    def _entry(self, pool: Pool, phase: Phase, shards: Sequence[str]) -> None:
        """Work out what the step at a phase's entry says of all documents."""
        if phase.entry is None or pool.folder("resolved", phase.index).exists():
            return
        started = time.perf_counter()
        with folder_aside(pool.folder("resolved", phase.index)) as aside:
            if phase.entry.gate is not None:
                self._bounds(pool, phase, shards, aside)
            else:
                self._resolve(pool, phase, shards, aside)
            write_json(aside / "seconds.json", time.perf_counter() - started)
        self.seconds[phase.entry.label] = time.perf_counter() - started

    def _bounds(self, pool: Pool, phase: Phase, shards: Sequence[str], aside: Path) -> None:
        """The bounds of a gate by quantiles: memory is a number per document."""
        gate = phase.entry.gate if phase.entry is not None else None
        assert gate is not None
        values, tags = [], []
        for shard in shards:
            rows = numpy.flatnonzero(pool.reasons(shard, phase.index) == "")
            signals = {name: pool.signal(shard, name) for name in gate.signals()}
            count = pool.count(shard)
            values.append(reduced(gate, signals, count)[rows])
            if gate.by_language:
                tags.append(numpy.array(pool.documents(shard, phase.index).texts.languages, dtype=object))
            else:
                tags.append(numpy.full(len(rows), "", dtype=object))
        write_json(
            aside / "bounds.json", quantile_bounds(gate, numpy.concatenate(values), numpy.concatenate(tags))
        )

    def _resolve(self, pool: Pool, phase: Phase, shards: Sequence[str], aside: Path) -> None:
        """What a global operator says, shard by shard."""
        step = phase.entry
        assert step is not None and step.operator is not None
        sketches = [StoredSketch(pool.file("sketch", phase.index - 1, shard)) for shard in shards]
        work = pool.path / "work"
        work.mkdir(exist_ok=True)
        resolved = step.operator.function.resolve(sketches, step.settings, work)
        with Track(step.label, len(shards), "shards") as track:
            for shard, sketch, said in zip(shards, sketches, resolved, strict=True):
                rows = numpy.flatnonzero(pool.reasons(shard, phase.index) == "")
                count = pool.count(shard)
                signals = {
                    f"{step.label}.{name}": values
                    for name, values in checked(step.operator, said.signals, sketch.count).items()
                }
                if step.operator.spans:
                    signals[f"{step.label}#characters"] = sketch.characters().astype(numpy.float64)
                signals["cut"] = Spans.nothing() if said.cut is None else said.cut
                columns = {name: column_of(at_rows(v, rows, count), count) for name, v in signals.items()}
                write_table(aside / f"{shard}.parquet", pyarrow.table(columns))
                track.advance()
        shutil.rmtree(work)

    def _drive(self, pool: Pool, executor: Executor, units: Sequence[Unit], what: str) -> None:
        """Run units until all are done; a unit that dies goes on without the document that killed it."""
        if not units:
            return
        started = time.perf_counter()
        waiting, running = deque(units), set[Unit]()
        untold: dict[Unit, int] = {}
        idle = idle_file(pool.path)
        idle.unlink(missing_ok=True)
        with Track(what, len(units), "units") as track:
            while waiting or running:
                while waiting and len(running) < executor.slots:
                    unit = waiting.popleft()
                    executor.start(str(pool.path), unit, _deadly(pool, unit))
                    running.add(unit)
                if len(running) < executor.slots and any(unit.task == "begin" for unit in running):
                    idle.parent.mkdir(exist_ok=True)
                    idle.touch()
                for over in executor.poll(1.0):
                    running.discard(over.unit)
                    if over.error is not None:
                        raise over.error
                    if over.died:
                        waiting.appendleft(_died(pool, over.unit, untold))
                    else:
                        track.advance()
                for unit in running:
                    told = told_of(pool.path, unit)
                    if told is not None and time.time() > told[1] + _GRACE:
                        executor.kill(unit)
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

    def _clear(self, pool: Pool) -> None:
        """Remove what belongs to pipelines that the pool was worked on with before."""
        live = pool.live_folders()
        for folder in pool.path.iterdir():
            if folder.is_dir() and folder not in live:
                shutil.rmtree(folder)


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _deadly(pool: Pool, unit: Unit) -> list[Range]:
    file = pool.path / "deadly" / f"{unit.file}.json"
    return [Range(**known) for known in read_json(file)] if file.exists() else []


def _died(pool: Pool, unit: Unit, untold: dict[Unit, int]) -> Unit:
    """What to try after a unit has died: it is cut in halves until the document is found."""
    told = told_of(pool.path, unit)
    (pool.path / "now" / unit.file).unlink(missing_ok=True)
    if unit.task == "begin":  # Of several shards: what follows on reading them is done apart.
        return Unit("read", unit.phase, unit.name)
    if told is None:
        untold[unit] = untold.get(unit, 0) + 1
        if untold[unit] >= _DEATHS_UNTOLD:
            raise PunaError(
                "a process died again and again",
                where=f"{unit.task} {unit.name}",
                fix="see whether memory is short: fewer workers, smaller batch_characters",
            )
        return unit
    known = [asdict(range_) for range_ in _deadly(pool, unit)]
    write_json(pool.path / "deadly" / f"{unit.file}.json", [*known, asdict(told[0])])
    return unit


def _nothing_to_order(phase: Phase) -> bool:
    """Whether all gates of a phase wait for one and the same score, or for nothing."""
    scores = {name for step in phase.steps if step.kind == "score" for name in step.columns()}
    gates = [step.gate for step in phase.steps if step.gate is not None]
    others = any(name not in scores for gate in gates for name in gate.signals())
    return not gates or sum(step.kind == "score" for step in phase.steps) + others < 2


def _take_over(earlier: Pool, path: Path) -> None:
    """Link the files of another pool into a new one; those that do not hold any more are removed later."""
    import os

    if path.resolve() == earlier.path.resolve() or (path / "pool.json").exists():
        return
    for file in sorted(earlier.path.rglob("*")):
        target = path / file.relative_to(earlier.path)
        if file.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif file.name != "pool.json":
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, target)
            except OSError:
                shutil.copy2(file, target)
    shutil.copy2(earlier.path / "pool.json", path / "pool.json")


def failures(pool: Pool, shards: Iterable[str]) -> list[tuple[str, str]]:
    """Ids of documents that failed, and why."""
    failed = []
    for shard in shards:
        reasons = pool.reasons(shard, len(pool.phases))
        chosen = [row for row, reason in enumerate(reasons) if reason.startswith("failed: ")]
        if chosen:
            ids = strings(read_table(pool.documents_file(shard), ["id"])["id"])
            failed += [(ids[row], str(reasons[row]).removeprefix("failed: ")) for row in chosen]
    return failed
