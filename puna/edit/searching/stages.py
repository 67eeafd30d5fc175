"""The stages of searches over children: ``sort_channels``, ``search_children`` and ``measure_children``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pydantic

from puna.core.seeds import derive
from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage
from puna.model.sizes import forward_operations
from puna.train.plan import BYTES
from puna.train.settings import Children

if TYPE_CHECKING:
    from puna.edit.searching.search import SearchSettings

Method = Literal["linas", "nsga2", "random"]


class CommonText(Parameters):
    """Rows of a corpus of documents that all children read."""

    rows: int = pydantic.Field(64, ge=1)
    """Rows, drawn by the run's seed."""
    length: int = pydantic.Field(128, ge=2)
    """Tokens of a row."""
    batch_rows: int = pydantic.Field(32, ge=1)
    """Rows that are read at once; memory grows with it."""
    half: Literal["first", "second"] | None = None
    """One half of the corpus's documents, told apart by their ids: search on one and report on the other."""

    def wanted(self, name: str) -> bool:
        """Whether the document with this id is one to read."""
        return self.half is None or derive(0, "half", name) % 2 == (self.half == "second")

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.length


class SortChannels(CommonText):
    """Parameters of the stage ``sort_channels``."""

    scorer: Literal["taylor", "magnitude", "contribution", "random"] = "taylor"
    """How much a channel matters."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """What the sorted model is saved in."""


class SearchChildren(CommonText):
    """Parameters of the stage ``search_children``."""

    children: Children
    """The sizes that children may have: those that the super-network was tuned with."""
    cost: Literal["parameters", "operations", "seconds"] = "operations"
    """What is kept low beside the loss: weights; floating-point operations of a token that is decoded; or
    seconds of a decoding step on this machine, timed for each width and added up over the layers."""
    context_tokens: int = pydantic.Field(512, ge=1)
    """operations, seconds: tokens, itself included, that a token attends to."""
    timed_weights: Literal["float", "int8"] = "int8"
    """seconds: the form in which the engine holds the weights when it is timed."""
    timed_rounds: int = pydantic.Field(30, ge=1)
    """seconds: rounds in which the timed children take turns; medians count."""
    method: Method = "linas"
    """How children are chosen to be measured; the outputs are this search's."""
    baselines: tuple[Method, ...] = ()
    """Other searches with as many measurements, for comparison."""
    evaluations: int = pydantic.Field(250, ge=2)
    """Different children that a search measures in all."""
    population: int = pydantic.Field(50, ge=2)
    """Children of a round, and of the first, which is drawn at random."""
    generations: int = pydantic.Field(200, ge=1)
    """linas: generations of NSGA-II on the predictors between two rounds."""
    crossover: float = pydantic.Field(0.9, ge=0, le=1)
    """linas, nsga2: share of children that mix the genes of two parents."""
    mutation: float = pydantic.Field(0.02, ge=0, le=1)
    """linas, nsga2: share of genes that are drawn anew."""
    cost_shares: tuple[float, float, float] = (0.4, 0.6, 0.8)
    """The outputs small, middle and large are the best of at most these shares of the whole's cost."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """What these children are saved in."""

    def settings(self) -> SearchSettings:
        """The same for :func:`puna.edit.searching.search.search`."""
        from puna.edit.searching.search import SearchSettings

        return SearchSettings(
            self.evaluations, self.population, self.generations, self.crossover, self.mutation
        )

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> SearchChildren:
        if self.method in self.baselines or len({*self.baselines}) < len(self.baselines):
            raise ValueError("baselines are searches other than method, each once")
        fields = SearchChildren.model_fields
        timings = ("timed_weights", "timed_rounds")
        if self.cost != "seconds" and any(getattr(self, name) != fields[name].default for name in timings):
            raise ValueError("timed_weights and timed_rounds mean nothing without cost 'seconds'")
        if self.population > self.evaluations:
            raise ValueError("evaluations are those of one population at least")
        if list(self.cost_shares) != sorted(self.cost_shares) or not 0 < self.cost_shares[0] <= 1:
            raise ValueError("cost_shares rise, and lie between 0 and 1")
        return self


class MeasureChildren(CommonText):
    """Parameters of the stage ``measure_children``."""

    engine: Literal["none", "float", "int8"] = "int8"
    """Read every child of the front with the engine's kernels too and time the chosen ones, with weights in
    this form; none leaves the engine out."""
    timed_tokens: int = pydantic.Field(64, ge=1)
    """Tokens of a timed text."""
    timed_rounds: int = pydantic.Field(5, ge=1)
    """Rounds in which the whole and the chosen children take turns; medians are told."""


def _plan_sort(parameters: SortChannels, shapes: Any) -> Cost:
    """One pass over the text, with gradients for Taylor sums; the weights are read and written."""
    spec = shapes.spec
    if spec is None:
        return Cost()
    passes = {"taylor": 3, "contribution": 1}.get(parameters.scorer, 0)
    flops = passes * parameters.tokens * forward_operations(spec, parameters.length)
    weights = spec.parameter_count()
    moved = shapes.device.read_seconds((4 + BYTES[parameters.save_dtype]) * weights)
    memory = weights * (12 if parameters.scorer == "taylor" else 4)
    return Cost(
        tokens=parameters.tokens,
        flops=flops,
        memory=memory,
        seconds=shapes.device.seconds(flops, "float32") + moved,
    )


@stage(
    "sort_channels",
    parameters=SortChannels,
    inputs={"model": Input("model"), "corpus": Input("corpus")},
    outputs={"model": "model"},
    plan=_plan_sort,
)
def sort_channels(context: Context, parameters: SortChannels) -> Outcome:
    """Put the channels of every feed-forward in the order of their importance: a super-network's narrow
    children take the first (S29).

    Time is that of a forward and a backward pass over the text.
    """
    from puna.edit.searching.job import run_sort

    return run_sort(context, parameters)


def _plan_search(parameters: SearchChildren, shapes: Any) -> Cost:
    """Every search reads the text once for each child, counted as if all were the whole; the weights."""
    spec = shapes.spec
    if spec is None:
        return Cost()
    read = float((1 + len(parameters.baselines)) * parameters.evaluations * parameters.tokens)
    flops = read * forward_operations(spec, parameters.length)
    memory = BYTES[shapes.dtype] * spec.parameter_count() + 8e3 * parameters.batch_rows * parameters.length
    parameters.children.space(spec)  # sizes that the model does not have are told before anything runs
    return Cost(
        tokens=read,
        flops=flops,
        memory=memory,
        seconds=shapes.device.seconds(flops, shapes.dtype),
    )


@stage(
    "search_children",
    parameters=SearchChildren,
    inputs={"model": Input("model"), "corpus": Input("corpus")},
    outputs={"children": "file", "small": "model", "middle": "model", "large": "model"},
    plan=_plan_search,
)
def search_children(context: Context, parameters: SearchChildren) -> Outcome:
    """Search the best children of a tuned super-network for their cost: LINAS, NSGA-II or random (S29).

    ``children`` is what was measured, as JSON. Time is the number of measurements times the text; no child is
    copied to be measured.
    """
    from puna.edit.searching.job import run_search

    return run_search(context, parameters)


def _plan_measure(parameters: MeasureChildren, shapes: Any) -> Cost:
    """About fifty children read the text, from both models where there are two, and again in the engine."""
    spec = shapes.spec
    if spec is None:
        return Cost()
    passes = 50.0 * (2 if "plain" in shapes.models else 1) + (50 if parameters.engine != "none" else 0)
    flops = passes * parameters.tokens * forward_operations(spec, parameters.length)
    return Cost(
        tokens=passes * parameters.tokens,
        flops=flops,
        memory=2 * 4 * spec.parameter_count(),
        seconds=shapes.device.seconds(flops, shapes.dtype),
    )


@stage(
    "measure_children",
    parameters=MeasureChildren,
    inputs={
        "model": Input("model"),
        "children": Input("file"),
        "corpus": Input("corpus"),
        "plain": Input("model", optional=True),
    },
    plan=_plan_measure,
)
def measure_children(context: Context, parameters: MeasureChildren) -> Outcome:
    """Measure the children that searches found on text that was not searched on, and in the engine (S29).

    With ``plain``, a model of the same shape, the same children are sliced from it too. Time is that of
    reading the text with every child of the fronts.
    """
    from puna.edit.searching.job import run_measure

    return run_measure(context, parameters)
