"""A pool: documents that were read once, and what phases of a pipeline have stored about them.

Survivors are a view: nothing is deleted, and other thresholds decide anew over what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import NDArray

from puna.core.errors import PunaError
from puna.core.files import fingerprint, read_json, write_json
from puna.data.curate.documents import Documents
from puna.data.curate.gates import Found
from puna.data.curate.layout import of_rows, read_table, signal_of, strings, told_with
from puna.data.curate.operator import Spans
from puna.data.curate.pipeline import Phase, Pipeline, make_pipeline

META = "pool.json"
_FORMAT = 1


class Pool:
    """A pool in a folder, as a pipeline sees it."""

    def __init__(self, path: Path, pipeline: Pipeline, meta: dict[str, Any]) -> None:
        self.path = path
        self.pipeline = pipeline
        self.meta = meta
        """What ``pool.json`` holds: the pipeline, sources, limits, parts, order of steps."""

    @classmethod
    def open(cls, path: Path | str) -> Pool:
        """Open the pool in a folder, with the pipeline it was last worked on with."""
        folder = Path(path)
        if not (folder / META).is_file():
            inside = folder / "pool"
            if (inside / META).is_file():
                return cls.open(inside)
            raise PunaError("not a pool of documents", where=folder, fix="make one first: puna stage curate")
        meta = read_json(folder / META)
        if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
            raise PunaError("the pool was written by another version", where=folder / META)
        import_modules(meta.get("modules", ()))
        given = meta["pipeline"]
        given["steps"] = [{k: v for k, v in step.items() if k != "version"} for step in given["steps"]]
        return cls(folder, make_pipeline(given, where=folder / META), meta)

    @classmethod
    def create(cls, path: Path, pipeline: Pipeline, meta: Mapping[str, Any]) -> Pool:
        """Write ``pool.json`` for a pipeline."""
        made = cls(path, pipeline, {"format": _FORMAT, **meta, "pipeline": pipeline.as_json()})
        path.mkdir(parents=True, exist_ok=True)
        made.save()
        return made

    def save(self) -> None:
        """Write ``pool.json``."""
        write_json(self.path / META, self.meta)

    @cached_property
    def phases(self) -> list[Phase]:
        """The phases of the pipeline."""
        return self.pipeline.phases()

    @property
    def everything(self) -> bool:
        """Whether all signals are worked out for documents that a gate has dropped, too."""
        return not self.meta["short_circuit"]

    @cached_property
    def keys(self) -> list[tuple[str, str]]:
        """Per phase, what its signals and its decisions depend on, as hashes."""
        keys: list[tuple[str, str]] = []
        # Files that settings name are told by what is in them; pools without any have the names they had.
        read = [self.meta["read"]] if self.meta.get("read") else []
        before = fingerprint([self.meta["sources"], self.meta["limits"], *read])
        for phase in self.phases:
            steps = [step.as_json() for step in phase.steps if step.gate is None or not self.everything]
            entry = None if phase.entry is None else phase.entry.as_json()
            signals = fingerprint([before, entry, steps, self.everything])
            gates = [step.as_json() for step in phase.steps if step.gate is not None]
            before = fingerprint([signals, gates])
            keys.append((signals, before))
        return keys

    def folder(self, kind: str, phase: int) -> Path:
        """The folder of what a phase stores: signals, decisions, sketch, or resolved."""
        signals, decisions = self.keys[phase]
        if kind == "resolved":
            signals = fingerprint([self.keys[phase - 1][1], self.phases[phase].entry.as_json()])  # type: ignore[union-attr]
        if kind == "sketch":
            signals = fingerprint([decisions, self.phases[phase].closing.as_json()])  # type: ignore[union-attr]
        return self.path / f"{kind}-{phase}-{decisions if kind == 'decisions' else signals}"

    def documents_file(self, shard: str) -> Path:
        """The file of a shard's documents as they were read."""
        return self.path / "documents" / f"{shard}.parquet"

    def file(self, kind: str, phase: int, shard: str) -> Path:
        """The file of a shard in a phase's folder."""
        return self.folder(kind, phase) / f"{shard}.parquet"

    def live_folders(self) -> set[Path]:
        """Every folder that belongs to the pipeline as it is now."""
        live = {self.path / name for name in ("documents", "parts", "deadly", "plan")}
        live.add(self.survivors_file("").parent)
        for phase in self.phases:
            live |= {self.folder("signals", phase.index), self.folder("decisions", phase.index)}
            if phase.closing is not None and phase.closing.kind == "global":
                live.add(self.folder("sketch", phase.index))
            if phase.entry is not None:
                live.add(self.folder("resolved", phase.index))
        return live

    def plan_file(self, phase: int) -> Path:
        """The file of what the steps of a phase cost and drop, by which gates are ordered."""
        return self.path / "plan" / f"{phase}-{self.keys[phase][1]}.json"

    def survivors_file(self, shard: str) -> Path:
        """The file of what is kept of a shard, as rows of a corpus."""
        return self.path / f"survivors-{self.keys[-1][1]}" / f"{shard}.parquet"

    def shards(self) -> list[str]:
        """Names of all shards, in the order in which the documents were given."""
        return [shard for part in range(len(self.meta["parts"])) for shard in self.part(part)["shards"]]

    def part(self, number: int) -> dict[str, Any]:
        """What was read of a part of the sources."""
        return dict(read_json(self.part_file(number)))

    def part_file(self, number: int) -> Path:
        """The file that says that a part of the sources was read, and what it gave."""
        return self.path / "parts" / f"{number:06d}.json"

    def found(self, phase: int) -> dict[str, Found]:
        """The bounds that the quantiles of a phase's entry came to, by the gate's name."""
        entry = self.phases[phase].entry
        if entry is None or entry.gate is None:
            return {}
        return {entry.label: read_json(self.folder("resolved", phase) / "bounds.json")}

    def documents(
        self, shard: str, phase: int, *, rows: Sequence[int] | None = None, cut: bool = True
    ) -> Documents:
        """The documents of a shard that come to a phase (all kept ones for one past the last).

        With ``rows`` those documents, whether they are kept or not; without ``cut`` as they were before
        the global operator at the phase's entry cut anything.
        """
        table = read_table(self.documents_file(shard))
        if rows is None:
            chosen = numpy.flatnonzero(self.reasons(shard, phase, table) == "")
        else:
            chosen = numpy.array(rows, dtype=numpy.int64)
        documents = Documents.of_table(table, chosen, raw=phase == 0)
        texts, languages, sizes = documents.texts.texts, documents.texts.languages, documents.sizes
        count = documents.count
        for earlier in range(phase):
            self._cut(shard, earlier, chosen, count, texts, sizes)
            self._edit(shard, earlier, chosen, texts, languages, sizes)
        if cut and phase < len(self.phases):
            self._cut(shard, phase, chosen, count, texts, sizes)
        if phase:  # The batch counted the characters of the texts as they were read.
            documents.texts = documents.texts.replaced(texts)
        return documents

    def _edit(
        self,
        shard: str,
        phase: int,
        rows: NDArray[numpy.int64],
        texts: list[str],
        languages: list[str],
        sizes: NDArray[numpy.int64],
    ) -> None:
        """Put what a phase edited in place."""
        table = read_table(self.file("signals", phase, shard), ["text", "language"]).take(rows)
        for column, values in (("text", texts), ("language", languages)):
            if table[column].null_count == len(table):
                continue
            for place, value in enumerate(table[column].to_pylist()):
                if value is not None:
                    values[place] = value
                    if column == "text":
                        sizes[place] = len(value.encode("utf-8"))

    def _cut(
        self,
        shard: str,
        phase: int,
        rows: NDArray[numpy.int64],
        count: int,
        texts: list[str],
        sizes: NDArray[numpy.int64],
    ) -> None:
        """Leave out the parts of texts that the global operator at a phase's entry has cut."""
        entry = self.phases[phase].entry
        if entry is None or entry.kind != "global":
            return
        column = read_table(self.file("resolved", phase, shard), ["cut"])["cut"]
        if not pyarrow.compute.any(
            pyarrow.compute.greater(pyarrow.compute.list_value_length(column), 0)
        ).as_py():
            return
        cut = of_rows(signal_of(column), rows, count)
        assert isinstance(cut, Spans)
        for place in numpy.unique(cut.document).tolist():
            mine = cut.document == place
            text, kept, end = texts[place], [], 0
            for start, stop in sorted(zip(cut.starts[mine].tolist(), cut.ends[mine].tolist(), strict=True)):
                kept.append(text[end:start])
                end = max(end, stop)
            texts[place] = "".join([*kept, text[end:]])
            sizes[place] = len(texts[place].encode("utf-8"))

    def reasons(self, shard: str, phase: int, documents: Any = None) -> NDArray[Any]:
        """[count] why each document does not come to a phase; "" if it does."""
        if documents is None:
            documents = read_table(self.documents_file(shard), ["failed"])
        reasons = numpy.array(
            [f"failed: {reason}" if reason else "" for reason in strings(documents["failed"])], dtype=object
        )
        for earlier in range(phase):
            dropped = read_table(self.file("decisions", earlier, shard), ["dropped_by"])["dropped_by"]
            told = numpy.array(strings(dropped), dtype=object)
            reasons = numpy.where(reasons == "", told, reasons)
        return reasons

    def signal(self, shard: str, name: str) -> NDArray[numpy.float64] | Spans:
        """[count] a stored signal of a shard by its full name."""
        for phase in self.phases:
            for step in phase.steps:
                if name in step.columns():
                    return signal_of(read_table(self.file("signals", phase.index, shard), [name])[name])
            if phase.entry is not None and name in phase.entry.columns():
                return signal_of(read_table(self.file("resolved", phase.index, shard), [name])[name])
        raise PunaError("no such signal is stored", where=self.path, found=name)

    def count(self, shard: str) -> int:
        """Documents of a shard, whatever became of them."""
        return int(pyarrow.parquet.read_metadata(self.documents_file(shard)).num_rows)

    def counts_of(self, phase: int, shard: str) -> dict[str, dict[str, float]]:
        """What came to each step of a phase in a shard, and what became of it."""
        signals = told_with(self.file("signals", phase, shard))["counts"]
        return {**signals, **told_with(self.file("decisions", phase, shard))["counts"]}

    def keys_json(self) -> list[list[str]]:
        """:attr:`keys` as they are written down."""
        return [list(pair) for pair in self.keys]


def import_modules(names: Sequence[str]) -> None:
    """Import modules that register operators; one that cannot be is a :class:`PunaError`."""
    import importlib

    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise PunaError("the module cannot be imported", where=f"modules: {name}", found=error) from None
