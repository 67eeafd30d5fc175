"""Structured pruning: units that matter least go, in steps, until a target is met (S27, 2502.03460).

A step looks at the model as it is by then: statistics of calibration text, scores of its units, importances
of its layers. An allocator says how much of each layer goes, the scores which units. The last step goes only
as far as the target. Hidden dimensions and whole blocks go by their scores alone, the lowest first.

Simplified: importances and scores are of the same text; one text serves all steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from puna.core.errors import PunaError, unknown_name
from puna.core.progress import Track
from puna.edit.pruning.allocate import ALLOCATORS, Pace, Removals, centred, removals, weight_of
from puna.edit.pruning.scores import Scores, needs_of, score_units
from puna.edit.stats import Statistics, collect
from puna.model.slicing import sliced
from puna.model.spec import LlamaSpec
from puna.model.units import (
    Kept,
    Kind,
    Unit,
    block_parameters,
    layers_of,
    sliced_spec,
    unit_parameters,
)
from puna.text.packing import Batch

if TYPE_CHECKING:
    from puna.model.llama import Llama

MEASURES = ("cosine", "euclidean", "manhattan")


@dataclass(frozen=True)
class PruneSettings:
    """What goes, and how: see the stage ``prune``. ``share`` is of the weights of all blocks."""

    share: float
    kinds: tuple[Kind, ...] = ("head_group", "channel")
    scorer: str = "taylor"
    allocator: str = "adaptive"
    steps: int = 50
    amplitude: float = 0.02
    importance: str = "cosine"
    spared_first: int = 0
    spared_last: int = 0

    def spared(self, layers: int) -> frozenset[int]:
        """The layers that lose nothing, of so many."""
        first, last = min(self.spared_first, layers), min(self.spared_last, layers)
        return frozenset((*range(first), *range(layers - last, layers)))

    def check(self) -> None:
        """Refuse settings that do not go together."""
        if self.allocator not in ALLOCATORS:
            raise unknown_name("allocator", self.allocator, ALLOCATORS)
        if self.importance not in MEASURES:
            raise unknown_name("importance", self.importance, MEASURES)
        apart = {"hidden", "block"} & set(self.kinds)
        if not self.kinds or (apart and len(self.kinds) > 1):
            raise PunaError(
                "hidden dimensions and blocks are taken out alone",
                where="units",
                found=", ".join(self.kinds) or "none",
                expected="head_group, channel or both; or hidden; or block",
            )
        if "hidden" in apart and (self.spared_first or self.spared_last):
            raise PunaError("hidden dimensions go through all layers: none can be spared", where="units")
        needs_of(self.scorer, self.kinds)


@dataclass(frozen=True)
class Pruned:
    """A smaller model, what of the whole one is in it, and how each step went.

    ``importances`` are the centred ones that each step went by (none where nothing asked for them),
    ``shares`` those of the layers behind each step.
    """

    model: Llama
    kept: Kept
    steps: int
    shares: list[list[float]] = field(default_factory=list)
    importances: list[list[float]] = field(default_factory=list)


def prune(
    model: Llama,
    batches: Sequence[Batch],
    settings: PruneSettings,
    *,
    seed: int = 0,
    folder: Path | None = None,
) -> Pruned:
    """Take ``settings.share`` of the blocks' weights out of ``model``, which stays as it is.

    ``batches`` are the calibration text; ``folder`` keeps statistics of the whole model for another time.
    A share of 0 gives the model's own weights.
    """
    settings.check()
    target = settings.share * block_parameters(model.spec)
    if not target:
        return Pruned(sliced(model, Kept.everything(model.spec)), Kept.everything(model.spec), 0)
    if settings.kinds in (("hidden",), ("block",)):
        return _by_score(model, batches, settings, target, seed, folder)
    return _by_layer(model, batches, settings, target, seed, folder)


def _look(
    model: Llama, batches: Sequence[Batch], settings: PruneSettings, seed: int, folder: Path | None
) -> tuple[Scores, Statistics | None]:
    """Scores of the units as the model is now, and the statistics behind them."""
    needed = list(needs_of(settings.scorer, settings.kinds))
    if settings.allocator == "adaptive" and settings.kinds[0] not in ("hidden", "block"):
        needed.append(settings.importance)
    statistics = collect(model, batches, needed, folder=folder) if needed else None
    return score_units(model, settings.scorer, settings.kinds, statistics, seed=seed), statistics


def _by_layer(
    model: Llama,
    batches: Sequence[Batch],
    settings: PruneSettings,
    target: float,
    seed: int,
    folder: Path | None,
) -> Pruned:
    whole, current, kept = model.spec, model, Kept.everything(model.spec)
    spared = settings.spared(len(whole.blocks))
    everywhere = [0.0 if layer in spared else 1.0 for layer in range(len(whole.blocks))]
    pace = Pace(_share_of_open(whole, settings.share, spared), settings.steps, settings.amplitude)
    shares, taken = [0.0] * len(whole.blocks), Removals()
    history: list[list[float]] = []
    importances: list[list[float]] = []
    limit = weight_of(whole, removals(whole, settings.kinds, everywhere, {}))
    if limit < target:
        raise PunaError(
            "so much cannot be taken out: every half keeps a unit, and spared layers keep all",
            where="share",
            found=settings.share,
            expected=f"at most {limit / block_parameters(whole):.3f} of {', '.join(settings.kinds)}",
        )
    with Track("pruning", settings.steps, "steps") as track:
        done = False
        while not done:
            scores, statistics = _look(current, batches, settings, seed, folder if not history else None)
            importance = [0.0] * len(shares)
            if statistics is not None and settings.allocator == "adaptive":
                importance, among = _importance(statistics, settings.importance, spared)
                importances.append(among)
            next_ = ALLOCATORS[settings.allocator](shares, importance, pace)
            next_ = [share * open_ for share, open_ in zip(next_, everywhere, strict=True)]
            cut = functools.partial(removals, whole, settings.kinds, already=taken, order=_cheapest(scores))
            last = len(history) + 1 >= settings.steps
            if last and weight_of(whole, cut(next_)) < target:  # it gets there, whatever is left
                shares, next_ = next_, everywhere
            shares, counts = _up_to(whole, cut, shares, next_, target)
            done = weight_of(whole, counts) >= target
            units = _lowest(scores, {key: counts[key] - taken.get(key, 0) for key in counts})
            later = Kept.everything(current.spec).without(units)
            current, kept, taken = sliced(current, later), kept.then(later), counts
            history.append(shares)
            track.advance(1)
    return Pruned(current, kept, len(history), history, importances)


def _share_of_open(spec: LlamaSpec, share: float, spared: frozenset[int]) -> float:
    """The share of the layers that are not spared which is ``share`` of all."""
    if not spared or len(spared) == len(spec.blocks):
        return share
    open_ = sum(
        unit_parameters(spec, "block", layer) for layer in range(len(spec.blocks)) if layer not in spared
    )
    return share * block_parameters(spec) / open_


def _importance(
    statistics: Statistics, measure: str, spared: frozenset[int]
) -> tuple[list[float], list[float]]:
    """Importance of each layer, centred among those that are not spared, and of these alone.

    The less the stream turns, or moves, in a layer, the less it matters.
    """
    values = statistics.of(measure)["blocks"].double()
    every: list[float] = (-values if measure == "cosine" else values).tolist()
    places = [layer for layer in range(len(every)) if layer not in spared]
    among = centred([every[layer] for layer in places])
    found = [0.0] * len(every)
    for layer, value in zip(places, among, strict=True):
        found[layer] = value
    return found, among


def _cheapest(scores: Scores) -> dict[int, float]:
    """Of each layer, the lowest score of its head groups."""
    return {layer: float(each.min()) for (kind, layer), each in scores.items() if kind == "head_group"}


def _up_to(
    spec: LlamaSpec,
    cut: Callable[..., Removals],
    shares: list[float],
    next_: list[float],
    target: float,
) -> tuple[list[float], Removals]:
    """The shares after a step and what they take out, or of the way there only what the target needs.

    What is owed by head groups, which come whole, is settled in channels at the target alone: before that, a
    group that falls due later would find its channels gone.
    """

    def after(part: float) -> tuple[list[float], Removals]:
        some = [share + part * (later - share) for share, later in zip(shares, next_, strict=True)]
        return some, cut(some)

    if weight_of(spec, after(1.0)[1]) < target:
        return next_, cut(next_, settle=False)
    return after(_smallest(lambda part: weight_of(spec, after(part)[1]) >= target))


def _smallest(enough: Callable[[float], bool]) -> float:
    """Nearly the smallest part, from above, that is enough; all of it is."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _lowest(scores: Scores, numbers: Removals) -> list[Unit]:
    """So many units of each kind and layer, the lowest scores first and of equal ones the first."""
    found: list[Unit] = []
    for (kind, layer), number in numbers.items():
        if number:
            order = scores[kind, layer].argsort(stable=True)[:number].tolist()
            found += [Unit(kind, layer, index) for index in order]
    return found


def _by_score(
    model: Llama,
    batches: Sequence[Batch],
    settings: PruneSettings,
    target: float,
    seed: int,
    folder: Path | None,
) -> Pruned:
    """Hidden dimensions or blocks, the lowest scores first, until the target is met."""
    (kind,) = settings.kinds
    scores, _ = _look(model, batches, settings, seed, folder)
    everything, total = Kept.everything(model.spec), block_parameters(model.spec)
    spared = settings.spared(len(model.spec.blocks))
    places = [
        (layer, index)
        for layer in layers_of(model.spec, kind)
        if layer not in spared
        for index in range(len(scores[kind, layer]))
    ]
    order = sorted(places, key=lambda place: float(scores[kind, place[0]][place[1]]))

    def without(number: int) -> Kept:
        return everything.without([Unit(kind, layer, index) for layer, index in order[:number]])

    low, high = 0, len(order) - (0 if spared else 1)
    if total - block_parameters(sliced_spec(model.spec, without(high))) < target:
        raise PunaError(
            "so much cannot be taken out: one unit stays, and what is spared",
            where="share",
            found=settings.share,
        )
    while low < high:
        middle = (low + high) // 2
        if total - block_parameters(sliced_spec(model.spec, without(middle))) >= target:
            high = middle
        else:
            low = middle + 1
    kept = without(high)
    return Pruned(sliced(model, kept), kept, 1)
