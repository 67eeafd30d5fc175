"""How much a unit matters: a number for each, by a named scorer; the lowest goes first.

* ``taylor``: sum of |w dL/dw| over all weights of the unit (LLM-Pruner, 2305.11627; S27);
* ``magnitude``: sum of |w| over them, which needs no text;
* ``contribution``: mean size of what the unit adds (Puzzle, 2411.19146, for channels);
* ``cosine``: 1 - cosine of the stream before and behind a block (ShortGPT, 2403.03853); blocks alone have it;
* ``random``: drawn by the seed, the baseline of all others.

Scorers are pure functions of weights, statistics and seed; any of them goes with any kind of unit that it is
defined for, and with any way of allocating.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from puna.core.errors import PunaError, unknown_name
from puna.core.seeds import torch_generator
from puna.edit.stats import Statistics
from puna.model.units import KINDS, Kind, layers_of, number_of, sum_over_units

if TYPE_CHECKING:
    from puna.model.llama import Llama

Scores = Mapping[tuple[Kind, int], Tensor]
"""Numbers of the units [units], by kind and layer."""


@dataclass(frozen=True)
class Scorer:
    """A way of scoring: what it needs collected, the kinds it is defined for, and the scores of a layer."""

    needs: Callable[[Iterable[Kind]], tuple[str, ...]]
    kinds: tuple[Kind, ...]
    score: Callable[[Llama, Statistics | None, Kind, int, int], Tensor]


def _nothing(_kinds: Iterable[Kind]) -> tuple[str, ...]:
    return ()


def _taylor_needs(kinds: Iterable[Kind]) -> tuple[str, ...]:
    chosen = set(kinds)
    needed = ("taylor",) if chosen - {"hidden"} else ()
    return (*needed, *(("taylor_hidden",) if "hidden" in chosen else ()))


def _collected(collector: str) -> Callable[[Llama, Statistics | None, Kind, int, int], Tensor]:
    def score(_model: Llama, statistics: Statistics | None, kind: Kind, layer: int, _seed: int) -> Tensor:
        assert statistics is not None
        return statistics.units(collector, kind, layer)

    return score


def _magnitude(model: Llama, _statistics: Statistics | None, kind: Kind, layer: int, _seed: int) -> Tensor:
    sizes = {name: weight.detach().abs() for name, weight in model.named_parameters()}
    return sum_over_units(model.spec, kind, layer, sizes).cpu()


def _random(model: Llama, _statistics: Statistics | None, kind: Kind, layer: int, seed: int) -> Tensor:
    return torch.rand(
        number_of(model.spec, kind, layer), generator=torch_generator(seed, "random units", kind, layer)
    )


def _cosine(_model: Llama, statistics: Statistics | None, _kind: Kind, layer: int, _seed: int) -> Tensor:
    assert statistics is not None
    return 1 - statistics.of("cosine")["blocks"][layer].view(1)


SCORERS: dict[str, Scorer] = {
    "taylor": Scorer(_taylor_needs, KINDS, _collected("taylor")),
    "magnitude": Scorer(_nothing, KINDS, _magnitude),
    "contribution": Scorer(lambda _kinds: ("contribution",), KINDS, _collected("contribution")),
    "cosine": Scorer(lambda _kinds: ("cosine",), ("block",), _cosine),
    "random": Scorer(_nothing, KINDS, _random),
}


def needs_of(scorer: str, kinds: Iterable[Kind]) -> tuple[str, ...]:
    """The statistics that a scorer needs for these kinds; an unfit kind is an error."""
    chosen = tuple(kinds)
    if scorer not in SCORERS:
        raise unknown_name("scorer", scorer, SCORERS)
    unfit = [kind for kind in chosen if kind not in SCORERS[scorer].kinds]
    if unfit:
        raise PunaError(
            f"scorer {scorer!r} is not defined for this kind of unit",
            where="units",
            found=unfit[0],
            expected=", ".join(SCORERS[scorer].kinds),
        )
    return SCORERS[scorer].needs(chosen)


def score_units(
    model: Llama, scorer: str, kinds: Iterable[Kind], statistics: Statistics | None = None, *, seed: int = 0
) -> dict[tuple[Kind, int], Tensor]:
    """Scores of all units of these kinds; ``statistics`` hold what :func:`needs_of` says."""
    chosen = tuple(kinds)
    needs_of(scorer, chosen)
    score = SCORERS[scorer].score
    return {
        (kind, layer): score(model, statistics, kind, layer, seed).double()
        for kind in chosen
        for layer in layers_of(model.spec, kind)
        if number_of(model.spec, kind, layer)
    }
