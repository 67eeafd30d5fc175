"""The run folder as it lies on disk, and how to read it back.

::

    runs/<name>/
      run.yaml           the resolved recipe: everything spelt out, can be run again
      run.json           what ran, when, on what, with which versions
      fingerprints.json  for each stage: code, parameters, inputs, outputs
      metrics.jsonl      one line for each finished stage
      claims.json        figures and verdicts of the recipe's claims
      report.html        the report
      <stage>/           outputs and stage.json
      <stage>.work/      a stage being worked on: it survives a kill
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError, unknown_name
from puna.core.files import read_json

_ABOUT = ("name", "title", "scale", "status", "started", "stages")


class Metrics(dict[str, float]):
    """Metrics of a stage by name; an unknown name is an error that tells the nearest one."""

    def __init__(self, stage: str, values: Mapping[str, float | None]) -> None:
        # JSON has no word for what is not a finite number; null stands for it.
        super().__init__(
            {name: math.nan if value is None else float(value) for name, value in values.items()}
        )
        self._stage = stage

    def __missing__(self, name: str) -> float:
        raise unknown_name(f"metric of stage {self._stage!r}", name, self)


@dataclass(frozen=True)
class StageRecord:
    """What stage.json says of a finished stage: ``peak_memory`` in bytes, ``seconds`` of the last session."""

    id: str
    folder: Path
    use: str
    fingerprint: str
    parts: dict[str, Any]
    parameters: dict[str, Any]
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    metrics: Metrics
    report: dict[str, Any]
    started: str
    seconds: float
    sessions: int
    peak_memory: int

    @classmethod
    def open(cls, folder: Path) -> StageRecord | None:
        """The record of a stage's folder, or None if the stage has not finished there."""
        file = folder / "stage.json"
        if not file.is_file():
            return None
        said = read_json(file)
        names = (
            "use",
            "fingerprint",
            "parts",
            "parameters",
            "inputs",
            "outputs",
            "report",
            "started",
            "seconds",
        )
        try:
            fields = {name: said[name] for name in (*names, "sessions", "peak_memory")}
            metrics = Metrics(said["stage"], said["metrics"])
            return cls(id=said["stage"], folder=folder, metrics=metrics, **fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise PunaError(
                "not the record of a stage", where=file, found=error, fix="remove its folder"
            ) from None

    def about_output(self, name: str | None) -> dict[str, Any]:
        """What stage.json says of an output; one that the stage did not write is an error."""
        if name not in self.outputs:
            raise unknown_name(f"output that stage {self.id!r} wrote", str(name), self.outputs)
        about: dict[str, Any] = self.outputs[name]
        return about

    def output(self, name: str | None) -> Path:
        """Path of an output."""
        return self.folder / str(self.about_output(name)["path"])

    def damage(self) -> str | None:
        """What of the outputs is gone or has another size than when it was written, or None."""
        for name, output in self.outputs.items():
            root = self.output(name)
            for relative, about in output["files"].items():
                file = root / relative if relative else root
                # The model card is written when the whole run is known, after the stage's record.
                if file.name != "README.md" and (not file.is_file() or file.stat().st_size != about["bytes"]):
                    return f"{name}: {file.relative_to(self.folder)} was changed or removed"
        return None


@dataclass(frozen=True)
class Run:
    """A run, read from its folder: ``run["evaluate"]["bpb.nl"]``, ``run.folder``, ``run.report``.

    ``about`` is run.json; ``stages`` holds the records of those that have finished.
    """

    folder: Path
    about: dict[str, Any]
    stages: dict[str, StageRecord]

    @classmethod
    def open(cls, folder: Path | str) -> Run:
        """Read a run folder; anything else is a :class:`PunaError`."""
        root = Path(folder)
        if not (root / "run.json").is_file():
            raise PunaError("not a run folder: it has no run.json", where=root, expected="runs/<name>")
        about = read_json(root / "run.json")
        missing = [key for key in _ABOUT if key not in about] if isinstance(about, dict) else list(_ABOUT)
        if missing or not isinstance(about["stages"], list):
            raise PunaError(
                "not the record of a run",
                where=root / "run.json",
                found=f"no {', '.join(missing)}" if missing else f"stages {about['stages']!r}",
                fix="run the recipe again with this folder as --out",
            )
        records = {name: StageRecord.open(root / name) for name in about["stages"]}
        return cls(root, about, {name: record for name, record in records.items() if record is not None})

    @property
    def claims(self) -> dict[str, Any] | None:
        """What claims.json holds, or None if the claims were not judged."""
        file = self.folder / "claims.json"
        if not file.is_file():
            return None
        said = read_json(file)
        if not isinstance(said, dict) or not isinstance(said.get("claims"), list):
            raise PunaError("not the judged claims of a run", where=file, fix="remove it and run again")
        return said

    @property
    def recipe_text(self) -> str:
        """The resolved recipe as YAML."""
        return (self.folder / "run.yaml").read_text(encoding="utf-8")

    @property
    def fingerprints(self) -> dict[str, Any]:
        """What fingerprints.json holds."""
        found: dict[str, Any] = read_json(self.folder / "fingerprints.json")
        return found

    def __getitem__(self, stage: str) -> Metrics:
        if stage not in self.stages:
            raise unknown_name("stage of this run", stage, self.stages)
        return self.stages[stage].metrics

    @property
    def report(self) -> Path:
        """The report's file."""
        return self.folder / "report.html"

    @property
    def stage_seconds(self) -> float:
        """Time of all finished stages, whichever session of the run they were made in."""
        return seconds_of(self.stages)

    @property
    def metrics(self) -> dict[str, Metrics]:
        """Metrics of every finished stage."""
        return {name: record.metrics for name, record in self.stages.items()}


def seconds_of(records: Mapping[str, StageRecord]) -> float:
    """The time that stages took, together."""
    return round(sum(record.seconds for record in records.values()), 3)


def metrics_lines(records: Mapping[str, StageRecord], reused: Mapping[str, bool]) -> str:
    """The run's metrics.jsonl: one line for each finished stage."""
    lines = []
    for name, record in records.items():
        values = {key: value if math.isfinite(value) else None for key, value in record.metrics.items()}
        line = {
            "stage": name,
            "use": record.use,
            "time": record.started,
            "seconds": record.seconds,
            "peak_memory": record.peak_memory,
            "reused": reused.get(name, False),
            "metrics": values,
        }
        lines.append(json.dumps(line, ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines)
