"""The merge methods: each a function over the stack of one tensor's deltas, and one registry of them all.

A method takes a :class:`Stack` and its settings and yields the merged tensor part by part, float32. What it
has to know about the whole tensor first (a threshold, an angle) it finds in passes of its own. TIES, DARE,
breadcrumbs and DELLA are made of two halves, what is kept of a delta and how the deltas are combined. Names
and settings are mergekit's, whose files are read unchanged; where mergekit departs from the paper, the
paper's way is the default and mergekit's has a name (``rescale: l1``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.edit.merging import combine, sparsify
from puna.edit.merging.delta import added
from puna.edit.merging.stack import WHOLE_BASE, Method, Option, Settings, Stack, register
from puna.text.stored_weights import Parts, count_of, parts_of

# What is kept of a delta: a function of the part's number and the part, for each model.
Keep = Callable[[int, Tensor], Tensor]


def _keep_all(stack: Stack, settings: Settings, index: int) -> Keep:
    return lambda number, part: part


def _keep_largest(stack: Stack, settings: Settings, index: int) -> Keep:
    density = settings["density"][index]
    if stack.thresholds:
        threshold = stack.thresholds[index]
    elif density >= 1:
        threshold = 0.0
    else:
        rank = sparsify.largest(count_of(stack.shape), density)
        threshold = sparsify.magnitude_of_rank(lambda: stack.model(index), rank, count_of(stack.shape))
    if threshold == 0:
        return _keep_all(stack, settings, index)
    return lambda number, part: sparsify.keep_from(part, threshold)


def _keep_middle(stack: Stack, settings: Settings, index: int) -> Keep:
    density, count = settings["density"][index], count_of(stack.shape)
    if density >= 1:
        return _keep_all(stack, settings, index)
    kept = sparsify.largest(count, density)
    if not kept:
        return lambda number, part: torch.zeros_like(part)
    top = min(int(settings["gamma"][index] * count), count - kept)
    passes = lambda: stack.model(index)  # noqa: E731 - a pass over the parts
    beyond = sparsify.magnitude_of_rank(passes, top, count)
    least = sparsify.magnitude_of_rank(passes, top + kept, count)
    return lambda number, part: sparsify.keep_between(part, least, beyond)


def _drop_at_random(stack: Stack, settings: Settings, index: int) -> Keep:
    density, rescale = settings["density"][index], settings["rescale"] is True
    if density >= 1:
        return _keep_all(stack, settings, index)
    label = stack.labels[index]

    def keep(number: int, part: Tensor) -> Tensor:
        drawn = sparsify.draws(stack.seed, label, stack.name, number, part.numel())
        return sparsify.drop(part, density, drawn, rescale=rescale)

    return keep


def _prune_by_magnitude(stack: Stack, settings: Settings, index: int) -> Keep:
    density, epsilon = settings["density"][index], settings["epsilon"][index]
    if density >= 1:
        return _keep_all(stack, settings, index)
    if density > 0 and not 0 < density - epsilon <= density + epsilon < 1:
        raise PunaError(
            "density and epsilon leave no probabilities",
            where=f"parameters for {stack.name}",
            found=f"density {density:g}, epsilon {epsilon:g}",
            expected="density - epsilon above 0 and density + epsilon below 1",
        )
    label, rescale = stack.labels[index], settings["rescale"] is True

    def keep(number: int, part: Tensor) -> Tensor:
        drawn = sparsify.draws(stack.seed, label, stack.name, number, part.numel())
        return sparsify.magnitude_prune(part, density, epsilon, drawn, rescale=rescale)

    return keep


def _keeping_the_norm(stack: Stack, index: int, keep: Keep) -> Keep:
    """mergekit's rescaling: what is kept has the sum of magnitudes that the delta had before."""
    before = after = 0.0
    for number, part in enumerate(stack.model(index)):
        before += float(part.abs().sum(dtype=torch.float64))
        after += float(keep(number, part).abs().sum(dtype=torch.float64))
    factor = before / after if after else 1.0
    return lambda number, part: keep(number, part) * factor


@dataclass(frozen=True)
class _TaskVectors:
    """Base plus lambda times the combined deltas, of each of which ``keeper`` kept a part."""

    keeper: Callable[[Stack, Settings, int], Keep]
    elects: bool
    random: bool = False

    def __call__(self, stack: Stack, settings: Settings) -> Iterator[Tensor]:
        weights, scale, normalize = settings["weight"], settings["lambda"], settings["normalize"]
        keeps = [self.keeper(stack, settings, index) for index in range(len(stack.models))]
        if settings["rescale"] == "l1" or (settings["rescale"] and not self.random):
            keeps = [_keeping_the_norm(stack, index, keep) for index, keep in enumerate(keeps)]
        factor = scale / combine.divisor(weights) if normalize and not self.elects else scale
        for number, (base, parts) in enumerate(zip(stack.bases(), stack.parts(), strict=True)):
            kept = [keep(number, part) for keep, part in zip(keeps, parts, strict=True)]
            if self.elects:
                merged = combine.disjoint_mean(kept, weights, normalize=normalize)
            else:
                merged = combine.weighted_sum(kept, weights)
            yield added(base, merged if factor == 1 else merged.mul_(factor))

    def taken_whole(self, settings: Settings) -> int | None:
        """The base if nothing is added; a model if its delta is added as it is."""
        weights = settings["weight"]
        used = [index for index, weight in enumerate(weights) if weight]
        if not used or not settings["lambda"]:
            return WHOLE_BASE
        (first, *others) = used
        if others or (self.keeper is not _keep_all and settings["density"][first] < 1):
            return None
        factor = settings["lambda"] * (1 if settings["normalize"] else weights[first])
        return first if factor == 1 else None


def _linear(stack: Stack, settings: Settings) -> Iterator[Tensor]:
    weights = settings["weight"]
    if settings["normalize"] and abs(sum(weights)) < 1e-12:
        raise PunaError(
            "the weights sum to zero and cannot be normalised",
            where=f"parameters for {stack.name}",
            found=list(weights),
            fix="give other weights, or normalize: false",
        )
    for parts in stack.parts():
        yield combine.mixture(parts, weights, normalize=settings["normalize"])


def _linear_whole(settings: Settings) -> int | None:
    used = [index for index, weight in enumerate(settings["weight"]) if weight]
    if len(used) != 1 or not (settings["normalize"] or settings["weight"][used[0]] == 1):
        return None
    return used[0]


def _slerp(stack: Stack, settings: Settings) -> Iterator[Tensor]:
    products = stack.products()
    first, second = combine.arc_weights(
        settings["t"], float(products[0, 0]), float(products[1, 1]), float(products[0, 1])
    )
    for parts in stack.parts():
        yield combine.weighted_sum(parts, (first, second))


def _slerp_whole(settings: Settings) -> int | None:
    return {0.0: 0, 1.0: 1}.get(settings["t"])


def _model_stock(stack: Stack, settings: Settings) -> Iterator[Tensor]:
    by_row = settings["filter_wise"]
    ratio = combine.stock_ratio(stack.products(rows=by_row)).float().reshape(-1, 1)  # [rows or 1, 1]
    row = 0
    for base, parts in zip(stack.bases(), stack.parts(), strict=True):
        share = ratio[row : row + len(base)] if by_row else ratio
        row += len(base)
        yield added(base, share * combine.weighted_sum(parts, [1 / len(parts)] * len(parts)))


def _fisher(stack: Stack, settings: Settings) -> Iterator[Tensor]:
    weights, floor = settings["weight"], settings["floor"]
    places = parts_of(stack.shape)
    for (start, stop), base, parts in zip(places, stack.bases(), stack.parts(), strict=True):
        importance = [
            measured(start, stop).view_as(part).clamp_(min=floor).mul_(weight)
            for measured, part, weight in zip(stack.statistics, parts, weights, strict=True)
        ]
        yield added(base, combine.weighted_by(parts, importance))


def _regmean(stack: Stack, settings: Settings) -> Iterator[Tensor]:
    whole = [torch.cat(list(stack.model(index))) for index in range(len(stack.models))]  # [out, in] each
    side = stack.width
    grams = [measured(0, side * side).view(side, side) for measured in stack.statistics]
    if not grams:  # no product with an input: norms and embeddings are averaged, as in the paper
        merged = combine.weighted_sum(whole, [1 / len(whole)] * len(whole))
    else:
        merged = combine.regression_mean(whole, grams, settings["off_diagonal"])
    for (start, stop), base in zip(parts_of(stack.shape), stack.bases(), strict=True):
        yield added(base, merged.view(-1)[start:stop].view_as(base))


def _passthrough(stack: Stack, settings: Settings) -> Iterator[Tensor]:
    for (part,) in stack.parts():
        yield part * settings["scale"][0]


_WEIGHT = Option(None, each=True, says="How much of the model is taken.")
_DENSITY = Option(1.0, each=True, least=0, most=1, says="Share of the delta's elements that is kept.")
_RESCALE = (
    "What is kept is scaled up for what is not; l1 keeps the delta's sum of magnitudes, as mergekit does."
)


def _task_options(normalize: bool, rescale: bool, **more: Option) -> dict[str, Option]:
    return {
        "weight": _WEIGHT,
        **more,
        "normalize": Option(normalize, says="Divide by the weights of the models that take part."),
        "lambda": Option(1.0, says="The combined delta is multiplied by this."),
        "rescale": Option(rescale, choices=("l1",), says=_RESCALE),
    }


def _register_task_vectors(name: str, title: str, paper: str, merge: _TaskVectors, **more: Any) -> None:
    options = more.pop("options")
    register(Method(name, title, paper, merge, options, "deltas", merge.taken_whole, **more))


_TASK, _TIES, _DARE = "arXiv:2212.04089", "arXiv:2306.01708", "arXiv:2311.03099"
_CRUMBS, _DELLA = "arXiv:2312.06795", "arXiv:2406.11617"
_GAMMA = Option(0.01, each=True, least=0, most=1, says="Share of the largest elements that is left out.")
_EPSILON = Option(0.15, each=True, least=0, most=0.5, says="How far probabilities lie around the density.")
_register_task_vectors(
    "task_arithmetic",
    "Task arithmetic",
    _TASK,
    _TaskVectors(_keep_all, elects=False),
    options=_task_options(False, False),
)
for _name, _title, _whole in (
    ("ties", "TIES", False),
    ("ties_global", "TIES, trimmed over the whole model", True),
):
    _register_task_vectors(
        _name,
        _title,
        _TIES,
        _TaskVectors(_keep_largest, elects=True),
        options=_task_options(True, False, density=_DENSITY),
        trims_model=_whole,
    )
for _name, _title, _elects in (("dare_linear", "DARE", False), ("dare_ties", "DARE with TIES", True)):
    _register_task_vectors(
        _name,
        _title,
        _DARE,
        _TaskVectors(_drop_at_random, elects=_elects, random=True),
        options=_task_options(False, True, density=_DENSITY),
    )
for _name, _title, _elects in (
    ("breadcrumbs", "Model breadcrumbs", False),
    ("breadcrumbs_ties", "Model breadcrumbs with TIES", True),
):
    _register_task_vectors(
        _name,
        _title,
        _CRUMBS,
        _TaskVectors(_keep_middle, elects=_elects),
        options=_task_options(False, False, density=_DENSITY, gamma=_GAMMA),
    )
for _name, _title, _elects in (("della", "DELLA", True), ("della_linear", "DELLA without signs", False)):
    _register_task_vectors(
        _name,
        _title,
        _DELLA,
        _TaskVectors(_prune_by_magnitude, elects=_elects, random=True),
        options=_task_options(_elects, True, density=_DENSITY, epsilon=_EPSILON),
    )


def _never(settings: Settings) -> int | None:
    return None


register(
    Method(
        "linear",
        "Weighted mean of weights",
        "arXiv:2203.05482",
        _linear,
        {"weight": _WEIGHT, "normalize": Option(True, says="Divide by the sum of the weights.")},
        "weights",
        _linear_whole,
    )
)
register(
    Method(
        "slerp",
        "Spherical interpolation",
        "Shoemake 1985",
        _slerp,
        {"t": Option(None, least=0, most=1, says="0 is the base, 1 the other model.")},
        "weights",
        _slerp_whole,
        least=2,
        most=2,
    )
)
register(
    Method(
        "model_stock",
        "Model Stock",
        "arXiv:2403.19522",
        _model_stock,
        {"filter_wise": Option(False, says="A ratio for each row instead of one for the tensor.")},
        "deltas",
        _never,
        least=2,
    )
)
register(
    Method(
        "fisher",
        "Fisher merging",
        "arXiv:2111.09832",
        _fisher,
        {
            "weight": Option(1.0, each=True, least=0, says="The model's importance is multiplied by this."),
            "floor": Option(1e-6, least=0, says="The least importance of an element."),
        },
        "deltas",
        _never,
        statistics="fisher",
    )
)
register(
    Method(
        "regmean",
        "RegMean",
        "arXiv:2212.09849",
        _regmean,
        {
            "off_diagonal": Option(
                0.9,
                least=0,
                most=1,
                says="Multiplies what stands off the Gram matrices' diagonals.",
            )
        },
        "deltas",
        _never,
        statistics="gram",
    )
)
register(
    Method(
        "passthrough",
        "One model's layers as they are",
        "",
        _passthrough,
        {"scale": Option(1.0, each=True, says="The weights are multiplied by this.")},
        "weights",
        lambda settings: 0 if settings["scale"][0] == 1 else None,
        most=1,
    )
)


def model_thresholds(
    models: Sequence[Parts], names: Sequence[str], densities: Sequence[float]
) -> list[float]:
    """For each model the magnitude from which an element is kept if all its tensors are trimmed as one."""
    count = sum(count_of(models[0].shapes[name]) for name in names)
    found = []
    for model, density in zip(models, densities, strict=True):
        rank = sparsify.largest(count, density)

        def passes(model: Parts = model) -> Iterator[Tensor]:
            return (model.part(name, *place) for name in names for place in parts_of(model.shapes[name]))

        found.append(0.0 if density >= 1 else sparsify.magnitude_of_rank(passes, rank, count))
    return found
