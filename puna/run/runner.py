"""Runs recipes: each stage in its folder, again only if something it depends on changed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from puna.core.errors import unknown_name
from puna.core.files import fingerprint, write_json, write_text
from puna.core.progress import say
from puna.run import fingerprints, inputs, machine, processes, source
from puna.run.execute import check_place, execute, finish_interrupted, follow, interrupted, refusal
from puna.run.lock import locked
from puna.run.recipe import Recipe, StageEntry, find, load
from puna.run.record import Run, StageRecord, metrics_lines, seconds_of


@dataclass(frozen=True)
class Decision:
    """What will happen to a stage, and why. ``fingerprint`` is None while an input is not made yet."""

    stage: str
    use: str
    action: Literal["run", "resume", "reuse", "refuse"]
    reason: str
    fingerprint: str | None
    parts: dict[str, Any] = field(default_factory=dict)


def run(
    recipe: str | Path | Mapping[str, Any],
    scale: str | None = None,
    out: str | Path | None = None,
    *,
    set: Mapping[str, Any] | None = None,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    from_stage: str | None = None,
) -> Run:
    """Run a recipe, or what of it is not done yet, and return the run.

    ``recipe`` is a file, a run folder, a system's name or a mapping; ``scale`` is "demo" (unless the
    recipe was resolved for another) or "paper"; ``out`` is the run's folder, ``runs/<name>`` by
    default. ``set`` overrides settings: ``set={"lora.learning_rate": 1e-3}``. ``from_stage`` makes
    that stage and all after it run again.

    >>> run = puna.run("chocollama", out="runs/dutch", set={"lora.max_steps": 50})
    >>> run["evaluate"]["bpb.nl.lora"]
    """
    resolved = load(recipe, scale, set, seed=seed, device=device, dtype=dtype)
    return Runner(resolved, default_folder(recipe, resolved, out), from_stage=from_stage).run()


def default_folder(recipe: str | Path | Mapping[str, Any], resolved: Recipe, out: str | Path | None) -> Path:
    """Where a run goes: ``out``, or the folder a resolved recipe lies in, or ``runs/<name>[-paper]``."""
    if out is not None:
        return Path(out)
    if not isinstance(recipe, Mapping):
        file = find(recipe)
        if file.name == "run.yaml" and (file.parent / "run.json").is_file():
            return file.parent
    return Path("runs") / (resolved.name if resolved.scale == "demo" else f"{resolved.name}-{resolved.scale}")


class Runner:
    """Runs one resolved recipe in one folder.

    ``from_stage`` makes that stage and those after it run again. ``only`` restricts the run to some
    stages (and what they draw on); such a part of a run writes neither claims, cards nor a report.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        from_stage: str | None = None,
        only: Iterable[str] | None = None,
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.whole = only is None
        wanted = recipe.needed_for(recipe.stages if only is None else only)
        self.entries = [entry for entry in recipe.stages.values() if entry.id in wanted]
        ids = [entry.id for entry in self.entries]
        if from_stage is not None and from_stage not in ids:
            raise unknown_name("stage", from_stage, ids, where="--from")
        self.forced = ids[ids.index(from_stage) :] if from_stage is not None else []
        self.device = machine.choose_device(recipe.header.device)
        self.dtype = machine.choose_dtype(recipe.header.dtype, self.device)
        self.records: dict[str, StageRecord] = {}
        self.reused: dict[str, bool] = {}

    def preview(self) -> list[Decision]:
        """What :meth:`run` would do now, without doing it."""
        self.records = {}
        decisions = []
        for entry in self.entries:
            check_place(self.folder / entry.id)
            decision = self._decide(entry)
            decisions.append(decision)
            record = StageRecord.open(self.folder / entry.id)
            if decision.action == "reuse" and record is not None:
                self.records[entry.id] = record
        return decisions

    def run(self) -> Run:
        """Run every stage that needs it, then judge the claims and write cards and report.

        Under ``torchrun`` the first process does so; the others join in the stages that are distributed.
        """
        with processes.joined(self.device) as self._others:
            if processes.is_first():
                with locked(self.folder, self.folder / ".lock"):
                    self._lead()
                self._others.tell("", "done")
            else:
                self._follow()
        return Run.open(self.folder)

    def _lead(self) -> None:
        for entry in self.entries:
            check_place(self.folder / entry.id)
        self._refuse_early()
        started, clock = _now(), time.monotonic()
        self._write_about("running", started, 0.0)
        write_text(self.folder / "run.yaml", source.dump(self._resolved()))
        try:
            for position, entry in enumerate(self.entries, start=1):
                self._stage(entry, f"[{position}/{len(self.entries)}] {entry.id}")
                self._others.tell(entry.id, "done")
            self._write_about("done", started, time.monotonic() - clock)
            if self.whole:
                self._conclude()
        except BaseException as error:
            status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            self._write_about(status, started, time.monotonic() - clock)
            raise
        say(f"{self.folder}: done in {time.monotonic() - clock:.1f} s")

    def _refuse_early(self) -> None:
        """Refuse before anything is written, if it can be told by then, to lose unfinished work."""
        if any(interrupted(self.folder / entry.id) for entry in self.entries):
            for entry, decision in zip(self.entries, self.preview(), strict=True):
                refused = refusal(entry, self.folder / entry.id, decision.parts)
                if decision.action == "refuse" and refused is not None:
                    raise refused
            self.records = {}

    def _follow(self) -> None:
        """What a process other than the first does: its part of distributed stages, and nothing on disk."""
        header = self.recipe.header
        for entry in self.entries:
            self.records[entry.id] = follow(
                entry,
                self.folder / entry.id,
                partial(inputs.given_to, entry, self.records),
                header,
                self.device,
                self.dtype,
                self._others,
            )
        self._others.wait("")

    def _stage(self, entry: StageEntry, label: str) -> None:
        final = self.folder / entry.id
        finish_interrupted(entry.stage, final)
        decision = self._decide(entry)
        if decision.action == "reuse":
            say(f"{label}: reused, {decision.reason}")
            record = StageRecord.open(final)
        else:
            say(f"{label}: {entry.stage.name}, {decision.reason}")
            record = execute(
                entry,
                final,
                inputs.given_to(entry, self.records),
                decision.parts,
                described=inputs.written_down(entry, decision.parts["inputs"]),
                afresh=entry.id in self.forced,
                ready=partial(self._others.tell, entry.id, "join") if entry.stage.distributed else None,
            )
            say(f"{label}: {record.seconds:.1f} s, peak {record.peak_memory / 1e9:.2f} GB{_headline(record)}")
        assert record is not None
        self.records[entry.id] = record
        self.reused[entry.id] = decision.action == "reuse"
        write_text(self.folder / "metrics.jsonl", metrics_lines(self.records, self.reused))
        write_json(self.folder / "fingerprints.json", self._fingerprints())

    def _decide(self, entry: StageEntry) -> Decision:
        def decision(action: Literal["run", "resume", "reuse", "refuse"], reason: str) -> Decision:
            return Decision(entry.id, entry.stage.name, action, reason, print_, parts)

        final = self.folder / entry.id
        old = StageRecord.open(final)
        prints, waiting = inputs.fingerprints_of(entry, self.records)
        print_: str | None = None
        parts: dict[str, Any] = {}
        if waiting:
            never = "never ran" if old is None else "again if that gives something else"
            return decision("run", f"waits for {', '.join(waiting)}; {never}")
        header = self.recipe.header
        parts = fingerprints.parts_of(entry, prints, seed=header.seed, device=self.device, dtype=self.dtype)
        print_ = fingerprint(parts)
        if entry.id in self.forced:
            return decision("run", "forced by --from")
        if old is not None and old.fingerprint == print_:
            damage = old.damage()
            return decision("run", damage) if damage else decision("reuse", "unchanged")
        if interrupted(final) == print_:
            return decision("resume", "continues where it was interrupted")
        refused = refusal(entry, final, parts)
        if refused is not None:
            return decision("refuse", f"{refused.message}: {refused.found}")
        return decision("run", "never ran" if old is None else fingerprints.difference(old.parts, parts))

    def _conclude(self) -> None:
        """Claims, model cards and the report, out of what the stages left."""
        from puna.run import claims

        if self.recipe.claims and not (
            all(self.reused.values()) and claims.are_judged(self.recipe.header.claims, self.folder)
        ):
            found = {name: record.metrics for name, record in self.records.items()}
            judged = claims.judge(self.recipe, {self.recipe.header.seed: found})
            claims.write(judged, self.recipe, self.folder)
        say(f"report: {write_cards_and_report(Run.open(self.folder))}")

    def _resolved(self) -> dict[str, Any]:
        return {**self.recipe.resolved(), "device": self.device, "dtype": self.dtype}

    def _fingerprints(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, record in self.records.items():
            outputs = {output: about["fingerprint"] for output, about in record.outputs.items()}
            found[name] = {"fingerprint": record.fingerprint, **record.parts, "outputs": outputs}
        return found

    def _write_about(self, status: str, started: str, seconds: float) -> None:
        header = self.recipe.header
        if status == "running":
            self._about = {
                **header.model_dump(include={"name", "title", "system", "paper"}),
                "scale": self.recipe.scale,
                "recipe": self.recipe.origin,
                "seed": header.seed,
                "device": self.device,
                "dtype": self.dtype,
                "stages": [entry.id for entry in self.entries],
                "command": sys.argv,
                "versions": machine.versions(),
                "machine": machine.describe(self.device),
                "git": machine.commit(),
            }
        finished = None if status == "running" else _now()
        times = {
            "status": status,
            "started": started,
            "finished": finished,
            "seconds": round(seconds, 3),
            "stage_seconds": seconds_of(self.records),
        }
        write_json(self.folder / "run.json", {**self._about, **times})


def write_cards_and_report(run: Run) -> Path:
    """Write a card into every model's folder of a run, and its report; returns the report's file."""
    from puna.run.card import write_card
    from puna.run.report import write_report

    for record in run.stages.values():
        for name, output in record.outputs.items():
            if output["kind"] == "model" and (record.output(name) / "config.json").is_file():
                write_card(run.folder, record.output(name))
    return Path(write_report(run.folder))


def _headline(record: StageRecord) -> str:
    """The first metrics of a stage, for its line on the terminal."""
    shown = [f"{name} {value:.4g}" for name, value in list(record.metrics.items())[:3]]
    return f"; {', '.join(shown)}" + (" ..." if len(record.metrics) > 3 else "") if shown else ""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
