"""Predicts what a recipe costs before anything runs: tokens, operations, memory, time, and money."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.files import read_json
from puna.core.rows import META, corpus_kind
from puna.core.stage import Cost
from puna.model.spec import LlamaSpec
from puna.run import shapes
from puna.run.devices import DeviceProfile, profile
from puna.run.recipe import Recipe, StageEntry, load
from puna.run.references import Reference

if TYPE_CHECKING:
    from rich.table import Table

BYTES_PER_TOKEN = 4.0  # of text whose tokens nobody has counted
_GENERAL = (
    "time is operations at the achieved rate where a stage does not say more; "
    "starting, loading and saving come on top"
)
_SHARED = (
    "{processes} processes share distributed stages out evenly, the first runs the others alone; "
    "what they tell each other costs no time"
)


@dataclass(frozen=True)
class Shapes:
    """What a stage's ``plan`` is told: shapes of its input models, tokens of its input corpora, the device.

    Of a tokenizer it is the shape of the model that was planned with its vocabulary. Keys of ``models``
    and ``corpora`` are ``input`` or, where an input takes several, ``input.name``; ``kinds`` says by
    the same keys of which kind the corpora are, where that is known. ``processes`` are those that share
    a distributed stage out, each on such a device.
    """

    models: Mapping[str, LlamaSpec]
    corpora: Mapping[str, float]
    inputs: tuple[str, ...]
    device: DeviceProfile
    dtype: str
    kinds: Mapping[str, str] = field(default_factory=dict)
    processes: int = 1

    @property
    def spec(self) -> LlamaSpec | None:
        """The decoder of the first input model, or None."""
        return next(iter(self.models.values()), None)

    @property
    def tokens(self) -> float:
        """Tokens of the first declared input that holds corpora."""
        for name in self.inputs:
            found = self.tokens_of(name)
            if found:
                return found
        return 0.0

    def tokens_of(self, name: str) -> float:
        """Tokens of one input: of its corpus, or of all of its corpora together."""
        keys = (key for key in self.corpora if key == name or key.startswith(f"{name}."))
        return sum(self.corpora[key] for key in keys)


@dataclass(frozen=True)
class StagePlan:
    """A stage's part of a plan. ``cost`` is None if the stage cannot predict it; bytes and seconds."""

    stage: str
    use: str
    cost: Cost | None
    memory: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A recipe's predicted cost on a device."""

    recipe: str
    scale: str
    device: DeviceProfile
    dtype: str
    stages: list[StagePlan]
    assumptions: list[str] = field(default_factory=list)
    processes: int = 1

    @property
    def seconds(self) -> float:
        """Time of all stages, one after the other."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def flops(self) -> float:
        """Operations of all stages."""
        return sum(stage.cost.flops for stage in self.stages if stage.cost)

    @property
    def memory(self) -> float:
        """Peak bytes: that of the largest stage, since stages run one after the other."""
        return max((stage.memory for stage in self.stages), default=0.0)

    @property
    def fits(self) -> bool:
        """Whether the largest stage fits into the device's memory."""
        return self.memory <= self.device.memory

    def table(self) -> Table:
        """One row for each stage, and the total."""
        from rich.table import Table

        title = f"{self.recipe}, {self.scale} scale, on {self.device.name} in {self.dtype}"
        if self.processes > 1:
            title += f", {self.processes} processes of one such device each"
        shown = Table(title=title, title_justify="left", show_footer=True)
        footers = ["total", "", "", "", quantity(self.flops), size(self.memory), duration(self.seconds)]
        headings = ["stage", "use", "tokens", "trained", "operations", "peak memory", "time"]
        for heading, footer in zip(headings, footers, strict=True):
            shown.add_column(
                heading, footer=footer, justify="left" if heading in ("stage", "use") else "right"
            )
        for stage in self.stages:
            if stage.cost is None:
                shown.add_row(stage.stage, stage.use, "", "", "", "", "not predicted")
                continue
            cost = stage.cost
            figures = [quantity(value) for value in (cost.tokens, cost.trainable, cost.flops)]
            shown.add_row(stage.stage, stage.use, *figures, size(stage.memory), duration(stage.seconds))
        return shown


def plan(
    recipe: str | Path | Mapping[str, Any],
    scale: str | None = None,
    *,
    device: str = "this",
    model: str | None = None,
    set: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    measure_again: bool = False,
    processes: int = 1,
) -> Plan:
    """Predict the cost of a recipe on a device, without a download.

    ``device`` is "this" (measured here) or a name in devices.yaml; ``model`` (a model, or a built-in
    shape such as llama-2-7b) stands in for every model the recipe starts from. ``processes`` share the
    distributed stages out, each on a device of its own; memory is then that of one of them.
    """
    if processes < 1:
        raise PunaError("a run has at least one process", where="processes", found=processes)
    resolved = load(recipe, scale, set, dtype=dtype)
    found = profile(device, measure_again=measure_again)
    return _Planner(resolved, found, model, processes).plan()


class _Planner:
    def __init__(self, recipe: Recipe, device: DeviceProfile, model: str | None, processes: int) -> None:
        self.recipe = recipe
        self.device = device
        self.model = model
        self.processes = processes
        self.dtype = device.quicker_dtype if recipe.header.dtype == "auto" else recipe.header.dtype
        self.specs: dict[str, LlamaSpec | None] = {}  # by stage: the decoder of the model it writes
        self.costs: dict[str, Cost | None] = {}
        self.assumed: list[str] = []

    def plan(self) -> Plan:
        stages = [self._stage(entry) for entry in self.recipe.stages.values()]
        unknown = [stage.stage for stage in stages if stage.cost is None]
        notes = [self.device.assumptions(self.dtype), *dict.fromkeys(self.assumed), _GENERAL]
        if unknown:
            notes.append(f"not predicted, and not in the total: {', '.join(unknown)}")
        if self.processes > 1:
            notes.append(_SHARED.format(processes=self.processes))
        return Plan(
            self.recipe.name, self.recipe.scale, self.device, self.dtype, stages, notes, self.processes
        )

    def _stage(self, entry: StageEntry) -> StagePlan:
        told = self._shapes(entry)
        try:
            cost = entry.stage.plan(entry.parameters, told) if entry.stage.plan else None
        except PunaError as error:
            place = f"stage {entry.id}" + (f", {error.where}" if error.where is not None else "")
            raise PunaError(
                error.message, where=place, found=error.found, expected=error.expected, fix=error.fix
            ) from None
        self.costs[entry.id] = cost
        self.specs[entry.id] = cost.spec if cost is not None and cost.spec is not None else told.spec
        if cost is None:
            return StagePlan(entry.id, entry.stage.name, None)
        seconds = cost.seconds or self.device.seconds(cost.flops, self.dtype)
        return StagePlan(entry.id, entry.stage.name, cost, cost.memory + self.device.process, seconds)

    def _shapes(self, entry: StageEntry) -> Shapes:
        models: dict[str, LlamaSpec] = {}
        corpora: dict[str, float] = {}
        kinds: dict[str, str] = {}
        for name, reference in entry.references():
            kind = entry.stage.inputs[name.partition(".")[0]].kind
            if kind == "model":
                spec = self._spec(reference)
                if spec is not None:
                    models[name] = spec
            elif kind == "tokenizer":
                spec = self._spec_with(reference)
                if spec is not None:
                    models[name] = spec
            elif kind == "corpus":
                corpora[name] = self._tokens(reference)
                rows = self._kind(reference)
                if rows is not None:
                    kinds[name] = rows
        processes = self.processes if entry.stage.distributed else 1
        return Shapes(models, corpora, tuple(entry.stage.inputs), self.device, self.dtype, kinds, processes)

    def _spec(self, reference: Reference) -> LlamaSpec | None:
        if reference.stage is not None:
            return self.specs[reference.stage]
        name = self.model or reference.text
        spec = shapes.of_model(name, assumed=None if self.model else self.recipe.shape)
        millions = spec.parameter_count() / 1e6
        self.assumed.append(
            f"{reference.text}: {millions:,.1f}M parameters"
            + (f", the shape of {name}" if self.model else "")
        )
        return spec

    def _spec_with(self, reference: Reference) -> LlamaSpec | None:
        """A decoder with the vocabulary of a tokenizer, if an earlier stage makes it for a known model."""
        spec = self.specs[reference.stage] if reference.stage is not None else None
        if spec is None:
            self.assumed.append(f"{reference.text}: a vocabulary as large as the model's")
        return spec

    def _tokens(self, reference: Reference) -> float:
        if reference.stage is not None:
            cost = self.costs[reference.stage]
            if cost is None:
                return 0.0
            return cost.corpora.get(reference.output or "", cost.tokens)
        folder = Path(reference.text).expanduser()
        if reference.origin == "path" and (folder / META).is_file():
            self.assumed.append(f"{reference.text}: {BYTES_PER_TOKEN:g} bytes of text a token")
            return _corpus_bytes(folder) / BYTES_PER_TOKEN
        self.assumed.append(f"{reference.text}: its size is not known here and counts as nothing")
        return 0.0

    def _kind(self, reference: Reference) -> str | None:
        """The kind of rows of a corpus, if the stage that makes it tells or it lies here."""
        if reference.stage is not None:
            cost = self.costs[reference.stage]
            return None if cost is None else cost.kind
        folder = Path(reference.text).expanduser()
        here = reference.origin == "path" and (folder / META).is_file()
        return corpus_kind(folder) if here else None


def _corpus_bytes(folder: Path) -> float:
    counts = read_json(folder / META).get("counts", {})
    written = sum(file.stat().st_size for file in folder.glob("*.parquet"))
    return float(counts.get("bytes", written))


def quantity(value: float) -> str:
    """A number in three digits with k, M, G, T, P, E."""
    if value == 0:
        return "-"
    for factor, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes in GB or MB."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
