"""Parameters of the stage ``curate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from puna.core.stage import Parameters, PlanOnly
from puna.data.curate.order import Order
from puna.data.curate.records import Limits
from puna.data.curate.sources import PoolSource

if TYPE_CHECKING:
    from puna.data.curate.pipeline import Pipeline


class CurateParameters(Parameters):
    """What is read, the pipeline it goes through, and how the work is done."""

    sources: list[PoolSource] = pydantic.Field(default_factory=list)
    """Where documents come from, each a mapping with the settings of its format."""
    pipeline: str | list[dict[str, Any]]
    """A preset's name, a YAML file, or the steps themselves."""
    settings: dict[str, dict[str, Any]] = pydantic.Field(default_factory=dict)
    """Settings of single steps that replace those of the pipeline, by the step's name."""
    gates: dict[str, dict[str, Any]] = pydantic.Field(default_factory=dict)
    """Bounds of single gates that replace those of the pipeline, by the gate's name."""
    order: Order | None = None
    """Write survivors in the order of a signal, as curricula need them; without it as they were read."""
    short_circuit: bool = True
    """Leave off work on documents that a gate has dropped. Without it every signal is stored of every
    document, and other thresholds are decided on without working anything out again."""
    plan: Literal["measured", "recipe"] = "measured"
    """With ``short_circuit``: order gates by what the first batch costs and drops, or as the pipeline has
    them. The survivors are the same; the reason told for a drop is the first gate that was run."""
    limits: Limits = Limits()
    """Sizes beyond which a document or a file fails, alone."""
    shard_bytes: pydantic.PositiveInt = 8 << 20
    """About how many bytes of text a shard holds: the unit of work, and of what is lost by a kill. A few
    files are written of each; more than a terabyte wants larger ones."""
    batch_characters: pydantic.PositiveInt = 1 << 19
    """About how many characters operators work on at once; memory grows with it, and arrays of half a
    million characters still fit into processors' caches."""
    batch_seconds: pydantic.PositiveFloat = 120.0
    """How much processor time a step may take over a batch (five times that by the clock) before it is
    tried on parts of it; a document that takes longer alone fails."""
    executor: Annotated[Literal["processes", "ray", "here"], PlanOnly()] = "processes"
    """Who does the work: processes of this machine, a Ray cluster, or the process itself."""
    workers: Annotated[pydantic.NonNegativeInt, PlanOnly()] = 0
    """How many shards are worked on at once; 0: one for each core."""
    address: Annotated[str | None, PlanOnly()] = None
    """Address of a running Ray cluster; without it one is started on this machine."""
    expected_tokens: Annotated[pydantic.PositiveInt | None, PlanOnly()] = None
    """How many tokens are read, where that is known: a plan then needs none of the files."""
    modules: list[str] = pydantic.Field(default_factory=list)
    """Python modules to import that register operators of one's own."""

    def files(self) -> list[Path]:
        """The files that decide what is kept: the pipeline's, those its steps name, and the sources'."""
        from puna.data.curate.named_files import named, named_in

        if isinstance(self.pipeline, str):
            file = Path(self.pipeline)
            given = [file, *named_in(file)] if file.is_file() else []
        else:
            given = list(named(self.pipeline))
        read = [file for source in self.sources for file in source.files()]
        return [*given, *named(self.settings), *read]

    @pydantic.field_validator("pipeline", mode="before")
    @classmethod
    def _of_steps(cls, pipeline: Any) -> Any:
        for step in pipeline if isinstance(pipeline, list) else ():
            if isinstance(step, str):
                raise ValueError(f"a step is a mapping, such as {{include: {step}}}")
        return pipeline

    @pydantic.field_validator("sources")
    @classmethod
    def _told_apart(cls, sources: list[Any]) -> list[Any]:
        titles = [source.title for source in sources]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"two sources are named {title!r}; give each a name: {{name: ..., ...}}")
        return sources

    def loaded(self) -> Pipeline:
        """The pipeline with its changes, checked."""
        from puna.data.curate.pipeline import load_pipeline, make_pipeline
        from puna.data.curate.pool import import_modules

        import_modules(self.modules)
        if isinstance(self.pipeline, str):
            return load_pipeline(self.pipeline, settings=self.settings, gates=self.gates)
        return make_pipeline(self.pipeline, settings=self.settings, gates=self.gates)
