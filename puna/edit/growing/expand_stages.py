"""The stages ``expand``, ``merge_twins`` and ``twin_checks``; no torch here."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage
from puna.train.plan import forward_operations

SaveDtype = Literal["float32", "bfloat16", "float16"]


class Expand(Parameters):
    """Parameters of the stage ``expand``."""

    layers: Annotated[int, pydantic.Field(ge=1)] | tuple[Annotated[int, pydantic.Field(ge=0)], ...]
    """How many, the last ones of so many equal groups; or layers by number, counted from 0."""
    kind: Literal["concat", "stack", "hybrid"] = "concat"
    """concat gives a layer a twin beside it, stack a copy behind it that adds nothing yet, hybrid the two in
    turn."""
    merger: Literal["lerp", "dlerp", "dlerpin", "slerp", "proj", "prog", "moe"] = "dlerp"
    """What puts the outputs of a layer and its twin together; the model's page has the formulas."""
    noise: float = pydantic.Field(0.01, ge=0)
    """proj, prog: deviation of what is added to a map at identity; prog with 0 starts at the base."""
    seed: int | None = None
    """Seed of gates and maps; null takes the run's."""
    save_dtype: SaveDtype = "float32"
    """What the grown model is saved in."""

    @pydantic.model_validator(mode="after")
    def _rises(self) -> Expand:
        if isinstance(self.layers, tuple) and (
            not self.layers or any(later <= one for one, later in itertools.pairwise(self.layers))
        ):
            raise ValueError("layers by number rise, and there is at least one")
        return self

    def planned(self, spec: Any) -> Any:
        """What becomes of a decoder of ``spec``."""
        from puna.edit.growing.expand import last_of_groups, plan

        count = len(spec.blocks)
        chosen = last_of_groups(count, self.layers) if isinstance(self.layers, int) else self.layers
        return plan(spec, chosen, self.merger, self.kind)


def _plan_expand(parameters: Expand, shapes: Any) -> Cost:
    """The weights are read, held twice and written."""
    if shapes.spec is None:
        return Cost()
    grown = parameters.planned(shapes.spec).spec
    held = 4 * (shapes.spec.parameter_count() + grown.parameter_count())
    return Cost(memory=held, seconds=shapes.device.read_seconds(2 * held), spec=grown)


@stage(
    "expand",
    parameters=Expand,
    inputs={"model": Input("model")},
    outputs={"model": "model"},
    plan=_plan_expand,
)
def expand(context: Context, parameters: Expand) -> Outcome:
    """Give some layers a trainable twin, or a copy behind them, so that all the rest can stay frozen (S02).

    Figures: the largest difference of a logit from the base's, and both divergences of the twins, on a probe.
    Time and memory grow linearly with the weights.
    """
    from puna.edit.growing.expand_checks import at_start
    from puna.text import pretrained

    base = pretrained.load_plain(context.inputs["model"], dtype="float32")
    planned = parameters.planned(base.spec)
    seed = context.seed if parameters.seed is None else parameters.seed
    grown, figures = at_start(base, planned, seed=seed, noise=parameters.noise)
    rows = [["twins in layers", ", ".join(map(str, planned.twins)) or "none"]]
    rows.append(["inserted layers", ", ".join(map(str, planned.inserted)) or "none"])
    context.report["tables"] = [{"title": "Expanded", "columns": ["", ""], "rows": rows}]
    written = pretrained.save(grown.to(pretrained.DTYPES[parameters.save_dtype]), context.out / "model")
    counts = {"parameters": float(grown.spec.parameter_count()), "layers": float(len(grown.spec.blocks))}
    return Outcome({"model": written}, {**counts, "twins": float(len(planned.twins)), **figures})


class MergeTwins(Parameters):
    """Parameters of the stage ``merge_twins``."""

    method: Literal["own", "lerp", "slerp"] = "own"
    """Between the weights of a layer and its twin: a line, or an arc for each row; own takes the line for
    layers merged by lerp and arcs for the others."""
    tokens: int = pydantic.Field(20_000, ge=1)
    """Of the corpus, if there is one: tokens at most on which a twin's share is looked at."""
    save_dtype: SaveDtype = "float32"
    """What the model of the base's size is saved in."""


def _plan_merge(parameters: MergeTwins, shapes: Any) -> Cost:
    """One pass over the corpus's tokens; the weights are read, held twice and written."""
    spec = shapes.spec
    if spec is None:
        return Cost()
    merged = spec.replace(merger=None)
    held = 4 * (spec.parameter_count() + merged.parameter_count())
    tokens = min(shapes.tokens_of("corpus"), parameters.tokens)
    flops = tokens * forward_operations(spec, 512)
    seconds = shapes.device.seconds(flops, "float32") + shapes.device.read_seconds(2 * held)
    return Cost(tokens=tokens, flops=flops, memory=held, seconds=seconds, spec=merged)


@stage(
    "merge_twins",
    parameters=MergeTwins,
    inputs={"model": Input("model"), "corpus": Input("corpus", optional=True)},
    outputs={"model": "model"},
    plan=_plan_merge,
)
def merge_twins(context: Context, parameters: MergeTwins) -> Outcome:
    """Put twins back into their layers: a plain model of the base's size, near the expanded one (S02).

    A layer's weights lie between its own and its twin's at the twin's share of the outputs: the mean of those
    seen on a corpus of documents, or without one that of the merger's constant. Figures: ``share.N``.
    Time and memory grow linearly with the weights, time with the corpus too.
    """
    from puna.data.corpus import Corpus
    from puna.edit.growing import expand as expansion
    from puna.text import pretrained

    model = pretrained.load_plain(context.inputs["model"], dtype="float32")
    corpus = context.inputs.get("corpus")
    if corpus is None:
        shares = expansion.learnt_shares(model)
    else:
        texts = expansion.first_tokens(model, Corpus.open(corpus).texts(), parameters.tokens)
        shares = expansion.seen_shares(model, texts)
    merged = expansion.merge_back(model, shares, parameters.method)
    written = pretrained.save(merged.to(pretrained.DTYPES[parameters.save_dtype]), context.out / "model")
    figures = {f"share.{layer}": share for layer, share in shares.items()}
    return Outcome({"model": written}, {"parameters": float(merged.spec.parameter_count()), **figures})


class TwinChecks(Parameters):
    """Parameters of the stage ``twin_checks``: there are none."""


def _plan_checks(parameters: TwinChecks, shapes: Any) -> Cost:
    """Both models, read three times."""
    held = 4.0 * sum(spec.parameter_count() for spec in shapes.models.values())
    return Cost(memory=held, seconds=shapes.device.read_seconds(3 * held))


@stage(
    "twin_checks",
    parameters=TwinChecks,
    inputs={
        "base": Input("model"),
        "expanded": Input("model"),
        "merged": Input("model", optional=True),
    },
    plan=_plan_checks,
)
def twin_checks(context: Context, parameters: TwinChecks) -> Outcome:
    """Check an expanded model against its base: frozen tensors, counts, bytes of keys, what is served (S02).

    Time and memory grow linearly with the weights.
    """
    from puna.edit.growing import expand_checks as checks
    from puna.text import pretrained
    from puna.text.stored_weights import Weights

    stored = {name: Weights.open(path) for name, path in context.inputs.items() if path is not None}
    spec = stored["expanded"].spec
    figures = checks.tensors_kept(stored["base"], stored["expanded"])
    figures["added_formula"] = checks.formula(spec)
    if "merged" in stored:
        counts = [stored[name].spec.parameter_count() for name in ("merged", "base")]
        figures["merged_parameters_more"] = float(counts[0] - counts[1])
    models = (pretrained.load_plain(context.inputs[name], dtype="float32") for name in ("base", "expanded"))
    return Outcome({}, {**figures, **checks.keys_kept(*models)})
